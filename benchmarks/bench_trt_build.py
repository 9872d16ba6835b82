"""Time and peak memory of building TensorRT plans of random weights, each in a process of its own.

    python3 benchmarks/bench_trt_build.py --work-dir /tmp

Weights come from a generator instead of a checkpoint; `build_plan` alone is timed.  Peak memory is that of the whole
process, of which libraries are the part that is there before it begins.  Plans are deleted.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_convert import ROOT
from common import RESULTS, append_csv, describe_device, describe_versions

sys.path.insert(0, str(ROOT))

MODELS = {"12x768": (12, 768, 12), "24x1024": (24, 1024, 16), "48x1600": (48, 1600, 25)}
CASES = [("12x768", "fused"), ("12x768", "separate layers"), ("24x1024", "fused"), ("48x1600", "fused")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="where the plans go for a while")
    parser.add_argument("--csv", type=Path, default=RESULTS / "trt_build.csv")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        name, attention = args.case
        measure(name, attention, args)
        return
    for case in CASES:
        # A process's peak memory starts at what its parent has.
        subprocess.run([sys.executable, *sys.argv, "--case", *case], check=True)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, attention: str, args: argparse.Namespace) -> None:
    from gpt.checkpoint.random_weights import RandomWeights
    from gpt.config import BuildConfig, ModelConfig
    from gpt.engine.trt_builder import build_plan
    from gpt.engine.weights import engine_layout, engine_tensors
    from gpt.mapping import Mapping

    n_layer, n_embd, n_head = MODELS[name]
    model = ModelConfig(
        vocab_size=50257,
        n_positions=1024,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        inter_size=4 * n_embd,
    )
    plugin = "float16" if attention == "fused" else None
    build = BuildConfig(
        dtype="float16", max_batch_size=8, max_input_len=512, max_output_len=512, gpt_attention_plugin=plugin
    )
    weight_bytes = sum(tensor.num_bytes for tensor in engine_layout(model, Mapping(), build.dtype))
    with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="bench_trt_build-") as folder:
        path = Path(folder) / "plan"
        before, begin = peak_bytes(), time.perf_counter()
        build_plan(model, build, Mapping(), engine_tensors(model, build, Mapping(), RandomWeights(model, 1)), path)
        seconds, peak, plan_bytes = time.perf_counter() - begin, peak_bytes(), path.stat().st_size
    row = {
        "device": describe_device(),
        "versions": describe_versions("torch", "tensorrt_rtx_cu13_libs"),
        "model": name,
        "attention": attention,
        "dtype": build.dtype,
        "max_batch_size": build.max_batch_size,
        "max_seq_len": build.max_input_len + build.max_output_len,
        "weight_bytes": weight_bytes,
        "plan_bytes": plan_bytes,
        "build_s": round(seconds, 1),
        "peak_before_bytes": before,
        "peak_bytes": peak,
        "peak_over_weights": round(peak / weight_bytes, 2),
    }
    print(*row.values())
    append_csv(args.csv, [row])


if __name__ == "__main__":
    main()
