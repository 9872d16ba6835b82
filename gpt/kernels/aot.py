"""Compiles a kernel for a named compute capability, with or without a GPU, into what another program can launch.

What TensorRT embeds in an engine is PTX, a kernel name, the size of a launch and a list of arguments.  A kernel that
needs more than that is refused here, where the reason is known: scratch memory that the launcher would have to provide,
tensor descriptors made on the host, clusters, a launch that waits for its predecessor, more shared memory than every
kernel may have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpt.errors import ConfigError, Problems
from gpt.kernels.launch import INTERPRETED

# What a kernel may use without its launcher asking for more.
MAX_SHARED_BYTES = 48 << 10
# Triton ends every parameter list with pointers to scratch memory, which nobody has to provide for these kernels.
_MOST_SCRATCH_POINTERS = 2
_PTX_TYPES = {"*": "u64", "i32": "u32"}
# Instructions of tensor descriptors (TMA), tensor memory, clusters and dependent launches.
_FORBIDDEN = ("tensormap", "cp.async.bulk.tensor", "tcgen05", "barrier.cluster", "griddepcontrol")


@dataclass(frozen=True)
class KernelCall:
    """A kernel with everything that is fixed when it is compiled.

    types: of the parameters that are passed, in the kernel's order: "*fp16", "i32", ...  constants: of all others.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class CompiledKernel:
    """num_scratch_pointers: parameters behind `types`, for which null is passed."""

    name: str
    ptx: str
    num_threads: int
    shared_bytes: int
    types: tuple[str, ...]
    num_scratch_pointers: int


def compile_kernel(call: KernelCall, capability: int) -> CompiledKernel:
    """capability: 80, 89, 90, 100, ...

    Raises ConfigError in Triton's interpreter, which compiles nothing, and for kernels that need more than a launch.
    """
    if INTERPRETED:
        raise ConfigError("kernels cannot be compiled in Triton's interpreter", hint="unset TRITON_INTERPRET")
    names = call.kernel.arg_names
    passed = [name for name in names if name in call.types]
    if passed != list(call.types):
        raise ConfigError(
            f"{call.kernel.__name__}: the parameters do not stand in this order",
            found=", ".join(call.types),
            allowed=", ".join(passed),
        )
    source = ASTSource(
        fn=call.kernel,
        signature={name: call.types.get(name, "constexpr") for name in names},
        constexprs=dict(call.constants),
        # Tensors begin at multiples of 16 bytes; Triton then reads them in large pieces.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if call.types.get(name, "").startswith("*")
        },
    )
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    types = tuple(call.types.values())
    parameters = ptx_parameters(ptx, metadata.name)
    problems = Problems()
    if metadata.shared > MAX_SHARED_BYTES:
        problems.add(f"{metadata.shared} bytes of shared memory, allowed: {MAX_SHARED_BYTES}")
    for name in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, name, 0):
            problems.add(f"{name} {getattr(metadata, name)}, allowed: 0")
    if metadata.num_ctas != 1:
        problems.add(f"clusters of {metadata.num_ctas} programs, allowed: 1")
    problems.items += [f"{word} in its code" for word in _FORBIDDEN if word in ptx]
    expected = [_PTX_TYPES["*" if kind.startswith("*") else kind] for kind in types]
    scratch = parameters[len(types) :]
    if parameters[: len(types)] != expected or set(scratch) - {"u64"} or len(scratch) > _MOST_SCRATCH_POINTERS:
        problems.add(f"parameters {', '.join(parameters)}, allowed: {', '.join(expected)} and scratch pointers")
    problems.raise_if_any(ConfigError, f"{metadata.name} cannot be embedded")
    return CompiledKernel(metadata.name, ptx, 32 * metadata.num_warps, metadata.shared, types, len(scratch))


def ptx_parameters(ptx: str, name: str) -> list[str]:
    """The types of an entry's parameters in their order: u64 for pointers, u32.  Raises ConfigError where `name` is not
    the only entry."""
    entries = re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if [entry for entry, _ in entries] != [name]:
        raise ConfigError("the code does not have one entry", found=[entry for entry, _ in entries], allowed=name)
    return re.findall(r"\.param\s+\.(\w+)", entries[0][1])
