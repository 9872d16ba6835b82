"""Offers the plugins of gpt.engine.trt_plugin_kernels to TensorRT: its quickly deployable plugins, compiled ahead.

TensorRT asks for a plugin's outputs, for its tactics, and while it builds, for each of them, for a kernel as PTX with
the size of its launch; the PTX becomes part of the engine, which then needs neither Python nor Triton.  The library is
given as `trt`, its `tensorrt.plugin` as `api`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_type_hints

from gpt.engine.trt_library import plugin_api
from gpt.engine.trt_plugin import Plugin

if TYPE_CHECKING:
    from gpt.kernels.aot import CompiledKernel

NAMESPACE = "gpt"
# What `tensorrt.plugin` calls the types whose names differ from the enumeration's.
_SHORT_NAMES = {"FLOAT": "FP32", "HALF": "FP16"}


def definition(trt: Any, plugin: type[Plugin]) -> Callable[..., Any]:
    """What `network.add_plugin` takes when it is called with tensors and attributes; registered at its first use."""
    api = plugin_api(trt)
    if not hasattr(getattr(api.op, NAMESPACE, None), plugin.name):
        _register(trt, api, plugin)
    found: Callable[..., Any] = getattr(getattr(api.op, NAMESPACE), plugin.name)
    return found


def attributes(plugin: Plugin) -> dict[str, int | float | str | bool]:
    """In the order in which they were registered."""
    return dataclasses.asdict(plugin)


@lru_cache(maxsize=256)
def compiled(plugin: Plugin, types: tuple[str, ...], tactic: int) -> CompiledKernel:
    """The layers of a network share what is compiled alike.  Raises ConfigError for what cannot be embedded."""
    from gpt.kernels.aot import compile_kernel

    return compile_kernel(plugin.call(types, tactic), plugin.capability)


def _register(trt: Any, api: Any, plugin: type[Plugin]) -> None:
    identifier = f"{NAMESPACE}::{plugin.name}"
    num_inputs, names = len(plugin.inputs), [field.name for field in dataclasses.fields(plugin)]

    def make(values: Sequence[Any]) -> Plugin:
        return plugin(**dict(zip(names, values, strict=True)))

    def describe(*tensors: Any, **values: Any) -> Any:
        shapes, types = [list(tensor.shape_expr) for tensor in tensors], _types(tensors)
        return tuple(
            tensors[plugin.aliases[index]].aliased()
            if index in plugin.aliases
            else api.from_shape_expr(output.shape, dtype=getattr(trt.DataType, output.dtype))
            for index, output in enumerate(plugin(**values).outputs(shapes, types))
        )

    def tune(*arguments: Any) -> Any:
        types = _types((*arguments[:num_inputs], *arguments[-1]))
        tactics = list(range(1, plugin.num_tactics + 1))
        return [api.AutoTuneCombination(", ".join(_SHORT_NAMES.get(t, t) for t in types), "LINEAR", tactics)]

    def compile_ahead(*arguments: Any) -> Any:
        tensors, (outputs, tactic) = arguments[:num_inputs], arguments[-2:]
        types, instance = _types((*tensors, *outputs)), make(arguments[num_inputs:-2])
        kernel = compiled(instance, types, tactic)
        launch = instance.launch([list(tensor.shape_expr) for tensor in tensors], types, tactic, api.cdiv)
        parameters = api.KernelLaunchParams()
        for axis, size in zip("xyz", launch.grid, strict=False):
            setattr(parameters, f"grid_{axis}", size)
        parameters.block_x, parameters.shared_mem = kernel.num_threads, kernel.shared_bytes
        sizes = api.SymIntExprs(len(launch.sizes))
        for index, size in enumerate(launch.sizes):
            sizes[index] = api.SymInt32(size)
        return kernel.name, kernel.ptx, parameters, sizes

    # Their arguments are values here: types to the library, not to a type checker.
    some: Any = tuple
    tensor, result = api.TensorDesc, some[(api.TensorDesc,) * plugin.num_outputs]
    hints = get_type_hints(plugin)
    declared = {**dict.fromkeys(plugin.inputs, tensor), **{name: hints[name] for name in names}}
    _declare(describe, declared, result)
    api.register(identifier, lazy_register=True)(describe)
    if plugin.num_tactics > 1:
        _declare(tune, {**declared, "outputs": some[tensor]}, list[api.AutoTuneCombination])
        api.autotune(identifier)(tune)
    kernel = some[str | bytes, str | bytes, api.KernelLaunchParams, api.SymIntExprs]
    _declare(compile_ahead, {**declared, "outputs": some[tensor], "tactic": int}, kernel)
    api.aot_impl(identifier)(compile_ahead)


def _declare(function: Callable[..., Any], parameters: dict[str, Any], result: Any) -> None:
    """TensorRT reads from a function's signature what a plugin takes and gives."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    declared = [inspect.Parameter(name, kind, annotation=hint) for name, hint in parameters.items()]
    function.__signature__ = inspect.Signature(declared, return_annotation=result)  # type: ignore[attr-defined]


def _types(tensors: Sequence[Any]) -> tuple[str, ...]:
    return tuple(tensor.dtype.name for tensor in tensors)
