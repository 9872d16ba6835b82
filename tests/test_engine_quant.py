"""Quantised engines end to end: every mode, family and number of ranks, and what build.py refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import build_engine, open_session, random_prompts, relative_error
from plain_gpt import plain_logits
from sharded_ops import sharded_logits
from tiny_models import tiny_gpt2

import build
import check
from gpt import quant
from gpt.checkpoint.store import Checkpoint
from gpt.engine.folder import EngineInfo, open_engine
from gpt.engine.inspection import inspect
from gpt.engine.plan import Plan
from gpt.engine.tensor_file import map_tensor_file
from gpt.errors import CheckpointError, ConfigError, EngineError
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session, load_torch_weights
from gpt.runtime.request import Request

SIZES = ["--n_layer", "2", "--n_embd", "64", "--n_head", "4", "--vocab_size", "91", "--n_positions", "64"]
RANDOM = [*SIZES, "--dtype", "float32", "--random_seed", "5", "--max_input_len", "40", "--max_output_len", "20"]
FAMILIES = {
    "gpt2": ["--hidden_act", "gelu_new"],
    "multi-query": ["--multi_query_mode", "--hidden_act", "gelu_new"],
    "gpt-next": ["--rotary_pct", "0.5", "--hidden_act", "swiglu", "--no_bias", "--inter_size", "96"],
}
MODES = {
    "int8": ["--use_weight_only"],
    "int4": ["--use_weight_only", "--weight_only_precision", "int4", "--weight_only_group_size", "0"],
    "int4 groups": ["--use_weight_only", "--weight_only_precision", "int4", "--weight_only_group_size", "32"],
    "smooth": ["--use_smooth_quant"],
    "smooth channel": ["--use_smooth_quant", "--per_channel"],
    "smooth token": ["--use_smooth_quant", "--per_token"],
    "smooth both": ["--use_smooth_quant", "--per-token", "--per-channel"],
    "fp8": ["--enable_fp8"],
    "fp8 token": ["--enable_fp8", "--per_token"],
}
# What is left where only weights are quantised is float32 against float64.  Where activations are, an input next to
# the middle between two steps goes the other way now and then: one step of one input, of about 64 x 127 (FP8: x 16).
WEIGHT_ONLY_BOUND, INT8_BOUND, FP8_BOUND = 1e-4, 5e-3, 2e-2


def widened(info: EngineInfo, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The engine's tensors with quantised weights as the numbers they stand for."""
    result = dict(weights)
    for name in [name for name in weights if name.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        steps = quant.unpack_int4(weights[weight]) if info.build.quant.weights == "int4" else weights[weight]
        result[weight] = quant.dequantize_weight(steps, weights[name])
    return result


def seen(info: EngineInfo, weights: dict[str, torch.Tensor]) -> Callable[[torch.Tensor, str], torch.Tensor]:
    mode = info.build.quant

    def see(x: torch.Tensor, name: str) -> torch.Tensor:
        if mode.activations is None:
            return x
        fp8 = mode.weights == "fp8"
        largest = 448 if fp8 else 127
        scale = weights.get(name + ".input_scale", x.abs().amax(-1, keepdim=True) / largest).double()
        steps = x / scale
        if fp8:
            return steps.clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale
        return steps.round().clamp(-128, 127) * scale

    return see


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_mode_of_every_family(family: list[str], mode: list[str], tmp_path: Path) -> None:
    """Prompts and steps, beside the same network with the same integers in float64."""
    info = build_engine(None, tmp_path / "e", *RANDOM, *family, *mode)
    weights = load_torch_weights(info, Mapping(), torch.device("cpu"))
    session = open_session(info)
    prompts = random_prompts((5, 12, 3), 91)
    session.start(len(prompts), 30)
    logits = [session.context(prompts).clone()]
    new = [7, 8, 9]
    logits.append(session.generation(torch.tensor(new)).clone())
    wide = widened(info, weights)
    bound = {"fp8": FP8_BOUND, "int8": INT8_BOUND}.get(info.build.quant.weights or "", WEIGHT_ONLY_BOUND)
    bound = WEIGHT_ONLY_BOUND if info.build.quant.weight_only else bound
    for row, prompt in enumerate(prompts):
        expected = plain_logits(info.model, wide, [*prompt, new[row]], seen(info, weights))
        assert relative_error(logits[0][row], expected[-2]) < bound
        assert relative_error(logits[1][row], expected[-1]) < bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cache", ["--int8_kv_cache", "--fp8_kv_cache"])
@pytest.mark.parametrize("mode", [[], ["--use_weight_only"], ["--use_smooth_quant", "--per_token", "--per_channel"]])
def test_caches_go_with_any_weights(mode: list[str], cache: str, dtype: str, tmp_path: Path) -> None:
    """Random ranges are six deviations wide: 1/21 of one per int8 step, so results move by a few per cent at most."""
    half = [*RANDOM, "--dtype", dtype, "--use_gpt_attention_plugin"]
    logits = []
    for name, flags in (("a", []), ("b", [cache])):
        session = open_session(build_engine(None, tmp_path / name, *half, *mode, *flags))
        session.start(2, 20)
        session.context([[1, 2, 3], [4, 5, 6, 7, 8]])
        steps = [session.generation(torch.tensor([9, 10])).clone() for _ in range(4)]
        logits.append(torch.cat(steps))
        if flags:
            assert session.cache is not None
            assert session.cache.blocks.element_size() == 1
    assert 0 < relative_error(logits[1], logits[0]) < 5e-2


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A tiny GPT-2 converted with -sq 0.5 for so many ranks."""
    import hf_gpt_convert

    root = tmp_path_factory.mktemp("calibrated")
    model = tiny_gpt2(root / "hf", n_embd=64)
    (root / "texts.txt").write_text(
        "The quick brown fox.\n\nthe hen and the rat in the inn on her heath\n\nA tin hat\n"
    )

    def convert(tp: int) -> Path:
        out = root / f"{tp}-gpu"
        if not out.exists():
            flags = ["-sq", "0.5", "-tp", str(tp), "--calib-data", str(root / "texts.txt"), "-p", "1"]
            assert hf_gpt_convert.main(["-i", str(model), "-o", str(root), *flags]) == 0
        return out

    return convert


TENSOR_PARALLEL = {
    "int8": QuantConfig("int8"),
    "int4": QuantConfig("int4", group_size=32),
    "smooth": QuantConfig("int8", "per_tensor"),
    "smooth channel": QuantConfig("int8", "per_tensor", per_channel=True),
    "smooth token": QuantConfig("int8", "per_token"),
    "smooth both": QuantConfig("int8", "per_token", per_channel=True),
    "fp8": QuantConfig("fp8", "per_tensor"),
    "int8 cache": QuantConfig(kv_cache="int8"),
    "smooth, int8 cache": QuantConfig("int8", "per_token", per_channel=True, kv_cache="int8"),
}


@pytest.mark.parametrize("mode", TENSOR_PARALLEL.values(), ids=TENSOR_PARALLEL)
def test_two_ranks_are_as_near_to_float_as_one(mode: QuantConfig, calibrated: Callable[[int], Path]) -> None:
    prompts, new = random_prompts((6, 11), 300), (5, 6)
    exact = sharded_logits(calibrated(1), prompts, new)
    one, two = (sharded_logits(calibrated(tp), prompts, new, mode) for tp in (1, 2))
    error = relative_error(one, exact)
    assert 0 < error < (0.2 if mode.weights == "int4" else 0.1)
    assert relative_error(two, exact) < 1.5 * error
    if mode.smooth_quant and mode.activations == "per_tensor":  # global scales: only the order of the sums differs
        assert relative_error(two, one) < max(5e-3, 0.2 * error)


@pytest.mark.parametrize("mode", ["smooth", "smooth both"])
def test_weights_come_from_the_int8_files(mode: str, calibrated: Callable[[int], Path], tmp_path: Path) -> None:
    folder = calibrated(1)
    info = build_engine(folder, tmp_path / "e", *MODES[mode], "--int8_kv_cache")
    weights, _ = map_tensor_file(info.engine_path(0))
    column = ".col" if mode == "smooth both" else ""
    for name in ("attention.query_key_value", "mlp.dense_4h_to_h"):
        prefix = f"model.layers.1.{name}"
        stored = torch.from_file(
            str(folder / f"{prefix}.weight.int8{column}.0.bin"),
            size=weights[prefix + ".weight"].numel(),
            dtype=torch.int8,
        )
        assert torch.equal(weights[prefix + ".weight"].t().flatten(), stored)
        assert (prefix + ".input_scale" in weights) == (mode == "smooth")
    scale = weights["model.layers.0.attention.query_key_value.weight_scale"]
    assert len(scale.unique()) == (3 if mode == "smooth" else len(scale))  # plateaus of Q, K and V
    kv = torch.from_file(
        str(folder / "model.layers.0.attention.query_key_value.scale_kv_quant_orig.bin"), size=2, dtype=torch.float32
    )
    torch.testing.assert_close(weights["model.layers.0.attention.kv_scale"], kv)


def test_an_engine_says_what_it_is_and_what_it_takes(calibrated: Callable[[int], Path], tmp_path: Path) -> None:
    flags = ["--use_weight_only", "--weight_only_precision", "int4", "--int8_kv_cache"]
    info = build_engine(calibrated(1), tmp_path / "e", *flags)
    assert info.build.quant == QuantConfig("int4", group_size=64, kv_cache="int8")
    assert "int4 weights in groups of 64, int8 cache" in info.describe()
    weights, _ = map_tensor_file(info.engine_path(0))
    assert Plan.make(info.model, info.build).needed.weights == sum(weight.nbytes for weight in weights.values())
    found = inspect(tmp_path / "e")
    assert not found.problems
    assert any("int4" in str(option) for option in found.facts["options"])
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["builder_config"]["quant_mode"] == 1 + 32 + 64
    config["engine"]["build"]["quant"]["group_size"] = 32
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="does not hold the tensors"):
        load_session(open_engine(tmp_path / "e"), "cpu")


def test_texts_of_a_trained_model_stay(tmp_path: Path) -> None:
    """Greedy ids of the bundled model: int8 weights keep nearly all of them."""
    from engines import convert

    bundled = Path(__file__).resolve().parent.parent / "assets" / "gpt2-tiny"
    checkpoint = convert(bundled, tmp_path / "ft")
    prompts = random_prompts((9, 20, 5, 14), 4096)
    tokens = []
    for name, flags in (("float", []), ("int8", MODES["int8"])):
        session = open_session(build_engine(checkpoint, tmp_path / name, *flags))
        tokens.append(generate(session, Request(prompts, max_new_tokens=20)).tokens)
    same = sum(a == b for rows in zip(*tokens, strict=True) for a, b in zip(*rows, strict=True))
    assert same > 60


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--use_smooth_quant", "--use_weight_only"], ["--use_smooth_quant and --use_weight_only"]),
        (["--use_weight_only", "--enable_fp8", "--per_channel"], ["and --enable_fp8", "--per_channel: goes with"]),
        (["--int8_kv_cache", "--fp8_kv_cache"], ["give one of the two"]),
        (["--per_token"], ["--per_token: goes with --use_smooth_quant or --enable_fp8"]),
        (["--weight_only_precision", "int4"], ["goes with --use_weight_only"]),
        (["--use_weight_only", "--weight_only_group_size", "64"], ["--weight_only_precision int4"]),
        (["--fp8_kv_cache", "--backend", "tensorrt"], ["--fp8_kv_cache with --backend tensorrt", "int8"]),
        (["--enable_fp8", "--fp8_kv_cache", "--target", "ada"], ["--fp8_kv_cache with --backend tensorrt"]),
        (["--check_quality", "x.txt"], ["random weights have no quality"]),
        (["--check_quality", "x.txt", "--dry_run", "--world_size", "2"], ["nothing is built", "in one process"]),
        (
            ["--use_weight_only", "--weight_only_precision", "int4", "--weight_only_group_size", "128"],
            ["groups of 128 do not divide", "n_embd 64", "0, 32, 64"],
        ),
        (
            ["--use_weight_only", "--weight_only_precision", "int4", "--inter_size", "33"],
            ["cannot be packed", "inter_size per rank 33"],
        ),
    ],
)
def test_refusals(flags: list[str], told: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.main([*SIZES, *flags, "--output_dir", str(tmp_path / "e")]) == 2
    error = capfd.readouterr().err
    for text in told:
        assert text in error
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--use_smooth_quant", "--int8_kv_cache"], ["--use_smooth_quant: no", "--int8_kv_cache: no", "-sq 0.5"]),
        (["--fp8_kv_cache", "--use_weight_only"], ["--fp8_kv_cache: no scale_kv_quant_orig", "-kv"]),
    ],
)
def test_missing_scales_are_named_with_the_command(
    flags: list[str], told: list[str], make_gpt2: Callable[..., Path], tmp_path: Path
) -> None:
    from engines import convert

    checkpoint = convert(make_gpt2(), tmp_path / "ft")
    with pytest.raises(CheckpointError) as caught:
        build_engine(checkpoint, tmp_path / "e", *flags)
    for text in (*told, "hf_gpt_convert", str(tmp_path / "hf")):
        assert text in str(caught.value)
    assert not (tmp_path / "e").exists()


def test_group_size_follows_the_model(tmp_path: Path) -> None:
    int4 = ["--use_weight_only", "--weight_only_precision", "int4"]
    assert build_engine(None, tmp_path / "a", *RANDOM, *int4).build.quant.group_size == 64
    assert build_engine(None, tmp_path / "b", *RANDOM, *int4, "--inter_size", "96").build.quant.group_size == 32
    assert build_engine(None, tmp_path / "c", *RANDOM, *int4, "--inter_size", "90").build.quant.group_size == 0


def test_fp8_without_calibration_scales_each_row(make_gpt2: Callable[..., Path], tmp_path: Path) -> None:
    from engines import convert

    info = build_engine(convert(make_gpt2(), tmp_path / "ft"), tmp_path / "e", "--enable_fp8")
    assert info.build.quant == QuantConfig("fp8", "per_token")


def test_every_file_of_bad_scales_is_named(
    calibrated: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built, and by check.py too; float and weight-only engines do without scales."""
    folder = tmp_path / "1-gpu"
    shutil.copytree(calibrated(1), folder)
    (folder / "manifest.json").unlink()
    bad = {
        "attention.dense.scale_x_orig_quant": float("nan"),
        "attention.query_key_value.scale_kv_quant_orig": 0.0,
        "mlp.dense_4h_to_h.scale_w_quant_orig.col": -1.0,
    }
    for name, value in bad.items():
        path = folder / f"model.layers.1.{name}.bin"
        values = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
        values[-1] = value
        path.write_bytes(values.numpy().tobytes())
    words = ["--model_dir", str(folder), "--output_dir", str(tmp_path / "e")]
    for flags in (["--use_smooth_quant"], ["--int8_kv_cache"], ["--enable_fp8"]):
        capsys.readouterr()
        assert build.main([*words, *flags]) == 3
        told = capsys.readouterr().err
        assert all(f"model.layers.1.{name}.bin: 1 of" in told for name in bad)
        assert f"the first is {bad['mlp.dense_4h_to_h.scale_w_quant_orig.col']}" in told
    assert not (tmp_path / "e").exists()
    assert check.main([str(folder)]) == 3
    told = capsys.readouterr().out
    assert all(f"model.layers.1.{name}.bin: scales must be finite and above 0: 1 of" in told for name in bad)
    assert build.main([*words, "--use_weight_only"]) == 0


# The comparison with the float model.


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_check_quality(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from engines import convert

    bundled = Path(__file__).resolve().parent.parent / "assets" / "gpt2-tiny"
    texts = tmp_path / f"texts.{kind}"
    article = "This package contains the documentation of a library for reading and writing compressed archives. " * 4
    rows = [{"article": article, "highlights": "library for archives - documentation"}] * 3
    texts.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else article * 3)
    flags = ["--use_weight_only", "--check_quality", str(texts)]
    checkpoint = convert(bundled, tmp_path / "ft")
    assert build.main(["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "e"), *flags]) == 0
    told = capfd.readouterr().out
    for text in ("int8 weights", "perplexity", "KL divergence", "cache per token", "MiB (float32)"):
        assert text in told
    assert ("ROUGE-1, 3 texts" in told) == (kind == "jsonl")
    report = json.loads((tmp_path / "e" / "quality.json").read_text())
    if kind == "jsonl":
        rouge1 = report["rouge1"]
        assert rouge1["loss"]["mean"] == pytest.approx(rouge1["float_model"] - rouge1["engine"])  # equal texts
        assert rouge1["float_model"] > 20
    found = report["agreement"]
    assert abs(found["perplexity"] / found["float_perplexity"] - 1) < 0.01
    assert found["same_top1_percent"] > 95
    assert 0 < found["kl"] < 0.01
    assert report["weight_bytes"] < report["float_weight_bytes"]
    assert "<svg" in (tmp_path / "e" / "quality.svg").read_text()


def test_the_float_engine_agrees_with_itself_token_by_token(tmp_path: Path) -> None:
    from gpt.text.quality import Windows, compare

    info = build_engine(None, tmp_path / "e", *RANDOM)
    session, reference = open_session(info), open_session(info)
    found = compare(session, reference, Windows(torch.tensor(random_prompts((20, 20, 20), 91)), 8))
    assert found.num_tokens == 3 * 19
    assert found.same_top1_percent == 100
    assert found.kl == pytest.approx(0, abs=1e-9)
    expected = 0.0
    weights = load_torch_weights(info, Mapping(), torch.device("cpu"))
    for ids in random_prompts((20, 20, 20), 91):
        scores = plain_logits(info.model, weights, ids).log_softmax(-1)
        expected -= float(scores[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert found.perplexity == pytest.approx(2.718281828459045 ** (expected / 57), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "there is no file"),
        ("short.txt", "a", "too little text"),
        ("rows.jsonl", '{"body": "x"}', "row 1 has no text"),
        ("numbers.jsonl", '{"text": "a"}\n{"text": 3}', "row 2: text is 3"),
        ("nulls.jsonl", '{"article": "a", "highlights": null}', "row 1: highlights is None"),
        ("empty.jsonl", "", "no text to check"),
        ("blank.csv", "text\n  \n", "no text to check"),
        ("bytes.txt", b"\xff\xfe\xfa", "no UTF-8"),
    ],
)
def test_bad_quality_texts(name: str, content: str | bytes | None, told: str, tmp_path: Path) -> None:
    from gpt.text.quality import read_rows, windows_of
    from gpt.text.tokenizer import load_tokenizer

    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    info = build_engine(None, tmp_path / "e", *RANDOM)
    tokenizer = load_tokenizer(tiny_gpt2(tmp_path / "hf"))
    with pytest.raises(ConfigError, match=told):
        windows_of([row.whole for row in read_rows(path)], tokenizer, info.model, info.build, 4)


def test_what_is_wrong_with_the_texts_is_said_before_the_work(
    make_gpt2: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines import convert

    checkpoint = convert(make_gpt2(), tmp_path / "ft")
    texts, engine = tmp_path / "numbers.jsonl", tmp_path / "e"
    texts.write_text('{"text": 3}')
    flags = ["--model_dir", str(checkpoint), "--output_dir", str(engine), "--check_quality"]
    assert build.main([*flags, str(texts)]) == 2
    assert "row 1: text is 3" in capsys.readouterr().err
    for path in Checkpoint.open(checkpoint).tokenizer_files:
        path.unlink()
    assert build.main([*flags, str(texts)]) == 2
    assert "no tokenizer to check the quality with" in capsys.readouterr().err
    assert not engine.exists()
