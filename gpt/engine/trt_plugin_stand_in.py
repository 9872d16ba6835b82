"""`tensorrt` with its plugins where only TensorRT-RTX is installed: networks with plugin layers, described and walked.

It is TensorRT-RTX with what that lacks: `tensorrt.plugin` (gpt.engine.trt_plugin_api), and networks that take a plugin
as a layer.  Every other layer is the library's own.  Nothing is built: what a plugin computes is known to the
evaluator, and its kernels are compiled and described as they would be in a build.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from gpt.engine.trt_library import TENSORRT, TENSORRT_RTX, has_plugins, load
from gpt.engine.trt_plugin_api import PluginApi, PluginDef, TensorDesc
from gpt.errors import ConfigError

_CAPABILITY = 90


class PluginLayer:
    """As IPluginV3Layer.  Its outputs are tensors of the library: inputs of its network that nobody feeds."""

    def __init__(self, type_: Any, definition: PluginDef, inputs: list[Any], attributes: dict[str, Any]):
        self.type = type_
        self.name = definition.identifier
        self.metadata = ""
        self.definition, self.attributes = definition, attributes
        self.inputs, self.outputs = inputs, list[Any]()

    def described_inputs(self) -> list[TensorDesc]:
        return [TensorDesc([n if n >= 0 else None for n in tensor.shape], tensor.dtype) for tensor in self.inputs]

    def kernels(self) -> dict[int, tuple[Any, ...]]:
        return self.definition.kernels(self.described_inputs(), self.attributes)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class PluginNetwork:
    """As INetworkDefinition: the library's, with plugin layers between its own."""

    def __init__(self, network: Any, layer_type: Any):
        self._network, self._layer_type = network, layer_type
        self._layers: list[Any] = []
        self._num_own = 0  # of the library's layers, as many as are in the list
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    @property
    def error_recorder(self) -> Any:
        return self._network.error_recorder

    @error_recorder.setter
    def error_recorder(self, recorder: Any) -> None:
        self._network.error_recorder = recorder

    def add_input(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        self._inputs.append(self._network.add_input(name, dtype, shape))
        return self._inputs[-1]

    def mark_output(self, tensor: Any) -> None:
        self._outputs.append(tensor)

    def add_plugin(
        self, create: Callable[[], tuple[PluginDef, list[Any], dict[str, Any]]], *, aot: bool
    ) -> PluginLayer:
        if not aot:
            raise ValueError("plugins that run in Python are not stood in for")
        self._collect()
        layer = PluginLayer(self._layer_type.PLUGIN_V3, *create())
        for output in layer.definition.describe(*layer.described_inputs(), **layer.attributes):
            shape = tuple(-1 if size.value is None else size.value for size in output.shape_expr)
            name = f"(Unnamed plugin output {len(self._layers)}.{layer.num_outputs})"
            layer.outputs.append(self._network.add_input(name, output.dtype, shape))
        self._layers.append(layer)
        return layer

    def _collect(self) -> None:
        own = range(self._num_own, self._network.num_layers)
        self._layers += [self._network.get_layer(index) for index in own]
        self._num_own = self._network.num_layers

    @property
    def num_layers(self) -> int:
        self._collect()
        return len(self._layers)

    def get_layer(self, index: int) -> Any:
        self._collect()
        layer = self._layers[index]
        if isinstance(layer, PluginLayer):
            return layer
        # A fresh object: whoever reads a layer makes it one of its kind.
        return self._network.get_layer(index - sum(isinstance(other, PluginLayer) for other in self._layers[:index]))

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class _Builder:
    """As Builder."""

    def __init__(self, builder: Any, layer_type: Any):
        self.__dict__.update(_builder=builder, _layer_type=layer_type)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._builder, name, value)

    def create_network(self) -> PluginNetwork:
        return PluginNetwork(self._builder.create_network(), self._layer_type)


class StandIn(ModuleType):
    """As the module `tensorrt`."""

    def __init__(self, rtx: ModuleType):
        super().__init__(TENSORRT)
        self.rtx, self.compute_capability = rtx, _CAPABILITY
        self.plugin = PluginApi()
        self.IPluginV3QuickAOTBuild, self.IPluginV3Layer = object, PluginLayer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rtx, name)

    def Builder(self, logger: Any) -> _Builder:  # noqa: N802 - the library's name
        return _Builder(self.rtx.Builder(logger), self.rtx.LayerType)


def load_with_plugins() -> Any:
    """`tensorrt`, or this stand-in for it.  Raises ConfigError where neither library is installed."""
    try:
        trt = load([TENSORRT])
    except ConfigError:
        trt = StandIn(load([TENSORRT_RTX]))
    return trt if has_plugins(trt) else StandIn(load([TENSORRT_RTX]))
