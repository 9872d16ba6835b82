"""The Hugging Face side generates what Hugging Face generates, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_gpt2

from gpt.errors import CheckpointError, ConfigError
from gpt.text.hf_baseline import HfBaseline, cut_at_end

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("hf") / "model", vocab_size=40, tokenizer=False)


def _next_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy by whole forward passes: no cache, no padding, no `generate`."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batched_rows_equal_single_ones_and_plain_forward_passes(folder: Path) -> None:
    baseline = HfBaseline(str(folder), "float32", torch.device("cpu"))
    together = baseline.generate(PROMPTS, COUNT, None)
    assert together.tokens == [_next_tokens(folder, prompt, COUNT) for prompt in PROMPTS]
    assert together.tokens == [baseline.generate([prompt], COUNT, None).tokens[0] for prompt in PROMPTS]
    assert len(together.step_ms) == COUNT - 1
    assert min(together.context_ms, *together.step_ms) > 0


def test_rows_end_at_their_end_token(folder: Path) -> None:
    """Each row's third token as the end, in turn, with the end id also being what pads."""
    baseline = HfBaseline(str(folder), "float32", torch.device("cpu"))
    free = baseline.generate(PROMPTS, COUNT, None).tokens
    for end_id in {row[2] for row in free}:
        expected = [cut_at_end(row, end_id) for row in free]
        result = baseline.generate(PROMPTS, COUNT, end_id)
        assert result.tokens == expected
        assert len(result.step_ms) == max(map(len, expected)) - 1


def test_sampling_settings_of_a_checkpoint_do_not_count(make_gpt2: Callable[..., Path]) -> None:
    folder = make_gpt2(vocab_size=40, tokenizer=False)
    plain = HfBaseline(str(folder), "float32", torch.device("cpu")).generate(PROMPTS, COUNT, None).tokens
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 1, "max_length": 5}'
    )
    again = HfBaseline(str(folder), "float32", torch.device("cpu")).generate(PROMPTS, COUNT, None).tokens
    assert again == plain


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(folder: Path, dtype: str) -> None:
    baseline = HfBaseline(str(folder), dtype, torch.device("cpu"))
    assert {parameter.dtype for parameter in baseline.model.parameters()} == {getattr(torch, dtype)}
    assert (baseline.vocab_size, baseline.n_positions) == (40, 64)


def test_unusable_models_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        HfBaseline(str(tmp_path / "absent"), "float32", torch.device("cpu"))
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        HfBaseline(str(tmp_path), "float32", torch.device("cpu"))
    assert caught.value.exit_code == 3
    with pytest.raises(CheckpointError, match="--hf_model_location"):
        HfBaseline("no-such-organisation/no-such-model", "float32", torch.device("cpu"))
