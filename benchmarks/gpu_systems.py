"""The systems that bench_gpu.py compares, each behind the same three calls, on the same weights.

Weights come from `RandomWeights` with one seed on one device, the source that a random-weight engine loads from.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from gpu_cases import Shape

from gpt.checkpoint.hf_families import FAMILIES, Family
from gpt.checkpoint.layout import tensors
from gpt.checkpoint.random_weights import RandomWeights
from gpt.config import ModelConfig
from gpt.dtypes import torch_dtype
from gpt.engine.folder import EngineInfo
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session
from gpt.runtime.request import Request

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Setup:
    """What a system is made from: a random-weight engine, where it runs, and a folder for files of its own."""

    info: EngineInfo
    device: str
    scratch: Path


class System(Protocol):
    def prepare(self, shape: Shape) -> None:
        """Told before the runs of a shape, which may be of fewer new tokens but of no other batch or prompt size."""
        ...

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        """New token ids, greedily, none of which ends a sequence early.  Back when the ids are on the host."""
        ...

    def logits(self, ids: Sequence[int]) -> torch.Tensor | None:
        """What follows one sequence, [V] float32, where the system tells."""
        ...


class Ours:
    """An engine folder through `load_session` and `generate`, as run.py does it."""

    def __init__(self, setup: Setup):
        self.session = load_session(setup.info, setup.device)

    def prepare(self, shape: Shape) -> None: ...

    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        return generate(self.session, Request(prompts, max_new_tokens=num_tokens)).tokens

    def logits(self, ids: Sequence[int]) -> torch.Tensor | None:
        self.session.start(1, len(ids))
        return self.session.context([ids])[0]


class HfEager:
    """`transformers`' `generate` with its own dynamic cache."""

    def __init__(self, setup: Setup):
        self.device = setup.device
        self.model = hf_model(setup.info, setup.device)

    def prepare(self, shape: Shape) -> None: ...

    @torch.no_grad()
    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        from transformers import GenerationConfig

        ids = torch.tensor(prompts, device=self.device)
        settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        rows = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return rows[:, ids.shape[1] :].tolist()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor | None:
        output = self.model(torch.tensor([ids], device=self.device), use_cache=False, logits_to_keep=1)
        return output.logits[0, -1].float()


class HfStatic(HfEager):
    """The model with a cache of fixed size; on a GPU, one generation step with its argmax is captured as a CUDA graph
    and replayed without waiting.  compiled: the step goes through torch.compile first."""

    def __init__(self, setup: Setup, *, compiled: bool = False):
        super().__init__(setup)
        self.compiled = compiled
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prepare(self, shape: Shape) -> None:
        from transformers import StaticCache

        self.graph = None  # before the buffers that it points to
        self.cache = StaticCache(config=self.model.config, max_cache_len=shape.num_slots)
        self.ids = torch.zeros(shape.batch_size, 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.slots = torch.arange(shape.num_slots, device=self.device)
        self.chosen = torch.zeros(shape.batch_size, shape.output_len, dtype=torch.long, device=self.device)
        self.forward: Any = self.model
        if self.compiled:
            torch._dynamo.reset()
            self.forward = torch.compile(self.model, dynamic=False)

    @torch.no_grad()
    def generate(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.device)
        if self.graph is None and torch.device(self.device).type == "cuda":
            self._prompts(ids)
            self._capture()
        self._prompts(ids)
        for index in range(1, num_tokens):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            self.chosen[:, index] = self.ids[:, 0]
        return self.chosen[:, :num_tokens].tolist()

    def _prompts(self, ids: torch.Tensor) -> None:
        self.cache.reset()
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.ids.copy_(output.logits[:, -1:].argmax(-1))
        self.position.fill_(ids.shape[1])
        self.chosen[:, 0] = self.ids[:, 0]

    def _step(self) -> None:
        mask = (self.slots <= self.position)[None, None]  # [1, 1, 1, T]
        output = self.forward(
            self.ids,
            position_ids=self.position,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.ids.copy_(output.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def _capture(self) -> None:
        """The steps before the capture, which allocate and compile, start from an empty cache: they need its slots."""
        self.cache.reset()
        self.position.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph


def hf_model(info: EngineInfo, device: str) -> Any:
    """The model of `transformers` with the weights of a random-weight engine, made on `device` one tensor at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    model, family = info.model, hf_family(info.model)
    with torch.device(device):
        result = AutoModelForCausalLM.from_config(
            hf_config(model), dtype=torch_dtype(info.build.dtype), attn_implementation="sdpa"
        )
    parameters = {name.removeprefix("transformer."): value for name, value in result.named_parameters()}
    source = RandomWeights(model, info.build.seed or 0, device)
    sources = {tensor.name: tensor for tensor in tensors(model)}
    with torch.no_grad():
        for name, value in engine_tensors(model, info.build, Mapping(), source):
            target = parameters.pop(family.source_names(sources[name])[0])
            if sources[name].kind == "weight" and not family.out_in:
                value = value.t()
            target.copy_(value[: target.shape[0]])  # the head's table is padded in an engine
    if parameters:
        raise RuntimeError(f"no weights for {', '.join(parameters)}")
    return result.eval()


def hf_family(model: ModelConfig) -> Family:
    name = "starcoder" if model.multi_query else "gpt2"
    return next(family for family in FAMILIES if family.name == name)


def hf_config(model: ModelConfig) -> Any:
    from transformers import GPT2Config, GPTBigCodeConfig

    sizes = {name: getattr(model, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    kind = GPTBigCodeConfig if model.multi_query else GPT2Config
    more = {"multi_query": True} if model.multi_query else {}
    config = kind(**sizes, **more, activation_function=model.hidden_act, n_inner=model.inter_size)
    config.bos_token_id = config.eos_token_id = None
    return config


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
