"""Virtual tokens: their embeddings reach the right tokens of the right prompts, everything that does not fit is
told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import build_engine, open_session, random_prompts, relative_error
from plain_gpt import plain_logits

from gpt.errors import ConfigError
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.load import load_torch_weights
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession
from gpt.runtime.virtual_tokens import VirtualTokens

VOCAB = 91
SIZES = ["--n_layer", "2", "--n_embd", "48", "--n_head", "4", "--vocab_size", str(VOCAB), "--n_positions", "64"]
NUM_TASKS, NUM_VIRTUAL = 3, 5


def table() -> torch.Tensor:
    return torch.randn(NUM_TASKS, NUM_VIRTUAL, 48, generator=torch.Generator().manual_seed(2))


def session(tmp_path: Path, *flags: str) -> tuple[TorchSession, dict[str, torch.Tensor]]:
    size = ["--max_prompt_embedding_table_size", str(NUM_TASKS * NUM_VIRTUAL)]
    info = build_engine(None, tmp_path / "e", *SIZES, *size, "--dtype", "float32", "--random_seed", "5", *flags)
    return open_session(info), load_torch_weights(info, Mapping(), torch.device("cpu"))


@pytest.mark.parametrize("positions", [[], ["--rotary_pct", "0.5"]], ids=["learned", "rotary"])
@pytest.mark.parametrize("layout", [[], ["--remove_input_padding"]], ids=["padded", "packed"])
def test_each_prompt_gets_its_task(layout: list[str], positions: list[str], tmp_path: Path) -> None:
    """In front, in the middle and not at all; two prompts share a task; equal to a model with the rows in its
    embedding."""
    engine, weights = session(tmp_path, *layout, *positions)
    words = random_prompts((4, 9, 6, 2), VOCAB)
    virtual_ids = list(range(VOCAB, VOCAB + NUM_VIRTUAL))
    prompts = [
        virtual_ids + words[0],
        words[1][:3] + virtual_ids[:2] + words[1][3:],
        words[2],
        virtual_ids[::-1] + words[3],
    ]
    tasks = (2, 0, 1, 2)
    engine.start(len(prompts), 30)
    logits = engine.context(prompts, VirtualTokens(table(), tasks))
    for prompt, task, row in zip(prompts, tasks, logits, strict=True):
        rows = torch.cat([weights["model.wte"][:VOCAB], table()[task]])
        assert relative_error(row, plain_logits(engine.model, weights | {"model.wte": rows}, prompt)[-1]) < 1e-5


def test_padding_of_the_vocabulary_is_no_place_for_virtual_tokens(tmp_path: Path) -> None:
    """The table of embeddings has 96 rows for 91 tokens: id 91 must be virtual token 0, not row 91."""
    engine, weights = session(tmp_path)
    assert weights["model.wte"].shape[0] == 96
    first, second = (
        generate(engine, Request([[VOCAB, 3]], max_new_tokens=8, virtual=VirtualTokens(table() * scale, (0,)))).tokens
        for scale in (1.0, -1.0)
    )
    assert first != second


@pytest.mark.parametrize(
    ("change", "prompt", "told"),
    [
        (lambda t: VirtualTokens(t, (3,)), [1], ["task 3", "tasks 0 to 2"]),
        (lambda t: VirtualTokens(t, (-1,)), [1], ["task -1"]),
        (lambda t: VirtualTokens(t, (0, 1)), [1], ["2 tasks for 1 prompts"]),
        (lambda t: VirtualTokens(t[..., :40], (0,)), [1], ["40 wide, the model 48"]),
        (lambda t: VirtualTokens(torch.cat([t, t]), (0,)), [1], ["6 tasks of 5", "table_size is 15"]),
        (lambda t: VirtualTokens(t[0], (0,)), [1], ["[5, 48]"]),
        (lambda t: VirtualTokens(t, (0,)), [VOCAB + NUM_VIRTUAL], ["token ids 96", "virtual tokens 91 to 95"]),
    ],
)
def test_what_does_not_fit(change, prompt: list[int], told: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine, _ = session(tmp_path)
    with pytest.raises(ConfigError) as caught:
        generate(engine, Request([prompt], max_new_tokens=2, virtual=change(table())))
    for text in told:
        assert text in str(caught.value)


def test_an_engine_without_room_says_how_to_build_one(tmp_path: Path) -> None:
    engine = open_session(build_engine(None, tmp_path / "e", *SIZES))
    with pytest.raises(ConfigError, match="does not fit") as caught:
        generate(engine, Request([[1]], max_new_tokens=2, virtual=VirtualTokens(table(), (0,))))
    assert "--max_prompt_embedding_table_size" in str(caught.value)
