"""What each TensorRT layer computes, as its documentation says, in PyTorch.

A function takes the running evaluation, the layer cast to its class, and its inputs (None where one is absent) and
returns its output in any float type.  Settings that are not implemented are refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gpt.comm import Communicator
from gpt.engine.trt_evaluator_plugins import PLUGINS
from gpt.errors import EngineError


@dataclass
class Evaluation:
    """One walk: tensors by name so far, unreadable constants, the way to the other ranks, and what attention's first
    half leaves its second."""

    trt: Any
    values: dict[str, torch.Tensor]
    side_table: Dict[str, torch.Tensor]
    comm: Communicator
    attention_inputs: dict[str, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)


def _demand(condition: bool, layer: Any, what: str) -> None:
    if not condition:
        raise EngineError(f"the evaluator does not know this setting: {what}", found=layer.name)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.is_floating_point() else x


def _constant(evaluation: Evaluation, layer: Any) -> torch.Tensor:
    weights = layer.weights
    if isinstance(weights, np.ndarray):
        return torch.from_numpy(np.array(weights)).reshape(tuple(layer.shape))
    values = evaluation.side_table[layer.get_output(0).name]  # NumPy has no such type
    if layer.get_output(0).dtype == evaluation.trt.int4:
        both = values.view(torch.int8)  # two in a byte, the lower four bits first
        values = torch.stack([(both << 4) >> 4, both >> 4], -1)
    _demand(values.numel() == weights.size, layer, "a constant of another size than the table beside the network has")
    return values.reshape(tuple(layer.shape))


def _gather(evaluation: Evaluation, layer: Any, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    _demand(layer.mode == evaluation.trt.GatherMode.DEFAULT, layer, "gather mode")
    axis, shared = layer.axis, layer.num_elementwise_dims
    if shared == 0:
        picked = x.index_select(axis, indices.flatten().long())
        return picked.unflatten(axis, indices.shape) if indices.dim() != 1 else picked
    _demand(shared == 1 and axis == 1 and indices.dim() in (1, 2), layer, "gather with elementwise dimensions")
    rows = torch.arange(x.shape[0])
    return x[rows if indices.dim() == 1 else rows[:, None], indices.long()]


def _elementwise(evaluation: Evaluation, layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    functions: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "SUM": torch.add,
        "PROD": torch.mul,
        "SUB": torch.sub,
        "DIV": torch.div,
        "GREATER": torch.gt,
        "LESS": torch.lt,
        "EQUAL": torch.eq,
        "AND": torch.logical_and,
        "MIN": torch.minimum,
        "MAX": torch.maximum,
    }
    _demand(layer.op.name in functions, layer, layer.op.name)
    return functions[layer.op.name](_wide(a), _wide(b))


def _activation(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "RELU": F.relu,
        "GELU_ERF": F.gelu,
        "GELU_TANH": lambda t: F.gelu(t, approximate="tanh"),
        "SIGMOID": torch.sigmoid,
        "TANH": torch.tanh,
    }
    _demand(layer.type.name in functions, layer, layer.type.name)
    return functions[layer.type.name](_wide(x))


def _matrix_multiply(evaluation: Evaluation, layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def operand(x: torch.Tensor, operation: Any) -> torch.Tensor:
        kinds = evaluation.trt.MatrixOperation
        _demand(operation in (kinds.NONE, kinds.TRANSPOSE), layer, str(operation))
        return _wide(x).mT if operation == kinds.TRANSPOSE else _wide(x)

    return operand(a, layer.op0) @ operand(b, layer.op1)


def _shuffle(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.permute(list(layer.first_transpose)[: x.dim()])
    sizes = layer.reshape_dims
    if sizes is not None and len(sizes) >= 0:
        kept = [x.shape[i] if size == 0 and layer.zero_is_placeholder else size for i, size in enumerate(sizes)]
        x = x.reshape(kept)
    return x.permute(list(layer.second_transpose)[: x.dim()])


def _cast(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x  # every result is rounded to its declared type


def _shape(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.shape)


def _concatenation(evaluation: Evaluation, layer: Any, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, layer.axis)


def _slice(evaluation: Evaluation, layer: Any, x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Inputs 1, 2 and 3, where present, stand for start, shape and stride."""
    _demand(layer.mode == evaluation.trt.SampleMode.STRICT_BOUNDS, layer, "slice mode")
    fixed = (layer.start, layer.shape, layer.stride)
    given = (*tensors, None, None, None)[:3]
    start, shape, stride = (
        [int(n) for n in (dims if tensor is None else tensor)] for tensor, dims in zip(given, fixed, strict=True)
    )
    _demand(all(step == 1 for step in stride), layer, "slice stride")
    for axis, (first, size) in enumerate(zip(start, shape, strict=True)):
        x = x.narrow(axis, first, size)
    return x


def _select(
    evaluation: Evaluation, layer: Any, condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    return torch.where(condition, a, b)


def _softmax(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(_wide(x), _axis(layer))


def _normalization(
    evaluation: Evaluation, layer: Any, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    _demand(layer.num_groups == 1, layer, "normalization in groups")
    axis = _axis(layer)
    centered = _wide(x) - _wide(x).mean(axis, keepdim=True)
    variance = centered.square().mean(axis, keepdim=True)
    return centered / torch.sqrt(variance + layer.epsilon) * _wide(scale) + _wide(bias)


def _reduce(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    kinds = evaluation.trt.ReduceOperation
    _demand(layer.op in (kinds.AVG, kinds.MAX), layer, str(layer.op))
    reduce = torch.mean if layer.op == kinds.AVG else torch.amax
    return reduce(_wide(x), _axis(layer), keepdim=layer.keep_dims)


def _unary(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    kinds = evaluation.trt.UnaryOperation
    _demand(layer.op in (kinds.SQRT, kinds.ABS), layer, str(layer.op))
    return torch.sqrt(_wide(x)) if layer.op == kinds.SQRT else _wide(x).abs()


def _quantize(evaluation: Evaluation, layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    trt = evaluation.trt
    steps = _wide(x) / _scale_of(layer, x, scale)
    if layer.to_type == trt.fp8:
        return steps.clamp(-448.0, 448.0)  # more would be NaN
    _demand(layer.to_type == trt.int8, layer, f"quantization to {layer.to_type}")
    return steps.round().clamp(-128, 127)


def _dequantize(evaluation: Evaluation, layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.float() * _scale_of(layer, x, scale)


def _scale_of(layer: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale of every value of x: from one of no dimensions, one along `axis`, or one per block, whose shape is the
    layer's or follows from both shapes."""
    scale = _wide(scale)
    if scale.dim() == 0:
        return scale
    if scale.dim() == 1 and x.dim() > 1:
        _demand(0 <= layer.axis < x.dim(), layer, "one scale per channel, of no axis")
        return scale.reshape([-1 if axis == layer.axis else 1 for axis in range(x.dim())])
    sizes = [whole // parts for whole, parts in zip(x.shape, scale.shape, strict=True)]
    block = _block_shape(layer)
    _demand(block is None or list(block) == sizes, layer, f"blocks of {block} in {tuple(x.shape)}")
    for axis, size in enumerate(sizes):
        scale = scale.repeat_interleave(size, axis)
    return scale


def _block_shape(layer: Any) -> tuple[int, ...] | None:
    try:
        return tuple(layer.block_shape) or None
    except RuntimeError:  # it was never set
        return None


def _axis(layer: Any) -> int:
    """The one axis of a layer's bit mask."""
    _demand(layer.axes.bit_count() == 1, layer, "several axes")
    return layer.axes.bit_length() - 1


def _rotary_embedding(
    evaluation: Evaluation,
    layer: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, heads, S, D], cos and sin [positions, r / 2], positions [B, S]; the rotation of Su et al. 2021."""
    _demand(positions is not None, layer, "rotary embedding without position ids")
    assert positions is not None
    width = layer.rotary_embedding_dim or x.shape[-1]
    cos, sin = (_wide(table)[positions.long()][:, None] for table in (cos, sin))  # [B, 1, S, r/2]
    rotated, rest = _wide(x).split([width, x.shape[-1] - width], dim=-1)
    if layer.interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned, rest], -1)


def _kv_cache_update(
    evaluation: Evaluation,
    layer: Any,
    cache: torch.Tensor,
    update: torch.Tensor,
    index: torch.Tensor,
    *lengths: torch.Tensor,
) -> torch.Tensor:
    trt = evaluation.trt
    _demand(layer.cache_mode == trt.KVCacheMode.LINEAR, layer, "cache mode")
    _demand(layer.update_form == trt.AttentionIOForm.PADDED_BHND and not lengths, layer, "packed cache update")
    for row, first in enumerate(index.tolist()):
        if not 0 <= first <= cache.shape[2] - update.shape[2]:
            # The library drops such writes without a word; nobody means them.
            raise EngineError(
                "write outside the cache", found=f"slot {first} + {update.shape[2]}", allowed=cache.shape[2]
            )
        cache[row, :, first : first + update.shape[2]] = update[row]
    return cache


def _attention_input(evaluation: Evaluation, layer: Any, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The first half of an attention keeps its inputs; the tensor that joins it with the second half means nothing."""
    evaluation.attention_inputs[layer.attention.name] = inputs
    q = inputs[0]
    assert q is not None
    return q


def _attention_output(evaluation: Evaluation, layer: Any, link: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T, masked) v, not scaled: q [B, H, S, D], k and v [B, G, T, D]; H / G heads in a row share a key."""
    trt, attention = evaluation.trt, layer.attention
    q, k, v, *_ = evaluation.attention_inputs[attention.name]
    _demand(attention.norm_op == trt.AttentionNormalizationOp.SOFTMAX, layer, "attention normalization")
    _demand(
        attention.query_form == attention.key_value_form == trt.AttentionIOForm.PADDED_BHND, layer, "packed attention"
    )
    _demand(attention.causal_kind == trt.CausalMaskKind.NONE, layer, "attention with a causal kind")
    _demand(
        attention.key_value_lengths is None and attention.normalization_quantize_scale is None,
        layer,
        "lengths or scales",
    )
    assert q is not None
    assert k is not None
    assert v is not None
    repeats = q.shape[1] // k.shape[1]
    scores = _wide(q) @ _wide(k).repeat_interleave(repeats, 1).mT  # [B, H, S, T]
    if attention.mask is not None:
        mask = evaluation.values[attention.mask.name]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + _wide(mask)
    return torch.softmax(scores, -1) @ _wide(v).repeat_interleave(repeats, 1)


def _dist_collective(evaluation: Evaluation, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Which operation it is cannot be read from the layer and stands in its metadata; how many ranks there are can."""
    facts = json.loads(layer.metadata)
    comm = evaluation.comm
    _demand(layer.num_ranks == comm.size, layer, f"{layer.num_ranks} ranks, {comm.size} are here")
    _demand((facts["root"], facts["groups"]) == (-1, []), layer, "a root, or groups of ranks")
    kind = facts["collective"], facts["reduction"]
    if kind == ("ALL_REDUCE", "SUM"):
        total = _wide(x).clone()
        comm.all_reduce(total)
        return total
    _demand(kind == ("ALL_GATHER", "NONE"), layer, " ".join(kind))
    return comm.all_gather(x, 0)


def _plugin(evaluation: Evaluation, layer: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Which plugin it is, with which attributes, cannot be read from the layer and stands in its metadata."""
    facts = json.loads(layer.metadata)
    _demand(facts["plugin"] in PLUGINS, layer, f"plugin {facts['plugin']}")
    return PLUGINS[facts["plugin"]](facts["attributes"], *inputs)


# By the layer type's name: the class that shows its attributes, and what it computes.
LAYERS: dict[str, tuple[str, Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]]] = {
    "CONSTANT": ("IConstantLayer", _constant),
    "GATHER": ("IGatherLayer", _gather),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "ACTIVATION": ("IActivationLayer", _activation),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "CAST": ("ICastLayer", _cast),
    "SHAPE": ("IShapeLayer", _shape),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "SLICE": ("ISliceLayer", _slice),
    "SELECT": ("ISelectLayer", _select),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "NORMALIZATION": ("INormalizationLayer", _normalization),
    "REDUCE": ("IReduceLayer", _reduce),
    "UNARY": ("IUnaryLayer", _unary),
    "QUANTIZE": ("IQuantizeLayer", _quantize),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary_embedding),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _attention_output),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", _dist_collective),
    "PLUGIN_V3": ("IPluginV3Layer", _plugin),
}
