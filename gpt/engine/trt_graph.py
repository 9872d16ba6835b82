"""A TensorRT network for reading: its layers as a table, its operations as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.console import aligned, human_bytes
from gpt.dtypes import torch_dtype
from gpt.engine.trt_builder import NetworkBuild
from gpt.engine.trt_library import load
from gpt.engine.trt_plugin_stand_in import load_with_plugins
from gpt.engine.weights import engine_layout
from gpt.mapping import Mapping

# The library's names of types that others call differently.
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Tensor:
    """shape: -1 for sizes that change from step to step."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: float

    @property
    def num_bytes(self) -> int:
        """For one index of every dimension that changes."""
        count = 1
        for size in self.shape:
            count *= max(1, size)
        return int(count * self.itemsize)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size < 0 else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Layer:
    """operation: the operation of gpt.network.ops it came from, with the tensor or layer it was called for."""

    name: str
    kind: str
    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]

    @property
    def is_constant(self) -> bool:
        return self.kind == "CONSTANT"


def config_network(model: ModelConfig, build: BuildConfig, rank: int = 0) -> NetworkBuild:
    """The network that an engine with this configuration was built from, with zeros for weights, which take no memory
    until they are touched.

    Raises ConfigError where TensorRT is missing, EngineError where it refuses a layer.
    """
    mapping = Mapping.of_build(build, rank)
    layout = engine_layout(model, mapping, build.dtype, build.quant)
    weights = {tensor.name: torch.zeros(tensor.shape, dtype=torch_dtype(tensor.dtype)) for tensor in layout}
    return NetworkBuild(load_with_plugins() if build.plugins else load(), model, build, mapping, weights)


def network_layers(network: Any) -> list[Layer]:
    """Every layer of an INetworkDefinition in its order; what feeds it by tensor name."""
    layers = [_describe(network.get_layer(index)) for index in range(network.num_layers)]
    for index in reversed(range(len(layers) - 1)):
        if not layers[index].operation:  # the first half of an attention keeps no metadata
            layers[index] = replace(layers[index], operation=layers[index + 1].operation)
    return layers


def _describe(layer: Any) -> Layer:
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    facts = json.loads(layer.metadata or "{}")
    return Layer(
        name=layer.name,
        kind=f"PLUGIN {facts['plugin']}" if "plugin" in facts else layer.type.name,
        operation=facts.get("operation", ""),
        inputs=tuple(tensor.name for tensor in inputs if tensor is not None),
        outputs=tuple(_tensor(tensor) for tensor in outputs),
    )


def _tensor(tensor: Any) -> Tensor:
    name = tensor.dtype.name
    return Tensor(tensor.name, _TYPES.get(name, name.lower()), tuple(tensor.shape), tensor.dtype.itemsize)


def network_inputs(network: Any) -> list[Tensor]:
    return [_tensor(network.get_input(index)) for index in range(network.num_inputs)]


def table(layers: Sequence[Layer], inputs: Sequence[Tensor]) -> Iterator[str]:
    """Lines: number, layer, operation, output, its bytes (for one index of every `?`), weights it reads.

    Constants are not lines of their own: their bytes stand where they are used first.
    """
    rows = [("#", "layer", "operation", "output", "bytes", "weights")]
    rows += [("", "input", "", f"{tensor.name} {tensor}", human_bytes(tensor.num_bytes), "") for tensor in inputs]
    constants = {layer.outputs[0].name: layer.outputs[0].num_bytes for layer in layers if layer.is_constant}
    total = sum(constants.values())
    for index, layer in enumerate(layers):
        if layer.is_constant:
            continue
        weights = sum(constants.pop(name, 0) for name in layer.inputs)
        output = ", ".join(_named(tensor) for tensor in layer.outputs)
        size = human_bytes(sum(tensor.num_bytes for tensor in layer.outputs))
        rows.append((str(index), layer.kind, layer.operation, output, size, human_bytes(weights) if weights else ""))
    yield from aligned(rows)
    kinds = len({layer.kind for layer in layers})
    yield f"{len(layers)} layers of {kinds} kinds, constants {human_bytes(total)}"


def _named(tensor: Tensor) -> str:
    return str(tensor) if tensor.name.startswith("(") else f"{tensor.name} {tensor}"


@dataclass
class Node:
    """The layers of one operation.  depth: the longest way to it from an input."""

    operation: str
    num_layers: int
    num_weight_bytes: int
    outputs: list[Tensor]
    sources: list[int]
    depth: int


def operations(layers: Sequence[Layer]) -> list[Node]:
    """Layers that follow each other and came from one operation, as one node each; constants belong to their reader."""
    nodes: list[Node] = []
    producer: dict[str, int] = {}
    constants: dict[str, int] = {}
    for layer in layers:
        if layer.is_constant:
            constants[layer.outputs[0].name] = layer.outputs[0].num_bytes
            continue
        if not nodes or nodes[-1].operation != layer.operation:
            nodes.append(Node(layer.operation, 0, 0, [], [], 0))
        node, own = nodes[-1], len(nodes) - 1
        node.num_layers += 1
        node.num_weight_bytes += sum(constants.pop(name, 0) for name in layer.inputs)
        for name in layer.inputs:
            source = producer.get(name, own)
            if source != own and source not in node.sources:
                node.sources.append(source)
                node.depth = max(node.depth, nodes[source].depth + 1)
        node.outputs = list(layer.outputs)
        producer |= {tensor.name: own for tensor in layer.outputs}
    return nodes


_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y = 330, 44, 24, 26
_MARGIN = 90  # to the left, for what passes boxes by


def picture(nodes: Sequence[Node]) -> str:
    """The nodes from top to bottom by depth, as an SVG file's text."""
    places: dict[int, tuple[int, int]] = {}
    in_row: dict[int, int] = {}
    for index, node in enumerate(nodes):
        column = in_row.get(node.depth, 0)
        in_row[node.depth] = column + 1
        places[index] = _MARGIN + column * (_BOX_WIDTH + _GAP_X), 10 + node.depth * (_BOX_HEIGHT + _GAP_Y)
    width = _MARGIN + max(in_row.values(), default=1) * (_BOX_WIDTH + _GAP_X)
    height = 10 + (max(in_row, default=0) + 1) * (_BOX_HEIGHT + _GAP_Y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    parts += [_line(places[source], places[index]) for index, node in enumerate(nodes) for source in node.sources]
    parts += [_box(places[index], node) for index, node in enumerate(nodes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From a box to one in the next row; to one further below around those between them, the further the wider."""
    span, middle = end[1] - start[1], _BOX_WIDTH // 2
    if span > _BOX_HEIGHT + _GAP_Y:
        (x1, y1), (x2, y2) = ((x, y + _BOX_HEIGHT // 2) for x, y in (start, end))
        bend = min(20 + span // 12, 4 * _MARGIN // 3)  # three quarters of which the curve reaches
        curve = f"M{x1} {y1} C{x1 - bend} {y1} {x2 - bend} {y2} {x2} {y2}"
        return f'<path d="{curve}" fill="none" stroke="#999"/>'
    ends = f'x1="{start[0] + middle}" y1="{start[1] + _BOX_HEIGHT}" x2="{end[0] + middle}" y2="{end[1]}"'
    return f'<line {ends} stroke="#999"/>'


def _box(place: tuple[int, int], node: Node) -> str:
    x, y = place
    weights = f", weights {human_bytes(node.num_weight_bytes)}" if node.num_weight_bytes else ""
    what = f"{', '.join(map(str, node.outputs))}, {node.num_layers} layers{weights}"
    return (
        f"<g><title>{escape(node.operation)}: {escape(what)}</title>"
        f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="4" fill="#eef" stroke="#557"/>'
        f'<text x="{x + 8}" y="{y + 18}" font-size="11">{escape(_short(node.operation, 48))}</text>'
        f'<text x="{x + 8}" y="{y + 34}" font-size="10" fill="#555">{escape(_short(what, 52))}</text></g>'
    )


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
