"""The ways PyTorch can multiply a few rows with all weights of a model's layers, one after the other, on a CPU.

python3 benchmarks/bench_linear.py --dtype float32 bfloat16 --rows 1 2 16 128
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, Sample, append_csv, describe_device, describe_versions

WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear with bias": F.linear,
    "x @ weight.T": lambda x, weight, bias: x @ weight.t(),
    "weight @ x.T": lambda x, weight, bias: weight @ x.t(),
    "matrix-vector": lambda x, weight, bias: torch.mv(weight, x[0]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 16, 128])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=RESULTS / "linear_cpu.csv")
    args = parser.parse_args()
    append_csv(
        args.csv, [row for dtype in args.dtype for num_rows in args.rows for row in measure(args, dtype, num_rows)]
    )


def measure(args: argparse.Namespace, dtype: str, num_rows: int) -> list[dict[str, object]]:
    """One result per way; ms for the four products of all layers."""
    size = args.n_embd
    shapes = [(3 * size, size), (size, size), (4 * size, size), (size, 4 * size)] * args.n_layer
    weights = [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]
    inputs = {width: torch.randn(num_rows, width).to(weights[0].dtype) for width in (size, 4 * size)}
    biases = {width: torch.randn(width).to(weights[0].dtype) for width in (size, 3 * size, 4 * size)}
    ways = {name: way for name, way in WAYS.items() if num_rows == 1 or name != "matrix-vector"}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(args.repeat + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                for weight in weights:
                    way(inputs[weight.shape[1]], weight, biases[weight.shape[0]])
                times[name].append((time.perf_counter() - begin) * 1e3)
    num_bytes = sum(weight.nbytes for weight in weights)
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        ms = Sample(values[1:])  # the first round warms up
        print(f"{dtype} {num_rows} rows, {name}: {ms} ms, {num_bytes / ms.median / 1e6:.1f} GB/s", flush=True)
        rows.append(
            {
                "device": describe_device(),
                "versions": describe_versions("torch"),
                "threads": torch.get_num_threads(),
                "model": f"{args.n_layer}x{size}",
                "dtype": dtype,
                "rows": num_rows,
                "way": name,
                "ms_median": round(ms.median, 3),
                "ms_min": round(min(ms.values), 3),
                "ms_max": round(max(ms.values), 3),
                "gb_per_s": round(num_bytes / ms.median / 1e6, 2),
            }
        )
    return rows


if __name__ == "__main__":
    main()
