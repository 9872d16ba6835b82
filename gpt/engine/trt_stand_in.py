"""Engine and execution context that need no GPU: the library's interface over the evaluator and CPU memory.

They have those members of ICudaEngine and IExecutionContext that the session uses, take plain memory addresses as the
library does, check profile ranges, and return False with a message in the error recorder where the library would.
Collectives go through one of our communicators, where the library takes NCCL's.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from collections.abc import Mapping as Dict
from typing import Any

import torch

from gpt.comm import Communicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine.trt_builder import NetworkBuild
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.trt_layers import to_torch_dtype
from gpt.engine.trt_library import load
from gpt.engine.trt_plugin_stand_in import load_with_plugins
from gpt.errors import EngineError
from gpt.mapping import Mapping

_UNNAMED = "(Unnamed"  # how the library's own names for tensors begin


def stand_in_engine(
    model: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    weights: Dict[str, torch.Tensor],
) -> EvaluatorEngine:
    """The network that `gpt.engine.trt_builder.build_plan` would compile, ready for a TrtSession on the CPU."""
    trt = load_with_plugins() if build.plugins else load()
    return EvaluatorEngine(NetworkBuild(trt, model, build, mapping, weights))


class EvaluatorEngine:
    """As ICudaEngine.

    trace: where the named intermediate results of the last step are kept, when given.
    """

    device_memory_size_v2 = 256

    def __init__(self, build: NetworkBuild):
        self.trace: dict[str, torch.Tensor] | None = None
        self.error_recorder: Any = None
        self.trt = build.trt
        self.profiles = build.profiles
        self.evaluator = NetworkEvaluator(build.trt, build.network, build.side_table)
        network = build.network
        self._keep_alive = build
        inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
        self.input_names = inputs.keys()
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
        return mode.INPUT if name in self.input_names else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(self.profiles[profile][name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> EvaluatorContext:
        return EvaluatorContext(self, config.strategy)


class RuntimeConfig:
    """As IRuntimeConfig."""

    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class EvaluatorContext:
    """As IExecutionContext."""

    def __init__(self, engine: EvaluatorEngine, strategy: Any):
        self.engine = engine
        self.error_recorder: Any = None
        self.active_optimization_profile = 0
        self._comm: Communicator | None = None
        user_managed = engine.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._memory: tuple[int, int] | None = (0, 0) if strategy != user_managed else None
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
        return [name for name in self.engine.input_names if name not in self._shapes]

    def set_device_memory(self, address: int, size: int) -> None:
        self._memory = address, size

    def set_communicator(self, comm: Communicator) -> bool:
        self._comm = comm
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        return self._execute(self._shapes, self._addresses)

    def captured(self) -> Callable[[], bool]:
        """Does what `execute_async_v3` would do now, with today's shapes and addresses whatever is set later: as a
        CUDA graph does."""
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        return lambda: self._execute(shapes, addresses)

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> bool:
        names = [name for name in self.engine.tensors if not addresses.get(name)]
        if names or self.infer_shapes():
            return self._fail(f"without address: {names}; without shape: {self.infer_shapes()}")
        if self._memory is None or 0 < self._memory[1] < self.engine.device_memory_size_v2:
            return self._fail(f"without working memory: {self._memory}")
        for output in self.engine.tensors:
            source = self.engine.get_aliased_input_tensor(output)
            if source and addresses[source] != addresses[output]:
                return self._fail(f"{output} is not at the address of {source}")
        inputs = {name: self._tensor(name, shape, addresses[name]) for name, shape in shapes.items()}
        try:
            results = self._evaluate(inputs)
        except EngineError as error:
            return self._fail(str(error))
        for name, result in results.items():
            if not self.engine.get_aliased_input_tensor(name):
                self._tensor(name, tuple(result.shape), addresses[name]).copy_(result)
        ctypes.memset(self._memory[0], 0xFF, self._memory[1])  # nobody else may keep anything there
        return True

    def _evaluate(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        evaluator = self.engine.evaluator
        if self._comm is not None:
            evaluator.comm = self._comm
        values = evaluator(inputs)
        if self.engine.trace is not None:
            named = {name for name in values if not name.startswith(_UNNAMED)} - inputs.keys()
            self.engine.trace.update({name: values[name] for name in named})
        return evaluator.outputs(values)

    def _tensor(self, name: str, shape: tuple[int, ...], address: int) -> torch.Tensor:
        """The memory at the tensor's address."""
        dtype = to_torch_dtype(self.engine.trt, self.engine.get_tensor_dtype(name))
        num_values = torch.Size(shape).numel()
        memory = (ctypes.c_char * (num_values * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype, count=num_values).view(shape)

    def _fail(self, message: str) -> bool:
        if self.error_recorder is not None:
            self.error_recorder.report_error(self.engine.trt.ErrorCodeTRT.INVALID_ARGUMENT, message)
        return False


def _cache_aliases(trt: Any, network: Any) -> dict[str, str]:
    """Output name -> input name of the cache updates, which work in place, and of the plugins that do."""
    result = {}
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            result[layer.get_output(0).name] = layer.get_input(0).name
        elif layer.type == trt.LayerType.PLUGIN_V3:
            for output, source in json.loads(layer.metadata)["aliases"].items():
                result[layer.get_output(int(output)).name] = layer.get_input(source).name
    return result
