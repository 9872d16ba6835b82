"""The sum through peers' memory: its protocol, in Triton's interpreter.  On GPUs: test_gpu_ranks.py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from ranks import PROGRAMS, mpirun

from gpt.comm import NullCommunicator
from gpt.errors import ConfigError
from gpt.kernels import peer_all_reduce as kernel
from gpt.runtime import peer_memory
from gpt.runtime.peer_memory import LIMIT_VARIABLE, PeerSum, connect_peers


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_between_processes(num_ranks: int, tmp_path: Path) -> None:
    result = mpirun(num_ranks, PROGRAMS / "peer_sum_interpreted.py", tmp_path)
    assert result.returncode == 0, result.stderr
    # Three of each, in two rounds; halves of the three odd shapes make no whole words. The largest shape, once, is too
    # large for words.
    of_parts = 3 * (2 * 2 * 3 + 3)
    of_words = 3 * 2 * (2 * 2 + 5)
    last = [ctypes.c_int32(2**31 - 4 + count).value for count in (of_parts, of_words)]
    expected = [f"rank {rank} of {num_ranks}: good, epochs {last}" for rank in range(num_ranks)]
    assert sorted(result.stdout.splitlines()) == expected


@pytest.mark.mpi
def test_decode_steps_add_sums_to_the_stream(tmp_path: Path) -> None:
    result = mpirun(2, PROGRAMS / "peer_session.py", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2: good", "rank 1 of 2: good"]


def test_the_reference_rounds_once() -> None:
    parts = [torch.tensor([1.0]).bfloat16(), torch.tensor([2.0**-8]).bfloat16(), torch.tensor([2.0**-8]).bfloat16()]
    assert kernel.reference(parts).item() == 1 + 2.0**-7  # added one by one, both would be lost


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0),
        torch.zeros(4, 4).t()[1:],
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(kernel.MAX_BYTES // 4 + 1),
    ],
)
def test_other_tensors_are_left_to_nccl(x: torch.Tensor) -> None:
    peers = kernel.PeerBuffers(0, (), torch.zeros(0))
    assert PeerSum(peers, kernel.MAX_BYTES)(x) is False
    with pytest.raises(ValueError, match="allowed"):
        kernel.peer_all_reduce(x, peers)


@pytest.mark.parametrize(
    ("stream", "bias"),
    [
        (torch.zeros(2, 4, dtype=torch.float16), None),
        (torch.zeros(8), None),
        (torch.zeros(2, 8)[:, ::2], None),
        (torch.zeros(2, 4), torch.zeros(8)),
        (None, torch.zeros(4)),
    ],
)
def test_streams_that_do_not_fit(stream: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="allowed"):
        kernel.peer_all_reduce(torch.zeros(2, 4), kernel.PeerBuffers(0, (), torch.zeros(0)), stream, bias)


def test_larger_tensors_are_left_to_nccl() -> None:
    assert PeerSum(kernel.PeerBuffers(0, (), torch.zeros(0)), 100)(torch.zeros(26)) is False


@pytest.mark.parametrize("text", ["", "-1", "many", str(kernel.MAX_BYTES + 1)])
def test_a_limit_is_a_number_of_bytes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(ConfigError, match=LIMIT_VARIABLE):
        connect_peers(NullCommunicator(), None, torch.device("cuda", 0))  # type: ignore[arg-type]


class TwoRanks(NullCommunicator):
    size = local_size = 2


@pytest.mark.parametrize("where", ["before", "while"])
def test_nccl_takes_over_where_memory_cannot_be_shared(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no peer access")

    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    monkeypatch.setattr(peer_memory, "_obstacle", lambda *_: "several machines" if where == "before" else None)
    monkeypatch.setattr(peer_memory, "_share_memory", refuse)
    assert connect_peers(TwoRanks(), None, torch.device("cuda", 0)) is None  # type: ignore[arg-type]


def test_more_ranks_than_eight_are_left_to_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_obstacle", lambda *_: pytest.fail("they share memory"))
    ranks = TwoRanks()
    ranks.size = 9
    assert connect_peers(ranks, None, torch.device("cuda", 0)) is None  # type: ignore[arg-type]
