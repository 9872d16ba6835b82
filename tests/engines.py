"""Short ways from a Hugging Face folder to an engine and a session, through the real scripts' functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import tiny_gpt2

import build
from gpt.engine.folder import EngineInfo, open_engine
from gpt.runtime.load import load_session
from gpt.runtime.torch_session import TorchSession
from hf_gpt_convert import ProgArgs, run_conversion


def convert(hf_folder: Path, out: Path, storage_type: str = "float32", tp: int = 1) -> Path:
    """Converts and returns the `<tp>-gpu` folder."""
    run_conversion(
        ProgArgs(
            out_dir=str(out), in_file=str(hf_folder), tensor_parallelism=tp, processes=2, storage_type=storage_type
        )
    )
    return out / f"{tp}-gpu"


def build_engine(checkpoint: Path | None, out: Path, *flags: str) -> EngineInfo:
    source = ["--model_dir", str(checkpoint)] if checkpoint else []
    build.run_build([*source, "--output_dir", str(out), "--log_level", "error", *flags])
    return open_engine(out)


def engines_of_ranks(base: Path, *sizes: int) -> dict[int, EngineInfo]:
    """A tiny GPT-2 with its tokenizer, on each of these numbers of ranks."""
    hf = tiny_gpt2(base / "hf", vocab_size=265)
    limits = ["--max_batch_size", "4", "--max_input_len", "40", "--max_output_len", "20", "--parallel_build"]
    return {
        size: build_engine(
            convert(hf, base / "ft", tp=size), base / f"engine{size}", *limits, "--world_size", str(size)
        )
        for size in sizes
    }


@dataclass(frozen=True)
class Engine:
    """hf: the Hugging Face folder it was made from."""

    hf: Path
    folder: Path


def tiny_engine(base: Path, *limits: str) -> Engine:
    """A tiny GPT-2 with random weights, converted and built in float32 below `base`."""
    hf = tiny_gpt2(base / "hf", vocab_size=264)
    build_engine(convert(hf, base / "ft"), base / "engine", *limits)
    return Engine(hf, base / "engine")


def open_session(info: EngineInfo) -> TorchSession:
    session = load_session(info, "cpu")
    if not isinstance(session, TorchSession):
        raise TypeError(type(session))
    return session


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance in float64."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
