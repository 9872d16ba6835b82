"""The GPT network, once: pre-layernorm decoder blocks, whatever the family.

    x = wte[ids] (+ wpe[positions])
    for each layer:  x = x + attention(ln(x));  x = x + mlp(ln(x))
    logits = ln(last token of x) @ head.T

Families differ by the ModelConfig alone: positions learned or rotary, normalisation centred or not, MLP gated or not,
biases or none, head tied or not, one key/value head or many.
"""

from __future__ import annotations

from gpt.config import ModelConfig
from gpt.mapping import Mapping, Split
from gpt.network.ops import Ops, X


def forward(ops: Ops[X], model: ModelConfig, mapping: Mapping, *, gather: bool = True) -> X:
    """The logits [B, V padded] of the last token of each sequence, float32, for the step that `ops` holds; the same on
    every rank.  gather: if not, this rank's part of them, [B, V padded / R]."""
    x = embed(ops, model, mapping)
    for layer in range(model.n_layer):
        x = block(ops, model, mapping, x, layer)
    x = _norm(ops, model, x, "model.final_layernorm")
    x = ops.name(x, "final_layernorm")
    logits = ops.logits(x, "model.wte" if model.tied_head else "model.lm_head.weight")  # [B, V padded / R]
    if gather and mapping.world_size > 1:
        logits = ops.all_gather(logits)
    return ops.name(logits, "logits")


def embed(ops: Ops[X], model: ModelConfig, mapping: Mapping) -> X:
    """The residual stream [..., E] that the first block gets."""
    x = ops.embedding("model.wte")  # [..., E]
    if mapping.embedding is Split.ROW:
        x = ops.all_reduce(x)  # zeros from all ranks but the one that has the token
    elif mapping.embedding is Split.COLUMN:
        x = ops.all_gather(x)
    if model.learned_positions:
        x = ops.add(x, ops.position_embedding("model.wpe"))
    return ops.name(x, "embedding")


def block(ops: Ops[X], model: ModelConfig, mapping: Mapping, x: X, layer: int) -> X:
    """One decoder block on the residual stream x [..., E]."""
    prefix = f"model.layers.{layer}."
    h = _norm(ops, model, x, prefix + "input_layernorm", prefix + "attention.query_key_value")
    qkv = ops.linear(h, prefix + "attention.query_key_value")  # [..., (H+2G)*D/R]
    if not model.learned_positions:
        qkv = ops.rotary(qkv, model.rotary_dim, model.rotary_base, model.rotary_scaling)
    h = ops.attention(qkv, layer, model.attention_scale(layer))  # [..., H*D/R]
    h = ops.name(h, f"layers.{layer}.attention")
    if layer == model.n_layer - 1:
        # Nothing after the last attention looks across tokens, and only the last token of a prompt is asked for.
        x, h = ops.gather_last(x), ops.gather_last(h)  # [B, E], [B, H*D/R]
    x = ops.add(x, _row_parallel(ops, mapping, h, prefix + "attention.dense"))
    h = _norm(ops, model, x, prefix + "post_attention_layernorm", prefix + "mlp.dense_h_to_4h")
    h = ops.name(_mlp(ops, model, mapping, h, prefix + "mlp."), f"layers.{layer}.mlp")
    return ops.name(ops.add(x, h), f"layers.{layer}")


def _norm(ops: Ops[X], model: ModelConfig, x: X, name: str, feeds: str | None = None) -> X:
    normalize = ops.rms_norm if model.normalization == "rmsnorm" else ops.layer_norm
    return normalize(x, name, model.layer_norm_epsilon, feeds)


def _mlp(ops: Ops[X], model: ModelConfig, mapping: Mapping, h: X, prefix: str) -> X:
    up, down = prefix + "dense_h_to_4h", prefix + "dense_4h_to_h"
    feeds = None if model.activation.gated else down
    inner = ops.linear(h, up, activation=model.activation.function, feeds=feeds)  # [..., F/R]
    if model.activation.gated:
        inner = ops.multiply(inner, ops.linear(h, up + ".gate"))
    return _row_parallel(ops, mapping, inner, down)


def _row_parallel(ops: Ops[X], mapping: Mapping, x: X, name: str) -> X:
    """A product whose input is shared among the ranks: partial sums, their sum, then the bias once."""
    if mapping.world_size == 1:
        return ops.linear(x, name)
    return ops.add_bias(ops.all_reduce(ops.linear(x, name, bias=False)), name)
