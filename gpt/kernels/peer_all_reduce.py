"""The sum of a small tensor over the GPUs of one machine, in one kernel that reads the other GPUs' memory.

Each program owns a piece of PIECE_BYTES at a fixed place of every GPU's buffer, and never touches another one:

    1. copy the own part of the piece into the own buffer          (the half that the epoch's parity names)
    2. write the epoch into a flag of each peer, releasing 1       (peers' memory)
    3. wait until every peer has written its epoch into ours       (own memory)
    4. add the peers' parts, in the order of the ranks, in float32, round once, store

A peer may still be reading the half of epoch n while this rank writes the other one in epoch n + 1; it cannot get to
epoch n + 2, the same half again, before that peer has signalled n + 1, which its stream does after reading n.  Epochs
are counted on the GPU, so that a CUDA graph may hold any number of sums and be replayed any number of times.  The order
of the sum is the same on all ranks, and with it every bit of the result.

R ranks read R - 1 times the tensor each: the fewest bytes for two ranks, too many for large tensors on many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

# 256 threads with one 16-byte access each.
PIECE_BYTES = 4096
NUM_WARPS = 8
# All programs wait for each other, so all must be on the GPU at once: 256 of 256 threads fit on 32 multiprocessors.
MAX_PIECES = 256
MAX_BYTES = MAX_PIECES * PIECE_BYTES
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def buffer_bytes(num_ranks: int) -> int:
    """What each GPU shares with its peers: two halves of MAX_BYTES, and an int32 flag per piece and rank."""
    return 2 * MAX_BYTES + 4 * MAX_PIECES * num_ranks


@dataclass(frozen=True)
class PeerBuffers:
    """buffers: by rank, [buffer_bytes] uint8 in that rank's memory, readable and writable here, all zeros before any
    rank's first sum.  epochs: [MAX_PIECES] int32 zeros, this rank's own.  owner: what keeps the mapping alive."""

    rank: int
    buffers: tuple[torch.Tensor, ...]
    epochs: torch.Tensor
    owner: object = None
    _views: dict[torch.dtype, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def data(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The halves of each rank's buffer, [2 * MAX_BYTES / itemsize]."""
        if dtype not in self._views:
            self._views[dtype] = tuple(buffer[: 2 * MAX_BYTES].view(dtype) for buffer in self.buffers)
        return self._views[dtype]

    def flags(self) -> tuple[torch.Tensor, ...]:
        """[MAX_PIECES * R] of each rank."""
        if torch.int32 not in self._views:
            self._views[torch.int32] = tuple(buffer[2 * MAX_BYTES :].view(torch.int32) for buffer in self.buffers)
        return self._views[torch.int32]


def can_sum(x: torch.Tensor) -> bool:
    """Whether the kernel takes this tensor."""
    return x.dtype in DTYPES and x.is_contiguous() and 0 < x.nbytes <= MAX_BYTES


def peer_all_reduce(x: torch.Tensor, peers: PeerBuffers) -> None:
    """Replaces x (any shape, contiguous, one of DTYPES, at most MAX_BYTES) by the sum over the ranks, all of which make
    the same call.  Raises ValueError for another tensor."""
    if not can_sum(x):
        raise ValueError(f"x: found {list(x.shape)} {x.dtype}, allowed: contiguous, {DTYPES}, 1 to {MAX_BYTES} bytes")
    piece = PIECE_BYTES // x.element_size()
    _peer_all_reduce[(triton.cdiv(x.numel(), piece),)](
        x,
        peers.data(x.dtype),
        peers.flags(),
        peers.epochs,
        x.numel(),
        rank=peers.rank,
        num_ranks=len(peers.buffers),
        piece=piece,
        half=MAX_BYTES // x.element_size(),
        num_warps=NUM_WARPS,
    )


def reference(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' tensors, in their order, in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@triton.jit
def _peer_all_reduce(
    x_ptr,  # [num_elements], summed in place
    data_ptrs,  # by rank: [2, half]
    flag_ptrs,  # by rank: [MAX_PIECES, num_ranks]
    epoch_ptr,  # [MAX_PIECES]
    num_elements,
    rank: tl.constexpr,
    num_ranks: tl.constexpr,
    piece: tl.constexpr,
    half: tl.constexpr,
):
    program = tl.program_id(0)
    epoch = tl.load(epoch_ptr + program) + 1
    offsets = program * piece + tl.arange(0, piece)
    mask = offsets < num_elements
    places = (epoch & 1) * half + offsets
    own = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(data_ptrs[rank] + places, own, mask=mask)
    tl.debug_barrier()  # all threads have stored before one of them says so
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            tl.atomic_xchg(flag_ptrs[peer] + program * num_ranks + rank, epoch, sem="release", scope="sys")
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            flag_ptr = flag_ptrs[rank] + program * num_ranks + peer
            # A peer may be one epoch ahead; the difference survives the overflow of the count.
            while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - epoch < 0:
                pass
    tl.debug_barrier()
    total = tl.zeros([piece], tl.float32)
    for peer in tl.static_range(num_ranks):
        if peer == rank:
            total += own.to(tl.float32)
        else:
            # Around the first-level cache, which knows nothing of other GPUs' writes.
            total += tl.load(data_ptrs[peer] + places, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(x_ptr + offsets, total.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(epoch_ptr + program, epoch)
