"""Weights out of a seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.random_weights import RandomWeights
from gpt.config import ModelConfig
from gpt.mapping import Mapping, Split

MODEL = ModelConfig(vocab_size=301, n_positions=64, n_embd=48, n_head=4, n_layer=2, n_kv_head=4, inter_size=120)
MULTI_QUERY = dataclasses.replace(MODEL, n_kv_head=1)


def tensor_named(model: ModelConfig, name: str) -> Tensor:
    return next(tensor for tensor in tensors(model) if tensor.name == name)


@pytest.mark.parametrize("model", [MODEL, MULTI_QUERY])
def test_random_weights_are_the_same_for_any_number_of_ranks(model: ModelConfig) -> None:
    weights = RandomWeights(model, seed=3)
    for tensor in tensors(model):
        whole = weights.read(tensor, Mapping())
        assert (whole.shape, whole.dtype) == (tensor.shape, torch.float32)
        parts = [weights.read(tensor, Mapping(4, rank)) for rank in range(4)]
        for rank, part in enumerate(parts):
            assert part.is_contiguous()
            assert torch.equal(part, Mapping(4, rank).shard(tensor.split, whole, model))
        if tensor.split in (Split.COLUMN, Split.ROW):
            assert torch.equal(torch.cat(parts, dim=0 if tensor.split is Split.ROW else -1), whole)


def test_random_weights_depend_on_seed_and_name_only() -> None:
    first, second = (tensor_named(MODEL, f"model.layers.{layer}.attention.dense.weight") for layer in (0, 1))
    read = RandomWeights(MODEL, seed=3).read(first, Mapping())
    assert torch.equal(read, RandomWeights(MODEL, seed=3).read(first, Mapping()))
    assert not torch.equal(read, RandomWeights(MODEL, seed=4).read(first, Mapping()))
    assert not torch.equal(read, RandomWeights(MODEL, seed=3).read(second, Mapping()))


def test_random_weights_look_like_a_fresh_model() -> None:
    for tensor in tensors(MODEL):
        values = RandomWeights(MODEL, seed=0).read(tensor, Mapping())
        center = 1.0 if tensor.kind == "scale" else 0.0
        assert abs(float(values.mean()) - center) < 0.02 * 5 / values.numel() ** 0.5
        assert 0.01 < float(values.std()) < 0.03
