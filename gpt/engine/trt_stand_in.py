"""Engine and execution context that need no GPU: the library's interface over the evaluator and CPU memory.

They have those members of ICudaEngine and IExecutionContext that the session uses, take plain memory addresses as the
library does, check profile ranges, and return False with a message in the error recorder where the library would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping as Dict
from typing import Any

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.engine.trt_builder import NetworkBuild
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.trt_layers import to_torch_dtype
from gpt.engine.trt_library import load
from gpt.errors import EngineError
from gpt.mapping import Mapping


def stand_in_engine(
    model: ModelConfig, build: BuildConfig, mapping: Mapping, weights: Dict[str, torch.Tensor]
) -> EvaluatorEngine:
    """The network that `gpt.engine.trt_builder.build_plan` would compile, ready for a TrtSession on the CPU."""
    return EvaluatorEngine(NetworkBuild(load(), model, build, mapping, weights))


class EvaluatorEngine:
    """As ICudaEngine."""

    def __init__(self, build: NetworkBuild):
        self.trt = build.trt
        self.profiles = build.profiles
        self.evaluator = NetworkEvaluator(build.trt, build.network, build.side_table)
        network = build.network
        self._keep_alive = build
        inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
        outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
        self.tensors = inputs | outputs
        self._aliases = _cache_aliases(build.trt, network)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self.trt.TensorIOMode
        return mode.INPUT if self.tensors[name].is_network_input else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(self.profiles[profile][name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def create_execution_context(self) -> EvaluatorContext:
        return EvaluatorContext(self)


class EvaluatorContext:
    """As IExecutionContext."""

    def __init__(self, engine: EvaluatorEngine):
        self.engine = engine
        self.error_recorder: Any = None
        self.active_optimization_profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not 0 <= profile < self.engine.num_optimization_profiles:
            return self._fail(f"no optimization profile {profile}")
        self.active_optimization_profile = profile
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        fits = len(shape) == len(smallest) and all(
            a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True)
        )
        if not fits:
            return self._fail(f"{name}: shape {tuple(shape)} is outside {smallest} to {largest}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors:
            return self._fail(f"no tensor {name}")
        self._addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        """The inputs that have no shape yet."""
        return [
            name for name, tensor in self.engine.tensors.items() if tensor.is_network_input and name not in self._shapes
        ]

    def execute_async_v3(self, stream_handle: int) -> bool:
        names = [name for name in self.engine.tensors if not self._addresses.get(name)]
        if names or self.infer_shapes():
            return self._fail(f"without address: {names}; without shape: {self.infer_shapes()}")
        for output in self.engine.tensors:
            source = self.engine.get_aliased_input_tensor(output)
            if source and self._addresses[source] != self._addresses[output]:
                return self._fail(f"{output} is not at the address of {source}")
        inputs = {name: self._tensor(name, shape) for name, shape in self._shapes.items()}
        try:
            results = self.engine.evaluator.outputs(self.engine.evaluator(inputs))
        except EngineError as error:
            return self._fail(str(error))
        for name, result in results.items():
            if not self.engine.get_aliased_input_tensor(name):
                self._tensor(name, tuple(result.shape)).copy_(result)
        return True

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The memory at the tensor's address."""
        dtype = to_torch_dtype(self.engine.trt, self.engine.get_tensor_dtype(name))
        num_values = torch.Size(shape).numel()
        memory = (ctypes.c_char * (num_values * dtype.itemsize)).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype, count=num_values).view(shape)

    def _fail(self, message: str) -> bool:
        if self.error_recorder is not None:
            self.error_recorder.report_error(self.engine.trt.ErrorCodeTRT.INVALID_ARGUMENT, message)
        return False


def _cache_aliases(trt: Any, network: Any) -> dict[str, str]:
    """Output name -> input name of the cache updates, which work in place."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    return {layer.get_output(0).name: layer.get_input(0).name for layer in updates}
