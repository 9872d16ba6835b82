"""run.py with virtual tokens in front of the prompts, and with the tokenizer of a NeMo model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import build_engine, convert
from tiny_models import tiny_gpt2
from tiny_nemo import GPT_NEXT, nemo_logits, save_model, sentencepiece_model, tiny_config, tiny_state

import nemo_ckpt_convert
import run
from gpt.checkpoint.prompt_sources import Task
from gpt.checkpoint.prompt_table import description_path, write_table
from gpt.runtime import load
from gpt.text.tokenizer import load_tokenizer

VOCAB, WIDTH, END, MAX_INPUT = 264, 32, 263, 20
COUNTS = (3, 2)  # real virtual tokens of each task
PROMPTS = ["the end", "a", "in the north"]
Main = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Engine:
    hf: Path
    folder: Path
    packed: Path
    untuned: Path
    table: Path

    def rows(self, prompts: Sequence[Sequence[int]], tasks: Sequence[int], count: int = 6) -> list[list[int]]:
        """New tokens by Hugging Face on embeddings: the task's real rows, then the prompt's."""
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(self.hf).eval()
        table = torch.from_numpy(np.load(self.table))
        rows = []
        for prompt, task in zip(prompts, tasks, strict=True):
            new: list[int] = []
            while len(new) < count and END not in new:
                ids = model.transformer.wte(torch.tensor([*prompt, *new]))
                embeds = torch.cat([table[task, : COUNTS[task]], ids])[None]
                with torch.inference_mode():
                    new.append(int(model(inputs_embeds=embeds).logits[0, -1].argmax()))
            rows.append(new)
        return rows

    def printed(self, prompts: Sequence[str], tasks: Sequence[int]) -> str:
        tokenizer = load_tokenizer(self.hf)
        rows = self.rows([tokenizer.encode(prompt) for prompt in prompts], tasks)
        texts = [tokenizer.decode(row[:-1] if row[-1] == END else row, skip_special=False) for row in rows]
        return "".join(f'Input: "{prompt}"\nOutput: "{text}"\n' for prompt, text in zip(prompts, texts, strict=True))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Two prompts at a time; a table of two tasks whose values are as large as embeddings get."""
    base = tmp_path_factory.mktemp("tasks")
    hf = tiny_gpt2(base / "hf", vocab_size=VOCAB)
    checkpoint = convert(hf, base / "ft")
    limits = ["--max_batch_size", "2", "--max_input_len", str(MAX_INPUT), "--max_output_len", "8"]
    tuned = [*limits, "--max_prompt_embedding_table_size", "6"]
    build_engine(checkpoint, base / "engine", *tuned)
    build_engine(checkpoint, base / "packed", *tuned, "--remove_input_padding")
    build_engine(checkpoint, base / "untuned", *limits)
    generator = np.random.default_rng(0)
    tasks = [
        Task(f"task{index}", generator.normal(size=(count, WIDTH)).astype(np.float32), "test")
        for index, count in enumerate(COUNTS)
    ]
    write_table(base / "prompts.npy", tasks)
    return Engine(hf, base / "engine", base / "packed", base / "untuned", base / "prompts.npy")


@pytest.fixture
def main(engine: Engine, call_script: Main) -> Main:
    def call(*flags: object, engine_dir: Path = engine.folder, max_output_len: int = 6) -> tuple[int, str, str]:
        given = ["--engine_dir", engine_dir, "--max_output_len", max_output_len, "--device", "cpu"]
        return call_script(run.main, *given, *flags)

    return call


@pytest.mark.parametrize("kind", ["folder", "packed"])
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_each_prompt_gets_the_virtual_tokens_of_its_task(
    engine: Engine, main: Main, kind: str, streaming: list[str]
) -> None:
    """The third prompt runs in a second batch with a task of its own; virtual tokens are not printed."""
    flags = ["--input_text", *PROMPTS, "--prompt_table", engine.table, "--tasks", "1,0,0", *streaming]
    expected = engine.printed(PROMPTS, [1, 0, 0])
    code, out, errors = main(*flags, engine_dir=getattr(engine, kind))
    assert (code, out) == (0, expected)
    assert len(errors.splitlines()) == len(streaming)  # streaming ends with its speed
    assert expected != engine.printed(PROMPTS, [1, 0, 1])


@pytest.mark.parametrize(("flags", "task"), [([], 0), (["--tasks", "0"], 0), (["--tasks", " 1"], 1)])
def test_one_task_for_all_prompts(engine: Engine, main: Main, flags: list[str], task: int) -> None:
    code, out, _ = main("--input_text", *PROMPTS, "--prompt_table", engine.table, *flags)
    assert (code, out) == (0, engine.printed(PROMPTS, [task] * 3))


def test_without_a_description_all_rows_are_virtual_tokens(engine: Engine, main: Main, tmp_path: Path) -> None:
    bare = tmp_path / "bare.npy"
    bare.write_bytes(engine.table.read_bytes())
    flags = ("--input_text", "a", "--tasks", 1, "--output_csv", tmp_path / "out.csv")
    lengths = []
    for table in (engine.table, bare):
        assert main(*flags, "--prompt_table", table)[0] == 0
        row = [int(cell) for cell in (tmp_path / "out.csv").read_text().split(",")]
        lengths.append(sum(token >= VOCAB for token in row))
    assert lengths == [2, 3]


def test_token_files_hold_their_virtual_ids(engine: Engine, main: Main, tmp_path: Path) -> None:
    prompts = [[5, 6, 7], [9]]
    in_front = [[VOCAB, VOCAB + 1, VOCAB + 2, *prompts[0]], [VOCAB, VOCAB + 1, *prompts[1]]]
    (tmp_path / "in.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in in_front))
    flags = ["--input_tokens", tmp_path / "in.csv", "--prompt_table", engine.table, "--tasks", "0,1"]
    assert main(*flags, "--output_npy", tmp_path / "out.npy") == (0, "", "")
    rows = engine.rows(prompts, [0, 1])
    expected = [(a + b + [END] * 12)[:12] for a, b in zip(in_front, rows, strict=True)]
    assert np.load(tmp_path / "out.npy").tolist() == expected
    code, out, _ = main(*flags)
    assert code == 0
    texts = [load_tokenizer(engine.hf).decode(prompt, skip_special=False) for prompt in prompts]
    assert [line for line in out.split("\n") if line.startswith("Input")] == [f'Input: "{text}"' for text in texts]


def test_importable_function_takes_tasks_as_numbers(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    run.generate(
        6,
        engine_dir=engine.folder,
        input_text=PROMPTS[:2],
        prompt_table=str(engine.table),
        tasks=(1, 0),
        device="cpu",
    )
    assert capsys.readouterr().out == engine.printed(PROMPTS[:2], [1, 0])


def _table(folder: Path, array: np.ndarray) -> list[object]:
    np.save(folder / "t.npy", array)
    return ["--prompt_table", folder / "t.npy"]


def _tokens(folder: Path, content: str) -> list[object]:
    (folder / "in.csv").write_text(content)
    return ["--input_tokens", folder / "in.csv"]


@pytest.mark.parametrize(
    ("flags", "expected_code", "expected"),
    [
        (lambda e, _: ["--tasks", "0"], 2, ["--tasks without a table", "--prompt_table"]),
        (lambda e, _: ["--prompt_table", e.table, "--tasks", "0,,x,-1"], 2, ["value 2: ''", "value 3: 'x'", "'-1'"]),
        (lambda e, _: ["--prompt_table", e.table, "--tasks", "2"], 2, ["task 2", "tasks 0 to 1"]),
        (lambda e, _: ["--prompt_table", e.table, "--tasks", "0,1"], 2, ["2 tasks for 1 prompts"]),
        (lambda e, d: ["--prompt_table", d / "absent.npy"], 2, ["no such input file"]),
        (lambda e, d: ["--prompt_table", d / "table.nemo"], 2, ["not supported", ".nemo", ".npy"]),
        (lambda e, d: _table(d, np.zeros((1, 2, 16), "f4")), 2, ["16 wide, the model 32"]),
        (lambda e, d: _table(d, np.zeros((3, 3, WIDTH), "f4")), 2, ["3 tasks of 3", "table_size is 6"]),
        (lambda e, d: _table(d, np.zeros((1, 2, WIDTH), "i4")), 3, ["int32", "a float type"]),
        (lambda e, d: _table(d, np.zeros(WIDTH, "f4")), 3, ["[32]", "[tasks, virtual tokens, hidden size]"]),
        (lambda e, d: _table(d, np.full((1, 2, WIDTH), np.nan, "f4")), 3, ["NaN or infinite"]),
        (
            lambda e, _: ["--prompt_table", e.table, "--input_text", "x" * 18],
            2,
            ["21 tokens, 3 of them virtual", f"--max_input_len {MAX_INPUT}"],
        ),
        (
            lambda e, d: ["--prompt_table", e.table, "--tasks", "1", *_tokens(d, f"{VOCAB},{VOCAB + 2},5\n")],
            2,
            [f"prompt 0: {VOCAB + 2}; task 1 (task1) has {VOCAB} to {VOCAB + 1}"],
        ),
        (lambda e, d: _tokens(d, f"{VOCAB},5\n"), 2, [f"token ids {VOCAB} outside the vocabulary"]),
        (lambda e, _: ["--prompt_table", e.table, "--engine_dir", e.untuned], 2, ["built without prompt tuning"]),
    ],
)
def test_what_does_not_fit_is_refused_before_the_engine_is_loaded(
    engine: Engine,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: Callable[[Engine, Path], list[object]],
    expected_code: int,
    expected: list[str],
) -> None:
    monkeypatch.setattr(load, "load_session", lambda *args: pytest.fail("nothing is loaded for this"))
    given = flags(engine, tmp_path)
    text = [] if "--input_text" in given or "--input_tokens" in given else ["--input_text", "a"]
    code, out, err = main(*text, *given)
    assert (code, out) == (expected_code, "")
    for part in expected:
        assert part in err
    assert "Traceback" not in err


def test_what_is_cut_of_a_prompt_leaves_its_virtual_tokens(engine: Engine, main: Main, tmp_path: Path) -> None:
    count = np.load(engine.table).shape[1]
    flags = ("--prompt_table", engine.table, "--on_long_prompt", "truncate", "--max_input_length")
    code, out, err = main("--input_text", "abcdef", *flags, count + 2)
    assert (code, out.splitlines()[0]) == (0, 'Input: "ef"')
    assert f"(--max_input_length {count + 2} less {count} virtual tokens): 1\n  prompt 0: 6 tokens\n" in err
    code, _, err = main("--input_text", "abcdef", *flags, count)
    assert (code, "no room for a prompt" in err, "a larger --max_input_length" in err) == (2, True, True)


def test_a_description_of_another_table_is_refused(engine: Engine, main: Main, tmp_path: Path) -> None:
    flags = _table(tmp_path, np.zeros((1, 2, WIDTH), "f4"))
    description_path(tmp_path / "t.npy").write_text(description_path(engine.table).read_text())
    code, _, err = main("--input_text", "a", *flags)
    assert (code, "belongs to another table" in err) == (3, True)


def test_a_nemo_model_brings_its_tokenizer_and_ends_at_its_end_id(main: Main, tmp_path: Path) -> None:
    """The end token's row of the head becomes a louder copy of what would be the third new token."""
    section = {"library": "sentencepiece", "model": "nemo:0a1b_tokenizer.model", "type": None}
    config = tiny_config(**GPT_NEXT, tokenizer=section)
    state = tiny_state(config)
    content = sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(content)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    prompt = tokenizer.encode("the quick")

    def continued() -> list[int]:
        new: list[int] = []
        while len(new) < 8 and 2 not in new:
            new.append(int(nemo_logits(config, state, [*prompt, *new])[-1].argmax()))
        return new

    head = state["model.language_model.output_layer.weight"]
    free = continued()
    head[2] = 1.01 * head[next(token for token in free if token != free[0])]
    new = continued()
    assert new[-1] == 2
    assert 1 < len(new) < 8
    archive = save_model(tmp_path / "m.nemo", config, state, extra={"0a1b_tokenizer.model": content})
    arguments = nemo_ckpt_convert.ProgArgs(out_dir=str(tmp_path / "ft"), in_file=str(archive))
    folder = nemo_ckpt_convert.run_conversion(arguments)
    build_engine(folder, tmp_path / "engine", "--max_input_len", "8", "--max_output_len", "8", "--max_batch_size", "1")
    expected = f'Input: "the quick"\nOutput: "{tokenizer.decode(new[:-1], skip_special=False)}"\n'
    for flags in ([], ["--vocab_file", tmp_path / "tokenizer.model"]):
        code, out, _ = main("--input_text", "the quick", *flags, engine_dir=tmp_path / "engine", max_output_len=8)
        assert (code, out) == (0, expected)
