"""gpt/kernels/w8a8_hopper.py through `w8a8`, as prompts come to it; on other cards what prompts come to there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from compiling import compiling
from kernel_inputs import operands
from w8a8_checks import Config, check_cache, check_fused, check_next_input, check_stream

from gpt.kernels import w8a8_config
from gpt.kernels.w8a8 import w8a8
from gpt.kernels.w8a8_config import HopperConfig, W8a8Config, default_config, runs_hopper_kernel

CUDA = torch.device("cuda")
INT8, FP8 = torch.int8, torch.float8_e4m3fn

# Tokens, rows, columns.
SHAPES = {
    "halves alone, a rest of K": (1030, 200, 1616),
    "whole tiles, then halves": (2118, 2200, 144),
    "no whole step along K": (1100, 3000, 48),
    "many rounds of the ring": (8192, 4700, 256),
    "tokens in groups": (8192, 136, 4112),
}
HALVES = (1030, 208, 144)


def config_of(num_tokens: int, num_rows: int, num_columns: int) -> Config:
    return default_config(num_tokens, num_rows, num_columns, CUDA, splits=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_are_exact(shape: tuple[int, int, int]) -> None:
    """Twice: a launch finds nothing of the one before it."""
    num_tokens, num_rows, _ = shape
    x, _, weight, _ = operands(*shape, CUDA)
    ones = [torch.ones(size, device=CUDA) for size in (num_tokens, num_rows)]
    expected = x.double() @ weight.double().t()
    for _ in range(2):
        out = torch.full((num_tokens, num_rows), math.nan, device=CUDA)
        w8a8(x, ones[0], weight, ones[1], out, config=config_of(*shape))
        assert torch.equal(out.double(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("steps", "dtype"), [(INT8, torch.float16), (INT8, torch.bfloat16), (FP8, torch.float32)], ids=str
)
def test_product_with_everything_fused(steps: torch.dtype, dtype: torch.dtype) -> None:
    check_fused(HALVES, config_of(*HALVES), steps, dtype, CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize(("steps", "smoothed"), [(INT8, True), (FP8, False)], ids=str)
def test_result_as_the_next_product_takes_it(steps: torch.dtype, smoothed: bool) -> None:
    check_next_input(HALVES, config_of(*HALVES), steps, smoothed, CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [170, 208])
def test_result_added_to_the_stream(num_rows: int) -> None:
    """Rows of a stream that begin at multiples of 16 bytes, and others."""
    check_stream((1030, num_rows, 144), config_of(1030, num_rows, 144), INT8, CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "stored", "queries_alone"),
    [((3, 3, 64), None, True), ((2, 2, 40), None, False), ((5, 1, 16), INT8, True), ((6, 2, 32), FP8, False)],
    ids=str,
)
def test_keys_and_values_go_to_the_cache(
    heads: tuple[int, int, int], stored: torch.dtype | None, queries_alone: bool
) -> None:
    check_cache(1030, heads, config_of(1030, 200, 96), stored, queries_alone, CUDA)


def test_where_prompts_come_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not runs_hopper_kernel(torch.device("cpu"))
    monkeypatch.setattr(w8a8_config, "INTERPRETED", False)
    for capability, version, runs in (
        ((9, 0), "3.6.0", True),
        ((9, 0), "3.7.1", True),
        ((9, 0), "3.8.0", False),
        ((8, 9), "3.7.1", False),
        ((10, 0), "3.7.1", False),
    ):
        monkeypatch.setattr(w8a8_config, "TRITON_VERSION", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert runs_hopper_kernel(CUDA) == runs
    monkeypatch.setattr(w8a8_config, "runs_hopper_kernel", lambda device: True)
    assert config_of(1024, 1600, 1600) == HopperConfig(by_tokens=False)
    assert config_of(8192, 1600, 6400) == HopperConfig(by_tokens=True)
    for few_or_odd in ((1023, 1600, 1600), (8192, 1600, 1608)):
        monkeypatch.setattr(w8a8_config, "supports_dependent_launch", lambda device: True)
        assert isinstance(config_of(*few_or_odd), W8a8Config)


def test_columns_that_no_descriptor_takes_are_refused() -> None:
    x, row_scale, weight, col_scale = operands(2, 16, 40, torch.device("cpu"))
    with pytest.raises(ValueError, match="found 40 columns, expected a multiple of 16"):
        w8a8(x, row_scale, weight, col_scale, torch.zeros(2, 16), config=HopperConfig(by_tokens=False))


def test_it_compiles_without_a_card() -> None:
    """In a process that compiles: for the version of Triton that is installed, what fits into a multiprocessor."""
    program = Path(__file__).parent / "compile_hopper.py"
    for line in compiling(str(program)).splitlines():
        found = json.loads(line)
        assert found["shared"] <= 227 << 10
        assert found["vectors"] > 0  # 16 bytes a thread
        assert found["waits"] == 3  # of both consumers and the producer
        assert not found["spills"]
        assert not found["serialized"]  # products that wait for each other
