"""`tensorrt.plugin`, after its documentation, where only TensorRT-RTX is installed: what registers a plugin, and what a
build would ask it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from enum import Enum
from types import SimpleNamespace
from typing import Any

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
        self.tactics = tactics


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


def without_libraries() -> Any:
    """As much of the module as describing and compiling plugins takes."""
    return SimpleNamespace(DataType=DataType, plugin=PluginApi())
