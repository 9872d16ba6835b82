"""Adds layers to a TensorRT network and finds out at once when the library disagrees.

Left alone, TensorRT reports most mistakes late or never: a wrong layer is returned as if it were right until somebody
reads its shape, and a refused setter keeps the old value without an exception.  Here every layer's shape is read, every
setting that can be refused is read back, and the library's own messages go into the error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from typing import Any

import torch

from gpt.dtypes import dtype_name, torch_dtype
from gpt.engine.trt_plugin import Plugin
from gpt.engine.trt_plugins import attributes, definition
from gpt.errors import EngineError

# Of a collective: all ranks in their order, and no rank that is special.
_ALL_RANKS: tuple[int, ...] = ()
_NO_ROOT = -1


class Layers:
    """The layers used here, by what they do.  Tensors are the library's ITensor; constants come as torch tensors.

    side_table: the values of every constant by the name of its tensor.  It keeps the memory alive that the network
    refers to (TensorRT copies weights only while it builds), and answers for the types that cannot be read back from a
    network.

    operation: the operation of gpt.network.ops that is being lowered; every layer carries it in its metadata.
    """

    operation = ""

    def __init__(self, trt: Any, network: Any, recorder: Any):
        self.trt = trt
        self.network = network
        self.recorder = recorder
        self.side_table: dict[str, torch.Tensor] = {}
        self._constants: dict[tuple[int, tuple[int, ...], torch.dtype], Any] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Any:
        tensor = self.network.add_input(name, self.library_dtype(torch_dtype(dtype)), tuple(shape))
        return self._checked(tensor, f"input {name}")

    def output(self, x: Any, name: str) -> None:
        self.name(x, name)
        self.network.mark_output(x)

    def constant(self, values: torch.Tensor, shape: Sequence[int] | None = None) -> Any:
        """`values` as a constant of `shape` (theirs by default); the same memory in the same shape is one constant."""
        values = values.contiguous()
        shape = tuple(values.shape if shape is None else shape)
        key = (values.data_ptr(), shape, values.dtype)
        if key not in self._constants:
            weights = self.trt.Weights(self.library_dtype(values.dtype), values.data_ptr(), values.numel())
            result = self._add(self.network.add_constant(shape, weights), "constant")
            self.side_table[result.name] = values
            self._constants[key] = result
        return self._constants[key]

    def packed_int4(self, values: torch.Tensor) -> Any:
        """An int4 constant [out, in] from uint8 [out, in / 2], whose low four bits are the even input."""
        values = values.contiguous()
        shape = (values.shape[0], 2 * values.shape[1])
        weights = self.trt.Weights(self.trt.int4, values.data_ptr(), 2 * values.numel())
        result = self._add(self.network.add_constant(shape, weights), "int4 constant")
        self.side_table[result.name] = values
        return result

    def scalar(self, value: float, dtype: torch.dtype, rank: int) -> Any:
        """A constant that broadcasts against tensors of `rank` dimensions."""
        return self.constant(torch.full((1,) * rank, value, dtype=dtype))

    def elementwise(self, a: Any, b: Any, operation: str) -> Any:
        """operation: a name of ElementWiseOperation."""
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self._add(self.network.add_elementwise(a, b, kind), operation)

    def activation(self, x: Any, function: str) -> Any:
        """function: a name of ActivationType."""
        return self._add(self.network.add_activation(x, getattr(self.trt.ActivationType, function)), function)

    def matmul(self, a: Any, b: Any, *, transpose_b: bool = False, name: str | None = None) -> Any:
        """a @ b, or a @ b.T; both of the same rank and type."""
        none, transposed = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        layer = self.network.add_matrix_multiply(a, none, b, transposed if transpose_b else none)
        return self._add(layer, "matrix product", name)

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        target = self.library_dtype(dtype)
        return x if x.dtype == target else self._add(self.network.add_cast(x, target), "cast")

    def shuffle(
        self, x: Any, shape: Sequence[int] | None = None, *, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> Any:
        """Transposes by `before`, reshapes to `shape` (0 keeps a size, one -1 is worked out), transposes by `after`."""
        layer = self.network.add_shuffle(x)
        if before:
            layer.first_transpose = tuple(before)
        if shape is not None:
            layer.reshape_dims = tuple(shape)
        if after:
            layer.second_transpose = tuple(after)
        return self._add(layer, "shuffle")

    def gather(self, x: Any, indices: Any, axis: int, num_elementwise_dims: int = 0) -> Any:
        layer = self.network.add_gather(x, indices, axis)
        layer.num_elementwise_dims = num_elementwise_dims
        return self._add(layer, "gather")

    def shape_of(self, x: Any) -> Any:
        """int64 [rank of x]."""
        return self._add(self.network.add_shape(x), "shape")

    def concatenate(self, parts: Sequence[Any], axis: int) -> Any:
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._add(layer, "concatenation")

    def slice(self, x: Any, start: Sequence[int], size: Any) -> Any:
        """x from `start`, of the sizes in the shape tensor `size`."""
        rank = len(start)
        layer = self.network.add_slice(x, tuple(start), (0,) * rank, (1,) * rank)
        layer.set_input(2, size)
        return self._add(layer, "slice")

    def select(self, condition: Any, if_true: Any, if_false: Any) -> Any:
        return self._add(self.network.add_select(condition, if_true, if_false), "select")

    def softmax(self, x: Any) -> Any:
        """Over the last axis."""
        layer = self.network.add_softmax(x)
        layer.axes = 1 << (len(x.shape) - 1)
        return self._add(layer, "softmax")

    def layer_norm(self, x: Any, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, name: str) -> Any:
        """Over the last axis, in the type of x; weight and bias [E] are cast to it."""
        rank = len(x.shape)
        dtype = self.torch_type(x)
        shape = (1,) * (rank - 1) + tuple(weight.shape)
        scale, shift = (self.constant(values.to(dtype), shape) for values in (weight, bias))
        layer = self.network.add_normalization_v2(x, scale, shift, 1 << (rank - 1))
        layer.epsilon = epsilon
        return self._add(layer, "layer normalization", name)

    def rms_norm(self, x: Any, weight: torch.Tensor, epsilon: float) -> Any:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in the type of x; TensorRT has no layer for it."""
        rank = len(x.shape)
        dtype = self.torch_type(x)
        average, axes = self.trt.ReduceOperation.AVG, 1 << (rank - 1)
        squares = self.elementwise(x, x, "PROD")
        mean = self._add(self.network.add_reduce(squares, average, axes, True), "mean")
        shifted = self.elementwise(mean, self.scalar(epsilon, dtype, rank), "SUM")
        root = self._add(self.network.add_unary(shifted, self.trt.UnaryOperation.SQRT), "square root")
        scale = self.constant(weight.to(dtype), (1,) * (rank - 1) + tuple(weight.shape))
        return self.elementwise(self.elementwise(x, root, "DIV"), scale, "PROD")

    def row_maximum(self, x: Any) -> Any:
        """max |x| over the last axis, which stays with size 1."""
        magnitudes = self._add(self.network.add_unary(x, self.trt.UnaryOperation.ABS), "magnitude")
        axes = 1 << (len(x.shape) - 1)
        return self._add(self.network.add_reduce(magnitudes, self.trt.ReduceOperation.MAX, axes, True), "maximum")

    def quantize(self, x: Any, scale: Any, dtype: torch.dtype) -> Any:
        """x / scale, rounded to the nearest (ties to even) and saturated: int8, or float8_e4m3fn.

        scale: a tensor of no dimensions, or one value per row of x, [..., 1].
        """
        layer = self.network.add_quantize(x, scale, self.library_dtype(dtype))
        self._check_taken(layer, "quantization")
        self._set_block(layer, x, scale)
        return self._add(layer, "quantization")

    def dequantize(self, x: Any, scale: Any, dtype: torch.dtype, *, axis: int | None = None) -> Any:
        """x * scale in `dtype`.

        scale: a tensor of no dimensions, one value per index of `axis`, one per row of x, [..., 1], or, for int4
        constants [out, in], one per group, [out, groups].
        """
        layer = self.network.add_dequantize(x, scale, self.library_dtype(dtype))
        self._check_taken(layer, "dequantization")
        if axis is not None:
            layer.axis = axis
        if x.dtype != self.trt.int4:  # whose groups follow from the shapes; setting them fails
            self._set_block(layer, x, scale)
        return self._add(layer, "dequantization")

    def _set_block(self, layer: Any, x: Any, scale: Any) -> None:
        rank = len(scale.shape)
        if rank > 1:
            layer.block_shape = (1,) * (rank - 1) + (x.shape[-1],)

    def rotary(self, x: Any, cos: Any, sin: Any, positions: Any, rotary_dim: int) -> Any:
        """Rotate-half on the first `rotary_dim` values.

        x [B, heads, S, D], cos and sin [T, rotary_dim / 2], positions [B, S].
        """
        layer = self.network.add_rotary_embedding(x, cos, sin, False, rotary_dim)
        if layer is not None:
            layer.set_input(3, positions)
        return self._add(layer, "rotary embedding")

    def cache_update(self, cache: Any, update: Any, write_index: Any) -> Any:
        """`cache` [B, G, T, D] with `update` [B, G, S, D] written from slot write_index[b] on, in place."""
        layer = self.network.add_kv_cache_update(cache, update, write_index, self.trt.KVCacheMode.LINEAR)
        return self._add(layer, "cache update")

    def attention(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """softmax(q k^T) v, not scaled: q [B, H, S, D], k and v [B, G, T, D], mask bool [B, 1, S, T] -> as q."""
        kinds = self.trt.AttentionNormalizationOp, self.trt.CausalMaskKind
        attention = self.network.add_attention_v2(q, k, v, kinds[0].SOFTMAX, kinds[1].NONE)
        self._check_taken(attention, "attention")
        # Without a fused kernel for the type or head size (float32 has none) the library may write the same out.
        attention.decomposable = True
        attention.mask = mask
        if attention.mask is None or attention.mask.name != mask.name:  # a refused mask raises nothing
            raise self._error("the attention layer did not take its mask")
        return self._add(attention, "attention")

    def all_reduce(self, x: Any, num_ranks: int) -> Any:
        """The sum over the ranks, in the type of x."""
        return self._collective(x, "ALL_REDUCE", "SUM", num_ranks)

    def all_gather(self, x: Any, num_ranks: int) -> Any:
        """The ranks' parts along the last axis; the library joins along the first one, so x is turned before and
        after."""
        last = len(x.shape) - 1
        turned = self.shuffle(x, before=(last, *range(last)))
        joined = self._collective(turned, "ALL_GATHER", "NONE", num_ranks)
        return self.shuffle(joined, before=(*range(1, last + 1), 0))

    def _collective(self, x: Any, operation: str, reduction: str, num_ranks: int) -> Any:
        operations, reductions = self.trt.CollectiveOperation, self.trt.ReduceOperation
        layer = self.network.add_dist_collective(
            x, getattr(operations, operation), getattr(reductions, reduction), _NO_ROOT, _ALL_RANKS
        )
        self._check_taken(layer, operation)
        layer.num_ranks = num_ranks  # it settles the shape
        facts = {"collective": operation, "reduction": reduction, "root": _NO_ROOT, "groups": list(_ALL_RANKS)}
        return self._add(layer, operation, facts=facts)

    def plugin(self, plugin: Plugin, *inputs: Any) -> list[Any]:
        """The outputs of a plugin.  Which one it is stands in the layer's metadata, as do outputs that live in inputs.

        Raises EngineError where the library refuses the layer.
        """
        values = attributes(plugin)
        layer = self.network.add_plugin(definition(self.trt, type(plugin))(*inputs, **values), aot=True)
        self._check_taken(layer, plugin.name)
        facts = {"plugin": plugin.name, "attributes": values, "aliases": plugin.aliases}
        self._add(layer, plugin.name, facts=facts)
        return [self._checked(layer.get_output(index), plugin.name) for index in range(plugin.num_outputs)]

    def name(self, x: Any, name: str) -> Any:
        """Gives the tensor `name`; a name in use is refused in silence by the library, and here with an error."""
        previous = x.name
        x.name = name
        if x.name != name:
            raise self._error(f"a tensor could not be named {name}")
        if previous in self.side_table:
            self.side_table[name] = self.side_table.pop(previous)
        return x

    def library_dtype(self, dtype: torch.dtype) -> Any:
        return self.trt.fp8 if dtype == torch.float8_e4m3fn else getattr(self.trt, dtype_name(dtype))

    def torch_type(self, x: Any) -> torch.dtype:
        return to_torch_dtype(self.trt, x.dtype)

    def _add(self, layer: Any, what: str, name: str | None = None, facts: Dict[str, object] | None = None) -> Any:
        """The layer's first output.  facts: what cannot be read back from the layer."""
        self._check_taken(layer, what)
        layer.metadata = json.dumps({"operation": self.operation, **(facts or {})})
        if name is not None:
            layer.name = name
            if layer.name != name:
                raise self._error(f"a layer could not be named {name}")
        return self._checked(layer.get_output(0), what)

    def _checked(self, tensor: Any, what: str) -> Any:
        self._check_taken(tensor, what)
        try:
            _ = tensor.shape  # reading it is what makes the library check the layer
        except RuntimeError as error:
            raise self._error(f"TensorRT refused a layer: {what}") from error
        self._check_taken(tensor, what)
        return tensor

    def _check_taken(self, thing: Any, what: str) -> None:
        if thing is None or self.recorder.messages:
            raise self._error(f"TensorRT refused a layer: {what}")

    def _error(self, what: str) -> EngineError:
        return EngineError(
            what, found=list(self.recorder.messages) or None, hint="this model may work with --backend torch"
        )


def to_torch_dtype(trt: Any, dtype: Any) -> torch.dtype:
    """The library's DataType as torch's."""
    names = ("float32", "float16", "bfloat16", "int32", "int64", "int8", "bool")
    others = {trt.fp8: torch.float8_e4m3fn, trt.int4: torch.int8}  # torch has no int4
    return others[dtype] if dtype in others else next(getattr(torch, n) for n in names if getattr(trt, n) == dtype)
