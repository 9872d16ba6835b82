"""Four small architectures, their random weights and their networks, for everything that is tested with TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from engines import relative_error

from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import torch_dtype
from gpt.engine import trt_io
from gpt.engine.trt_builder import NetworkBuild
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.engine.weights import engine_layout
from gpt.mapping import Mapping
from gpt.runtime.session import Session
from gpt.runtime.virtual_tokens import VirtualTokens

RANK = Mapping()
LENGTHS = (5, 1, 11, 3)
IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [27, 18, 28, 18, 2, 8]], dtype=torch.int32)

_GPT2 = ModelConfig(
    vocab_size=67,
    n_positions=48,
    n_embd=48,
    n_head=3,
    n_layer=2,
    n_kv_head=3,
    inter_size=80,
    hidden_act="gelu_new",
    layer_norm_epsilon=1e-3,  # not the default of any library
)
MODELS = {
    "gpt2": _GPT2,
    "rotary_swiglu_grouped": replace(
        _GPT2, n_embd=64, n_head=4, n_kv_head=2, hidden_act="swiglu", rotary_pct=0.5, bias=False, tied_head=False
    ),
    "rms_rotary_scaled": replace(
        _GPT2, normalization="rmsnorm", rotary_pct=1.0, rotary_scaling=4.0, hidden_act="geglu"
    ),
    "multi_query": replace(
        _GPT2, n_embd=64, n_head=4, n_kv_head=1, hidden_act="gelu", scale_attn_by_inverse_layer_idx=True
    ),
}


def random_weights(
    model: ModelConfig, dtype: str = "float32", seed: int = 0, mapping: Mapping = RANK
) -> dict[str, torch.Tensor]:
    """As `engine_tensors` makes them; wide enough for every operation to matter, the padding of the vocabulary zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for target in engine_layout(model, mapping):
        values = torch.randn(target.shape, generator=generator) * 0.2 + (target.source.kind == "scale")
        if target.source.name in ("model.wte", "model.lm_head.weight"):
            values[model.vocab_size :] = 0
        weights[target.name] = values.to(torch_dtype(dtype))
    return weights


def build_config(dtype: str = "float32", *, fused: bool = False, packed: bool = False, **options: Any) -> BuildConfig:
    limits = {"max_batch_size": 4, "max_input_len": 12, "max_output_len": 20}
    return BuildConfig(
        dtype=dtype,
        backend="tensorrt",
        gpt_attention_plugin=dtype if fused else None,
        remove_input_padding=packed,
        **{**limits, **options},
    )


def define(trt: Any, model: ModelConfig, build: BuildConfig, rank: int = 0) -> NetworkBuild:
    mapping = Mapping.of_build(build, rank)
    return NetworkBuild(trt, model, build, mapping, random_weights(model, build.dtype, mapping=mapping))


def layers_of(network: NetworkBuild, kind: str, class_name: str) -> list[Any]:
    layers = [network.network.get_layer(index) for index in range(network.network.num_layers)]
    chosen = [layer for layer in layers if layer.type.name == kind]
    for layer in chosen:
        layer.__class__ = getattr(network.trt, class_name)
    return chosen


def context_inputs(model: ModelConfig, build: BuildConfig, mapping: Mapping = RANK) -> dict[str, torch.Tensor]:
    """IDS as the whole prompts of a padded context step."""
    batch, width = IDS.shape
    caches = trt_io.cache_inputs(model, build, mapping)
    return {
        "input_ids": IDS,
        "position_ids": torch.arange(width, dtype=torch.int32).repeat(batch, 1),
        "last_token_ids": torch.full((batch,), width - 1, dtype=torch.int32),
        "cache_write_index": torch.zeros(batch, dtype=torch.int32),
        **{port.name: torch.zeros(port.shape_for({"B": batch})) for port in caches},
    }


def logit_errors(
    session: Session,
    reference: Session,
    prompts: Sequence[Sequence[int]],
    num_steps: int,
    virtual: VirtualTokens | None = None,
) -> list[float]:
    """Relative L2 of the session's logits after the prompts and after each of `num_steps` tokens, the reference's."""
    for each in (session, reference):
        each.start(len(prompts), max(map(len, prompts)) + num_steps)
    logits, expected = session.context(prompts, virtual), reference.context(prompts, virtual)
    errors = [relative_error(logits.cpu(), expected)]
    for _ in range(num_steps):
        chosen = expected.argmax(-1)
        logits, expected = session.generation(chosen.to(session.device)), reference.generation(chosen)
        errors.append(relative_error(logits.cpu(), expected))
    return errors


def evaluate(network: NetworkBuild, model: ModelConfig) -> dict[str, torch.Tensor]:
    evaluator = NetworkEvaluator(network.trt, network.network, network.side_table)
    return evaluator(context_inputs(model, network.build))
