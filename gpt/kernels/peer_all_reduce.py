"""The sum of a small tensor over the GPUs of one machine, in one kernel that writes to or reads the other GPUs' memory.

Each program owns a piece at a fixed place of every GPU's buffer, and never touches another one.  Up to MAX_WORD_BYTES
every 4 bytes travel beside the number of the sum, the epoch, in 8 bytes that arrive at once:

    1. write the own part of the piece, word by word with the epoch, into each peer's inbox
    2. read the own inbox until all words carry the epoch: one trip between the GPUs and nothing to wait for besides
    3. add the parts, in the order of the ranks, in float32

Larger pieces would pay for twice the bytes:

    1. copy the own part of the piece into the own buffer
    2. write the epoch into a flag of each peer, releasing 1       (peers' memory)
    3. wait until every peer has written its epoch into ours       (own memory)
    4. add the peers' parts, in the order of the ranks, in float32

The sum is rounded once, or goes unrounded to a float32 residual stream.  Buffers have two halves, which the epoch's
parity names.  A peer may still be reading the half of epoch n while this rank writes the other one in epoch n + 1; it
cannot get to epoch n + 2, the same half again, before that peer has sent n + 1, which its stream does after reading n.
Epochs are counted on the GPU, so that a CUDA graph may hold any number of sums and be replayed any number of times.
The order of the sum is the same on all ranks, and with it every bit of the result.

R ranks move R - 1 times the tensor each: the fewest bytes for two ranks, too many for large tensors on many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from gpt.kernels.launch import launch_options, wait_for_inputs

# 256 threads with one 16-byte access each.
PIECE_BYTES = 4096
NUM_WARPS = 8
# All programs wait for each other, so all must be on the GPU at once: 256 of 256 threads fit on 32 multiprocessors.
MAX_PIECES = 256
MAX_BYTES = MAX_PIECES * PIECE_BYTES
# Words of 4 bytes in a piece of the first kind: one warp, two accesses of 16 bytes per thread and peer.
PIECE_WORDS = 128
# What an inbox has room for; at every size up to here faster than the other way, with two GPUs and with eight.
MAX_WORD_BYTES = 256 << 10
_MAX_WORDS = MAX_WORD_BYTES // 4
NUM_EPOCHS = max(MAX_PIECES, _MAX_WORDS // PIECE_WORDS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def buffer_bytes(num_ranks: int) -> int:
    """What each GPU shares with its peers, all twice but the flags: MAX_BYTES, an inbox of 8 bytes per word and rank,
    and an int32 flag per piece and rank."""
    return 2 * MAX_BYTES + _inbox_bytes(num_ranks) + 4 * MAX_PIECES * num_ranks


def _inbox_bytes(num_ranks: int) -> int:
    return 2 * num_ranks * _MAX_WORDS * 8


@dataclass(frozen=True)
class PeerBuffers:
    """buffers: by rank, [buffer_bytes] uint8 in that rank's memory, readable and writable here, all zeros before any
    rank's first sum.  epochs: [2, NUM_EPOCHS] int32 zeros, this rank's own.  owner: what keeps the mapping alive."""

    rank: int
    buffers: tuple[torch.Tensor, ...]
    epochs: torch.Tensor
    owner: object = None
    _views: dict[torch.dtype, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def data(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The halves of each rank's buffer, [2 * MAX_BYTES / itemsize] in one of DTYPES."""
        return self._parts(dtype, 0, 2 * MAX_BYTES)

    def inboxes(self) -> tuple[torch.Tensor, ...]:
        """[2 * R * MAX_WORDS] int64 of each rank."""
        return self._parts(torch.int64, 2 * MAX_BYTES, 2 * MAX_BYTES + _inbox_bytes(len(self.buffers)))

    def flags(self) -> tuple[torch.Tensor, ...]:
        """[MAX_PIECES * R] int32 of each rank."""
        return self._parts(torch.int32, 2 * MAX_BYTES + _inbox_bytes(len(self.buffers)), None)

    def _parts(self, dtype: torch.dtype, begin: int, end: int | None) -> tuple[torch.Tensor, ...]:
        if dtype not in self._views:
            self._views[dtype] = tuple(buffer[begin:end].view(dtype) for buffer in self.buffers)
        return self._views[dtype]


def can_sum(x: torch.Tensor) -> bool:
    """Whether the kernel takes this tensor."""
    return x.dtype in DTYPES and x.is_contiguous() and 0 < x.nbytes <= MAX_BYTES


def peer_all_reduce(
    x: torch.Tensor,
    peers: PeerBuffers,
    stream: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    word_bytes: int = MAX_WORD_BYTES,
) -> None:
    """Replaces x (any shape, contiguous, one of DTYPES, at most MAX_BYTES) by the sum over the ranks, all of which make
    the same call; with `stream`, float32 of x's shape, adds the sum and `bias` [last axis] to it instead and leaves x.
    word_bytes: up to which words travel with their epoch, at most MAX_WORD_BYTES.

    Raises ValueError for another tensor.
    """
    if not can_sum(x):
        raise ValueError(f"x: found {list(x.shape)} {x.dtype}, allowed: contiguous, {DTYPES}, 1 to {MAX_BYTES} bytes")
    if stream is not None and (stream.shape != x.shape or stream.dtype != torch.float32 or not stream.is_contiguous()):
        raise ValueError(f"stream: found {list(stream.shape)} {stream.dtype}, allowed: {list(x.shape)} float32")
    if bias is not None and (stream is None or bias.shape != x.shape[-1:]):
        raise ValueError(f"bias: found {list(bias.shape)}, allowed: {list(x.shape[-1:])}, beside a stream")
    target = (x if stream is None else stream, x if bias is None else bias)
    options = {
        "rank": peers.rank,
        "num_ranks": len(peers.buffers),
        "TO_STREAM": stream is not None,
        "HAS_BIAS": bias is not None,
        **launch_options(x.device),
    }
    width = x.shape[-1] if x.dim() else 1
    if (
        x.nbytes <= min(word_bytes, MAX_WORD_BYTES)
        and x.nbytes % 4 == 0
        and x.storage_offset() * x.element_size() % 4 == 0
    ):
        words = x.view(-1).view(torch.int32)
        _send_words[(triton.cdiv(words.numel(), PIECE_WORDS),)](
            words,
            *target,
            peers.inboxes(),
            peers.epochs[1],
            words.numel(),
            width,
            dtype=_TRITON_DTYPES[x.dtype],
            piece=PIECE_WORDS,
            slots=_MAX_WORDS,
            num_warps=1,
            **options,
        )
        return
    piece = PIECE_BYTES // x.element_size()
    _read_parts[(triton.cdiv(x.numel(), piece),)](
        x,
        *target,
        peers.data(x.dtype),
        peers.flags(),
        peers.epochs[0],
        x.numel(),
        width,
        piece=piece,
        half=MAX_BYTES // x.element_size(),
        num_warps=NUM_WARPS,
        **options,
    )


_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def reference(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' tensors, in their order, in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@triton.jit
def _base(target_ptr, bias_ptr, offsets, inside, width, TO_STREAM: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What the sum is added to, float32: the residual stream and the bias, or nothing."""
    base = tl.zeros(offsets.shape, tl.float32)
    if TO_STREAM:
        base += tl.load(target_ptr + offsets, mask=inside, other=0.0)
    if HAS_BIAS:
        base += tl.load(bias_ptr + offsets % width, mask=inside, other=0.0).to(tl.float32)
    return base


@triton.jit
def _values(words, dtype: tl.constexpr):
    """float32 [n] or, of two halves each, [2 n] from int32 words [n]."""
    if dtype == tl.float32:
        values = words.to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(dtype, bitcast=True)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        values = tl.interleave(low.to(tl.float32), high.to(tl.float32))
    return values


@triton.jit
def _send_words(
    words_ptr,  # [num_words] int32, the bits of this rank's part
    target_ptr,  # [num_elements], the part itself or the float32 stream
    bias_ptr,  # [width]
    inbox_ptrs,  # by rank: [2, num_ranks, slots] int64, the epoch in the upper half
    epoch_ptr,  # [NUM_EPOCHS]
    num_words,
    width,
    dtype: tl.constexpr,  # of the elements
    piece: tl.constexpr,
    slots: tl.constexpr,
    rank: tl.constexpr,
    num_ranks: tl.constexpr,
    TO_STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    per_word: tl.constexpr = 32 // dtype.primitive_bitwidth
    program = tl.program_id(0)
    places = program * piece + tl.arange(0, piece)
    mask = places < num_words
    offsets = program * (piece * per_word) + tl.arange(0, piece * per_word)
    inside = offsets < num_words * per_word
    wait_for_inputs(DEPENDENT)
    epoch = tl.load(epoch_ptr + program) + 1
    own = tl.load(words_ptr + places, mask=mask, other=0)
    half = (epoch & 1) * (num_ranks * slots)
    message = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            tl.store(inbox_ptrs[peer] + half + rank * slots + places, message, mask=mask, cache_modifier=".wt")
    base = _base(target_ptr, bias_ptr, offsets, inside, width, TO_STREAM, HAS_BIAS)
    total = tl.zeros([piece * per_word], tl.float32)
    num_late = 1
    while num_late > 0:
        total = tl.zeros([piece * per_word], tl.float32)
        late = tl.zeros([piece], tl.int32)
        for peer in tl.static_range(num_ranks):
            if peer == rank:
                total += _values(own, dtype)
            else:
                found = tl.load(inbox_ptrs[rank] + half + peer * slots + places, mask=mask, other=0, volatile=True)
                total += _values(found.to(tl.int32), dtype)
                late |= (found >> 32).to(tl.int32) ^ epoch
        num_late = tl.sum((mask & (late != 0)).to(tl.int32), axis=0)
    tl.store(target_ptr + offsets, (base + total).to(target_ptr.dtype.element_ty), mask=inside)
    tl.store(epoch_ptr + program, epoch)


@triton.jit
def _read_parts(
    x_ptr,  # [num_elements], this rank's part
    target_ptr,  # [num_elements], the part itself or the float32 stream
    bias_ptr,  # [width]
    data_ptrs,  # by rank: [2, half]
    flag_ptrs,  # by rank: [MAX_PIECES, num_ranks]
    epoch_ptr,  # [NUM_EPOCHS]
    num_elements,
    width,
    piece: tl.constexpr,
    half: tl.constexpr,
    rank: tl.constexpr,
    num_ranks: tl.constexpr,
    TO_STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    offsets = program * piece + tl.arange(0, piece)
    mask = offsets < num_elements
    wait_for_inputs(DEPENDENT)
    epoch = tl.load(epoch_ptr + program) + 1
    places = (epoch & 1) * half + offsets
    own = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(data_ptrs[rank] + places, own, mask=mask)
    tl.debug_barrier()  # all threads have stored before one of them says so
    for peer in tl.static_range(num_ranks):
        if peer != rank:
            tl.atomic_xchg(flag_ptrs[peer] + program * num_ranks + rank, epoch, sem="release", scope="sys")
    base = _base(target_ptr, bias_ptr, offsets, mask, width, TO_STREAM, HAS_BIAS)
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
    tl.store(target_ptr + offsets, (base + total).to(target_ptr.dtype.element_ty), mask=mask)
    tl.store(epoch_ptr + program, epoch)
