"""A session executed by TensorRT: shapes, addresses and the cache around the phases of an engine."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt.comm import Communicator, NullCommunicator
from gpt.comm_nccl import NcclCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.console import log
from gpt.dtypes import torch_dtype
from gpt.engine import trt_io
from gpt.engine.trt_layers import to_torch_dtype
from gpt.engine.trt_library import error_recorder
from gpt.engine.trt_runtime import load_engine
from gpt.errors import ConfigError, EngineError, Problems
from gpt.mapping import Mapping
from gpt.runtime.limits import check_start
from gpt.runtime.trt_inputs import first_rows, generation_inputs, int32, packed_inputs, padded_inputs
from gpt.runtime.trt_phase import Capture, Phase, cuda_graphs, working_memory
from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens


class TrtSession:
    """See gpt.runtime.session.Session.  Several of them may share an engine.

    The caches [B, G/R, T, D], with all of the engine's T slots, are updated in place: each past_* input and its
    present_* output share an address.  Caches, logits and the inputs of generation are allocated for the largest batch
    so far; smaller ones use their first rows, so that addresses, and CUDA graphs with them, outlive a batch.  With
    batch buckets a step generates for all rows of the bucket; what is in the rows behind the batch is never looked at.

    An int8 cache is updated in place by a plugin only: without it there are two, and steps go to and fro.

    Each profile has an execution context of its own; they never run at once and share their working memory.
    """

    def __init__(
        self,
        engine: Any,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        device: torch.device | str,
        trt: Any,
        comm: Communicator | None = None,
        capture: Capture | None = None,
        *,
        graphs: bool = True,
    ):
        """engine: an ICudaEngine, or a `gpt.engine.trt_stand_in.EvaluatorEngine` with `device` cpu; trt: its library.
        comm: to the other ranks of `mapping`.  capture: instead of CUDA graphs, which need a GPU.  graphs: whether a
        GPU has them.

        Raises EngineError where the engine is not one that `gpt.engine.trt_builder` makes for this model and build.
        """
        self.model = model
        self.build = build
        self.device = torch.device(device)
        self.comm = comm or NullCommunicator()
        self._engine = engine
        self._trt = trt
        self._inputs = trt_io.step_inputs(model, build)
        self._caches = trt_io.cache_inputs(model, build, mapping)
        self._outputs = trt_io.outputs(model, build, mapping)
        self._in_place = build.cache_in_place
        _check_engine(engine, trt, self._inputs + self._caches, self._outputs)
        self._recorder = error_recorder(trt)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if graphs and capture is None and self._stream is not None:
            capture = cuda_graphs(self._stream)
        self._capture = capture
        self._scratch = working_memory(engine, self.device)
        self._context = self._phase(trt_io.CONTEXT, None)
        self._generation: dict[tuple[int, int], Phase] = {}  # by profile, and by the cache it reads
        self._capacity = 0  # rows of:
        self._logits = torch.empty(0)
        self._memory: list[dict[str, torch.Tensor]] = []  # the caches, two of each where they are not updated in place
        self._current = 0  # the one that has what was written last
        self._step_memory: dict[str, torch.Tensor] = {}  # the inputs of generation
        self._batch_size = 0
        self._lengths: list[int] = []
        self._generating = False
        if isinstance(self.comm, NcclCommunicator):
            self.comm.before_leaving(self.release_graphs)

    def release_graphs(self) -> None:
        """Forgets all that was captured, with what captured it; the next step begins anew."""
        self._generation.clear()

    @classmethod
    def from_plan(
        cls,
        path: Path,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        device: torch.device | str = "cuda",
        *,
        library: Dict[str, str],
        comm: Communicator | None = None,
        graphs: bool = True,
    ) -> TrtSession:
        """Loads this rank's plan at `path` on a GPU; `library` built it, as `gpt.engine.trt_library.library_info` says.

        Raises ConfigError where that library is missing, EngineError where it cannot load the plan here, with the
        reason.
        """
        engine, trt = load_engine(path, torch.device(device), library, build.targets)
        if build.weight_streaming:
            _stream_weights(engine)
        return cls(engine, model, build, mapping, device, trt, comm, graphs=graphs)

    def start(self, batch_size: int, max_seq_len: int) -> None:
        check_start(self.model, self.build, batch_size, max_seq_len)
        self._lengths = []
        self._batch_size = batch_size
        _, rows = trt_io.generation_profile(self.build, batch_size)
        if rows > self._capacity:
            self._allocate(rows)

    def context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None = None) -> torch.Tensor:
        if virtual is not None:
            check_virtual_tokens(self.model, self.build, virtual, len(prompts))
        self._lengths = [len(prompt) for prompt in prompts]
        self._batch_size = len(prompts)
        self._generating = False
        tensors = packed_inputs(prompts) if self.build.remove_input_padding else padded_inputs(prompts)
        tensors |= self._prompt_inputs(virtual, self._lengths)
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}  # kept until the step is launched
        self._current = 0
        self._bind(self._context, tensors, len(prompts))
        return self._run(self._context)

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        if max(self._lengths) >= self.build.max_seq_len:  # the library drops such writes to the cache in silence
            raise ConfigError(
                "the cache is full",
                found=f"a sequence of {max(self._lengths)} tokens",
                allowed=f"at most {self.build.max_seq_len}",
            )
        if not self._generating:
            self._begin_generation()
        self._step_memory["input_ids"].view(-1)[: self._batch_size].copy_(ids)
        logits = self._run(self._generation_phase())
        for name in ("position_ids", "cache_write_index"):
            self._step_memory[name] += 1
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def limit_logits(self, num_best: int | None) -> None:
        """Nothing to save: a plan computes all logits."""

    def prompt_logits(
        self, prompt: Sequence[int], places: Sequence[int], virtual: VirtualTokens | None = None
    ) -> torch.Tensor:
        raise ConfigError(
            "a TensorRT engine tells the logits of a prompt's last token only, so that it cannot score texts",
            hint="build a PyTorch engine of the same checkpoint: build.py --backend torch",
        )

    def reorder(self, sources: Sequence[int]) -> None:
        """The caches' rows are gathered whole: the library writes them, and what they share is not known here."""
        if len(sources) > self._capacity:
            raise RuntimeError("start makes room for the rows of reorder")
        index = torch.tensor(sources, device=self.device)
        for tensor in self._memory[self._current].values():
            tensor[: len(sources)] = tensor.index_select(0, index)
        lengths = [self._lengths[source] for source in sources]
        if lengths != self._lengths:
            self._generating = False  # the next step sets the positions again
        self._lengths, self._batch_size = lengths, len(sources)

    def _phase(self, profile: int, capture: Capture | None) -> Phase:
        name = trt_io.profile_name(self.build, profile)
        return Phase(
            self._engine, self._trt, self._recorder, profile, name, self._scratch, self._stream, self.comm, capture
        )

    def _allocate(self, rows: int) -> None:
        """The old memory goes first; contexts are told the new addresses when they are needed."""
        for phase in self._generation.values():
            phase.unbind()
        self._capacity = 0  # until all of the new memory is there
        self._memory, self._step_memory, self._logits = [], {}, torch.empty(0)
        self._logits = self._zeros(self._outputs[0], rows)
        for _ in range(1 if self._in_place else 2):
            # Zeros, since a slot that is masked out still takes part in a product with weight zero.
            self._memory.append({port.name: self._zeros(port, rows) for port in self._caches})
        self._step_memory = generation_inputs(self._inputs, rows, self.device)
        self._capacity = rows

    def _zeros(self, port: trt_io.Port, rows: int) -> torch.Tensor:
        return torch.zeros(port.shape_for({"B": rows}), dtype=torch_dtype(port.dtype), device=self.device)

    def _begin_generation(self) -> None:
        """From here on every sequence gets one token per step, at the position after those it has."""
        lengths = torch.tensor(self._lengths, dtype=torch.int32, device=self.device)
        for name in ("position_ids", "cache_write_index"):
            memory = self._step_memory[name].view(-1)
            memory.zero_()
            memory[: len(lengths)] = lengths
        # Tokens that were chosen are words: the prompts' table is one row here, which nothing refers to.
        self._step_memory["input_ids"].zero_()
        self._generating = True

    def _generation_phase(self) -> Phase:
        """The one of this number of rows' profile that reads the current cache; without buckets it takes one size after
        the other, since making a context may take the library long."""
        profile, rows = trt_io.generation_profile(self.build, self._batch_size)
        key = profile, self._current
        if key not in self._generation:
            self._generation[key] = self._phase(profile, self._capture)
        phase = self._generation[key]
        if phase.num_rows != rows:
            self._bind(phase, first_rows(self._step_memory, rows), rows)
        return phase

    def _prompt_inputs(self, virtual: VirtualTokens | None, counts: Sequence[int]) -> dict[str, torch.Tensor]:
        """What an engine for prompt tuning takes besides, from the number of tokens of each sequence in this step."""
        if self.build.max_prompt_embedding_table_size == 0:
            return {}
        if virtual is None:  # the inputs may not be left out: one row that nothing refers to
            virtual = VirtualTokens(torch.zeros(1, 1, self.model.n_embd), (0,) * len(counts))
        tasks = torch.tensor(virtual.tasks, dtype=torch.int32)
        per_token = tasks.repeat_interleave(torch.tensor(counts))
        return {
            "prompt_embedding_table": virtual.table.to(torch_dtype(self.build.dtype)).flatten(0, 1).contiguous(),
            "tasks": per_token if self.build.remove_input_padding else tasks[:, None],
            **int32(prompt_vocab_size=[virtual.num_tokens]),
        }

    def _bind(self, phase: Phase, inputs: dict[str, torch.Tensor], rows: int) -> None:
        """The first `rows` rows of the caches and of the logits, beside the step's inputs."""
        past = {name: tensor[:rows] for name, tensor in self._memory[self._current].items()}
        other = self._memory[self._next_cache()]
        present = {trt_io.present_name(name): tensor[:rows] for name, tensor in other.items()}
        phase.bind(inputs | past, {"logits": self._logits[:rows], **present})
        phase.num_rows = rows

    def _next_cache(self) -> int:
        return self._current if self._in_place else 1 - self._current

    def _run(self, phase: Phase) -> torch.Tensor:
        """Logits [B, V] float32."""
        if self._stream is None:
            phase.run()
        else:
            # The engine waits for the copies of the inputs; whoever reads the logits waits for the engine.
            caller = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                phase.run()
            caller.wait_stream(self._stream)
        self._current = self._next_cache()
        return self._logits[: self._batch_size, : self.model.vocab_size]


def _stream_weights(engine: Any) -> None:
    """Leaves on the host what does not fit beside the rest, as the library judges; before there are contexts.

    Raises EngineError where the library keeps another budget: refusing one it raises nothing.
    """
    budget = engine.get_weight_streaming_automatic_budget()
    engine.weight_streaming_budget_v2 = budget
    if engine.weight_streaming_budget_v2 != budget:
        raise EngineError(
            "TensorRT refused its own weight streaming budget",
            found=f"{engine.weight_streaming_budget_v2} bytes",
            allowed=f"{budget} bytes",
            hint="build the engine without --weight_streaming",
        )
    log.info("Weight streaming: %d of %d MiB stay on the GPU", budget >> 20, engine.streamable_weights_size >> 20)


def _check_engine(engine: Any, trt: Any, inputs: Sequence[trt_io.Port], outputs: Sequence[trt_io.Port]) -> None:
    """Raises EngineError listing every tensor that is missing, unexpected or of another type, shape or place."""
    problems = Problems()
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected: Dict[str, tuple[trt_io.Port, Any]] = {port.name: (port, trt.TensorIOMode.INPUT) for port in inputs} | {
        port.name: (port, trt.TensorIOMode.OUTPUT) for port in outputs
    }
    for name in sorted(found - expected.keys()):
        problems.add(f"{name}: unexpected")
    for name, (port, mode) in expected.items():
        if name not in found or engine.get_tensor_mode(name) != mode:
            problems.add(f"{name}: missing")
            continue
        dtype, shape = to_torch_dtype(trt, engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))
        if (dtype, shape) != (torch_dtype(port.dtype), port.network_shape):
            problems.add(f"{name}: found {dtype} {shape}, allowed: {torch_dtype(port.dtype)} {port.network_shape}")
        if port.alias is not None and engine.get_aliased_input_tensor(name) != port.alias:
            problems.add(f"{name}: not in the memory of {port.alias}")
    problems.raise_if_any(
        EngineError, "the engine does not fit its config.json", hint="build it again with this version's build.py"
    )
