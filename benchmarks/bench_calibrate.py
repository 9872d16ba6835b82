"""Time and peak memory of hf_gpt_convert.py -sq as a process, beside hooks on the same model in `transformers`.

    python3 benchmarks/bench_calibrate.py --work-dir /tmp

The model is a random GPT-2 in float16, 1.5B unless sizes are given, made once per run and deleted at the end.  The
texts are those that come with the project.  The peer does what the original converter does: it loads the whole model
in float32, hooks every linear layer, and keeps the running maxima of one text after the other; it writes nothing, where
the converter also quantises, measures the errors and writes everything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_convert import ROOT, make_model, timed
from common import RESULTS, append_csv, describe_device, describe_versions

TOKENIZER = ROOT / "assets" / "gpt2-tiny"
SIZES = {"n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calib_size", type=int, default=16)
    parser.add_argument("--calib_batch_size", type=int, default=8)
    parser.add_argument("--storage_type", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--calib_data", type=Path, default=ROOT / "assets" / "calibration.txt")
    parser.add_argument("--no_peer", action="store_true", help="it needs 4 bytes of memory per parameter")
    parser.add_argument("--work-dir", type=Path, help="where the model and what is made of it go for a while")
    parser.add_argument("--csv", type=Path, default=RESULTS / "calibrate.csv")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.source_dtype, args.source_format = "float16", "safetensors"
    if args.make:
        make_model(args, args.make)
    elif args.peer:
        hook_everything(args.peer, args.calib_data, args.calib_size)
    else:
        with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="bench_calibrate-") as folder:
            append_csv(args.csv, [measure(args, Path(folder))])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    model = folder / "model"
    # In processes of their own: a child's peak memory starts at what its parent has.
    subprocess.run([sys.executable, *sys.argv, "--make", str(model)], check=True)
    convert = [sys.executable, str(ROOT / "hf_gpt_convert.py"), "-i", str(model), "-o", str(folder / "converted")]
    convert += ["-t", args.storage_type, "-sq", "0.5", "--calib-data", str(args.calib_data)]
    convert += ["--calib-size", str(args.calib_size), "--calib-batch-size", str(args.calib_batch_size)]
    ours = timed([*convert, "--calib-tokenizer", str(TOKENIZER), "--calib-device", "cpu"])
    print(f"convert -sq 0.5: {ours.wall_s:.0f} s, {ours.cpu_s:.0f} s of processor, peak {ours.peak_bytes / 1e6:.0f} MB")
    row: dict[str, object] = {
        "device": describe_device(),
        "versions": describe_versions("torch", "transformers"),
        **{name: getattr(args, name) for name in (*SIZES, "storage_type", "calib_size", "calib_batch_size")},
        "wall_s": round(ours.wall_s, 1),
        "cpu_s": round(ours.cpu_s, 1),
        "peak_rss_bytes": ours.peak_bytes,
        "peer_wall_s": "",
        "peer_cpu_s": "",
        "peer_peak_rss_bytes": "",
    }
    if not args.no_peer:
        peer = timed([sys.executable, *sys.argv, "--peer", str(model)])
        print(f"hooks on the whole model: {peer.wall_s:.0f} s, {peer.cpu_s:.0f} s, peak {peer.peak_bytes / 1e6:.0f} MB")
        row |= {"peer_wall_s": round(peer.wall_s, 1), "peer_cpu_s": round(peer.cpu_s, 1)}
        row["peer_peak_rss_bytes"] = peer.peak_bytes
    return row


def hook_everything(model_dir: Path, data: Path, size: int) -> None:
    """The running maxima of inputs and outputs of every linear layer, one text at a time."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from gpt.text.calibration_data import load_texts
    from gpt.text.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    seen: dict[tuple[str, int], torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            for side, values in enumerate((inputs[0], output)):
                largest = values.abs().reshape(-1, values.shape[-1]).amax(0)
                seen[name, side] = torch.maximum(seen.get((name, side), largest), largest)

        module.register_forward_hook(see)

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            watch(name, module)
    tokenizer = load_tokenizer(TOKENIZER)
    with torch.no_grad():
        for text in load_texts(str(data), "text", size, None)[1]:
            model(torch.tensor([tokenizer.encode(text)[:512]]))
    print(f"{len(seen)} ranges")


if __name__ == "__main__":
    main()
