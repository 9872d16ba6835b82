"""Prompts of SmoothQuant and FP8 engines on a GPU: products that add to the residual stream and fill the cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import random_prompts, relative_error
from pages import Pages
from test_runtime_cuda_session import BOUNDS, MODELS, ROUNDS, begin, check_generation, make_build, make_weights, to

from gpt.checkpoint.random_weights import RandomWeights
from gpt.comm import NullCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine import cuda_prompt_attention, cuda_w8a8
from gpt.engine.weights import engine_tensors
from gpt.kernels.launch import INTERPRETED
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.cuda_session import CudaSession
from gpt.runtime.torch_session import TorchSession

QUANTS = {
    "int8": QuantConfig("int8", "per_tensor"),
    "int8 per token": QuantConfig("int8", "per_token"),
    "int8, int8 cache": QuantConfig("int8", "per_tensor", kv_cache="int8"),
    "fp8, fp8 cache": QuantConfig("fp8", "per_tensor", kv_cache="fp8"),
}
# Of a norm's sum another order can put a value on the other side of a half: one step of 127.
BOUND = BOUNDS["float32" if INTERPRETED else "float16"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what was launched: ways of storing a product's result, caches filled by a kernel of their own, parts
    that are added to the stream with the next rows."""
    found: Counter[str] = Counter()
    multiply, prepare = cuda_w8a8.w8a8, cuda_w8a8.quantize_rows

    def product(*values: Any, **options: Any) -> None:
        cache = options.get("cache")
        if options.get("add_to_out"):
            found["stream"] += 1
        if cache is not None:
            found["cache, queries alone" if values[4].shape[1] < len(values[2]) else "cache"] += 1
        multiply(*values, **options)

    def rows(*values: Any, **options: Any) -> None:
        found["parts"] += options.get("parts") is not None
        prepare(*values, **options)

    store = cuda_prompt_attention.store_cache

    def stored(*values: Any) -> None:
        found["store_cache"] += 1
        store(*values)

    monkeypatch.setattr(cuda_w8a8, "w8a8", product)
    monkeypatch.setattr(cuda_w8a8, "quantize_rows", rows)
    monkeypatch.setattr(cuda_prompt_attention, "store_cache", stored)
    return found


def sessions(
    model: ModelConfig, build: BuildConfig, device: torch.device, **options: Any
) -> tuple[TorchSession, CudaSession]:
    """The oracle and ours."""
    weights = make_weights(model, build)
    oracle = TorchSession(model, build, Mapping(), weights)
    return oracle, CudaSession(model, build, Mapping(), to(device, weights), device, **options)


ONE_LENGTH, SEVERAL = [5, 5], [3, 9, 1]
FORMS = [(form, lengths) for form in ("padded", "packed", "fused") for lengths in (ONE_LENGTH, SEVERAL)]
OTHERS = [*(("learned", quant) for quant in QUANTS if quant != "int8"), ("multi-query", "int8"), ("grouped", "int8")]


@pytest.mark.parametrize(
    ("name", "quant", "form", "lengths"),
    [
        *(("learned", "int8", *form) for form in FORMS),
        *(
            (*other, form, lengths)
            for other in OTHERS
            for form, lengths in (("padded", ONE_LENGTH), ("fused", SEVERAL))
        ),
    ],
)
def test_whole_prompts(
    name: str, quant: str, form: str, lengths: list[int], kernel_device: torch.device, launches: Counter[str]
) -> None:
    """Logits, and those of the steps that read the cache."""
    build = replace(make_build("float32"), quant=QUANTS[quant], remove_input_padding=form != "padded")
    if form == "fused":
        build = replace(build, gpt_attention_plugin="float32")
    model = replace(MODELS[name], inter_size=64)
    oracle, session = sessions(model, build, kernel_device)
    prompts = random_prompts(lengths, model.vocab_size)
    expected, logits = begin(oracle, prompts), begin(session, prompts)
    assert relative_error(logits, expected) < BOUND
    # Attention written out over packed prompts takes K and V as projected, as any over a quantised cache does.
    alone = build.quant.kv_cache is None and (form != "packed" or len(set(lengths)) == 1)
    assert launches.pop("stream") == 2 * model.n_layer
    assert launches.pop("cache, queries alone" if alone else "cache") == model.n_layer
    assert +launches == {"parts": 1}  # the positions
    check_generation(oracle, session, expected.argmax(-1), BOUND, 1 if INTERPRETED else 9)


@pytest.mark.parametrize("quant", QUANTS)
def test_steps_over_blocks(quant: str, kernel_device: torch.device, launches: Counter[str]) -> None:
    """Prompts in parts, new ones beside them and sequences that go on."""
    build = replace(make_build("float32"), quant=QUANTS[quant])
    model = replace(MODELS["grouped"], inter_size=64)
    pair = sessions(model, build, kernel_device)
    tokens = random_prompts((11, 7, 8, 3, 7), model.vocab_size)
    done = [0] * len(tokens)
    pages = [Pages(16, 4, device) for device in (torch.device("cpu"), kernel_device)]
    for each in pair:
        each.start_paged(16, 4)
    for counts in ROUNDS:
        parts = {row: tokens[row][done[row] : done[row] + count] for row, count in counts.items()}
        expected, found = (each.run_paged(page.step(parts)) for each, page in zip(pair, pages, strict=True))
        assert relative_error(found.cpu(), expected) < max(BOUND, 1e-3)
        for row, count in counts.items():
            done[row] += count
    num_steps = len(ROUNDS) - 1  # in the third all sequences decode
    assert launches["cache, queries alone" if build.quant.kv_cache is None else "cache"] == num_steps * model.n_layer
    assert not launches["store_cache"]


def test_rotation_stands_between_product_and_cache(kernel_device: torch.device, launches: Counter[str]) -> None:
    build = replace(make_build("float32"), quant=QUANTS["int8"])
    model = replace(MODELS["rope gated"], inter_size=64)
    oracle, session = sessions(model, build, kernel_device)
    prompts = random_prompts([5, 5], model.vocab_size)
    expected, logits = begin(oracle, prompts), begin(session, prompts)
    assert relative_error(logits, expected) < BOUND
    assert +launches == {"stream": 2 * model.n_layer, "store_cache": model.n_layer}


def test_partial_sums_are_exchanged_before_they_are_added(kernel_device: torch.device, launches: Counter[str]) -> None:
    class Other(NullCommunicator):
        """A second rank that has nothing to add."""

        def all_reduce(self, tensor: torch.Tensor) -> None:
            launches["exchanged"] += tensor.shape == (10, MODELS["learned"].n_embd)

        def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
            return torch.cat([tensor, tensor], dim)

    model, mapping = replace(MODELS["learned"], inter_size=64), Mapping(2, 0)
    build = replace(make_build("float32"), quant=QUANTS["int8"])
    random = RandomWeights(model, 1, torch.device("cpu"))
    weights = dict(engine_tensors(model, build, mapping, random))
    oracle = TorchSession(model, build, mapping, weights, torch.device("cpu"), Other())
    session = CudaSession(model, build, mapping, to(kernel_device, weights), kernel_device, Other())
    prompts = random_prompts([5, 5], model.vocab_size)
    expected = begin(oracle, prompts)
    launches.clear()
    assert relative_error(begin(session, prompts), expected) < BOUND
    # Of the last layer two rows are left behind its attention.
    assert +launches == {"exchanged": 2 * (model.n_layer - 1), "cache, queries alone": model.n_layer, "parts": 4}


@pytest.mark.parametrize("others", [[5], [2, 9]])
def test_among_others_the_same_bits(others: list[int], kernel_device: torch.device) -> None:
    """A prompt's cache is a row of the batch's then."""
    build = replace(make_build("float32"), quant=QUANTS["int8"])
    _, session = sessions(replace(MODELS["learned"], inter_size=64), build, kernel_device, batch_invariant=True)
    (prompt,) = random_prompts([6], MODELS["learned"].vocab_size)
    found = []
    for prompts in ([prompt], [*random_prompts(others, 60), prompt]):
        logits = begin(session, prompts)
        found.append((logits[-1], session.generation(torch.full((len(prompts),), 5, device=kernel_device))[-1].cpu()))
    for alone, among in zip(*found, strict=True):
        assert torch.equal(alone, among)
