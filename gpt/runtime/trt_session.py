"""A session executed by TensorRT: shapes, addresses and the cache of both phases over one execution context."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from gpt.comm import Communicator, NullCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import torch_dtype
from gpt.engine import trt_io
from gpt.engine.trt_layers import to_torch_dtype
from gpt.engine.trt_library import TENSORRT_RTX, error_recorder
from gpt.engine.trt_runtime import load_engine
from gpt.errors import ConfigError, EngineError, Problems
from gpt.mapping import Mapping
from gpt.runtime.limits import check_start
from gpt.runtime.virtual_tokens import VirtualTokens, check_virtual_tokens


class TrtSession:
    """See gpt.runtime.session.Session.

    The caches are allocated once per batch size, [B, G/R, T, D] with all of the engine's T slots, and are updated in
    place: each past_* input and its present_* output share an address.  In the generation phase every input has a fixed
    address too, so a step copies B token ids and starts the engine.
    """

    def __init__(
        self,
        engine: Any,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        device: torch.device | str,
        trt: Any,
    ):
        """engine: an ICudaEngine, or a `gpt.engine.trt_stand_in.EvaluatorEngine` with `device` cpu; trt: its library.

        Raises EngineError where the engine is not one that `gpt.engine.trt_builder` makes for this model and build.
        """
        self.model = model
        self.build = build
        self.device = torch.device(device)
        self.comm: Communicator = NullCommunicator()
        self._engine = engine
        self._inputs = trt_io.step_inputs(model, build)
        self._caches = trt_io.cache_inputs(model, build, mapping)
        self._outputs = trt_io.outputs(model, build, mapping)
        _check_engine(engine, trt, self._inputs + self._caches, self._outputs)
        self._recorder = error_recorder(trt)
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError("TensorRT cannot execute this engine", hint="is there enough free GPU memory?")
        self._context.error_recorder = self._recorder
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._max_rows = 0
        self._num_rows = 0
        self._memory: dict[str, torch.Tensor] = {}  # caches and logits of the batch
        self._bound: dict[str, torch.Tensor] = {}  # what the engine's step inputs point to
        self._phase = -1
        self._lengths: list[int] = []

    @classmethod
    def from_plan(
        cls,
        path: Path,
        model: ModelConfig,
        build: BuildConfig,
        mapping: Mapping,
        device: torch.device | str = "cuda",
        *,
        library: str = TENSORRT_RTX,
    ) -> TrtSession:
        """Loads the plan at `path` on a GPU; `library` built it, a name as in `gpt.engine.trt_library.library_info`.

        Raises ConfigError where that library is missing, EngineError where it cannot load the plan here, with the
        reason.
        """
        engine, trt = load_engine(path, torch.device(device), library)
        return cls(engine, model, build, mapping, device, trt)

    def start(self, batch_size: int, max_seq_len: int) -> None:
        check_start(self.model, self.build, batch_size, max_seq_len)
        self._max_rows = batch_size
        self._lengths = []

    def _make_room(self, num_rows: int) -> None:
        """Allocates caches and logits where the batch has another size than the last."""
        if num_rows == self._num_rows:
            return
        self._num_rows = num_rows
        self._memory = {}
        for port in (self._outputs[0], *self._caches):
            # Zeros, since a slot that is masked out still takes part in a product with weight zero.
            shape = port.shape_for({"B": num_rows})
            self._memory[port.name] = torch.zeros(shape, dtype=torch_dtype(port.dtype), device=self.device)

    def limit_logits(self, num_best: int | None) -> None:
        """Nothing to save: a plan computes all logits."""

    def context(self, prompts: Sequence[Sequence[int]], virtual: VirtualTokens | None = None) -> torch.Tensor:
        if virtual is not None:
            check_virtual_tokens(self.model, self.build, virtual, len(prompts))
        self._lengths = [len(prompt) for prompt in prompts]
        self._make_room(len(prompts))
        tensors = _packed_inputs(prompts) if self.build.remove_input_padding else _padded_inputs(prompts)
        self._bind(trt_io.CONTEXT, tensors | self._prompt_inputs(virtual, self._lengths))
        return self._run()

    def generation(self, ids: torch.Tensor) -> torch.Tensor:
        if max(self._lengths) >= self.build.max_seq_len:  # the library drops such writes to the cache in silence
            raise ConfigError(
                "the cache is full",
                found=f"a sequence of {max(self._lengths)} tokens",
                allowed=f"at most {self.build.max_seq_len}",
            )
        if self._phase != trt_io.GENERATION:
            tensors = _generation_inputs(self._lengths, packed=self.build.remove_input_padding)
            # Tokens that were chosen are words: the table of the prompts is not needed any more.
            self._bind(trt_io.GENERATION, tensors | self._prompt_inputs(None, [1] * len(self._lengths)))
        self._bound["input_ids"].view(-1).copy_(ids)
        logits = self._run()
        self._bound["position_ids"] += 1
        self._bound["cache_write_index"] += 1
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def prompt_logits(
        self, prompt: Sequence[int], places: Sequence[int], virtual: VirtualTokens | None = None
    ) -> torch.Tensor:
        raise ConfigError(
            "a TensorRT engine tells the logits of a prompt's last token only, so that it cannot score texts",
            hint="build a PyTorch engine of the same checkpoint: build.py --backend torch",
        )

    def reorder(self, sources: Sequence[int]) -> None:
        """The caches' rows are gathered whole: the library writes them, and what they share is not known here."""
        if len(sources) > self._max_rows:
            raise RuntimeError("start makes room for the rows of reorder")
        index = torch.tensor(sources, device=self.device)
        lengths = [self._lengths[source] for source in sources]
        old = self._memory
        if len(sources) != self._num_rows or lengths != self._lengths:
            self._phase = -1  # other shapes or positions: the next step binds again
        self._make_room(len(sources))
        for port in self._caches:
            self._memory[port.name].copy_(old[port.name].index_select(0, index))
        self._lengths = lengths

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
            **_int32(prompt_vocab_size=[virtual.num_tokens]),
        }

    def _bind(self, phase: int, tensors: dict[str, torch.Tensor]) -> None:
        """Selects the phase's profile and tells the context every shape and address."""
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        handle = self._stream.cuda_stream if self._stream is not None else 0
        if not self._context.set_optimization_profile_async(phase, handle):
            raise self._error(f"TensorRT refused the {trt_io.PROFILE_NAMES[phase]} profile")
        self._phase = phase
        self._bound = tensors
        memory = tensors | self._memory
        for port in self._inputs + self._caches:
            self._set_shape(port.name, tuple(memory[port.name].shape))
            self._set_address(port.name, memory[port.name])
        for port in self._outputs:
            self._set_address(port.name, memory[port.alias or port.name])
        unknown = self._context.infer_shapes()
        if unknown:
            raise self._error(f"TensorRT knows no shape of {', '.join(unknown)}")

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._context.set_input_shape(name, shape):
            return
        smallest, _, largest = (tuple(limit) for limit in self._engine.get_tensor_profile_shape(name, self._phase))
        raise EngineError(
            f"the {trt_io.PROFILE_NAMES[self._phase]} phase of this engine does not take this shape of {name}",
            found=str(shape),
            allowed=f"{smallest} to {largest}",
            hint="build the engine with larger limits, or shorten the request",
        )

    def _set_address(self, name: str, tensor: torch.Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise self._error(f"TensorRT refused the address of {name}")

    def _run(self) -> torch.Tensor:
        """Logits [B, V] float32."""
        if self._stream is None:
            done = self._context.execute_async_v3(0)
        else:
            # The engine waits for the copies of the inputs; whoever reads the logits waits for the engine.
            caller = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(caller)
            done = self._context.execute_async_v3(self._stream.cuda_stream)
            caller.wait_stream(self._stream)
        if not done:
            raise self._error("TensorRT could not execute the step")
        return self._memory["logits"][:, : self.model.vocab_size]

    def _error(self, what: str) -> EngineError:
        return EngineError(what, found=list(self._recorder.messages) or None)


def _padded_inputs(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    rows = [
        list(prompt) + [0] * (width - len(prompt)) for prompt in prompts
    ]  # any valid id: padding is never looked at
    return _int32(
        input_ids=rows,
        position_ids=[list(range(width))] * len(prompts),
        last_token_ids=[len(prompt) - 1 for prompt in prompts],
        cache_write_index=[0] * len(prompts),
    )


def _packed_inputs(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    slots = [(row, slot) for row, length in enumerate(lengths) for slot in range(length)]
    return _int32(
        input_ids=list(chain.from_iterable(prompts)),
        position_ids=[slot for _, slot in slots],
        last_token_ids=[end - 1 for end in ends],
        cache_write_index=[0] * len(prompts),
        padded_from_packed=[
            [min(start + slot, end - 1) for slot in range(width)] for start, end in zip(starts, ends, strict=True)
        ],
        packed_from_padded=[row * width + slot for row, slot in slots],
    )


def _generation_inputs(lengths: Sequence[int], *, packed: bool) -> dict[str, torch.Tensor]:
    """One token per sequence, at the position after those it has; the ids are filled in by each step."""
    rows = list(range(len(lengths)))
    tensors = _int32(
        input_ids=rows,
        position_ids=lengths,
        last_token_ids=rows if packed else [0] * len(rows),
        cache_write_index=lengths,
    )
    if packed:
        return tensors | _int32(padded_from_packed=[[row] for row in rows], packed_from_padded=rows)
    return tensors | {name: tensors[name][:, None] for name in ("input_ids", "position_ids")}


def _int32(**values: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}


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
