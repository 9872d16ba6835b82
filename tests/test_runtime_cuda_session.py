"""The session of our kernels beside the one of PyTorch's operations, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import random_prompts, relative_error
from pages import Pages
from ranks import without_nccl

from gpt.checkpoint.random_weights import RandomWeights
from gpt.comm import NullCommunicator
from gpt.config import BuildConfig, ModelConfig
from gpt.engine import cuda_ops, cuda_prompt_attention
from gpt.engine.cuda_w8a8 import W8a8Linear
from gpt.engine.kv_cache import batch_bucket
from gpt.engine.step import AheadStep
from gpt.engine.weights import engine_tensors
from gpt.kernels import gemv
from gpt.kernels.launch import INTERPRETED
from gpt.mapping import Mapping
from gpt.quant import ACTIVATION_SCALES, QuantConfig, dequantize_weight, unpack_int4
from gpt.runtime.batcher import generate_paged
from gpt.runtime.batching_config import BatchingConfig
from gpt.runtime.cuda_session import CudaSession, kernels_know
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.torch_session import TorchSession

MODEL = ModelConfig(vocab_size=67, n_positions=40, n_embd=32, n_head=4, n_layer=2, n_kv_head=4, inter_size=48)
MODELS = {
    "learned": MODEL,
    "multi-query": replace(MODEL, n_kv_head=1),
    "grouped": replace(MODEL, n_kv_head=2),
    "rope gated": replace(MODEL, rotary_pct=0.5, hidden_act="swiglu", bias=False, tied_head=False),
    "rope rmsnorm": replace(MODEL, rotary_pct=1.0, normalization="rmsnorm", hidden_act="geglu", bias=False),
}
BATCHES = {"one": [6], "three": [3, 9, 1]}
MAX_SEQ_LEN = 20
NUM_STEPS = 2 if INTERPRETED else 10
# The project's bounds for logits of each type beside float32.
BOUNDS = {"float32": 1e-5, "float16": 5e-3}


def make_build(dtype: str, kv_cache: str | None = None) -> BuildConfig:
    build = BuildConfig(dtype=dtype, max_input_len=12, max_output_len=12, max_batch_size=4, seed=1)
    return replace(build, quant=replace(build.quant, kv_cache=kv_cache))


def make_weights(model: ModelConfig, build: BuildConfig) -> dict[str, torch.Tensor]:
    """Every tensor random, also those that a fresh model has at 0 or 1, so that a mix-up changes the logits."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in engine_tensors(model, build, Mapping(), RandomWeights(model, 1, torch.device("cpu"))):
        spread = tensor.float().std() if tensor.dim() > 1 else 1.0
        noise = torch.randn(tensor.shape, generator=generator) * spread * 0.3
        whole = "scale" in name or tensor.itemsize == 1
        weights[name] = tensor if whole else (tensor.float() + noise).to(tensor.dtype)
    return weights


def to(device: torch.device, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in weights.items()}


def make_pair(model: ModelConfig, dtype: str, device: torch.device) -> Iterator[TorchSession]:
    """The oracle in float32 on the CPU and the session to be tested, weights of `dtype` in both."""
    build = make_build(dtype)
    weights = make_weights(model, build)
    yield TorchSession(model, make_build("float32"), Mapping(), {name: t.float() for name, t in weights.items()})
    yield CudaSession(model, build, Mapping(), to(device, weights), device)


def begin(session: TorchSession, prompts: list[list[int]]) -> torch.Tensor:
    session.start(len(prompts), MAX_SEQ_LEN)
    return session.context(prompts).cpu()


def check_generation(
    oracle: TorchSession, session: TorchSession, ids: torch.Tensor, bound: float, num_steps: int = NUM_STEPS
) -> None:
    """The logits behind `ids` and behind the oracle's choices that follow."""
    for _ in range(num_steps):
        expected, logits = oracle.generation(ids), session.generation(ids.to(session.device)).cpu()
        assert logits.shape == expected.shape
        assert relative_error(logits, expected) < bound
        ids = expected.argmax(-1)


def test_graphs_are_released_before_nccl_ends(kernel_device: torch.device) -> None:
    """What a session recorded is gone when its ranks leave; the next step records it again."""
    gpus = without_nccl()
    build = make_build("float32")
    weights = {name: tensor.to(kernel_device) for name, tensor in make_weights(MODEL, build).items()}
    session = CudaSession(MODEL, build, Mapping(), weights, kernel_device, gpus)
    ids = begin(session, [[1, 2, 3]]).argmax(-1).to(kernel_device)
    session.generation(ids)
    assert session._decoders
    gpus.release_all()
    assert not session._decoders
    assert session._active is None


@pytest.mark.parametrize(
    ("name", "dtype", "batch"),
    [
        *((name, "float32", batch) for name in MODELS for batch in BATCHES),
        *(("rope gated", "float16", batch) for batch in BATCHES),
    ],
)
def test_logits(name: str, dtype: str, batch: str, kernel_device: torch.device) -> None:
    oracle, session = make_pair(MODELS[name], dtype, kernel_device)
    prompts = random_prompts(BATCHES[batch], MODEL.vocab_size)
    ids = begin(oracle, prompts).argmax(-1)
    begin(session, prompts)
    check_generation(oracle, session, ids, BOUNDS[dtype])


@pytest.mark.parametrize("most", [0, gemv.MOST_IN_PARTS])
def test_parts_of_large_attentions_are_joined_by_themselves(
    most: int, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """The product of a small one takes its parts along."""
    splits: list[int] = []
    multiply = cuda_ops.gemv

    def listen(*args: Any, **options: Any) -> None:
        splits.append(options["splits"])
        multiply(*args, **options)

    monkeypatch.setattr(cuda_ops, "gemv", listen)
    monkeypatch.setattr(gemv, "MOST_IN_PARTS", most)
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    prompts = random_prompts(BATCHES["one"], MODEL.vocab_size)
    ids = begin(oracle, prompts).argmax(-1)
    begin(session, prompts)
    check_generation(oracle, session, ids, BOUNDS["float32"])
    assert (max(splits) > 1) == (most > 0)


@pytest.mark.parametrize("name", ["learned", "rope gated"])
def test_products_of_large_batches_by_libraries(
    name: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.engine.cuda_ops.LIBRARY_ROWS", 2)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel for few rows")

    monkeypatch.setattr("gpt.engine.cuda_ops.skinny", refuse)
    oracle, session = make_pair(MODELS[name], "float32", kernel_device)
    prompts = random_prompts(BATCHES["three"], MODEL.vocab_size)
    ids = begin(oracle, prompts).argmax(-1)
    begin(session, prompts)
    check_generation(oracle, session, ids, BOUNDS["float32"])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("weights", "inter_size"), [("int8", 64), ("int8", 46), ("int4", 64)])
def test_quantised_weights(weights: str, inter_size: int, batch: str, kernel_device: torch.device) -> None:
    """The oracle multiplies with what the integers stand for; rows of 46 bytes are no whole words."""
    model = replace(MODELS["rope gated"], inter_size=inter_size)
    build = make_build("float32")
    quantized = replace(build, quant=replace(build.quant, weights=weights, group_size=32 if weights == "int4" else 0))
    tensors = dict(engine_tensors(model, quantized, Mapping(), RandomWeights(model, 1, torch.device("cpu"))))
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            continue
        scale = tensors.get(f"{name}_scale")
        if scale is not None:
            tensor = dequantize_weight(unpack_int4(tensor) if weights == "int4" else tensor, scale)
        plain[name] = tensor
    oracle = TorchSession(model, build, Mapping(), plain)
    on_device = {name: tensor.to(kernel_device) for name, tensor in tensors.items()}
    session = CudaSession(model, quantized, Mapping(), on_device, kernel_device)
    prompts = random_prompts(BATCHES[batch], model.vocab_size)
    ids = begin(oracle, prompts).argmax(-1)
    begin(session, prompts)
    # The prompt's integer products of TorchOps differ a little from float ones, and the cache remembers it.
    check_generation(oracle, session, ids, 1e-3)


# With a cache of the same type.
QUANTISED_PRODUCTS = {
    f"{weights} {activations}{' per channel' if per_channel else ''}": QuantConfig(
        weights=weights, activations=activations, per_channel=per_channel, kv_cache=weights
    )
    for weights, activations, per_channel in (
        *(("int8", activations, channel) for activations in ACTIVATION_SCALES for channel in (False, True)),
        *(("fp8", activations, False) for activations in ACTIVATION_SCALES),
    )
}


@pytest.mark.parametrize(("name", "batch"), [("learned", "one"), ("rope gated", "three")])
@pytest.mark.parametrize("quant", QUANTISED_PRODUCTS.values(), ids=QUANTISED_PRODUCTS)
def test_quantised_products(quant: QuantConfig, name: str, batch: str, kernel_device: torch.device) -> None:
    """The oracle is TorchOps, whose formulas are the same."""
    model = replace(MODELS[name], inter_size=64)
    build = replace(make_build("float32"), quant=quant)
    tensors = make_weights(model, build)
    oracle = TorchSession(model, build, Mapping(), tensors)
    on_device = {name: tensor.to(kernel_device) for name, tensor in tensors.items()}
    session = CudaSession(model, build, Mapping(), on_device, kernel_device)
    assert all(isinstance(product, W8a8Linear) for product in session.ops.linears.values())
    prompts = random_prompts(BATCHES[batch], model.vocab_size)
    expected, logits = begin(oracle, prompts), begin(session, prompts)
    # Another order of a norm's sum can put a value on the other side of a half: one step of 127.
    bound = BOUNDS["float32" if INTERPRETED else "float16"]
    assert relative_error(logits, expected) < bound
    check_generation(oracle, session, expected.argmax(-1), bound, 1 if INTERPRETED else 9)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_running_ahead_chooses_the_same(lengths: list[int], kernel_device: torch.device) -> None:
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    prompts = random_prompts(lengths, MODEL.vocab_size)
    first = ids = begin(oracle, prompts).argmax(-1)
    for batch in (prompts[:1], prompts):  # the second batch finds the buffers of the first
        begin(session, batch)
    assert isinstance(session, CudaSession)
    num_steps = 3 if INTERPRETED else 10
    for tokens, largest in session.run_ahead(first.to(kernel_device), num_steps):
        logits = oracle.generation(ids)
        ids = logits.argmax(-1)
        assert tokens == ids.tolist()
        assert torch.tensor(largest).allclose(logits.amax(-1), rtol=1e-4, atol=1e-5)
        num_steps -= 1
    assert num_steps == 0


def test_sums_can_go_through_another_communicator(kernel_device: torch.device) -> None:
    """What was recorded with the old one is forgotten."""
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    prompts = random_prompts([3], MODEL.vocab_size)
    ids = begin(oracle, prompts).argmax(-1)
    begin(session, prompts)
    session.generation(ids.to(kernel_device))
    assert isinstance(session, CudaSession)
    comm = NullCommunicator()
    session.exchange_through(comm)
    assert session.ops.comm is session._decode_ops.comm is comm
    assert session._decoders == {}
    begin(session, prompts)
    expected, logits = oracle.generation(ids), session.generation(ids.to(kernel_device)).cpu()
    assert relative_error(logits, expected) < BOUNDS["float32"]


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 0}, {"top_k": 5, "temperature": 3.0}, {"top_k": 40, "top_p": 0.7}, {"top_k": 0, "min_p": 0.2}],
    ids=str,
)
def test_running_ahead_draws_what_the_host_would(
    settings: dict[str, Any], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    monkeypatch.setattr(CudaSession, "generation", None)  # which waits for the host
    prompts = random_prompts([3, 5, 2], MODEL.vocab_size)
    num_tokens = 3 if INTERPRETED else 12

    def drawn(each: TorchSession, seed: int) -> list[list[int]]:
        sampling = SamplingConfig(seed=seed, **settings)
        return generate(each, Request(prompts, max_new_tokens=num_tokens, sampling=sampling)).tokens

    expected = {seed: drawn(oracle, seed) for seed in (3, 4)}
    assert expected[3] != expected[4]
    for seed in (3,) if INTERPRETED else (3, 4):
        assert drawn(session, seed) == expected[seed]


def test_a_larger_batch_follows_a_smaller_one(kernel_device: torch.device) -> None:
    """The first one's cache and graphs go, and with them the memory that graphs shared."""
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    assert isinstance(session, CudaSession)
    for lengths in ([4], [3, 5, 2], [4] * 4):
        prompts = random_prompts(lengths, MODEL.vocab_size)
        first = begin(oracle, prompts).argmax(-1)
        begin(session, prompts)
        tokens = next(session.run_ahead(first.to(kernel_device), 1))[0]
        assert tokens == oracle.generation(first).argmax(-1).tolist()


def test_steps_one_by_one_between_those_run_ahead(kernel_device: torch.device) -> None:
    """A token given by the caller, two chosen by the device, and the next one goes on behind them."""
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    assert isinstance(session, CudaSession)
    prompts = random_prompts([2, 4], MODEL.vocab_size)
    for each in (oracle, session):
        begin(each, prompts)
    given = torch.tensor([5, 6])
    oracle.generation(given)
    session.generation(given.to(kernel_device))
    ids = given
    for tokens, _ in session.run_ahead(given.to(kernel_device), 2):
        ids = oracle.generation(ids).argmax(-1)
        assert tokens == ids.tolist()
    expected, logits = oracle.generation(given), session.generation(given.to(kernel_device)).cpu()
    assert relative_error(logits, expected) < BOUNDS["float32"]


def test_reordered_rows(kernel_device: torch.device) -> None:
    oracle, session = make_pair(MODEL, "float32", kernel_device)
    prompts = random_prompts([3, 5, 2], MODEL.vocab_size)
    given = torch.tensor([5, 6, 7])
    logits = []
    for each in (oracle, session):
        begin(each, prompts)
        each.generation(given.to(each.device))
        each.reorder([2, 0, 0])
        logits.append(each.generation(given.to(each.device)).cpu())
    assert relative_error(logits[1], logits[0]) < BOUNDS["float32"]


# Tokens by sequence: prompts of several lengths, then single tokens beside a prompt's later part, a new prompt and a
# draft, then a prompt alone.
ROUNDS = ({0: 9, 1: 3, 2: 5}, {0: 1, 1: 4, 3: 2, 2: 3}, {0: 1, 3: 1}, {4: 7})


@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [*((name, None) for name in MODELS), ("learned", "int8"), ("multi-query", "int8"), ("grouped", "fp8")],
)
def test_steps_over_blocks(
    name: str, kv_cache: str | None, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch's operations over the same blocks; no prompt has a call of its own."""
    model, build = MODELS[name], make_build("float32", kv_cache)
    weights = make_weights(model, build)
    oracle = TorchSession(model, build, Mapping(), weights)
    session = CudaSession(model, build, Mapping(), to(kernel_device, weights), kernel_device)
    monkeypatch.setattr(session.ops.attend, "attend", None)
    monkeypatch.setattr(session.ops.attend, "paged", None)
    tokens = random_prompts((11, 7, 8, 3, 7), MODEL.vocab_size)
    done = [0] * len(tokens)
    pages = [Pages(16, 4, device) for device in (torch.device("cpu"), kernel_device)]
    for each in (oracle, session):
        each.start_paged(16, 4)
    for counts in ROUNDS:
        parts = {row: tokens[row][done[row] : done[row] + count] for row, count in counts.items()}
        expected, found = (
            each.run_paged(page.step(parts)) for each, page in zip((oracle, session), pages, strict=True)
        )
        # Another order of a sum can put a cached value on the other side of a half.
        assert relative_error(found.cpu(), expected) < (BOUNDS["float32"] if kv_cache is None else 1e-3)
        for row, count in counts.items():
            done[row] += count


def test_prompts_of_several_lengths_attend_in_one_launch(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over a contiguous cache, which the steps after them read."""
    build = replace(make_build("float32"), gpt_attention_plugin="float32")
    assert build.fused_attention
    weights = make_weights(MODEL, build)
    oracle = TorchSession(MODEL, build, Mapping(), weights)
    build = replace(build, remove_input_padding=True)
    session = CudaSession(MODEL, build, Mapping(), to(kernel_device, weights), kernel_device)
    launches: list[int] = []
    launch = cuda_prompt_attention.paged_attention

    def listen(*values: Any, **options: Any) -> None:
        launches.append(len(values[0]))
        launch(*values, **options)

    monkeypatch.setattr(cuda_prompt_attention, "paged_attention", listen)
    prompts = random_prompts([3, 9, 1], MODEL.vocab_size)
    expected, found = begin(oracle, prompts), begin(session, prompts)
    assert relative_error(found, expected) < BOUNDS["float32"]
    assert launches == [13] * MODEL.n_layer
    ids = expected.argmax(-1)
    expected, found = oracle.generation(ids), session.generation(ids.to(kernel_device)).cpu()
    assert relative_error(found, expected) < BOUNDS["float32"]


@pytest.mark.parametrize("enough", [True, False], ids=["enough blocks", "few blocks"])
def test_sequences_that_join_while_others_run_ahead(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    """Every prompt's tokens are those of the prompt alone, also where it ends in the middle of the steps ahead."""
    num_new = 4 if INTERPRETED else 12
    build = replace(
        make_build("float32"), paged_kv_cache=True, tokens_per_block=4, use_inflight_batching=True, max_batch_size=2
    )
    weights = make_weights(MODEL, build)
    # Small random weights say the same whatever they read.
    weights = {name: tensor * 8 if tensor.dim() == 2 else tensor for name, tensor in weights.items()}
    oracle = TorchSession(MODEL, build, Mapping(), weights)
    session = CudaSession(MODEL, build, Mapping(), to(kernel_device, weights), kernel_device)
    prompts = random_prompts([3, 9, 1, 6], MODEL.vocab_size)
    longest = max(map(len, prompts)) + num_new
    max_cache_tokens = None if enough else longest + 2 * build.tokens_per_block - 1
    free = [generate(oracle, Request([prompt], max_new_tokens=num_new)).tokens[0] for prompt in prompts]
    end_id = free[0][2]
    assert len({token for row in free for token in row}) > len(prompts)  # they say different things
    ahead: list[tuple[int, int]] = []
    run_ahead = session.run_paged_ahead

    def listen(step: AheadStep) -> Iterator[tuple[list[int], list[float]]]:
        ahead.append((len(step.ids), step.num_steps))
        return run_ahead(step)

    monkeypatch.setattr(session, "run_paged_ahead", listen)
    found = generate_paged(
        session,
        Request(prompts, max_new_tokens=num_new, end_id=end_id),
        batching=BatchingConfig(max_cache_tokens=max_cache_tokens),
    )
    assert found.tokens == [row[: row.index(end_id) + 1] if end_id in row else row for row in free]
    assert max(rows for rows, _ in ahead) == 2
    assert max(steps for _, steps in ahead) > 1
    assert len(found.step_ms) >= sum(steps for _, steps in ahead if steps > 1)


def test_logits_that_are_no_numbers_reach_the_caller(kernel_device: torch.device) -> None:
    _, session = make_pair(MODEL, "float32", kernel_device)
    assert isinstance(session, CudaSession)
    begin(session, [[1, 2]])
    session.ops.weights["model.wte"][9, 3] = torch.nan  # the tied head: token 9 has no logit
    (tokens, largest), *_ = session.run_ahead(torch.tensor([4], device=kernel_device), 1)
    assert largest[0] != largest[0]
    assert 0 <= tokens[0] < MODEL.vocab_size


@pytest.mark.parametrize(
    ("quant", "older"),
    [
        (QuantConfig(), True),
        (QuantConfig("int8", "per_token", kv_cache="int8"), True),
        (QuantConfig(kv_cache="fp8"), False),
        (QuantConfig("fp8", "per_tensor"), False),
    ],
)
def test_fp8_wants_a_newer_card(quant: QuantConfig, older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((8, 6), older), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert kernels_know(quant, torch.device("cuda")) == expected


def test_batches_share_buckets() -> None:
    assert [batch_bucket(size) for size in (1, 2, 3, 33, 256, 257)] == [1, 2, 4, 48, 256, 320]
