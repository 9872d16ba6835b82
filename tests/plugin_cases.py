"""Inputs for every plugin, what a build would embed for them, and what the kernel has to compute.

As a program: compiles those whose name has one of the words it is given for a compute capability, and prints the
contract of each as a line of JSON.  In Triton's interpreter, in which tests without a GPU run, nothing can be compiled.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engines import relative_error

from gpt.engine.trt_evaluator_plugins import PLUGINS
from gpt.engine.trt_plugin import Plugin
from gpt.engine.trt_plugin_api import DataType, TensorDesc, without_libraries
from gpt.engine.trt_plugin_kernels import Attention, Int8Gemm, Lookup, Norm, QuantizeRows, WeightOnlyGemm
from gpt.engine.trt_plugins import attributes, definition

_TYPES = {
    torch.float32: DataType.FLOAT,
    torch.float16: DataType.HALF,
    torch.bfloat16: DataType.BF16,
    torch.int8: DataType.INT8,
    torch.int32: DataType.INT32,
}
NAMES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
# Of the result, relative L2: what is rounded to the type once, and products whose operands are.
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    name: str
    plugin: Plugin
    inputs: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    def descriptions(self) -> list[TensorDesc]:
        return [TensorDesc(tensor.shape, _TYPES[tensor.dtype]) for tensor in self.inputs]

    def outputs(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each."""
        made = self.plugin.outputs([tensor.shape for tensor in self.inputs], self._types())
        dtypes = {value.name: key for key, value in _TYPES.items()}
        return [(tuple(output.shape), dtypes[output.dtype]) for output in made]

    def empty_outputs(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Memory beside `inputs`, or theirs where the plugin writes in place."""
        return [
            inputs[self.plugin.aliases[index]]
            if index in self.plugin.aliases
            else torch.full(shape, 77, dtype=dtype, device=inputs[0].device)
            for index, (shape, dtype) in enumerate(self.outputs())
        ]

    def _types(self) -> list[str]:
        return [_TYPES[tensor.dtype].name for tensor in self.inputs]

    def interpreted(self, tactic: int) -> list[torch.Tensor]:
        """The outputs of the kernel as it would be compiled and launched, by Triton's interpreter."""
        types = [*self._types(), *(_TYPES[dtype].name for _, dtype in self.outputs())]
        call = self.plugin.call(types, tactic)
        shapes = [tensor.shape for tensor in self.inputs]
        launch = self.plugin.launch(shapes, types, tactic, lambda size, block: -(-size // block))
        inputs = [tensor.clone() for tensor in self.inputs]
        outputs = self.empty_outputs(inputs)
        passed = dict(zip(call.types, (*inputs, *launch.sizes, *outputs), strict=True))
        call.kernel[tuple(launch.grid)](**passed, **call.constants)
        return outputs

    def kernels(self) -> dict[int, tuple[Any, ...]]:
        """What TensorRT would embed, by tactic: name, PTX, launch parameters, sizes."""
        found: Any = definition(without_libraries(), type(self.plugin))
        return dict(found.kernels(self.descriptions(), attributes(self.plugin)))

    def expected(self) -> tuple[torch.Tensor, ...]:
        return PLUGINS[self.plugin.name](attributes(self.plugin), *(tensor.clone() for tensor in self.inputs))


def cases(capability: int) -> Iterator[Case]:
    """Sizes that are no multiples of a tile, and those of a real model."""
    torch.manual_seed(0)
    for dtype in BOUNDS:
        label = str(dtype).removeprefix("torch.")
        yield _attention(f"attention prompt {label}", capability, dtype, (3, 3, 64), (0, 0), 37, rotary_dim=0)
        yield _attention(f"attention step int8 {label}", capability, dtype, (3, 3, 64), (37, 5, 0), 1, int8=True)
        yield _weight_only(f"int8 weights {label}", capability, dtype, (7, 200, 72), 8, 0)
        yield _weight_only(f"int4 weights in groups {label}", capability, dtype, (70, 192, 104), 4, 64)
    half = torch.float16
    yield _attention("attention grouped, behind a past, int8", capability, half, (6, 2, 40), (70, 9), 19, int8=True)
    yield _attention("attention multi-query", capability, half, (8, 1, 128), (0, 0), 21, rotary_dim=32)
    yield _attention("attention head size 256", capability, torch.float32, (2, 2, 256), (50, 3), 1)
    yield _weight_only("int4 weights by row", capability, half, (3, 200, 72), 4, 0)
    for tokens, num_in, num_out in ((5, 200, 72), (150, 768, 300)):
        x = torch.randint(-127, 128, (1, tokens, num_in), dtype=torch.int8)
        weight = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8)
        factors = torch.rand(num_out) * 1e-3
        plugin = Int8Gemm(capability, num_in, num_out, "gelu_tanh", True, "HALF")
        inputs = (x, torch.rand(1, tokens) * 1e-2, weight, factors, torch.randn(num_out).half())
        yield Case(f"int8 product of {tokens} rows", plugin, inputs, half)
    for kind, dtype in (("layernorm", half), ("rmsnorm", torch.float32)):
        x, weight, bias = torch.randn(2, 5, 200).to(dtype) * 3 + 1, torch.randn(200), torch.randn(200)
        norm = Norm(capability, kind, 200, 1e-5, NAMES[dtype])
        yield Case(f"{kind} {dtype}", norm, (x, weight, bias), dtype)
        rows = QuantizeRows(capability, kind, 200, 1e-5, kind == "layernorm", kind == "rmsnorm")
        smoother, scale = 0.5 + torch.rand(200), torch.tensor([0.03])
        yield Case(f"{kind} and integers {dtype}", rows, (x, weight, bias, smoother, scale), dtype)
    x = torch.randn(4, 1001).half()
    yield Case("integers", QuantizeRows(capability, "none", 1001, 0.0, False, False), (x,) * 5, half)
    words = torch.randn(91, 1200).half()
    yield Case("lookup", Lookup(capability, 1200), (torch.tensor([[0, 90, 7]], dtype=torch.int32), words), half)


def _attention(
    name: str,
    capability: int,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    past: tuple[int, ...],
    num_tokens: int,
    *,
    rotary_dim: int = 24,
    int8: bool = False,
) -> Case:
    num_heads, num_kv_heads, size = heads
    slots, batch = 96, len(past)
    qkv = torch.randn(batch, num_tokens, (num_heads + 2 * num_kv_heads) * size).to(dtype)
    shape = (batch, num_kv_heads, slots, size)
    caches = [
        torch.randint(-127, 128, shape, dtype=torch.int8) if int8 else torch.randn(shape).to(dtype) for _ in range(2)
    ]
    scale = torch.tensor([0.0107, 0.0193])
    angles = torch.rand(slots, max(rotary_dim, 2) // 2) * 6
    plugin = Attention(capability, num_heads, num_kv_heads, size, slots, rotary_dim, int8, 0.3)
    inputs = (qkv, torch.tensor(past, dtype=torch.int32), *caches, scale, angles.cos(), angles.sin())
    return Case(name, plugin, inputs, dtype)


def _weight_only(
    name: str, capability: int, dtype: torch.dtype, sizes: tuple[int, int, int], bits: int, group: int
) -> Case:
    tokens, num_in, num_out = sizes
    weight = torch.randint(-128, 128, (num_out, num_in * bits // 8), dtype=torch.int8)
    scale = (torch.rand((num_out, num_in // group) if group else (num_out,)) * 0.01 + 0.001).to(dtype)
    plugin = WeightOnlyGemm(capability, num_in, num_out, "gelu_erf", True, NAMES[dtype], bits, group)
    return Case(
        name, plugin, (torch.randn(tokens, num_in).to(dtype), weight, scale, torch.randn(num_out).to(dtype)), dtype
    )


def contract(case: Case) -> dict[str, Any]:
    """What the launch of each tactic consists of; compiling has already checked that there is nothing else."""
    from gpt.kernels.aot import ptx_parameters

    tactics = {}
    for tactic, (name, ptx, launch, sizes) in case.kernels().items():
        tactics[tactic] = {
            "kernel": name,
            "parameters": ptx_parameters(ptx, name),
            "target": re.findall(r"\.target (\w+)", ptx),
            "sizes": [size.value for size in sizes],
            **launch.values(),
        }
    return {"case": case.name, "plugin": case.plugin.name, "inputs": len(case.inputs), "tactics": tactics}


def largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Relative L2 of float outputs; raises AssertionError for integers further away than one step."""
    errors = [0.0]
    for one, other in zip(found, expected, strict=True):
        if one.dtype != torch.int8:
            errors.append(relative_error(one, other))
            continue
        distance = (one.int() - other.int()).abs()
        assert int(distance.max()) <= 1
        assert int((distance > 0).sum()) <= max(2, one.numel() // 1000)  # those in the middle go to either side
    return max(errors)


if __name__ == "__main__":
    for each in cases(int(sys.argv[1])):
        if any(word in each.name for word in sys.argv[2:]):
            print(json.dumps(contract(each)), flush=True)
