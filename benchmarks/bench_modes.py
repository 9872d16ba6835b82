"""What ways of executing and of choosing tokens cost: ms per token of one engine beside plain greedy decoding.

    python3 benchmarks/bench_modes.py --case gpt2-medium --batch_size 1 64 --csv modes.csv

Random weights of a published shape; medians of rounds in which all ways take their turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, Sample, append_csv, describe_versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.cli import ArgumentParser, positive_int

# Names of ways: what the session is told, how tokens are chosen.
WAYS: dict[str, tuple[dict[str, bool], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "greedy, no graphs": ({"cuda_graphs": False}, {}),
    "greedy, batch-invariant": ({"batch_invariant": True}, {}),
    "temperature 0.8": ({}, {"top_k": 0, "temperature": 0.8}),
    "top-k 50": ({}, {"top_k": 50}),
    "top-k 50, top-p 0.9": ({}, {"top_k": 50, "top_p": 0.9}),
    "top-p 0.9": ({}, {"top_k": 0, "top_p": 0.9}),
    "min-p 0.05": ({}, {"top_k": 0, "min_p": 0.05}),
    "top-k 50, minimal length": ({}, {"top_k": 50, "min_length": 2}),  # step by step on the host
}


def main(argv: Sequence[str] | None = None) -> int:
    from gpu_cases import CASES

    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="gpt2-medium")
    parser.add_argument("--batch_size", type=positive_int, nargs="+", default=[1, 64])
    parser.add_argument("--input_len", type=positive_int, default=128)
    parser.add_argument("--output_len", type=positive_int, default=64, help="at least 2")
    parser.add_argument("--repeat", type=positive_int, default=5)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, default=RESULTS / "modes.csv")
    args = parser.parse_args(argv)
    rows: list[dict[str, object]] = []
    for batch_size in args.batch_size:
        rows += measure(args, batch_size)
    for row in rows:
        print(f"{row['batch_size']:>4}  {row['way']:28} {row['token_ms']:>9} ms, {row['of_greedy']} of greedy")
    append_csv(args.csv, rows)
    return 0


def measure(args: argparse.Namespace, batch_size: int) -> list[dict[str, object]]:
    from bench_gpu import device_name, random_prompts
    from gpu_cases import CASES, Shape, build_flags

    import build
    from gpt.engine.folder import open_engine
    from gpt.runtime.execution import Execution
    from gpt.runtime.generate import generate
    from gpt.runtime.load import load_session
    from gpt.runtime.request import Request
    from gpt.runtime.sampling_config import SamplingConfig

    case, shape = CASES[args.case], Shape(batch_size, args.input_len, args.output_len)
    with tempfile.TemporaryDirectory(prefix="bench_modes-") as folder:
        flags = build_flags(case, args.dtype, 1, [shape])
        build.run_build([*flags, "--output_dir", folder, "--log_level", "error"])
        info = open_engine(Path(folder))
        executions = {name: Execution(**told) for name, (told, _) in WAYS.items()}
        sessions = {each: load_session(info, args.device, each) for each in set(executions.values())}
    prompts = random_prompts(case, shape)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(1 + args.repeat):  # the first one captures and does not count
        for name, (_, settings) in WAYS.items():
            result = generate(
                sessions[executions[name]],
                Request(prompts, max_new_tokens=args.output_len, sampling=SamplingConfig(seed=1, **settings)),
            )
            if turn > 0:
                times[name].append(sum(result.step_ms) / len(result.step_ms))
    samples = {name: Sample(values) for name, values in times.items()}
    return [
        {
            "device": device_name(args.device),
            "versions": describe_versions("torch", "triton"),
            "case": args.case,
            "dtype": args.dtype,
            "batch_size": batch_size,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "way": name,
            "repeat": args.repeat,
            "token_ms": round(sample.median, 4),
            "token_ms_min": round(min(sample.values), 4),
            "token_ms_max": round(max(sample.values), 4),
            "of_greedy": round(sample.median / samples["greedy"].median, 3),
        }
        for name, sample in samples.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
