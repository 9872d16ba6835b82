"""What bench_gpu.py measures: the systems, which kinds of measurement each takes part in, and in which order."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt.errors import ConfigError

if TYPE_CHECKING:
    from gpu_cases import Case, Shape

# This project's engines with quantised weights: flags of build.py.
QUANTISED = {
    "ours_int8": "--use_weight_only",
    "ours_int4": "--use_weight_only --weight_only_precision int4 --weight_only_group_size 64",
    "ours_smoothquant": "--use_smooth_quant --per_token --per_channel",
    "ours_smoothquant_static": "--use_smooth_quant --per_channel",
    "ours_fp8": "--enable_fp8",
}
SYSTEMS = ("ours", "hf_static", *QUANTISED, "hf_eager", "vllm", "ctranslate2", "hf_compile")
PEERS = ("vllm", "ctranslate2")
KINDS = ("decode", "throughput", "prefill", "profile", "prompt_profile", "load")
# What starting a piece of work costs before its first number, roughly: with less left it is not begun.
START_SECONDS = {"hf_compile": 100.0, "vllm": 90.0, "load": 60.0}
LARGE = ("gpt2-xl",)
PROFILED = ("gpt2-medium", "gpt2-xl")


@dataclass(frozen=True)
class Work:
    """Shapes of one kind that one system runs after being made once."""

    kind: str
    system: str
    case: Case
    shapes: tuple[Shape, ...]


def plan(args: argparse.Namespace) -> Iterator[Work]:
    """All that is asked for, in the order of worth: ours, the best of `transformers`, ours quantised, then the rest."""
    from gpu_cases import CASES, PUBLISHED, Shape
    from gpu_systems import is_installed

    unknown = [name for name in args.case or () if name not in CASES]
    if unknown:
        raise ConfigError("unknown --case", found=", ".join(unknown), allowed=", ".join(CASES))
    if args.output_len < 2:
        raise ConfigError("--output_len 1 leaves no step to measure", allowed="at least 2", hint="--prefill")
    kinds = [kind for kind in KINDS if getattr(args, kind)] or list(KINDS)
    for name in (name for name in PEERS if name in args.system and not is_installed(name)):
        print(f"{name}: not installed, left out")
    systems = [name for name in SYSTEMS if name in args.system and (name not in PEERS or is_installed(name))]
    for system in systems:
        for kind in KINDS:
            if kind not in kinds or not takes_part(system, kind):
                continue
            defaults = {"decode": PUBLISHED, "profile": PROFILED}.get(kind, LARGE)
            if system in QUANTISED:
                defaults = LARGE
            if system == "hf_compile" and kind == "decode":
                defaults = ("gpt2-xl", "gpt2-medium")
            for case in (CASES[name] for name in args.case or defaults):
                batches = args.batch_size or (case.batch_sizes if kind == "decode" else (1,))
                if system == "hf_compile" and kind == "decode" and not args.batch_size:
                    batches = batches[:1]
                shapes = {
                    "throughput": (Shape(*args.throughput_shape),),
                    "prefill": (Shape(*args.prefill_shape, 1),),
                    "prompt_profile": (Shape(*args.prefill_shape, 1),),
                    "load": (Shape(1, args.input_len, 2),),
                }.get(kind, tuple(Shape(batch, args.input_len, args.output_len) for batch in batches))
                yield Work(kind, system, case, shapes)


def takes_part(system: str, kind: str) -> bool:
    if kind == "load":
        return system == "ours"
    if kind in ("profile", "prompt_profile"):
        return system.startswith("ours")
    if system in QUANTISED:
        return kind in ("decode", "prefill")
    return not (kind == "prefill" and system in ("hf_static", "hf_compile"))  # their prompts' step is eager


def describe(work: Work) -> str:
    return f"{work.kind} {work.case.name} {', '.join(map(str, work.shapes))} {work.system}"
