"""Time and peak memory of hf_gpt_convert.py as a process, beside `cp -r` of what it wrote, run in turn.

    python3 benchmarks/bench_convert.py --work-dir /tmp

The model is a random GPT-2, 1.5B unless sizes are given, made once per run and deleted at the end.  Before each timed
command the disk's queue is emptied; the source stays in the page cache.  Two times are taken: until the command ends,
when much of its output is still in the page cache, and until the disk has all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, Sample, append_csv, describe_device, describe_versions

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=48)
    parser.add_argument("--n_embd", type=int, default=1600)
    parser.add_argument("--n_head", type=int, default=25)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--n_positions", type=int, default=1024)
    parser.add_argument("--source_dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--source_format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--storage_type", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--tensor_parallelism", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work-dir", type=Path, help="where the model and its copies go for a while")
    parser.add_argument("--csv", type=Path, default=RESULTS / "convert.csv")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_model(args, args.make)
        return
    with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="bench_convert-") as folder:
        append_csv(args.csv, [measure(args, Path(folder))])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    model, converted, copied = folder / "model", folder / "converted", folder / "copied"
    # In a process of its own: a child's peak memory starts at what its parent has.
    subprocess.run([sys.executable, *sys.argv, "--make", str(model)], check=True)
    convert = [sys.executable, str(ROOT / "hf_gpt_convert.py"), "-i", str(model), "-o", str(converted)]
    convert += ["-t", args.storage_type, "-tp", str(args.tensor_parallelism), "-p", str(args.processes)]
    rounds: list[tuple[Timing, Timing]] = []
    for _ in range(args.repeat):
        shutil.rmtree(converted, ignore_errors=True)
        shutil.rmtree(copied, ignore_errors=True)
        rounds.append((timed(convert), timed(["cp", "-r", str(converted), str(copied)])))
    num_bytes = sum(path.stat().st_size for path in converted.rglob("*") if path.is_file())
    peak_bytes = max(ours.peak_bytes for ours, _ in rounds)
    ratio = Sample([ours.wall_s / theirs.wall_s for ours, theirs in rounds])
    disk_ratio = Sample([ours.disk_s / theirs.disk_s for ours, theirs in rounds])
    convert_s, copy_s = Sample([ours.wall_s for ours, _ in rounds]), Sample([theirs.wall_s for _, theirs in rounds])
    convert_disk_s, copy_disk_s = Sample([a.disk_s for a, _ in rounds]), Sample([b.disk_s for _, b in rounds])
    print(f"{num_bytes / 1e9:.2f} GB written, peak resident memory {peak_bytes / 1e6:.0f} MB")
    print(f"until the end: convert {convert_s} s, cp {copy_s} s, ratio {ratio}")
    print(f"until on disk: convert {convert_disk_s} s, cp {copy_disk_s} s, ratio {disk_ratio}")
    sizes = ("n_layer", "n_embd", "n_head", "vocab_size", "source_dtype", "source_format", "storage_type")
    return {
        "device": describe_device(),
        "versions": describe_versions("torch", "numpy"),
        **{name: getattr(args, name) for name in (*sizes, "tensor_parallelism", "processes", "repeat")},
        "written_bytes": num_bytes,
        "convert_s": round(convert_s.median, 2),
        "convert_cpu_s": round(Sample([ours.cpu_s for ours, _ in rounds]).median, 2),
        "cp_s": round(copy_s.median, 2),
        "ratio_median": round(ratio.median, 3),
        "convert_disk_s": round(convert_disk_s.median, 2),
        "cp_disk_s": round(copy_disk_s.median, 2),
        "disk_ratio_median": round(disk_ratio.median, 3),
        "peak_rss_bytes": peak_bytes,
    }


@dataclass(frozen=True)
class Timing:
    """Seconds until the command ended and until the disk had its output, processor seconds, peak resident bytes (mapped
    pages included)."""

    wall_s: float
    disk_s: float
    cpu_s: float
    peak_bytes: int


def timed(command: list[str]) -> Timing:
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begin
    os.sync()
    disk_s = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Timing(wall_s, disk_s, usage.ru_utime + usage.ru_stime, peak_bytes)


def make_model(args: argparse.Namespace, folder: Path) -> None:
    """A Hugging Face folder with config.json and one file of normal values."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {
        f"transformer.{name}": torch.empty(shape)
        .normal_(0.0, 0.02, generator=generator)
        .to(getattr(torch, args.source_dtype))
        for name, shape in gpt2_tensors(args.vocab_size, args.n_positions, args.n_embd, args.n_layer)
    }
    folder.mkdir()
    if args.source_format == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    sizes = {name: getattr(args, name) for name in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}), encoding="utf-8")


def gpt2_tensors(vocab_size: int, n_positions: int, n_embd: int, n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Hugging Face saves them."""
    yield "wte.weight", (vocab_size, n_embd)
    yield "wpe.weight", (n_positions, n_embd)
    linears = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    norms = [f"h.{layer}.{name}" for layer in range(n_layer) for name in ("ln_1", "ln_2")]
    for norm in [*norms, "ln_f"]:
        yield f"{norm}.weight", (n_embd,)
        yield f"{norm}.bias", (n_embd,)
    for layer in range(n_layer):
        for name, (rows, columns) in linears.items():
            yield f"h.{layer}.{name}.weight", (rows * n_embd, columns * n_embd)
            yield f"h.{layer}.{name}.bias", (columns * n_embd,)


if __name__ == "__main__":
    main()
