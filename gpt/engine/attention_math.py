"""softmax(scale * Q K^T) V, in two forms with the same arguments."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from gpt.engine.cpu import cpu_has


class Attend(Protocol):
    """q [B, H, S, D], k and v [B, G, T, D], mask [B, 1, S, T] bool or None -> [B, H, S, D] of q's dtype."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None,
        *,
        causal: bool,
    ) -> torch.Tensor: ...


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None, *, causal: bool
) -> torch.Tensor:
    """q [B, H, S, D], k and v [B, G, T, D], mask [B, 1, S, T] bool or None -> [B, H, S, D]."""
    dtype = attention_dtype(q.dtype, q.device)
    k, v = (_repeat_heads(t.to(dtype), q.shape[1]) for t in (k, v))
    y = F.scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return y.to(q.dtype)


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What queries, keys and values of `dtype` are widened to: on processors that do not multiply it, PyTorch's
    attention in float32 takes a half to a fifth of the time."""
    if device.type != "cpu":
        return dtype
    multiplies = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    return dtype if dtype in multiplies and cpu_has(multiplies[dtype]) else torch.float32


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None, *, causal: bool
) -> torch.Tensor:
    """The same as `fused_attention`, written out with scores and softmax in float32."""
    k, v = (_repeat_heads(t, q.shape[1]) for t in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale  # [B, H, S, T]
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).to(q.dtype)


def _repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, G, T, D] -> [B, H, T, D]: a view where one head serves all."""
    num_kv_heads = x.shape[1]
    if num_kv_heads == num_heads:
        return x
    if num_kv_heads == 1:
        return x.expand(-1, num_heads, -1, -1)
    return x.repeat_interleave(num_heads // num_kv_heads, dim=1)
