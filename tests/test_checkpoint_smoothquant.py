"""INT8 files and scales of a checkpoint against the formulas, written out plainly in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import hooked_ranges, source_of, tiny_bigcode
from engines import build_engine, open_session, relative_error
from tiny_models import tiny_gpt2
from tiny_nemo import GPT_NEXT, save_model, sentencepiece_model, tiny_config, tiny_state

import hf_gpt_convert
import nemo_ckpt_convert
from gpt.checkpoint.layout import DENSE, FC, GATE, PROJ, QKV, QuantFiles, Tensor, gemms, quant_tensors
from gpt.checkpoint.manifest import Manifest
from gpt.checkpoint.smoothquant import LinearScales, Ranges, factor_values, layer_scales, quantize, smoothing_factors
from gpt.checkpoint.store import Checkpoint
from gpt.config import ModelConfig
from gpt.errors import CheckpointError
from gpt.mapping import Mapping
from gpt.text import quant_report
from gpt.text.calibration_data import encode_texts
from gpt.text.tokenizer import load_tokenizer

TEXT = "The quick brown fox.\n\nA second paragraph, with numbers: 1, 2, 3.\n\nAnd a third one that ends it all.\n"
SMALL = ModelConfig(vocab_size=8, n_positions=8, n_embd=4, n_head=2, n_layer=1, n_kv_head=2, inter_size=6)

Array = np.ndarray[Any, Any]
Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """`convert(source, *flags)` -> the folder; texts are three short paragraphs.  The plot, which is not looked at here
    and takes longer than everything else, is left out."""
    monkeypatch.setattr(quant_report, "_plot", lambda errors: "")
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXT, encoding="utf-8")

    def run(source: Path, *flags: str, out: str = "out") -> Path:
        nemo = source.suffix == ".nemo"
        main = nemo_ckpt_convert.main if nemo else hf_gpt_convert.main
        words = ["-i", str(source), "-o", str(tmp_path / out), "--calib-data", str(texts), "--log_level", "error"]
        assert main([*words, *flags]) == 0
        (folder,) = (tmp_path / out).iterdir()
        return folder

    return run


def nemo_archive(path: Path, **changes: object) -> Path:
    config = tiny_config(
        **{**GPT_NEXT, **changes}, tokenizer={"library": "sentencepiece", "model": "nemo:ab_tiny.model"}
    )
    return save_model(path, config, tiny_state(config), extra={"ab_tiny.model": sentencepiece_model()})


MAKERS: dict[str, Callable[[Path], Path]] = {
    "gpt2": lambda path: tiny_gpt2(path / "hf"),
    "multi-query": lambda path: tiny_bigcode(path / "hf"),
    "gated": lambda path: nemo_archive(path / "tiny.nemo"),
    "rmsnorm": lambda path: nemo_archive(path / "tiny.nemo", normalization="rmsnorm", activation="squared-relu"),
}


def array(folder: Path, name: str, shape: tuple[int, ...], dtype: str = "<f4") -> Array:
    values = np.fromfile(folder / f"{name}.bin", dtype=dtype)
    assert values.size == np.prod(shape), name
    return values.reshape(shape)


def named(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in quant_tensors(checkpoint.model, checkpoint.quant)}


# Formulas.


def test_the_worked_example() -> None:
    """smoothing by alpha 0.5 of x 4, m 0.25; scales of mx 4, my 8, mw 0.5; and one product in INT8."""
    assert smoothing_factors(torch.tensor([4.0]), torch.tensor([0.25]), 0.5).tolist() == [4.0]
    scales = LinearScales(None, torch.tensor(4.0), torch.tensor(8.0), torch.tensor([0.25, 0.5]))
    values = factor_values(DENSE, scales, SMALL)
    assert values["scale_x_orig_quant"].tolist() == [31.75]
    assert values["scale_y_quant_orig"].item() == pytest.approx(0.0629921, rel=1e-6)
    assert values["scale_w_quant_orig"].item() == pytest.approx(0.00393701, rel=1e-6)
    assert values["scale_y_accum_quant"].item() == pytest.approx(0.00196850, rel=1e-5)
    assert values["scale_y_accum_quant.col"].tolist() == pytest.approx([0.00196850 / 2, 0.00196850], rel=1e-5)
    w8 = quantize(torch.tensor([[0.25]]), 127 / scales.column_max.amax())
    assert w8.item() == 64  # 63.5, half to even
    x8 = round(1.0 * values["scale_x_orig_quant"].item())
    y = x8 * w8.item() * values["scale_y_quant_orig"].item() * values["scale_y_accum_quant"].item()
    assert (x8, round(y, 5)) == (32, 0.25395)


def test_rounding_is_half_to_even_and_never_reaches_minus_128() -> None:
    weight = torch.tensor([[-1.0, 0.5, 1.5, 2.5, -0.5, 127.4, -127.6, -300.0]])
    assert quantize(weight, torch.ones(1)).tolist() == [[-1, 0, 2, 2, 0, 127, -127, -127]]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_zero_rows_columns_inputs_and_outputs_give_finite_scales(alpha: float) -> None:
    weight = torch.ones(4, 6)
    weight[1], weight[:, 2] = 0.0, 0.0
    some = Ranges(x=torch.tensor([1.0, 2.0, 0.0, 3.0]), y=torch.zeros(6))
    for w, ranges in ((weight, some), (weight * 0, Ranges(torch.zeros(4), torch.zeros(6)))):
        both = {QKV: w, FC: w}
        scales = layer_scales(both, dict.fromkeys(both, ranges), torch.zeros(2), alpha, smooth_inner=False)
        factors = scales.linears[FC].factors
        assert factors is not None
        values = [factors, scales.kv_max, *factor_values(FC, scales.linears[FC], SMALL).values()]
        assert all(bool(torch.isfinite(value).all() and (value > 0).all()) for value in values)
        quantized = quantize(w * factors[:, None], 127 / scales.linears[FC].column_max)
        assert torch.equal(quantized == 0, w == 0)


def test_plateaus_of_the_fused_projection() -> None:
    model = ModelConfig(vocab_size=8, n_positions=8, n_embd=4, n_head=2, n_layer=1, n_kv_head=1, inter_size=6)
    columns = torch.tensor([1.0, 2.0, 3.0, 2.0, 5.0, 4.0, 6.0, 7.0])  # Q of 2 heads, K, V
    scales = LinearScales(None, torch.tensor(1.0), torch.tensor(1.0), columns)
    values = factor_values(QKV, scales, model)["scale_w_quant_orig"] * 127
    assert values.tolist() == pytest.approx([3, 3, 3, 3, 5, 5, 7, 7])


# Files.


@pytest.mark.parametrize("kind", MAKERS)
def test_every_file_follows_from_the_float_weights_written_beside_it(
    kind: str, tmp_path: Path, convert: Convert
) -> None:
    folder = convert(MAKERS[kind](tmp_path), "-sq", "0.5")
    model = Checkpoint.open(folder).model
    e, q, f = model.n_embd, model.qkv_size, model.inter_size
    shapes = {QKV: (e, q), DENSE: (e, e), FC: (e, f), GATE: (e, f), PROJ: (f, e)}
    for layer in range(model.n_layer):
        for name in gemms(model):
            prefix, shape = f"model.layers.{layer}.{name}.", shapes[name]
            w = array(folder, prefix + "weight.0", shape)
            columns = np.abs(w).max(axis=0)
            per_tensor = np.full(1, columns.max())
            if name == QKV:
                ends = [model.n_head * model.head_size, (model.n_head + model.n_kv_head) * model.head_size]
                per_tensor = np.concatenate([np.full_like(part, part.max()) for part in np.split(columns, ends)])
            mx = 127 / array(folder, prefix + "scale_x_orig_quant", (1,))
            my = 127 * array(folder, prefix + "scale_y_quant_orig", (1,))
            rank = "" if name in (DENSE, PROJ) else ".0"
            for suffix, largest, end in (("", per_tensor, ""), (".col", columns, rank)):
                expected = np.clip(np.rint(w * (np.float32(127) / largest)), -127, 127)
                assert np.array_equal(array(folder, f"{prefix}weight.int8{suffix}.0", shape, "i1"), expected)
                scale_w = array(folder, f"{prefix}scale_w_quant_orig{suffix}{end}", largest.shape)
                np.testing.assert_allclose(scale_w, largest / 127, rtol=1e-6)
                accum = array(folder, f"{prefix}scale_y_accum_quant{suffix}{end}", largest.shape)
                np.testing.assert_allclose(accum, mx * largest / (127 * my), rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "multi-query"])
def test_smoothing_follows_the_formula_and_leaves_the_function(kind: str, tmp_path: Path, convert: Convert) -> None:
    source = MAKERS[kind](tmp_path)
    folder = convert(source, "-sq", "0.3")
    model, pairs = source_of(source)
    original = {tensor.name: src.read(0, src.shape[0] if len(src.shape) == 2 else 1).numpy() for tensor, src in pairs}
    samples = encode_texts([part.strip() for part in TEXT.split("\n\n")], load_tokenizer(source), 64, model.vocab_size)
    hooked = hooked_ranges(source, samples)
    for layer in range(model.n_layer):
        for norm, name, module in (
            ("input_layernorm", QKV, "attn.c_attn"),
            ("post_attention_layernorm", FC, "mlp.c_fc"),
        ):
            prefix = f"model.layers.{layer}."
            w = original[f"{prefix}{name}.weight"]
            x = hooked[f"transformer.h.{layer}.{module}"][0].double().numpy()
            s = np.maximum(1e-5, x**0.3 / np.abs(w).max(axis=1).astype(float) ** 0.7)
            np.testing.assert_allclose(array(folder, f"{prefix}{name}.weight.0", w.shape), w * s[:, None], rtol=1e-4)
            for part in ("weight", "bias"):
                vector = original[f"{prefix}{norm}.{part}"][0]
                np.testing.assert_allclose(array(folder, f"{prefix}{norm}.{part}", vector.shape), vector / s, rtol=1e-4)
            mx = (x / s).max()
            np.testing.assert_allclose(array(folder, f"{prefix}{name}.scale_x_orig_quant", (1,)), 127 / mx, rtol=1e-4)
        # Dense and proj are not smoothed.
        for name in (DENSE, PROJ):
            whole = original[f"model.layers.{layer}.{name}.weight"]
            assert np.array_equal(array(folder, f"model.layers.{layer}.{name}.weight.0", whole.shape), whole)


@pytest.mark.parametrize("kind", MAKERS)
def test_smoothed_float_weights_are_the_same_function(kind: str, tmp_path: Path, convert: Convert) -> None:
    source = MAKERS[kind](tmp_path)
    logits = []
    for out, flags in (("plain", ()), ("smooth", ("-sq", "0.7", "--smooth-dense-proj"))):
        folder = convert(source, *flags, out=out)
        limits = ("--max_batch_size", "2", "--max_input_len", "12", "--max_output_len", "4")
        session = open_session(build_engine(folder, tmp_path / f"{out}-engine", *limits))
        session.start(2, 16)
        logits.append(session.context([[5, 9, 200, 31], [7, 8]]))
    assert relative_error(logits[1], logits[0]) < 1e-5


@pytest.mark.parametrize("kind", MAKERS)
def test_two_ranks_hold_the_parts_of_one(kind: str, tmp_path: Path, convert: Convert) -> None:
    source = MAKERS[kind](tmp_path)
    flags = ("-sq", "0.5", "--smooth-dense-proj", "-t", "float16")
    one = Checkpoint.open(convert(source, *flags, out="one"))
    two = Checkpoint.open(convert(source, *flags, "-tp", "2", out="two"))
    assert named(one).keys() == named(two).keys()
    for tensor in named(one).values():
        whole = one.read(tensor, Mapping())
        assert whole.shape == tensor.shape
        assert whole.dtype == (torch.int8 if tensor.kind == "int8" else torch.float32)
        for rank in range(2):
            mapping = Mapping(2, rank)
            part = two.read(tensor, mapping)
            assert part.shape == tensor.local_shape(mapping, two.model), tensor.name
            assert torch.equal(part, mapping.shard(tensor.split, whole, two.model)), tensor.name
    # What is one number or vector for all ranks has one file.
    names = {path.name for path in two.folder.iterdir()}
    assert f"model.layers.0.{QKV}.scale_w_quant_orig.bin" in names
    assert f"model.layers.0.{QKV}.scale_w_quant_orig.col.1.bin" in names
    assert f"model.layers.0.{PROJ}.scale_y_accum_quant.col.bin" in names
    assert f"model.layers.0.{PROJ}.smoother.1.bin" in names


def test_names_and_sizes_are_those_of_the_original(tmp_path: Path, convert: Convert) -> None:
    """Per layer and linear layer: two weights, x, y, and two forms each of w and y_accum; and K and V apart."""
    folder = convert(tiny_gpt2(tmp_path / "hf"), "-sq", "0.5", "-tp", "2")
    new = {
        path.name: path.stat().st_size for path in folder.glob("*.bin") if "int8" in path.name or "scale_" in path.name
    }
    expected = {}
    for layer in range(2):
        for name, local, whole in ((QKV, (32, 48), 96), (DENSE, (16, 32), 0), (FC, (32, 64), 0), (PROJ, (64, 32), 0)):
            prefix = f"model.layers.{layer}.{name}."
            row_parallel = name in (DENSE, PROJ)
            for suffix in ("", ".col"):
                for rank in range(2):
                    expected[f"{prefix}weight.int8{suffix}.{rank}.bin"] = local[0] * local[1]
            for scale in ("scale_x_orig_quant", "scale_y_quant_orig"):
                expected[f"{prefix}{scale}.bin"] = 4
            for scale in ("scale_w_quant_orig", "scale_y_accum_quant"):
                expected[f"{prefix}{scale}.bin"] = 4 * (whole or 1)
                if row_parallel:
                    expected[f"{prefix}{scale}.col.bin"] = 4 * local[1]
                else:
                    expected |= {f"{prefix}{scale}.col.{rank}.bin": 4 * local[1] for rank in range(2)}
        expected[f"model.layers.{layer}.{QKV}.scale_kv_quant_orig.bin"] = 8
    assert new == expected
    assert set(expected) < set(Manifest.load(folder).files)


def test_int8_files_do_not_depend_on_the_storage_type(tmp_path: Path, convert: Convert) -> None:
    source = tiny_gpt2(tmp_path / "hf")
    wide, narrow = (convert(source, "-sq", "0.5", "-t", t, out=t) for t in ("float32", "bfloat16"))
    first, second = Manifest.load(wide).files, Manifest.load(narrow).files
    for name, record in first.items():
        if record.dtype == "int8" or "scale_" in name:
            assert second[name] == record, name
        else:
            assert (record.dtype, second[name].dtype) == ("float32", "bfloat16")


def test_the_cache_alone_adds_two_small_files_per_layer(tmp_path: Path, convert: Convert) -> None:
    source = tiny_gpt2(tmp_path / "hf")
    plain, calibrated = Manifest.load(convert(source, out="plain")), Manifest.load(convert(source, "-kv", out="kv"))
    added = {name: record.bytes for name, record in calibrated.files.items() if plain.files.get(name) != record}
    assert added == {
        f"model.layers.{layer}.{QKV}.{name}.bin": size
        for layer in range(2)
        for name, size in (("scale_y_quant_orig", 4), ("scale_kv_quant_orig", 8))
    }


# Reading.


def test_what_a_checkpoint_has_is_told(tmp_path: Path, convert: Convert) -> None:
    source = tiny_gpt2(tmp_path / "hf")
    plain = Checkpoint.open(convert(source, out="plain"))
    kv = Checkpoint.open(convert(source, "-kv", out="kv"))
    smooth = Checkpoint.open(convert(source, "-sq", "0.5", out="sq"))
    told = [(c.quant.smoothquant, c.quant.kv_scales, c.quant.smoothers) for c in (plain, kv, smooth)]
    assert told == [(False, False, False), (False, True, False), (True, True, False)]
    assert not plain.quant
    with pytest.raises(CheckpointError) as caught:
        plain.read_kv_scales(1)
    assert "--calibrate-kv-cache --force" in str(caught.value)
    assert torch.equal(kv.read_kv_scales(1), smooth.read_kv_scales(1))
    assert kv.read_kv_scales(1).shape == (2,)


def test_the_originals_folders_have_one_scale_for_the_cache(tmp_path: Path, convert: Convert) -> None:
    folder = convert(tiny_gpt2(tmp_path / "hf"), "-kv", "-tp", "2")
    (folder / "manifest.json").unlink()
    for path in folder.glob("*.scale_kv_quant_orig.bin"):
        path.unlink()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.quant == QuantFiles(kv_shared=True)
    shared = array(folder, f"model.layers.1.{QKV}.scale_y_quant_orig", (1,))
    assert checkpoint.read_kv_scales(1).tolist() == [shared[0]] * 2


@pytest.mark.parametrize("listed", [True, False])
def test_missing_and_short_scale_files_are_all_named(tmp_path: Path, convert: Convert, listed: bool) -> None:
    folder = convert(tiny_gpt2(tmp_path / "hf"), "-sq", "0.5", "-tp", "2")
    if not listed:
        (folder / "manifest.json").unlink()
    (folder / f"model.layers.0.{QKV}.scale_kv_quant_orig.bin").unlink()
    (folder / f"model.layers.1.{FC}.weight.int8.col.1.bin").unlink()
    (folder / f"model.layers.0.{QKV}.scale_w_quant_orig.col.0.bin").write_bytes(bytes(4 * 96))  # as of one rank
    (folder / f"model.layers.1.{DENSE}.scale_x_orig_quant.bin").write_bytes(b"12")  # as of a half-precision number
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    for part in (
        f"model.layers.0.{QKV}.scale_kv_quant_orig.bin: missing",
        f"model.layers.1.{FC}.weight.int8.col.1.bin: missing",
        f"model.layers.0.{QKV}.scale_w_quant_orig.col.0.bin: found 384 bytes, expected 192 for [48] in float32",
        f"model.layers.1.{DENSE}.scale_x_orig_quant.bin: found 2 bytes, expected 4 for [1] in float32",
    ):
        assert part in message
    assert "may be wrong" not in message  # scales are float32 whatever the storage dtype


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_scales_that_are_no_scales_are_refused_when_they_are_read(
    tmp_path: Path, convert: Convert, value: float
) -> None:
    folder = convert(tiny_gpt2(tmp_path / "hf"), "-sq", "0.5")
    (folder / "manifest.json").unlink()
    name = f"model.layers.1.{FC}.scale_w_quant_orig.col"
    values = array(folder, f"{name}.0", (128,))
    values[7] = value
    values.tofile(folder / f"{name}.0.bin")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(named(checkpoint)[name], Mapping())
    assert f"{name}.0.bin" in str(caught.value)
    assert "1 of 128" in str(caught.value)


def test_changed_int8_weights_are_noticed(tmp_path: Path, convert: Convert) -> None:
    folder = convert(tiny_gpt2(tmp_path / "hf"), "-sq", "0.5")
    name = f"model.layers.0.{PROJ}.weight.int8"
    data = bytearray((folder / f"{name}.0.bin").read_bytes())
    data[3] ^= 1
    (folder / f"{name}.0.bin").write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="changed after it was written") as caught:
        checkpoint.read(named(checkpoint)[name], Mapping())
    assert "--smoothquant 0.5" in str(caught.value)


def test_another_number_of_ranks_names_the_whole_command(tmp_path: Path, convert: Convert) -> None:
    checkpoint = Checkpoint.open(convert(tiny_gpt2(tmp_path / "hf"), "-sq", "0.5"))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(named(checkpoint)[f"model.layers.0.{QKV}.scale_w_quant_orig"], Mapping(2, 0))
    assert "-tp 2" in str(caught.value)
    assert "--smoothquant 0.5" in str(caught.value)
