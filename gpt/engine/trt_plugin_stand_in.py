"""`tensorrt` with its plugins where only TensorRT-RTX is installed: networks with plugin layers, described and walked.

It is TensorRT-RTX with what that lacks: `tensorrt.plugin`, after its documentation, and networks that take a plugin as
a layer.  Every other layer is the library's own.  Nothing is built: what a plugin computes is known to the evaluator,
and its kernels are compiled and described as they would be in a build.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

from gpt.engine.trt_library import TENSORRT, TENSORRT_RTX, has_plugins, load
from gpt.errors import ConfigError

_CAPABILITY = 90
_ATTRIBUTE_TYPES = (int, float, str, bool, bytes)


class DataType(Enum):
    """TensorRT's, for machines without any of its libraries."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BF16 = 7


class SymInt32:
    """A size: a number, or one that is not known (None).  As in the library, operators have the symbol on the left."""

    def __init__(self, value: int | SymInt32 | None):
        self.value: int | None = value.value if isinstance(value, SymInt32) else value

    def _op(self, function: Callable[[int, int], int], other: int | SymInt32) -> SymInt32:
        right = SymInt32(other).value
        known = self.value is not None and right is not None
        return type(self)(function(self.value, right) if known else None)  # type: ignore[arg-type]

    def __add__(self, other: int | SymInt32) -> SymInt32:
        return self._op(int.__add__, other)

    def __sub__(self, other: int | SymInt32) -> SymInt32:
        return self._op(int.__sub__, other)

    def __mul__(self, other: int | SymInt32) -> SymInt32:
        return self._op(int.__mul__, other)

    def __floordiv__(self, other: int | SymInt32) -> SymInt32:
        return self._op(int.__floordiv__, other)


class ShapeExpr(SymInt32):
    pass


def cdiv(first: SymInt32, second: int | SymInt32) -> SymInt32:
    return first._op(lambda a, b: -(-a // b), second)


class TensorDesc:
    """dtype: a member of the library's DataType, or of the one above."""

    def __init__(self, shape_expr: Iterable[int | SymInt32 | None], dtype: Any):
        self.shape_expr = [ShapeExpr(size) for size in shape_expr]
        self.dtype = dtype

    def aliased(self) -> TensorDesc:
        return TensorDesc(self.shape_expr, self.dtype)


def from_shape_expr(shape_expr: tuple[int | SymInt32, ...], dtype: Any) -> TensorDesc:
    return TensorDesc(shape_expr, dtype)


class KernelLaunchParams:
    _NAMES = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self) -> None:
        for name in self._NAMES:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name: str, value: int | SymInt32) -> None:
        if name not in self._NAMES:
            raise AttributeError(name)
        self.__dict__[name] = SymInt32(value)

    def values(self) -> dict[str, int | None]:
        return {name: self.__dict__[name].value for name in self._NAMES}


class SymIntExprs(list[SymInt32]):
    def __init__(self, length: int):
        super().__init__([SymInt32(None)] * length)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: list[int]):
        self.io_types = [name.strip() for name in io_types.split(",")]
        self.layouts, self.tactics = layouts, tactics


class PluginDef:
    """A registered plugin.  Called with tensors and attributes it gives what `add_plugin` takes."""

    def __init__(self, identifier: str, describe: Callable[..., Any]):
        signature = inspect.signature(describe)
        annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        self.identifier = identifier
        self.describe = describe
        self.tensors = [name for name, hint in annotations.items() if hint is TensorDesc]
        self.attributes = {name: hint for name, hint in annotations.items() if hint is not TensorDesc}
        self.num_outputs = len(signature.return_annotation.__args__)
        self.tune: Callable[..., Any] | None = None
        self.compile_ahead: Callable[..., Any] | None = None
        if list(annotations)[: len(self.tensors)] != self.tensors or not self.tensors:
            raise ValueError(f"{identifier}: tensors come first, then attributes: {signature}")
        if any(hint not in _ATTRIBUTE_TYPES for hint in self.attributes.values()):
            raise ValueError(f"{identifier}: attributes are {_ATTRIBUTE_TYPES}: {signature}")

    def check(self, function: Callable[..., Any], *further: str) -> None:
        """Raises ValueError unless `function` takes tensors, all attributes, then `further`."""
        found, expected = list(inspect.signature(function).parameters), [*self.tensors, *self.attributes, *further]
        if found != expected:
            raise ValueError(f"{self.identifier}: found {found}, expected {expected}")

    def __call__(self, *tensors: Any, **attributes: Any) -> Callable[[], tuple[PluginDef, list[Any], dict[str, Any]]]:
        found = {name: type(value) for name, value in attributes.items()}
        if len(tensors) != len(self.tensors) or list(found.items()) != list(self.attributes.items()):
            raise ValueError(f"{self.identifier}: found {len(tensors)} tensors, {found}, expected {self.attributes}")
        return lambda: (self, list(tensors), attributes)

    def kernels(self, descriptions: list[TensorDesc], attributes: dict[str, Any]) -> dict[int, tuple[Any, ...]]:
        """What a build asks for, by tactic: name, PTX, launch parameters, sizes."""
        outputs = self.describe(*descriptions, **attributes)
        arguments = (*descriptions, *attributes.values(), outputs)
        tactics = [0] if self.tune is None else self.tune(*arguments)[0].tactics
        if self.compile_ahead is None:
            raise ValueError(f"{self.identifier} has no aot_impl")
        return {tactic: self.compile_ahead(*arguments, tactic) for tactic in tactics}


class _Namespace:
    pass


class PluginApi:
    """The members of `tensorrt.plugin` that this package uses."""

    TensorDesc, SymInt32, SymIntExprs = TensorDesc, SymInt32, SymIntExprs
    KernelLaunchParams, AutoTuneCombination = KernelLaunchParams, AutoTuneCombination
    cdiv, from_shape_expr = staticmethod(cdiv), staticmethod(from_shape_expr)

    def __init__(self) -> None:
        self.op = _Namespace()
        self._registered: dict[str, PluginDef] = {}

    def register(self, identifier: str, *, lazy_register: bool = False) -> Callable[..., Any]:
        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            namespace, name = identifier.split("::")
            if not hasattr(self.op, namespace):
                setattr(self.op, namespace, _Namespace())
            self._registered[identifier] = PluginDef(identifier, function)
            setattr(getattr(self.op, namespace), name, self._registered[identifier])
            return function

        return decorator

    def autotune(self, identifier: str) -> Callable[..., Any]:
        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            self._registered[identifier].check(function, "outputs")
            self._registered[identifier].tune = function
            return function

        return decorator

    def aot_impl(self, identifier: str) -> Callable[..., Any]:
        def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
            self._registered[identifier].check(function, "outputs", "tactic")
            self._registered[identifier].compile_ahead = function
            return function

        return decorator


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

    def create_network(self, flags: int) -> PluginNetwork:
        return PluginNetwork(self._builder.create_network(flags), self._layer_type)


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


def without_libraries() -> Any:
    """As much of the module as describing and compiling plugins takes."""
    return SimpleNamespace(DataType=DataType, plugin=PluginApi())


def load_with_plugins() -> Any:
    """`tensorrt`, or this stand-in for it.  Raises ConfigError where neither library is installed."""
    try:
        trt = load([TENSORRT])
    except ConfigError:
        trt = StandIn(load([TENSORRT_RTX]))
    return trt if has_plugins(trt) else StandIn(load([TENSORRT_RTX]))
