"""gpt/kernels/launch.py: what is fetched ahead, counted without a GPU."""

from __future__ import annotations

import pytest
import torch

from gpt.kernels import launch

SPARE = torch.zeros(1)


@pytest.fixture
def dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "supports_dependent_launch", lambda device: True)


@pytest.mark.usefixtures("dependent")
@pytest.mark.parametrize("multiple", [1, 3, 25])
@pytest.mark.parametrize("num_bytes", [128, 1000, 200 * 1024 + 16, 9 << 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_programs_share_the_end_of_the_next_weights(num_bytes: int, multiple: int, dtype: torch.dtype) -> None:
    weight = torch.zeros((2, num_bytes // dtype.itemsize // 2), dtype=dtype)
    fetch = launch.fetch_before(weight, SPARE, multiple=multiple)
    assert fetch.num_lines == min(weight.nbytes, 5 << 20) // 128
    assert fetch.weight.nbytes == fetch.num_lines * 128
    assert fetch.weight.data_ptr() + fetch.weight.nbytes == weight.data_ptr() + weight.nbytes
    assert fetch.num_programs % multiple == 0
    assert fetch.share & (fetch.share - 1) == 0
    assert fetch.num_lines <= fetch.num_programs * fetch.share <= 2 * fetch.num_lines + 2 * fetch.num_programs


@pytest.mark.usefixtures("dependent")
@pytest.mark.parametrize("weight", [None, torch.zeros(10)])
def test_nothing_to_fetch(weight: torch.Tensor | None) -> None:
    assert launch.fetch_before(weight, SPARE) == launch.Fetch(SPARE, 0, 0, 0)


def test_nothing_is_fetched_where_launches_do_not_overlap() -> None:
    assert launch.fetch_before(torch.zeros(4096), SPARE).num_programs == 0
