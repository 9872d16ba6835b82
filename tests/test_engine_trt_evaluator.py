"""The evaluator computes the network it is given, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines import relative_error
from trt_models import MODELS, RANK, build_config, context_inputs, define, evaluate, layers_of

from gpt.engine import trt_io, trt_library
from gpt.engine.trt_builder import NetworkBuild
from gpt.engine.trt_evaluator import NetworkEvaluator
from gpt.errors import EngineError

pytestmark = pytest.mark.tensorrt


@pytest.fixture
def trt() -> Any:
    return trt_library.load()


class TestEvaluatorReadsTheNetwork:
    """Whatever is changed in the network after it was defined has to show: the evaluator knows nothing else."""

    model = MODELS["gpt2"]

    def change(self, network: NetworkBuild, before: torch.Tensor) -> float:
        return relative_error(evaluate(network, self.model)["logits"], before)

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_unchanged_is_unchanged(self, fused: bool, trt: Any) -> None:
        network = define(trt, self.model, build_config(fused=fused))
        assert self.change(network, evaluate(network, self.model)["logits"]) == 0

    def test_epsilon(self, trt: Any) -> None:
        network = define(trt, self.model, build_config())
        before = evaluate(network, self.model)["logits"]
        layers_of(network, "NORMALIZATION", "INormalizationLayer")[0].epsilon = 0.1
        assert self.change(network, before) > 1e-3

    def test_one_weight(self, trt: Any) -> None:
        network = define(trt, self.model, build_config())
        before = evaluate(network, self.model)["logits"]
        constants = layers_of(network, "CONSTANT", "IConstantLayer")
        product = next(c for c in constants if tuple(c.shape) == (1, self.model.inter_size, self.model.n_embd))
        values = product.weights.copy()
        values[0] += 1.0
        product.weights = values
        assert self.change(network, before) > 1e-4

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_without_the_mask(self, fused: bool, trt: Any) -> None:
        network = define(trt, self.model, build_config(fused=fused))
        before = evaluate(network, self.model)["logits"]
        constants = layers_of(network, "CONSTANT", "IConstantLayer")
        (slots,) = (c for c in constants if tuple(c.shape) == (1, 1, 1, network.build.max_seq_len))
        slots.weights = np.full_like(slots.weights, -1)  # every position is greater: all slots are seen
        assert self.change(network, before) > 1e-2

    def test_half_precision_is_rounded_to(self, trt: Any) -> None:
        """bfloat16 constants come from the table beside the network, and results lie on bfloat16's grid."""
        build = build_config("bfloat16", fused=True)
        network = define(trt, self.model, build)
        caches = {port.name: torch.bfloat16 for port in trt_io.cache_inputs(self.model, build, RANK)}
        inputs = context_inputs(self.model, build)
        inputs = {name: tensor.to(caches.get(name, tensor.dtype)) for name, tensor in inputs.items()}
        values = NetworkEvaluator(trt, network.network, network.side_table)(inputs)
        assert values["embedding"].dtype == torch.bfloat16
        assert values["logits"].dtype == torch.float32
        assert torch.equal(values["logits"], values["logits"].bfloat16().float())

    def test_what_it_does_not_know_it_refuses(self, trt: Any) -> None:
        network = define(trt, self.model, build_config(fused=True))
        inner = network.network
        top = inner.add_topk(inner.get_output(0), trt.TopKOperation.MAX, 1, 2)
        inner.mark_output(top.get_output(0))
        with pytest.raises(EngineError, match="TOPK"):
            evaluate(network, self.model)

    def test_causal_kinds_are_refused(self, trt: Any) -> None:
        builder = trt.Builder(trt_library.logger(trt))
        network = builder.create_network(0)
        q, k, v = (network.add_input(name, trt.float32, (1, 2, 8, 16)) for name in "qkv")
        softmax = trt.AttentionNormalizationOp.SOFTMAX
        attention = network.add_attention_v2(q, k, v, softmax, trt.CausalMaskKind.LOWER_RIGHT)
        network.mark_output(attention.get_output(0))
        with pytest.raises(EngineError, match="causal kind"):
            NetworkEvaluator(trt, network, {})({name: torch.zeros(1, 2, 8, 16) for name in "qkv"})

    def test_inputs_are_checked(self, trt: Any) -> None:
        network = define(trt, self.model, build_config())
        inputs = context_inputs(self.model, network.build)
        inputs["input_ids"] = inputs["input_ids"].long()
        with pytest.raises(EngineError, match="input_ids"):
            NetworkEvaluator(trt, network.network, network.side_table)(inputs)
