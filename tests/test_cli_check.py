"""check.py: every kind of artifact is recognised and described, every kind of damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import build_engine, convert
from tiny_models import tiny_gpt2
from tiny_nemo import GPT_NEXT, save_model, save_prompts, tiny_config, tiny_state

import check
from gpt.checkpoint.prompt_sources import Task
from gpt.checkpoint.prompt_table import description_path, write_table
from gpt.engine.tensor_file import map_tensor_file

WEIGHT = "model.layers.1.mlp.dense_4h_to_h.weight.0.bin"
Main = Callable[..., tuple[int, str, str]]
Result = dict[str, Any]


@pytest.fixture
def main(call_script: Main) -> Main:
    return lambda *arguments: call_script(check.main, *arguments, "--log_level", "error")


@pytest.fixture
def checked(main: Main) -> Callable[..., Result]:
    """`checked(path, *flags)` -> the only object that --json prints; the exit code fits its problems."""

    def call(*arguments: object) -> Result:
        code, out, _ = main(*arguments, "--json")
        (result,) = json.loads(out)
        assert code == (3 if result["problems"] else 0)
        assert isinstance(result, dict)
        return result

    return call


Checked = Callable[..., Result]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_gpt2(tmp_path / "hf", vocab_size=264)


@pytest.fixture
def checkpoint(hf: Path, tmp_path: Path) -> Path:
    return convert(hf, tmp_path / "ft", tp=2)


@pytest.fixture
def engine(hf: Path, tmp_path: Path) -> Path:
    limits = ["--max_batch_size", "3", "--max_input_len", "20", "--max_output_len", "9"]
    build_engine(convert(hf, tmp_path / "ft1"), tmp_path / "engine", *limits, "--max_prompt_embedding_table_size", "6")
    return tmp_path / "engine"


def _poison(path: Path, offset: int = 0) -> None:
    """Two NaN and one infinite float32 value."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.array([np.nan, 1.0, -np.inf, np.nan], dtype="<f4").tobytes())


def test_a_whole_checkpoint(checkpoint: Path, checked: Checked) -> None:
    for path in (checkpoint, checkpoint.parent):
        result = checked(path)
        facts = result["facts"]
        assert result["kind"] == "FT checkpoint"
        assert (facts["dtype"], facts["ranks"], facts["vocabulary"]) == ("float32", 2, 264)
        assert facts["parameters"] == 264 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
        assert facts["architecture"].startswith("2 layers of 32, 4 heads of 8, MLP 128 gelu_new, layernorm, 64 learned")
        assert facts["token_ids"] == {"begin": 263, "end": 263, "padding": None}
        assert facts["tokenizer"] == "fast, 264 tokens, end id 263"
        assert "hf_gpt_convert.py" in facts["made_with"]
        assert result["next_step"] == f"python build.py --model_dir {checkpoint} --world_size 2"


def test_a_checkpoint_of_another_tool(checkpoint: Path, checked: Checked) -> None:
    """No manifest, FasterTransformer's names in config.ini, no checksums: values are still looked at."""
    (checkpoint / "manifest.json").unlink()
    keys: dict[str, object] = {
        "head_num": 4,
        "size_per_head": 8,
        "inter_size": 128,
        "max_pos_seq_len": 64,
        "num_layer": 2,
    }
    keys |= {"vocab_size": 264, "start_id": 263, "end_id": 263, "weight_data_type": "fp32", "tensor_para_size": 2}
    lines = [f"{key} = {value}" for key, value in keys.items()]
    (checkpoint / "config.ini").write_text("\n".join(["[gpt]", *lines]) + "\n")
    result = checked(checkpoint)
    assert result["kind"] == "FT checkpoint of another tool (no manifest.json)"
    assert result["facts"]["token_ids"]["end"] == 263
    _poison(checkpoint / WEIGHT)
    assert checked(checkpoint)["problems"] == [f"{WEIGHT}: 2 NaN and 1 infinite values"]


def test_everything_wrong_with_a_checkpoint_is_listed(checkpoint: Path, checked: Checked) -> None:
    """Missing and short files do not hide changed bytes, values and tokenizer files."""
    _poison(checkpoint / WEIGHT)
    (checkpoint / "model.wpe.bin").unlink()
    with open(checkpoint / "model.layers.0.attention.dense.weight.1.bin", "r+b") as file:
        file.truncate(100)
    (checkpoint / "merges.txt").unlink()
    (checkpoint / "model.other.bin").write_bytes(b"1234")
    result = checked(checkpoint)
    problems = "\n".join(result["problems"])
    assert len(result["problems"]) == 5
    for part in (
        "this checkpoint cannot be used: model.wpe.bin: missing",
        "model.layers.0.attention.dense.weight.1.bin: found 100 bytes, expected 2048 for [16, 32] in float32",
        "merges.txt: missing",
        f"{WEIGHT}: changed after it was written: xxh3_128",
        f"{WEIGHT}: 2 NaN and 1 infinite values",
    ):
        assert part in problems
    assert result["facts"]["files_not_used"] == ["model.other.bin"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], ["changed", "NaN"]), (["--no_checksums"], ["NaN"]), (["--no_values"], ["changed"])],
)
def test_what_takes_long_can_be_left_out(
    checkpoint: Path, checked: Checked, flags: list[str], expected: list[str]
) -> None:
    _poison(checkpoint / WEIGHT)
    problems = checked(checkpoint, *flags)["problems"]
    assert [word for word in ("changed", "NaN") if word in " ".join(problems)] == expected
    assert len(problems) == len(expected)


@pytest.mark.parametrize("name", ["manifest.json", "config.ini"])
def test_damaged_descriptions(checkpoint: Path, checked: Checked, name: str) -> None:
    (checkpoint / name).write_text("{")
    (problem,) = checked(checkpoint)["problems"]
    assert "damaged" in problem


def test_a_tokenizer_larger_than_the_embedding_is_explained(checkpoint: Path, checked: Checked) -> None:
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": 264, "content": "<more>", "special": True, "normalized": False}
    content["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    path.write_text(json.dumps(content))
    (problem,) = checked(checkpoint)["problems"]
    assert "the tokenizer has 265 tokens, the embedding 264 rows" in problem


def test_a_whole_engine(engine: Path, checked: Checked) -> None:
    result = checked(engine)
    facts = result["facts"]
    assert result["kind"] == "engine folder"
    assert (facts["backend"], facts["library"]) == ("torch", f"torch {torch.__version__}")
    sizes = {"max_batch_size": 3, "max_input_len": 20, "max_output_len": 9, "max_prompt_embedding_table_size": 6}
    assert facts["limits"] == sizes
    assert facts["made_from"].endswith("1-gpu")
    assert facts["made_with"]
    assert facts["tokenizer"] == "fast, 264 tokens, end id 263"


def test_damage_in_an_engine(engine: Path, checked: Checked) -> None:
    (path,) = engine.glob("*.engine")
    weights, _ = map_tensor_file(path)
    content = path.read_bytes()
    # The final layernorm's weight is looked for by its bytes, since the file's layout is its own business.
    _poison(path, content.index(weights["model.final_layernorm.weight"].numpy().tobytes()))
    problems = checked(engine)["problems"]
    assert len(problems) == 2
    assert "changed after it was written" in problems[0]
    assert problems[1] == f"{path.name}, model.final_layernorm.weight: 2 NaN and 1 infinite values"
    config = engine / "config.json"
    changed = json.loads(config.read_text())
    changed["engine"]["model"]["inter_size"] = 64
    changed["engine"]["build_id"] = "another"
    config.write_text(json.dumps(changed))
    problems = checked(engine, "--no_checksums", "--no_values")["problems"]
    assert any("build" in problem and "another" in problem for problem in problems)
    wrong = [problem for problem in problems if "dense_h_to_4h.weight" in problem]
    assert wrong == [
        f"{path.name}, model.layers.{layer}.mlp.dense_h_to_4h.weight: found [128, 32] float32, allowed [64, 32] float32"
        for layer in range(2)
    ]
    path.unlink()
    assert f"{path.name} is missing" in checked(engine)["problems"][0]


def test_an_engine_of_random_weights(tmp_path: Path, checked: Checked) -> None:
    sizes = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "50", "--n_positions", "16"]
    build_engine(None, tmp_path / "engine", *sizes, "--random_seed", "0")
    result = checked(tmp_path / "engine")
    assert (result["kind"], result["problems"]) == ("engine folder of random weights", [])
    assert "--vocab_file" in result["facts"]["tokenizer"]


def test_a_hugging_face_folder(hf: Path, checked: Checked) -> None:
    result = checked(hf)
    assert (result["kind"], result["facts"]["dtype"]) == ("Hugging Face model (gpt2)", "float32")
    assert result["next_step"] == f"python hf_gpt_convert.py -i {hf} -o <output folder>"
    from safetensors.torch import load_file, save_file

    tensors = load_file(hf / "model.safetensors")
    tensors["transformer.h.1.ln_1.bias"][3] = torch.nan
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(3, 3)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    problems = checked(hf)["problems"]
    assert problems[0] == "transformer.h.1.ln_1.bias: 1 NaN and 0 infinite values"
    assert problems[1].endswith("h.0.mlp.c_fc.weight: found [3, 3], config.json wants [32, 128]")
    assert len(problems) == 2


@pytest.mark.parametrize("mode", ["w", "w:gz", None])
def test_nemo_archives(tmp_path: Path, checked: Checked, mode: str | None) -> None:
    config = tiny_config(**GPT_NEXT)
    path = save_model(tmp_path / "m.nemo", config, tiny_state(config), mode=mode)
    result = checked(path)
    assert result["kind"] == ("unpacked NeMo archive" if mode is None else "NeMo archive")
    assert "nemo_ckpt_convert.py" in result["next_step"]
    if mode != "w:gz":
        assert result["facts"]["configuration"]["hidden_act"] == "fast-swiglu"
    path = save_prompts(tmp_path / "p.nemo", {"a": torch.zeros(2, 4)}, mode=mode)
    result = checked(path)
    if mode != "w:gz":
        assert (result["facts"]["tasks"], "prompt-learning" in result["kind"]) == (["a"], True)
        assert "nemo_prompt_convert.py" in result["next_step"]


def test_a_broken_nemo_archive(tmp_path: Path, checked: Checked) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(b"no archive" * 100)
    assert "no archive, or a damaged one" in checked(path)["problems"][0]


def test_prompt_tables(tmp_path: Path, checked: Checked) -> None:
    tasks = [Task(name, np.ones((count, 4), np.float32), "test") for name, count in (("first", 3), ("second", 2))]
    path = tmp_path / "p.npy"
    write_table(path, tasks)
    result = checked(path)
    assert result["facts"] == {
        "tasks": ["0: first, 3 virtual tokens", "1: second, 2 virtual tokens"],
        "hidden_size": 4,
        "build_with": "--max_prompt_embedding_table_size 6",
    }
    description_path(path).unlink()
    assert "every row counts" in checked(path)["facts"]["description"]
    np.save(path, np.full((1, 2, 4), np.inf, np.float32))
    assert "NaN or infinite values" in checked(path)["problems"][0]


def test_several_paths_as_text(checkpoint: Path, engine: Path, tmp_path: Path, main: Main) -> None:
    """One summary each, the exit code for all; nothing else on stdout."""
    code, out, err = main(checkpoint, engine)
    assert (code, err) == (0, "")
    first, second = out.split("\n\n")
    assert first.startswith(f"{checkpoint}: FT checkpoint\n  architecture    2 layers of 32, ")
    assert "\n  ranks           2\n" in first
    assert f"\n  next step       python run.py --engine_dir {engine} " in second
    assert (first + second).count("no problems found") == 2
    (tmp_path / "empty").mkdir()
    code, out, _ = main(checkpoint, tmp_path / "empty")
    assert code == 3
    assert "  1 problem:\n    - not recognised: found an empty folder" in out


def test_nothing_at_the_path_is_a_wrong_command_line(main: Main, tmp_path: Path) -> None:
    code, out, err = main(tmp_path / "absent")
    assert (code, out) == (2, "")
    assert "nothing to check" in err
    code, out, err = main(tmp_path, tmp_path / "absent", tmp_path / "gone")
    assert (code, out) == (2, "")  # known before the first is read
    assert f"- {tmp_path / 'absent'}\n    - {tmp_path / 'gone'}\n" in err
