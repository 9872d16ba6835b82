"""One profile of a TensorRT engine at work: an execution context that is told shapes and addresses, and started."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Dict
from typing import Any

import torch

from gpt.comm import Communicator
from gpt.console import log, verbose
from gpt.engine.trt_runtime import create_context, set_communicator
from gpt.errors import EngineError, brief

Capture = Callable[["Phase"], Callable[[], None]]


class Phase:
    """An execution context for one profile and, once bound, one set of shapes and addresses.

    num_rows: what whoever bound it says of them; 0 until then.
    capture: turns `launch` into something that does the same again for less, a CUDA graph; None: every run is a launch.
    """

    def __init__(
        self,
        engine: Any,
        trt: Any,
        recorder: Any,
        profile: int,
        what: str,
        memory: torch.Tensor,
        stream: torch.cuda.Stream | None,
        comm: Communicator,
        capture: Capture | None,
    ):
        """what: the phase in messages.  memory: working memory, shared with other phases that never run at once."""
        self.what = what
        self.context = create_context(engine, trt, recorder)
        self._engine = engine
        self._recorder = recorder
        self._profile = profile
        self._handle = stream.cuda_stream if stream is not None else 0
        self._capture = capture
        self.unbind()
        self._call("refused its profile", self.context.set_optimization_profile_async, profile, self._handle)
        self.context.set_device_memory(memory.data_ptr(), memory.nbytes)
        if comm.size > 1:
            self._call("refused the communicator", set_communicator, self.context, comm, memory.device)

    def bind(self, inputs: Dict[str, torch.Tensor], outputs: Dict[str, torch.Tensor]) -> None:
        """Tells the context every shape and address.  What was captured is forgotten.

        Raises EngineError with limits and request side by side where a shape is outside the profile.
        """
        self.unbind()
        for name, tensor in inputs.items():
            self._set_shape(name, tuple(tensor.shape))
        for name, tensor in {**inputs, **outputs}.items():
            self._call(f"refused the address of {name}", self.context.set_tensor_address, name, tensor.data_ptr())
        unknown = self._call("cannot work out its shapes", lambda: [None, *self.context.infer_shapes()])[1:]
        if unknown:
            raise self._error(f"knows no shape of {', '.join(unknown)}")

    def unbind(self) -> None:
        """Forgets what was captured, and for how many rows."""
        self.num_rows = self._num_runs = 0
        self._replay: Callable[[], None] | None = None

    def run(self) -> None:
        """One step.  Raises EngineError where the library cannot do it."""
        if self._replay is None and self._capture is not None and self._num_runs == 1:
            self._replay = self._captured()
        self._num_runs += 1
        if self._replay is not None:
            self._replay()
        else:
            self.launch()

    def launch(self) -> None:
        """Hands one step to the library."""
        self._call("could not execute the step", self.context.execute_async_v3, self._handle)

    def _captured(self) -> Callable[[], None] | None:
        """The second step is the first to be captured: at the first one the library may still allocate and compile."""
        capturable = getattr(self.context, "is_stream_capturable", None)
        if self._capture is None or (capturable is not None and not capturable(self._handle)):
            verbose(f"TensorRT, {self.what}: steps cannot be captured in a CUDA graph")
            return None
        try:
            return self._capture(self)
        except (EngineError, RuntimeError) as error:
            self._recorder.clear()
            log.warning("TensorRT, %s: steps run without a CUDA graph: %s", self.what, brief(error))
            return None

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            taken = self.context.set_input_shape(name, shape)
        except RuntimeError:
            taken = False
        if taken:
            return
        smallest, _, largest = (tuple(limit) for limit in self._engine.get_tensor_profile_shape(name, self._profile))
        self._recorder.clear()
        raise EngineError(
            f"the {self.what} phase of this engine does not take this shape of {name}",
            found=str(shape),
            allowed=f"{smallest} to {largest}",
            hint="build the engine with larger limits, or shorten the request",
        )

    def _call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args); an exception of the library, or a refusal, becomes an EngineError with its messages."""
        try:
            result = function(*args)
        except RuntimeError as error:
            raise self._error(what, str(error)) from error
        if not result:
            raise self._error(what)
        return result

    def _error(self, what: str, *reasons: str) -> EngineError:
        found = [*self._recorder.messages, *reasons]
        self._recorder.clear()  # they belong to this error
        return EngineError(f"TensorRT, {self.what} phase: {what}", found=found or None)


def cuda_graphs(stream: torch.cuda.Stream) -> Capture:
    """Captures on the stream that steps are launched on."""

    def capture(phase: Phase) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            phase.launch()
        return graph.replay

    return capture


def working_memory(engine: Any, device: torch.device) -> torch.Tensor:
    """As many bytes as the hungriest profile needs."""
    return torch.empty(max(1, engine.device_memory_size_v2), dtype=torch.uint8, device=device)
