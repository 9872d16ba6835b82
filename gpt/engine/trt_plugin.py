"""What a TensorRT plugin of this package is; those there are stand in gpt.engine.trt_plugin_kernels.

A plugin is a frozen record of its attributes.  It names its input tensors, says what comes out of them, and for each
tactic (1, 2, ...: sizes of tiles, of which TensorRT measures the best) which kernel is compiled with what, and how many
programs of it a shape takes.  Expressions of sizes may be numbers or TensorRT's symbols: only +, -, *, // and the
`ceil_div` that is given are used, with the symbol on the left.

A kernel's parameters stand in the order in which TensorRT passes arguments: input tensors, sizes, output tensors.  An
input that an attribute switches off is any other tensor of the plugin; the kernel does not touch it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from gpt.kernels.aot import KernelCall

# Triton's names of types by TensorRT's.  int4 weights travel as bytes.
_TRITON_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "i8", "INT32": "i32"}
Expression = Any
Shape = Sequence[Expression]
CeilDiv = Callable[[Expression, int], Expression]


@dataclass(frozen=True)
class Output:
    """dtype: TensorRT's name."""

    dtype: str
    shape: tuple[Expression, ...]


@dataclass(frozen=True)
class Launch:
    """Programs along x, y and z, and the sizes that are passed."""

    grid: tuple[Expression, ...]
    sizes: tuple[Expression, ...] = ()


@dataclass(frozen=True)
class Plugin(ABC):
    """capability: the compute capability that kernels are compiled for, 80, 90, ...

    Types are TensorRT's names; those of inputs, or of inputs and outputs where a kernel is compiled.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    num_outputs: ClassVar[int] = 1
    num_tactics: ClassVar[int] = 1
    aliases: ClassVar[dict[int, int]] = {}  # output -> the input in whose memory it is
    capability: int

    @abstractmethod
    def outputs(self, shapes: Sequence[Shape], types: Sequence[str]) -> list[Output]:
        """What comes out of inputs of these shapes and types."""

    @abstractmethod
    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        """The kernel for these types, and its constants."""

    @abstractmethod
    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        """How many programs of it, for inputs of these shapes."""

    def parameter_types(
        self, types: Sequence[str], outputs: Sequence[str], sizes: Sequence[str] = ()
    ) -> dict[str, str]:
        """Parameter of a kernel -> Triton's type.  types: of the inputs, then of `outputs`."""
        pointers, count = [f"*{_TRITON_TYPES[dtype]}" for dtype in types], len(self.inputs)
        names = [f"{name}_ptr" for name in (*self.inputs, *outputs)]
        names[count:count], pointers[count:count] = sizes, ["i32"] * len(sizes)
        return dict(zip(names, pointers, strict=True))


def num_rows(shape: Shape) -> Expression:
    """The product of all dimensions but the last."""
    rows = shape[0]
    for size in tuple(shape)[1:-1]:
        rows = rows * size
    return rows


def without(*parameters: str) -> dict[str, object]:
    """Pointers that no tensor stands for."""
    return dict.fromkeys(parameters)
