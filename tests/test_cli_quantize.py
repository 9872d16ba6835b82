"""-sq and -kv of both converters as their users meet them: what is printed and saved, and each kind of bad input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_gpt2
from tiny_nemo import GPT_NEXT, bpe_files, save_model, sentencepiece_model, tiny_config, tiny_state

import check
import hf_gpt_convert
import nemo_ckpt_convert
from gpt.checkpoint.manifest import Manifest
from gpt.checkpoint.store import Checkpoint
from gpt.errors import ConfigError
from gpt.text import quant_report
from gpt.text.calibration_data import BUNDLED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, call_script: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*flags)` converts <tmp>/hf into <tmp>/out: exit code, stdout, stderr.  The plot is left out."""
    monkeypatch.setattr(quant_report, "_plot", lambda errors: "")
    texts = tmp_path / "texts.txt"
    texts.write_text("A first text.\n\nAnd another one.\n", encoding="utf-8")

    def call(
        *flags: str, source: Path = tmp_path / "hf", main: Callable[..., int] = hf_gpt_convert.main
    ) -> tuple[int, str, str]:
        data = [] if "--calib-data" in flags else ["--calib-data", texts]
        return call_script(main, "-i", source, "-o", tmp_path / "out", *data, *flags)

    return call


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_gpt2(tmp_path / "hf")


def folder(tmp_path: Path) -> Path:
    return tmp_path / "out" / "1-gpu"


def refused(run: Run, tmp_path: Path, *flags: str, code: int = 2) -> str:
    """The message of a call that must fail and leave nothing."""
    found, _, errors = run(*flags)
    assert found == code, errors
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in errors
    return errors[errors.index("error: ") :]


# What a good run does.


def test_errors_are_printed_and_saved(hf: Path, tmp_path: Path, run: Run) -> None:
    code, out, errors = run("-sq", "0.5", "-t", "float16")
    assert code == 0
    lines = out[out.index("Relative error") :].splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]
    assert len(lines) == 8 + 4 + 1
    assert lines[-1] == "All numbers: quantization.csv beside the weights, drawn in quantization.svg"
    assert "2 texts" in errors
    rows = list(csv.DictReader((folder(tmp_path) / "quantization.csv").open(encoding="utf-8")))
    assert len(rows) == 2 * (4 * 6 + 4)  # layers of: four linear layers with two weights and four outputs; the cache
    assert {row["layer"] for row in rows} == {"0", "1"}
    assert all(0 < float(row["relative_error"]) < 0.1 for row in rows)
    chosen = [
        row
        for row in rows
        if (row["part"], row["quantity"], row["variant"]) == ("attention.dense", "output", "per-tensor")
    ]
    mean = sum(float(row["relative_error"]) for row in chosen) / 2
    assert f"{mean:.4f}" in lines[3]
    found = {(row["layer"], row["part"], row["quantity"], row["variant"]): float(row["relative_error"]) for row in rows}
    for layer, line in zip("01", lines[-3:-1], strict=True):
        cells = line.split()
        assert cells[0] == layer
        both = [found[layer, "mlp.dense_4h_to_h", "output", mode] for mode in ("per-tensor", "per-token per-channel")]
        cache = [found[layer, "cache", quantity, "separate"] for quantity in "KV"]
        expected = [f"{both[0]:.4f}", "/", f"{both[1]:.4f}", *(f"{value:.4f}" for value in cache)]
        assert cells[-5:] == expected


def test_the_plot_shows_every_linear_layer(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("One text.", encoding="utf-8")
    words = ["-i", str(hf), "-o", str(tmp_path / "out"), "--calib-data", str(texts)]
    assert hf_gpt_convert.main([*words, "-sq", "0.5"]) == 0
    plot = (folder(tmp_path) / "quantization.svg").read_text(encoding="utf-8")
    for text in ("outputs, per-tensor", "mlp.dense_4h_to_h", "V, separate scale", "layer"):
        assert text in plot
    assert hf_gpt_convert.main([*words, "-kv", "--force"]) == 0
    plot = (folder(tmp_path) / "quantization.svg").read_text(encoding="utf-8")
    assert "V, separate scale" in plot
    assert "outputs" not in plot


def test_the_same_command_gives_the_same_files(hf: Path, tmp_path: Path, run: Run) -> None:
    assert run("-sq", "0.5")[0] == 0
    first = Manifest.load(folder(tmp_path)).files
    assert run("-sq", "0.5", "--force", "-p", "1")[0] == 0
    assert Manifest.load(folder(tmp_path)).files == first


def test_the_command_and_the_texts_are_recorded(hf: Path, tmp_path: Path, run: Run) -> None:
    flags = ("-sq", "0.5", "-kv", "--smooth_dense_proj", "--calib_size", "1", "--calib-length", "3")
    assert run(*flags)[0] == 0
    command = Manifest.load(folder(tmp_path)).command
    for words in ("--smoothquant 0.5", "--calibrate-kv-cache", "--smooth-dense-proj", "--calib-size 1", "texts.txt"):
        assert words in command
    ini = (folder(tmp_path) / "config.ini").read_text(encoding="utf-8")
    assert "texts.txt, 1 texts, 3 tokens" in ini
    assert "smoothquant = 0.5" in ini


def test_check_knows_the_new_files(hf: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-sq", "0.5", "--smooth-dense-proj")[0] == 0
    assert check.main([str(folder(tmp_path)), "--json", "--log_level", "error"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["facts"]["quantisation"].startswith(
        "INT8 weights and scales (SmoothQuant), smoothers of dense and proj"
    )
    assert "files_not_used" not in result["facts"]
    (folder(tmp_path) / "model.layers.1.attention.dense.weight.int8.0.bin").unlink()
    assert check.main([str(folder(tmp_path)), "--log_level", "error"]) == 3
    assert "weight.int8.0.bin: missing" in capsys.readouterr().out


def test_without_hub_and_data_the_bundled_text_is_used(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-i", str(hf), "-o", str(tmp_path / "out"), "-kv", "--calib-size", "3", "--calib-length", "20"]
    assert hf_gpt_convert.main(words) == 0
    errors = capsys.readouterr().err
    assert "cimec/lambada cannot be loaded" in errors
    assert f"Calibration texts: assets/{BUNDLED.name}" in errors
    assert "3 texts, 60 tokens" in errors


def test_long_texts_are_cut_to_the_models_positions(hf: Path, tmp_path: Path, run: Run) -> None:
    long = tmp_path / "long.txt"
    long.write_text("word " * 500, encoding="utf-8")
    code, _, errors = run("-kv", "--calib-data", str(long))
    assert code == 0
    assert "--calib-length is 64: the model has 64 positions" in errors
    assert "1 texts, 64 tokens" in errors


# Adding to a folder.


def test_the_cache_scales_are_added_to_an_earlier_conversion(hf: Path, tmp_path: Path, run: Run) -> None:
    """The float files stay, so that nothing is lost; the same again is fine too."""
    assert run("-t", "float16")[0] == 0
    plain = Manifest.load(folder(tmp_path)).files
    for _ in range(2):
        assert run("-kv", "-t", "float16")[0] == 0
        now = Manifest.load(folder(tmp_path)).files
        assert plain.items() < now.items()
        assert Checkpoint.open(folder(tmp_path)).quant.kv_scales


def test_another_folder_is_not_replaced_without_force(hf: Path, tmp_path: Path, run: Run) -> None:
    assert run("-t", "float16")[0] == 0
    before = Manifest.load(folder(tmp_path)).files
    for flags in (("-kv", "-t", "float32"), ("-sq", "0.5", "-t", "float16")):
        code, _, errors = run(*flags)
        assert code == 2
        assert "the output folder is in use" in errors
    tiny_gpt2(tmp_path / "hf", seed=1)
    code, _, errors = run("-kv", "-t", "float16")
    assert code == 2
    assert "the model has changed since it was converted" in errors
    assert Manifest.load(folder(tmp_path)).files == before
    assert run("-kv", "-t", "float16", "--force")[0] == 0
    assert run("-sq", "0.5", "-t", "float16", "--force")[0] == 0
    code, _, errors = run("-kv", "-t", "float16")  # INT8 weights would be lost, which is known before the work
    assert code == 2
    assert "the output folder is in use" in errors


# Bad command lines.


@pytest.mark.parametrize("alpha", ["-0.1", "1.5", "nan", "inf"])
def test_alpha_outside_its_range(hf: Path, tmp_path: Path, run: Run, alpha: str) -> None:
    message = refused(run, tmp_path, f"-sq={alpha}")
    assert f"--smoothquant: found {float(alpha)}, allowed: 0 to 1" in message


@pytest.mark.parametrize("alpha", ["0", "1"])
def test_both_ends_of_alpha_are_allowed(hf: Path, tmp_path: Path, run: Run, alpha: str) -> None:
    assert run("-sq", alpha)[0] == 0


def test_everything_wrong_is_said_at_once_before_anything_is_read(tmp_path: Path) -> None:
    options = hf_gpt_convert.ProgArgs(
        str(tmp_path / "out"), "absent", smoothquant=2.0, calib_size=0, calib_length=-1, calib_batch_size=0
    )
    with pytest.raises(ConfigError) as caught:
        hf_gpt_convert.run_conversion(options)
    assert len(caught.value.found) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", ["--calib-size", "--calib-length", "--calib-batch-size"])
def test_sizes_of_zero(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hf_gpt_convert.main(["-i", "x", "-o", str(tmp_path / "out"), "-kv", flag, "0"])
    assert ended.value.code == 2
    assert "an integer of at least 1" in capsys.readouterr().err


def test_smoothing_more_without_smoothing(hf: Path, tmp_path: Path, run: Run) -> None:
    assert "--smooth-dense-proj: there is nothing to smooth" in refused(run, tmp_path, "-kv", "--smooth-dense-proj")


def test_flags_without_effect_say_so(hf: Path, run: Run) -> None:
    code, _, errors = run("--calib-size", "3")
    assert code == 0
    assert "--calib-size has no effect without --smoothquant or --calibrate-kv-cache" in errors
    assert "--calib-data has no effect" in errors


def test_a_device_that_is_not_there(hf: Path, tmp_path: Path, run: Run) -> None:
    assert "unknown device" in refused(run, tmp_path, "-kv", "--calib-device", "tpu")
    assert "cuda:99" in refused(run, tmp_path, "-kv", "--calib-device", "cuda:99")


# Bad texts.


def test_files_that_are_no_calibration_text(hf: Path, tmp_path: Path, run: Run) -> None:
    cases: dict[str, tuple[bytes | None, str]] = {
        "absent.txt": (None, "no such file"),
        "empty.txt": (b"", "an empty file"),
        "empty.jsonl": (b"", "an empty file"),
        "header.csv": (b"text\n", "no rows, or"),
        "blank.txt": (b" \n\n\t\n", "nothing but blanks"),
        "latin.txt": ("caf\u00e9".encode("latin-1"), "no UTF-8 text"),
        "latin.jsonl": ('{"text": "caf\u00e9"}'.encode("latin-1"), "cannot be read as .jsonl"),
        "blank.jsonl": (b'{"text": ""}\n{"text": " "}\n', "nothing but blanks"),
        "numbers.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "row 2: text is 3"),
        "column.jsonl": (b'{"article": "a"}\n', "has no column text"),
        "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b",}\n', "line 3, character"),
        "list.json": (b"[1]", "holds no rows with columns"),
        "other.pdf": (b"%PDF", ".pdf"),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        assert expected in refused(run, tmp_path, "-sq", "0.5", "--calib-data", str(path)), name
    assert "a folder" in refused(run, tmp_path, "-kv", "--calib-data", str(tmp_path))


def test_another_column(hf: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,article\n1,some text\n2,more of it\n", encoding="utf-8")
    assert "--calib-column names the one to use" in refused(run, tmp_path, "-kv", "--calib-data", str(path))
    code, _, errors = run("-kv", "--calib-data", str(path), "--calib-column", "article")
    assert code == 0
    assert "2 texts" in errors


def test_a_hub_name_that_cannot_be_reached(hf: Path, tmp_path: Path, run: Run) -> None:
    message = refused(run, tmp_path, "-kv", "--calib-data", "someone/some-texts")
    assert "the data set someone/some-texts cannot be loaded" in message
    assert "--calib-data <file>" in message


# Bad models.


def test_a_model_without_a_tokenizer(tmp_path: Path, run: Run) -> None:
    tiny_gpt2(tmp_path / "hf", tokenizer=False)
    message = refused(run, tmp_path, "-kv")
    assert "no tokenizer in" in message
    assert "--calib-tokenizer names the one" in message
    other = tiny_gpt2(tmp_path / "other")
    assert run("-kv", "--calib-tokenizer", str(other))[0] == 0


def test_a_tokenizer_of_another_model(tmp_path: Path, run: Run) -> None:
    tiny_gpt2(tmp_path / "hf", vocab_size=40, tokenizer=False)
    other = tiny_gpt2(tmp_path / "other")
    message = refused(run, tmp_path, "-kv", "--calib-tokenizer", str(other))
    assert "does not belong to the model" in message
    assert "0 to 39" in message


def test_weights_that_are_not_finite(hf: Path, tmp_path: Path, run: Run) -> None:
    from safetensors.torch import load_file, save_file

    path = hf / "model.safetensors"
    weights = load_file(path)
    weights["transformer.h.1.ln_2.bias"][3] = float("nan")
    save_file(weights, path)
    message = refused(run, tmp_path, "-sq", "0.5", code=3)
    assert "layer 1, mlp.dense_h_to_4h: 1 of 32 inputs" in message


def test_space_is_looked_at_before_the_work(
    hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.engine import calibration

    sizes = {}
    for name, flags in (("float", ()), ("int8", ("-sq", "0.5"))):
        assert run(*flags, "--force")[0] == 0
        sizes[name] = sum(record.bytes for record in Manifest.load(folder(tmp_path)).files.values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=sizes["float"] + 10))
    monkeypatch.setattr(calibration, "calibrate", lambda *args, **kwargs: pytest.fail("the work has begun"))
    code, _, errors = run("-sq", "0.5", "--force")
    assert code == 1
    assert "not enough space" in errors
    assert sizes["int8"] > sizes["float"] + 10
    assert Checkpoint.open(folder(tmp_path)).quant.smoothquant  # the earlier one is still there


def test_too_little_memory_names_the_flags_that_need_less(
    hf: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.engine import calibration

    def fail(*args: object, **kwargs: object) -> None:
        raise calibration.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(calibration, "calibrate", fail)
    message = refused(run, tmp_path, "-sq", "0.5", code=1)
    assert "CUDA out of memory" in message
    assert "--calib-batch-size" in message


# NeMo.


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "none"])
def test_nemo_archives(tmp_path: Path, run: Run, kind: str) -> None:
    section: dict[str, str] = {}
    extra: dict[str, bytes] = {}
    if kind == "sentencepiece":
        section = {"library": "sentencepiece", "model": "nemo:ab_tiny.model"}
        extra = {"ab_tiny.model": sentencepiece_model()}
    elif kind == "byte-level":
        section = {"library": "megatron", "vocab_file": "nemo:ab_vocab.json", "merge_file": "nemo:ab_merges.txt"}
        extra = dict(zip(("ab_vocab.json", "ab_merges.txt"), bpe_files(), strict=True))
    config = tiny_config(**GPT_NEXT, tokenizer=section)
    source = save_model(tmp_path / "tiny.nemo", config, tiny_state(config), extra=extra)
    code, out, errors = run("-sq", "0.5", source=source, main=nemo_ckpt_convert.main)
    if kind == "none":
        assert code == 2
        assert "--calib-tokenizer names the one" in errors
        return
    assert code == 0, errors
    assert "mlp.dense_h_to_4h.gate" in out
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.quant.smoothquant
    assert checkpoint.manifest is not None
    assert "--smoothquant 0.5" in checkpoint.manifest.command
    assert run("-kv", source=source, main=nemo_ckpt_convert.main)[0] == 2  # INT8 weights would be lost
    assert run("-sq", "7", source=source, main=nemo_ckpt_convert.main)[0] == 2


def test_no_torch_before_the_arguments_are_checked() -> None:
    import subprocess

    code = (
        "import sys, hf_gpt_convert as h\n"
        "assert h.main(['-i', 'x', '-o', 'y', '-sq', '3']) == 2\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    root = Path(hf_gpt_convert.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
