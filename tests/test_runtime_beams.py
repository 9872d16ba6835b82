"""Beam search beside Hugging Face's generate: ids and scores, settings, families, limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import build_engine, convert, open_session, random_prompts, relative_error
from test_network_families import old_santacoder, tiny_bigcode
from tiny_models import tiny_gpt2
from transformers import GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList
from trt_models import MODELS, RANK, build_config, random_weights

from gpt.engine.trt_stand_in import stand_in_engine
from gpt.errors import ConfigError, GptError
from gpt.quant import QuantConfig
from gpt.runtime.beam_config import BeamConfig
from gpt.runtime.beams import generate_beams
from gpt.runtime.generate import Generation, generate
from gpt.runtime.hypotheses import BeamSearch, Candidate
from gpt.runtime.request import Request
from gpt.runtime.sampling_config import SamplingConfig
from gpt.runtime.session import Session
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.trt_session import TrtSession
from gpt.text.stop_words import StopWords

# A word that hypotheses of different lengths end with.
VOCAB, END = 101, 92
LENGTHS = (5, 17, 1, 9)
LIMITS = ["--max_batch_size", "4", "--max_beam_width", "6", "--max_input_len", "20", "--max_output_len", "108"]


def make_session(folder: Path, out: Path) -> TorchSession:
    return open_session(build_engine(convert(folder, out / "ft"), out / "engine", *LIMITS))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchSession, Any]:
    """An engine, and the same model in Hugging Face."""
    base = tmp_path_factory.mktemp("beams")
    folder = tiny_gpt2(base / "hf", vocab_size=VOCAB, n_positions=128, tokenizer=False)
    return make_session(folder, base), GPT2LMHeadModel.from_pretrained(folder).eval()


def hf_beams(
    model: Any, prompt: Sequence[int], beams: BeamConfig, count: int, end_id: int | None, **options: Any
) -> tuple[list[list[int]], list[float]]:
    """New tokens and scores of the hypotheses of one prompt, best first."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=beams.num_beams,
            num_return_sequences=beams.num_returned,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            eos_token_id=end_id,
            pad_token_id=VOCAB - 1,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    lengths = (output.beam_indices >= 0).sum(dim=1).tolist()
    rows = [row[len(prompt) :][:length].tolist() for row, length in zip(output.sequences, lengths, strict=True)]
    return rows, output.sequences_scores.tolist()


def compare(
    session: Session, model: Any, beams: BeamConfig, count: int, end_id: int | None, options: Any = None, **ours: Any
) -> Generation:
    """Asserts that all hypotheses of all prompts are those of Hugging Face, one prompt at a time."""
    prompts = random_prompts(LENGTHS, VOCAB)
    result = generate_beams(session, Request(prompts, max_new_tokens=count, end_id=end_id, **ours), beams)
    expected = [hf_beams(model, prompt, beams, count, end_id, **(options or {})) for prompt in prompts]
    assert result.tokens == [row for rows, _ in expected for row in rows]
    assert result.scores == pytest.approx([score for _, scores in expected for score in scores], abs=1e-5, rel=1e-5)
    return result


def test_four_beams_of_a_hundred_tokens(gpt2: tuple[TorchSession, Any]) -> None:
    session, model = gpt2
    result = compare(session, model, BeamConfig(4), 100, None)
    assert {len(row) for row in result.tokens} == {100}
    greedy = generate(session, Request(random_prompts(LENGTHS, VOCAB), max_new_tokens=100)).tokens
    assert result.tokens[::4] != greedy
    ended = compare(session, model, BeamConfig(4), 100, END)
    assert len({len(row) for row in ended.tokens}) > 4


@pytest.mark.parametrize(("name", "end_id"), [("starcoder", 7), ("many key heads", 25), ("santacoder", 7)])
def test_other_families(name: str, end_id: int, tmp_path: Path) -> None:
    model = tiny_bigcode(tmp_path / "hf", n_head=4, n_embd=48, multi_query=name != "many key heads")
    folder = tmp_path / "hf"
    if name == "santacoder":
        folder = tmp_path / "old"
        old_santacoder(model, folder)
    result = compare(make_session(folder, tmp_path), model, BeamConfig(4), 100, end_id)
    assert len({len(row) for row in result.tokens}) > 4


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_ends_of_a_search(early_stopping: Any, length_penalty: float, gpt2: tuple[TorchSession, Any]) -> None:
    beams = BeamConfig(3, length_penalty=length_penalty, early_stopping=early_stopping, num_return=2)
    compare(*gpt2, beams, 25, END)


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "done"),
    [(True, 1.0, True), (False, 1.0, True), ("never", 1.0, False), ("never", 0.0, True), ("never", -1.0, True)],
)
def test_when_nothing_better_can_come(early_stopping: Any, length_penalty: float, done: bool) -> None:
    """Two complete hypotheses of -0.5 and -0.6 after one token; the best running one has -3, over ten tokens -0.3."""
    config = BeamConfig(2, length_penalty=length_penalty, early_stopping=early_stopping)
    search = BeamSearch(config, 2, max_new_tokens=10)
    scores = (-0.5, -0.6, -3.0, -4.0)
    chosen = search.step([Candidate(0, token, np.float32(score), token < 2) for token, score in enumerate(scores)])
    assert [one.token for one in chosen] == [2, 3]
    assert [one.tokens for one in search.best(2)] == [(0,), (1,)]
    assert search.is_done == done


def test_penalties_and_blocks(gpt2: tuple[TorchSession, Any]) -> None:
    words = [[7], [9, 11], [12, 3, 4], [END]]
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "bad_words_ids": words}
    ours = SamplingConfig(
        repetition_penalty=1.4, no_repeat_ngram_size=2, min_length=6, bad_words=tuple(tuple(word) for word in words)
    )
    plain = compare(*gpt2, BeamConfig(4), 30, END)
    result = compare(*gpt2, BeamConfig(4), 30, END, options, sampling=ours)
    assert result.tokens != plain.tokens
    assert min(map(len, result.tokens)) > 6


def test_stop_words_end_hypotheses(gpt2: tuple[TorchSession, Any]) -> None:
    free = compare(*gpt2, BeamConfig(3), 20, None)
    stop = tuple(free.tokens[0][6:8])

    class Stop(StoppingCriteria):
        """Looks at new tokens alone: the two of the stop word cannot both lie in the prompt of one token."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([tuple(row[-2:]) == stop for row in input_ids.tolist()])

    options = {"stopping_criteria": StoppingCriteriaList([Stop()])}
    result = compare(*gpt2, BeamConfig(3), 20, END, options, stops=StopWords(ids=[stop]))
    assert any(tuple(row[-2:]) == stop and len(row) < 20 for row in result.tokens)


def plain_search(
    session: Session, prompt: list[int], num_beams: int, count: int, groups: int = 1, penalty: float = 0.0
) -> list[list[int]]:
    """Diverse beam search as Vijayakumar et al. 2016 have it (algorithm 1, Hamming diversity), without an end token,
    a cache or anything shared: the beams of all groups, best first."""
    size = num_beams // groups
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(groups)]
    for _ in range(count):
        taken: list[int] = []
        for group in range(groups):
            continuations = []
            for score, tokens in beams[group]:
                session.start(1, 40)
                logprobs = session.context([prompt + tokens])[0].double().log_softmax(-1).tolist()
                continuations += [
                    (score + logprob - penalty * taken.count(token), [*tokens, token])
                    for token, logprob in enumerate(logprobs)
                ]
            beams[group] = sorted(continuations, key=lambda one: -one[0])[:size]
            taken += [tokens[-1] for _, tokens in beams[group]]
    return [tokens for _, tokens in sorted((one for group in beams for one in group), key=lambda one: -one[0])]


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_groups_differ_as_the_paper_says(groups: int, gpt2: tuple[TorchSession, Any]) -> None:
    session, _ = gpt2
    prompts = random_prompts((5, 3), VOCAB)
    beams = BeamConfig(6, num_groups=groups, diversity_penalty=0.7)
    result = generate_beams(session, Request(prompts, max_new_tokens=7), beams)
    expected = [plain_search(session, prompt, 6, 7, groups, 0.7) for prompt in prompts]
    assert result.tokens == [row for rows in expected for row in rows]
    alike = generate_beams(session, Request(prompts, max_new_tokens=7), BeamConfig(6))
    assert len({tuple(row[:2]) for row in result.tokens}) > len({tuple(row[:2]) for row in alike.tokens})


@pytest.mark.parametrize(
    "flags",
    [
        ["--rotary_pct", "0.5", "--hidden_act", "swiglu", "--no_bias", "--inter_size", "40"],
        ["--multi_query_mode", "--remove_input_padding", "--use_gpt_attention_plugin"],
    ],
)
def test_a_reordered_cache_is_that_of_the_whole_text(flags: list[str], tmp_path: Path) -> None:
    """Families that Hugging Face has no model for: each hypothesis computed anew."""
    sizes = ["--n_layer", "2", "--n_embd", "32", "--n_head", "2", "--vocab_size", "50", "--n_positions", "40"]
    limits = ["--max_batch_size", "2", "--max_beam_width", "4", "--max_input_len", "30", "--max_output_len", "10"]
    info = build_engine(None, tmp_path, *sizes, *limits, "--dtype", "float32", "--random_seed", "1", *flags)
    session, prompts = open_session(info), random_prompts((5, 3), 50)
    result = generate_beams(session, Request(prompts, max_new_tokens=10), BeamConfig(4))
    assert result.tokens == [row for prompt in prompts for row in plain_search(session, prompt, 4, 10)]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"quant": QuantConfig(kv_cache="int8")}, {"batch_buckets": (6,)}]
)
def test_tensorrt_session_reorders_its_cache(options: dict[str, Any]) -> None:
    model, build = MODELS["rotary_swiglu_grouped"], build_config(max_beam_width=3, **options)
    weights = random_weights(model)
    for layer in range(model.n_layer if build.quant.kv_cache else 0):
        weights[f"model.layers.{layer}.attention.kv_scale"] = torch.tensor([0.03, 0.02])
    engine = stand_in_engine(model, build, RANK, weights)
    ours = TrtSession(engine, model, build, RANK, "cpu", engine.trt)
    reference = TorchSession(model, build, RANK, weights)
    prompts = random_prompts((5, 1, 11, 3), model.vocab_size)
    for config in (BeamConfig(3), BeamConfig(2, num_return=1)):
        both = [
            generate_beams(session, Request(prompts, max_new_tokens=12, end_id=END), config)
            for session in (ours, reference)
        ]
        assert both[0].tokens == both[1].tokens
    logits = []
    for session in (ours, reference):  # while tokens are generated, and among prompts of several lengths
        session.start(6, 20)
        session.context(prompts)
        session.generation(torch.tensor([1, 2, 3, 4]))
        session.reorder([2, 0, 0, 3, 1])
        logits.append(session.generation(torch.tensor([5, 6, 7, 8, 9])).clone())
    assert relative_error(*logits) < 5e-3  # an int8 cache may hold another integer
    keys = [(0, 0), (0, 1), (1, 0)]
    sampling = SamplingConfig(top_k=0, seed=3)
    rows = [prompts[0], prompts[0], prompts[1]]
    samples = [
        generate(session, Request(rows, max_new_tokens=9, sampling=sampling, keys=keys)).tokens
        for session in (ours, reference)
    ]
    assert samples[0] == samples[1]
    assert samples[0][0] != samples[0][1]


def test_log_probabilities_add_up_to_the_score(gpt2: tuple[TorchSession, Any]) -> None:
    session, model = gpt2
    prompt = random_prompts((5,), VOCAB)[0]
    beams = BeamConfig(3, length_penalty=0.0)
    result = generate_beams(session, Request([prompt], max_new_tokens=15, end_id=END, num_top_logprobs=2), beams)
    for tokens, logprobs, score in zip(result.tokens, result.logprobs, result.scores, strict=True):
        assert sum(one.logprob for one in logprobs) == pytest.approx(score, abs=1e-4)
        with torch.inference_mode():
            exact = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values = exact.gather(1, torch.tensor([tokens]).T)[:, 0].tolist()
        assert [one.logprob for one in logprobs] == pytest.approx(values, abs=1e-4)
        assert [[token for token, _ in one.top] for one in logprobs] == exact.topk(2).indices.tolist()


def test_what_cannot_be_searched(gpt2: tuple[TorchSession, Any]) -> None:
    session, _ = gpt2

    def search(beams: BeamConfig, num_prompts: int = 1, **options: Any) -> None:
        generate_beams(session, Request([[1, 2]] * num_prompts, max_new_tokens=5, **options), beams)

    with pytest.raises(ConfigError, match="more beams than the engine") as caught:
        search(BeamConfig(7))
    assert "--max_beam_width 7" in str(caught.value)
    with pytest.raises(ConfigError, match="searched, not drawn"):
        search(BeamConfig(2), sampling=SamplingConfig(top_k=0, seed=1))
    with pytest.raises(ConfigError, match="at most 4"):
        search(BeamConfig(2), num_prompts=5)
    everything = tuple((token,) for token in range(VOCAB))
    with pytest.raises(GptError, match="no token is left"):
        search(BeamConfig(2), sampling=SamplingConfig(bad_words=everything))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_beams": 0, "length_penalty": 11.0, "early_stopping": "always"}, ["--num_beams 0", "-10 to 10", "never"]),
        ({"num_beams": 4, "num_groups": 3, "diversity_penalty": 1.0}, ["must divide --num_beams 4"]),
        ({"num_beams": 4, "diversity_penalty": 1.0}, ["--num_beam_groups"]),
        ({"num_beams": 4, "num_groups": 2}, ["without --diversity_penalty"]),
        ({"num_beams": 4, "num_groups": 2, "diversity_penalty": -1.0}, ["0 to 100"]),
        ({"num_beams": 4, "num_return": 5}, ["--num_return_sequences 5"]),
        (
            {"length_penalty": 2.0, "early_stopping": True},
            ["--length_penalty 2 without beams", "--early_stopping true"],
        ),
    ],
)
def test_bad_settings_are_listed_at_once(settings: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        BeamConfig(**settings)
    for part in told:
        assert part in str(error.value)
