"""The ways PyTorch can multiply a few rows with all weights of a model's layers, one after the other, on a CPU.

    python3 benchmarks/bench_linear.py --dtype float32 bfloat16 int8 --rows 1 2 16 128
    python3 benchmarks/bench_linear.py --clock cpu --threads 1

int8 stands for int8 weights, with int8 rows (oneDNN's and FBGEMM's with unsigned ones and a zero point) or, in
`_weight_int8pack_mm`, bfloat16 ones.  The clock `cpu` counts the process's own time alone, for a busy machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, Sample, append_csv, describe_device, describe_versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.engine.int8_product import FbgemmProduct, OneDnnProduct, PlainProduct

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Way = Callable[[torch.Tensor], torch.Tensor]
FLOAT_WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear with bias": F.linear,
    "x @ weight.T": lambda x, weight, bias: x @ weight.t(),
    "weight @ x.T": lambda x, weight, bias: weight @ x.t(),
    "matrix-vector": lambda x, weight, bias: torch.mv(weight, x[0]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 16, 128])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=RESULTS / "linear_cpu.csv")
    args = parser.parse_args()
    for dtype in args.dtype:
        for num_rows in args.rows:
            append_csv(args.csv, measure(args, dtype, num_rows))


def float_ways(shape: tuple[int, int], dtype: torch.dtype, num_rows: int) -> dict[str, Way]:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    return {
        name: lambda x, way=way: way(x.to(dtype), weight, bias)  # type: ignore[misc]
        for name, way in FLOAT_WAYS.items()
        if num_rows == 1 or name != "matrix-vector"
    }


def int8_ways(shape: tuple[int, int]) -> dict[str, Way]:
    """Weights of -127 to 127 with a scale per output; rows of whole numbers."""
    weight, scale = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]) / 1000
    half_scale, zero_points = scale.bfloat16(), torch.zeros(shape[0], dtype=torch.int32)
    onednn, fbgemm, plain = (kind(weight, scale) for kind in (OneDnnProduct, FbgemmProduct, PlainProduct))
    packed = torch.ops.onednn.qlinear_prepack(weight, None)

    def unsigned(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 128, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )

    ways: dict[str, Way] = {
        "oneDNN, unsigned rows": lambda x: unsigned((x + 128).to(torch.uint8)),
        "FBGEMM": fbgemm,
        "_int_mm": lambda x: plain(x.to(torch.int8)),
        "_weight_int8pack_mm": lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, half_scale),
    }
    if OneDnnProduct.is_fast():
        ways["oneDNN"] = lambda x: onednn(x.to(torch.int8))
    return ways


def measure(args: argparse.Namespace, dtype: str, num_rows: int) -> list[dict[str, object]]:
    """One result per way; ms for the four products of all layers."""
    torch.set_num_threads(args.threads)
    clock, size = CLOCKS[args.clock], args.n_embd
    shapes = [(3 * size, size), (size, size), (4 * size, size), (size, 4 * size)] * args.n_layer
    inputs = {width: torch.randn(num_rows, width).mul_(40).round_().clamp_(-127, 127) for width in (size, 4 * size)}
    products = [
        int8_ways(shape) if dtype == "int8" else float_ways(shape, getattr(torch, dtype), num_rows) for shape in shapes
    ]
    times: dict[str, list[float]] = {name: [] for name in products[0]}
    with torch.inference_mode():
        for _ in range(args.repeat + 1):
            for name in times:
                begin = clock()
                for shape, ways in zip(shapes, products, strict=True):
                    ways[name](inputs[shape[1]])
                times[name].append((clock() - begin) * 1e3)
    num_bytes = sum(num_out * num_in for num_out, num_in in shapes) * getattr(torch, dtype).itemsize
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        ms = Sample(values[1:])  # the first round warms up
        print(f"{dtype} {num_rows} rows, {name}: {ms} ms, {num_bytes / ms.median / 1e6:.1f} GB/s", flush=True)
        rows.append(
            {
                "device": describe_device(),
                "versions": describe_versions("torch"),
                "threads": args.threads,
                "clock": args.clock,
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
