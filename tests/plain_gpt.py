"""A GPT written down plainly in float64, one sequence at a time, no cache: what the executors are compared with where
no other implementation of the same architecture is at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpt.config import ModelConfig

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_erf": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def plain_logits(
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    ids: list[int],
    seen: Callable[[torch.Tensor, str], torch.Tensor] = lambda x, name: x,
) -> torch.Tensor:
    """Logits [S, V] of one sequence; `weights` as engine_tensors makes them (linear weights [out, in]).

    seen: what a linear layer of this name sees of its input.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.wte"][ids]
    if model.learned_positions:
        x = x + w["model.wpe"][: len(ids)]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if model.normalization == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + model.layer_norm_epsilon).sqrt() * w[name + ".weight"]
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + model.layer_norm_epsilon).sqrt()
        return centred / deviation * w[name + ".weight"] + w[name + ".bias"]

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        y = seen(x, name) @ w[name + ".weight"].t()
        return y + w[name + ".bias"] if name + ".bias" in w else y

    for layer in range(model.n_layer):
        prefix = f"model.layers.{layer}."
        qkv = product(norm(x, prefix + "input_layernorm"), prefix + "attention.query_key_value")
        x = x + product(_attention(model, qkv, layer), prefix + "attention.dense")
        h = norm(x, prefix + "post_attention_layernorm")
        inner = _ACTIVATIONS[model.activation.function](product(h, prefix + "mlp.dense_h_to_4h"))
        if model.activation.gated:
            inner = inner * product(h, prefix + "mlp.dense_h_to_4h.gate")
        x = x + product(inner, prefix + "mlp.dense_4h_to_h")
    head = w["model.wte" if model.tied_head else "model.lm_head.weight"]
    return (norm(x, "model.final_layernorm") @ head.t())[:, : model.vocab_size]


def _attention(model: ModelConfig, qkv: torch.Tensor, layer: int) -> torch.Tensor:
    num_tokens, size = qkv.shape[0], model.head_size
    heads = qkv.view(num_tokens, -1, size).transpose(0, 1)  # [H + 2G, S, D]
    q, k, v = heads.split([model.n_head, model.n_kv_head, model.n_kv_head])
    if model.rotary_dim:
        q, k = _rotate(q, model), _rotate(k, model)
    outputs = []
    for head in range(model.n_head):
        kv_head = head * model.n_kv_head // model.n_head
        scores = q[head] @ k[kv_head].t() * model.attention_scale(layer)
        future = torch.ones(num_tokens, num_tokens).triu(1).bool()
        outputs.append(torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v[kv_head])
    return torch.cat(outputs, -1)


def _rotate(x: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Value i and value i + R/2 of a head turn together by position / scaling * base^(-2i/R)."""
    result = x.clone()
    half = model.rotary_dim // 2
    for i in range(half):
        angle = (
            torch.arange(x.shape[1]).double() / model.rotary_scaling * model.rotary_base ** (-2 * i / model.rotary_dim)
        )
        a, b = x[..., i], x[..., i + half]
        result[..., i] = a * angle.cos() - b * angle.sin()
        result[..., i + half] = b * angle.cos() + a * angle.sin()
    return result
