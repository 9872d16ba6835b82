"""What the kernels share: how one waits for the one before it, epilogue functions, and facts about the device.

Decoding is a chain of short kernels, each needing the result of the last.  With programmatic dependent launch (compute
capability 9.0 and above) a kernel starts while its predecessor still computes, loads what does not depend on it (its
weights), then waits.  Most kernels let their successor start only after their own wait, so that whatever was written
two kernels ago may be read before waiting.  Kernels that are `early` let it start at once: then several wait in a
row, all their weights on the way, and before waiting they read only what no kernel of the step writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_VERSION: str = triton.__version__
# Good to 11 bits, by one slow instruction instead of two; an interpreter does not have it.
APPROXIMATIONS = {} if INTERPRETED else {"gelu_tanh": "gelu_tanh_approximate"}
_LINE = 128  # bytes that a request brings into the L2 cache
OutOfResources = triton.runtime.errors.OutOfResources  # a launch that asks for more than the card has


@lru_cache
def supports_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; likewise."""
    return 1 << (n - 1).bit_length()


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments for a launch: DEPENDENT for the kernel, launch_pdl for Triton."""
    dependent = supports_dependent_launch(device)
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}


@triton.jit
def start_dependents(EARLY: tl.constexpr):
    """Lets the next kernel start at once; `wait_for_inputs` with EARLY has still to follow."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr, EARLY: tl.constexpr = False):
    """What stands before it may run while the kernel before this one still computes."""
    if DEPENDENT:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()


@triton.jit
def place_of_tile(tile, num_across, num_along, GROUP: tl.constexpr):
    """(across, along) of the tile-th tile: groups of GROUP of them across, each from its beginning to its end.  Tiles
    that run at the same time are then neighbours, and share most of what they read."""
    per_group = GROUP * num_along
    first = tile // per_group * GROUP
    width = tl.minimum(num_across - first, GROUP)
    place = tile % per_group
    return first + place % width, place // width


@triton.jit
def load_epilogue(bias_ptr, scale_ptr, rows, inside, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """What a product's sums of `rows` will need: bias and scale, [rows] each."""
    return load_vector(bias_ptr, rows, inside, HAS_BIAS), load_vector(scale_ptr, rows, inside, HAS_SCALE)


@triton.jit
def load_vector(ptr, places, inside, PRESENT: tl.constexpr):
    """The vector's values at `places`, zeros of float32 where there is no vector.  Small as it is, it comes from far:
    asked for before the kernel waits, it costs nothing; after the sums, all of a trip to the memory.  It stays in its
    own type, which may take half of the registers, until it meets float32 values."""
    if PRESENT:
        return tl.load(ptr + places, mask=inside, other=0.0)
    else:
        return tl.zeros(places.shape, tl.float32)


@triton.jit
def fetch_lines(ptr, offsets):
    """Asks for the 128-byte lines at `offsets` (int64, in bytes) behind `ptr` to be brought into the L2 cache: one
    instruction for all lanes of a warp, where the bulk copy engine's takes a turn for each."""
    addresses = ptr.to(tl.int64, bitcast=True) + offsets
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def fetch_share(ptr, num_lines, program, SHARE: tl.constexpr):
    """A program's part in fetching `num_lines` lines from `ptr` on: SHARE of them, a power of two."""
    lines = program * SHARE + tl.arange(0, SHARE)
    fetch_lines(ptr, tl.minimum(lines, num_lines - 1).to(tl.int64) * 128)


@dataclass(frozen=True)
class Fetch:
    """What programs beside a kernel's own bring into the L2 cache while the memory has nothing else to do."""

    weight: torch.Tensor
    num_lines: int
    num_programs: int
    share: int


def fetch_before(weight: torch.Tensor | None, spare: torch.Tensor, *, multiple: int = 1) -> Fetch:
    """The end of what a kernel to come will read, since its first programs fetch their own weights.  weight: None for
    nothing, with `spare` as the address.  multiple: of how many programs there have to be.

    5 MB were best on an H100 for one row of every model (docs/performance.md): more keeps the memory from what the
    products between ask for.
    """
    if weight is None or weight.nbytes < _LINE or not supports_dependent_launch(weight.device):
        return Fetch(spare, 0, 0, 0)
    num_lines = min(weight.nbytes, 5 << 20) // _LINE
    end = weight.view(-1).view(torch.uint8)[-num_lines * _LINE :]
    num_programs = cdiv(cdiv(num_lines, 1024), multiple) * multiple
    return Fetch(end, num_lines, num_programs, next_power_of_2(cdiv(num_lines, num_programs)))


@triton.jit
def _approximate_tanh(x):
    """tanh of float32 by the card's own instruction, with a relative error of 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An `Activation.function` of float32 values, or one of `APPROXIMATIONS`."""
    if ACTIVATION == "gelu_tanh_approximate":
        half = 0.5 * x
        y = half + half * _approximate_tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "gelu_erf":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    elif ACTIVATION == "squared_relu":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "none")
        y = x
    return y


@triton.jit
def to_steps(x, dtype_ptr):
    """float32 values in units of a scale, saturated and rounded to the type behind `dtype_ptr`: int8 or float8e4nv."""
    dtype: tl.constexpr = dtype_ptr.dtype.element_ty
    # Adding 1.5 * 2^23 units rounds to a multiple of the unit, half to even.  The lowest byte of the sum is then the
    # integer, without a conversion, which takes as long as four additions.
    if dtype == tl.int8:
        x = tl.minimum(tl.maximum(x, -128.0), 127.0)
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        # FP8 has three bits behind the first one, and below 2^-6 multiples of 2^-9.
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.maximum(power, 0.015625) * 1572864.0
        return ((x + magic) - magic).to(dtype)
