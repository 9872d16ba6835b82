"""check.py --layers, --graph and --diff: what an engine's network is, and where two engines part."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from engines import build_engine, convert
from tiny_models import tiny_gpt2
from trt_models import MODELS, build_config, define

import check
import hf_gpt_convert
from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig
from gpt.engine import inspection, trt_graph, trt_library
from gpt.engine.diff import compare
from gpt.engine.folder import EngineInfo
from gpt.quant import QuantConfig
from gpt.runtime import trace
from gpt.runtime.trace import compare_engines

pytestmark = pytest.mark.tensorrt

LIMITS = ["--max_batch_size", "2", "--max_input_len", "12", "--max_output_len", "8"]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(call_script: Main) -> Main:
    return lambda *arguments: call_script(check.main, *arguments, "--log_level", "error")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("model")
    return convert(tiny_gpt2(base / "hf", tokenizer=False), base / "ft")


@pytest.fixture(scope="module")
def engines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EngineInfo]:
    base = tmp_path_factory.mktemp("engines")
    flags = {
        "torch": [],
        "float16": ["--dtype", "float16"],
        "plan": ["--target", "ada"],
        "packed plan": ["--target", "ada", "--remove_input_padding", "--use_gpt_attention_plugin"],
    }
    return {name: build_engine(checkpoint, base / name, *LIMITS, *more) for name, more in flags.items()}


class TestDiff:
    @pytest.mark.parametrize(
        ("a", "b"), [("torch", "plan"), ("torch", "packed plan"), ("plan", "packed plan"), ("torch", "float16")]
    )
    def test_equal(self, a: str, b: str, engines: dict[str, EngineInfo], main: Main) -> None:
        code, out, err = main("--diff", engines[a].folder, engines[b].folder)
        assert (code, err) == (0, "")
        *lines, verdict = out.splitlines()
        # Three steps of a model of two layers: embedding, three per layer, the last normalisation, logits.
        assert verdict.startswith("no tensor of 27 differs")
        assert [line.split("  ")[0] for line in lines[:2]] == ["context, embedding", "context, layers.0.attention"]
        assert all(float(line.split()[-1]) < (5e-3 if b == "float16" else 1e-5) for line in lines)

    def test_the_first_is_named(
        self, checkpoint: Path, engines: dict[str, EngineInfo], tmp_path: Path, main: Main
    ) -> None:
        """One weight of the second layer's MLP is another."""
        changed = tmp_path / "1-gpu"
        changed.mkdir()
        for path in checkpoint.iterdir():
            (changed / path.name).write_bytes(path.read_bytes())
        weights = changed / "model.layers.1.mlp.dense_4h_to_h.weight.0.bin"
        values = bytearray(weights.read_bytes())
        values[:4] = torch.tensor([9.0]).numpy().tobytes()
        weights.write_bytes(values)
        (changed / "manifest.json").unlink()
        assert Checkpoint.open(changed).model == engines["torch"].model
        other = build_engine(changed, tmp_path / "other", *LIMITS)
        code, out, _ = main("--diff", engines["plan"].folder, other.folder)
        assert code == 1
        assert "first difference: context, layers.1.mlp" in out.splitlines()[-1]
        assert re.search(r"context, layers\.1\.attention +\d\.\d\de-\d\d$", out, re.MULTILINE)
        assert main("--diff", "--bound", "10", engines["plan"].folder, other.folder)[0] == 0

    def test_rounding_to_integers_in_half_precision_is_no_difference(self, tmp_path: Path) -> None:
        """Of a trained model, whose inputs have outliers, which make steps large.  A bias a tenth less differs."""
        assets = Path(__file__).resolve().parent.parent / "assets"
        calibration = ["-sq", "0.5", "--calib-data", str(assets / "calibration.txt"), "--calib-size", "2"]
        source = ["-i", str(assets / "gpt2-tiny"), "-o", str(tmp_path), "-t", "float16"]
        assert hf_gpt_convert.main([*source, *calibration]) == 0
        checkpoint = tmp_path / "1-gpu"
        for quant, dtype in [(["--per_token", "--per_channel"], "float16"), ([], "bfloat16")]:
            flags = ["--use_smooth_quant", *quant, "--dtype", dtype, *LIMITS]
            reference = build_engine(checkpoint, tmp_path / dtype, *flags)
            plan = replace(reference, build=replace(reference.build, backend="tensorrt"))
            comparison = compare_engines(plan, reference)
            assert comparison.first is None, list(comparison.lines())
            # In the engines' own types every layer differs by more than these allow.
            assert compare_engines(plan, reference, bound=5e-3).first is not None
        bias = checkpoint / "model.layers.2.attention.dense.bias.bin"
        values = torch.frombuffer(bytearray(bias.read_bytes()), dtype=torch.float16)
        bias.write_bytes((0.9 * values).numpy().tobytes())
        (checkpoint / "manifest.json").unlink()
        found = compare_engines(plan, reference).first
        assert found is not None
        assert (found.name, found.moved) == ("context, layers.2.mlp", found.num_rows)
        assert found.error < 4e-2  # what a single rounding may become

    @pytest.mark.parametrize(
        ("quant", "differs"), [(QuantConfig("fp8", "per_token"), False), (QuantConfig("int8", "per_token"), True)]
    )
    def test_what_one_number_of_fp8_may_become(
        self, engines: dict[str, EngineInfo], quant: QuantConfig, differs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Measured of a trained multi-query model; int8's steps are finer."""
        ones = torch.ones(16, 4)
        one_row = ones.clone()
        one_row[3] += 4 * 6.6e-2
        traces = iter([{"a": ones}, {"a": one_row}])
        monkeypatch.setattr(trace, "trace_engine", lambda *_, **__: next(traces))
        info = replace(engines["torch"], build=replace(engines["torch"].build, quant=quant))
        assert (compare_engines(info, info).first is not None) == differs

    def test_rows_tell_a_defect_from_a_rounding(self) -> None:
        """The first tensor with any that moved decides, where there are enough of them."""
        ones = torch.ones(16, 4)
        some, all_rows, few = ones.clone(), 1.001 * ones, 1.001 * ones[:2]
        some[3] += 1e-3
        for first, expected in ((some, None), (all_rows, "a"), (few, None)):
            found = compare({"a": ones[: len(first)], "b": ones}, {"a": first, "b": all_rows}, 4e-2, 1e-5)
            assert (found.first and found.first.name) == expected
            verdict = [*found.lines()][-1]
            assert verdict.startswith("no tensor of 2 differs" if expected is None else "first difference: a, 1.00e-03")
        assert next(compare({"a": ones}, {"a": some}, 4e-2, 1e-5).lines()).endswith("in 1 of 16 rows")

    def test_weights_are_gone(self, checkpoint: Path, tmp_path: Path, main: Main) -> None:
        moved = tmp_path / "1-gpu"
        moved.mkdir()
        for path in checkpoint.iterdir():
            (moved / path.name).write_bytes(path.read_bytes())
        plan = build_engine(moved, tmp_path / "plan", *LIMITS, "--target", "ada")
        moved.rename(tmp_path / "elsewhere")
        code, _, err = main("--diff", plan.folder, plan.folder)
        assert code == 2
        assert "what it was built from is not there" in err

    def test_of_different_models(self, engines: dict[str, EngineInfo], tmp_path: Path, main: Main) -> None:
        sizes = ["--n_layer", "1", "--n_embd", "32", "--n_head", "4", "--vocab_size", "301", "--n_positions", "64"]
        other = build_engine(None, tmp_path / "other", *sizes, *LIMITS, "--random_seed", "1")
        code, _, err = main("--diff", engines["torch"].folder, other.folder)
        assert code == 2
        assert "n_layer: 2 and 1" in err

    def test_of_several_ranks_and_of_one_engine(
        self, engines: dict[str, EngineInfo], tmp_path: Path, main: Main
    ) -> None:
        sizes = ["--n_layer", "1", "--n_embd", "32", "--n_head", "4", "--vocab_size", "301", "--n_positions", "64"]
        other = build_engine(None, tmp_path / "other", *sizes, *LIMITS, "--random_seed", "1", "--world_size", "2")
        assert main("--diff", other.folder, other.folder)[0] == 2
        assert "--max_output_len 40 --spawn\n" in main(other.folder)[1]  # run.py alone would be one rank
        code, _, err = main("--diff", other.folder)
        assert (code, "compares two engines" in err) == (2, True)

    def test_values_that_are_no_numbers_and_shapes(self) -> None:
        nan = torch.tensor([1.0, torch.nan])
        found = compare(
            {"a": torch.ones(2), "b": torch.ones(2), "c": nan, "d": nan}, {"b": nan, "a": torch.ones(3)}, 1.0
        )
        assert [difference.note for difference in found.differences] == [
            "shapes (2,) and (3,)",
            "not all of its values are finite",
        ]
        assert found.first == found.differences[0]
        assert found.only_one == ("c", "d")


class TestNetwork:
    def test_table(self, engines: dict[str, EngineInfo], main: Main) -> None:
        code, out, err = main("--layers", engines["plan"].folder)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].split() == ["#", "layer", "operation", "output", "bytes", "weights"]
        (product,) = [line for line in lines if "MATRIX_MULTIPLY  linear model.layers.1.mlp.dense_4h_to_h" in line]
        assert "float32[?, 32]" in product
        assert "16.0 KiB" in product  # 128 x 32 weights
        assert any("KV_CACHE_UPDATE" in line and "attention 1" in line and "present_key_1" in line for line in lines)
        assert "constants" in lines[-1]

    def test_every_layer_has_an_operation(self) -> None:
        network = define(trt_library.load(), MODELS["rotary_swiglu_grouped"], build_config(packed=True))
        layers = trt_graph.network_layers(network.network)
        assert {layer.operation.split()[0] for layer in layers} == {
            *("inputs", "embedding", "layer_norm", "linear", "rotary", "attention", "gather_last", "add", "multiply"),
            "logits",
        }
        total = sum(layer.outputs[0].num_bytes for layer in layers if layer.is_constant)
        assert total == sum(tensor.nbytes for tensor in network.side_table.values())

    def test_graph(self, engines: dict[str, EngineInfo], tmp_path: Path, main: Main) -> None:
        path = tmp_path / "net.svg"
        assert main("--graph", path, engines["packed plan"].folder)[0] == 0
        root = ElementTree.parse(path).getroot()
        space = "{http://www.w3.org/2000/svg}"
        titles = [title.text or "" for title in root.iter(f"{space}title")]
        assert sum(title.startswith("attention ") for title in titles) == 2
        assert any(
            "linear model.layers.0.mlp.dense_h_to_4h: " in title and "weights 16.5 KiB" in title for title in titles
        )
        boxes = [(rect.get("x"), rect.get("y")) for rect in root.iter(f"{space}rect")]
        assert len(set(boxes)) == len(boxes)
        lines, curves = list(root.iter(f"{space}line")), list(root.iter(f"{space}path"))
        assert len(lines) + len(curves) >= len(titles) - 1
        # Residuals pass boxes by: behind them a straight line would not be seen.
        assert len(curves) >= 4
        assert {int(line.get("y2", 0)) - int(line.get("y1", 0)) for line in lines} == {26}
        code, _, err = main("--graph", tmp_path / "net.png", engines["packed plan"].folder)
        assert code == 2
        assert "ends in .svg" in err

    def test_curves_are_as_wide_as_the_picture_lets_them(self) -> None:
        def reach(num_rows: int) -> float:
            """The column where a curve over so many rows turns back, halfway."""
            left = trt_graph._MARGIN
            (curve,) = re.findall(r' d="(.*?)"', trt_graph._line((left, 10), (left, 10 + 70 * num_rows)))
            a, b, c, d = (int(column) for column in re.findall(r"-?\d+", curve)[::2])
            return (a + 3 * b + 3 * c + d) / 8

        reaches = [reach(num_rows) for num_rows in (2, 8, 1000)]
        assert reaches == sorted({*reaches}, reverse=True)
        assert reaches[-1] >= 0

    def test_needs_one_engine(self, engines: dict[str, EngineInfo], main: Main) -> None:
        assert main("--layers", engines["plan"].folder, engines["torch"].folder)[0] == 2
        code, _, err = main("--layers", "--rank", "3", engines["plan"].folder)
        assert code == 2
        assert "allowed: 0 to 0" in err

    @pytest.mark.parametrize(
        ("flags", "idle"),
        [
            ("--layers --bound 1", "--bound without --diff"),
            ("--layers --device cpu", "--device, --timeout without --ranks"),
            ("--timeout 1", "--device, --timeout without --ranks"),
            ("--layers --json", "--json with --layers or --graph"),
            ("--layers --no_values", "--no_checksums, --no_values with --layers or --graph"),
            ("--layers --no_checksums", "--no_checksums, --no_values with --layers or --graph"),
            ("--rank 3", "--rank without --layers and --graph"),
            ("--layers --rank 0", None),
            ("--json --no_values --no_checksums", None),
        ],
    )
    def test_flags_that_belong_elsewhere(
        self, flags: str, idle: str | None, engines: dict[str, EngineInfo], call_script: Main
    ) -> None:
        _, out, err = call_script(check.main, *flags.split(), engines["plan"].folder)
        assert out
        assert re.findall(r"\[W\] (.*): no effect\n", err) == ([idle] if idle else [])

    @pytest.mark.parametrize("pair", [*combinations(("--ranks", "--diff", "--layers", "--tune 1"), 2)], ids=" ".join)
    def test_one_thing_at_a_time(self, pair: tuple[str, str], main: Main) -> None:
        code, _, err = main(*" ".join(pair).split())
        assert code == 2
        assert "each of these does something else" in err
        for flag in pair:
            assert flag.removesuffix(" 1") in err

    def test_a_plan_is_told_as_it_is(self, engines: dict[str, EngineInfo], main: Main) -> None:
        """Not by the flags that asked for it: TensorRT-RTX takes no plugin."""
        told = main(engines["packed plan"].folder)[1]
        assert "fused attention" in told
        assert "packed prompts" in told
        assert "gpt_attention plugin" not in told
        build = BuildConfig(
            backend="tensorrt",
            gpt_attention_plugin="float16",
            plugins=("attention",),
            max_batch_size=4,
            batch_buckets=(2,),
            builder_opt=0,
            weight_streaming=True,
            refit=True,
        )
        assert inspection._options(build) == [
            "compiled into the plan: attention",
            "generation for batches of 2 4",
            "optimisation level 0",
            "weight streaming",
            "weights can be replaced",
        ]

    def test_a_library_that_no_one_knows(self, engines: dict[str, EngineInfo], main: Main, tmp_path: Path) -> None:
        folder = shutil.copytree(engines["plan"].folder, tmp_path / "plan")
        config = json.loads((folder / "config.json").read_text())
        config["engine"]["library"]["name"] = "tensorflow"
        (folder / "config.json").write_text(json.dumps(config))
        assert "unknown library in config.json: found 'tensorflow', allowed tensorrt, tensorrt_rtx" in main(folder)[1]
