"""Why SmoothQuant smooths: a trained GPT-2 with planted outliers, quantised per tensor with and without smoothing.

    python3 benchmarks/bench_outliers.py MODEL texts.jsonl calibration.jsonl --name gpt2-tiny

8 channels of every layernorm are multiplied by 30 and the rows of weights behind them divided by 30, which leaves the
float model's function as it was.  Compared with the float model as `build.py --check_quality` does, per-tensor scales.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from bench_quality import open_session
from common import RESULTS, append_csv, describe_device, describe_versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hf_gpt_convert
from gpt.checkpoint import hf, hf_files
from gpt.checkpoint.layout import Tensor, tensors
from gpt.checkpoint.smoothquant import LayerScales
from gpt.checkpoint.store import Checkpoint
from gpt.engine.calibration import calibrate
from gpt.engine.quant_weights import linear_name, quantized_tensors
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping, Split
from gpt.quant import INT8_MAX, QuantConfig
from gpt.runtime.torch_session import TorchSession
from gpt.text.calibration_data import encode_texts, load_texts
from gpt.text.quality import compare, read_rows, windows_of
from gpt.text.tokenizer import load_tokenizer

NUM_CHANNELS, FACTOR = 8, 30.0
MODE = QuantConfig("int8", "per_tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face GPT-2")
    parser.add_argument("texts", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--calib_size", type=int, default=128)
    parser.add_argument("--max_windows", type=int, default=48)
    parser.add_argument("--csv", type=Path, default=RESULTS / "quant_outliers.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for planted in (False, True)
            for row in measure(args, plant(args.model, Path(folder) / "planted") if planted else args.model, planted)
        ]
    append_csv(args.csv, rows)


def plant(model: Path, target: Path) -> Path:
    """A copy of the model with outliers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target)
    weights = {name: tensor.float() for name, tensor in load_file(target / "model.safetensors").items()}
    for name in [name for name in weights if ".ln_1.weight" in name or ".ln_2.weight" in name]:
        channels = torch.randperm(len(weights[name]), generator=torch.Generator().manual_seed(0))[:NUM_CHANNELS]
        follower = "attn.c_attn.weight" if ".ln_1." in name else "mlp.c_fc.weight"
        linear = name.replace("ln_1.weight", follower).replace("ln_2.weight", follower)
        for part in (name, name.replace("weight", "bias")):
            weights[part][channels] *= FACTOR
        weights[linear][channels] /= FACTOR
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def measure(args: argparse.Namespace, model: Path, planted: bool) -> list[dict[str, object]]:
    tokenizer = load_tokenizer(model)
    texts = [row.whole for row in read_rows(args.texts)]
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = ["--calib-data", str(args.calibration), "--calib-size", str(args.calib_size)]
        flags = {"smoothed": ["-sq", "0.5", *data], "plain": []}
        for name, given in flags.items():
            hf_gpt_convert.main(["-i", str(model), "-o", f"{folder}/{name}", "-t", "float32", *given])
        plain, smoothed = (Checkpoint.open(Path(folder) / name / "1-gpu") for name in ("plain", "smoothed"))
        reference = open_session(plain, "float32", QuantConfig())
        windows = windows_of(texts, tokenizer, plain.model, reference.build, args.max_windows)
        sessions = {
            "without smoothing": unsmoothed(args, model, plain, reference),
            "SmoothQuant 0.5": open_session(smoothed, "float32", MODE),
        }
        for name, session in sessions.items():
            found = compare(session, reference, windows)
            rise = round(found.perplexity_rise_percent, 3)
            print(f"planted {planted}, {name}: {rise} %", flush=True)
            results.append(
                {
                    "device": describe_device(),
                    "versions": describe_versions("torch"),
                    "model": args.name,
                    "planted": planted,
                    "mode": name,
                    "tokens": found.num_tokens,
                    "float_perplexity": round(found.float_perplexity, 4),
                    "perplexity": round(found.perplexity, 4),
                    "rise_percent": rise,
                    "same_top1_percent": round(found.same_top1_percent, 2),
                }
            )
    return results


def unsmoothed(args: argparse.Namespace, model: Path, plain: Checkpoint, reference: TorchSession) -> TorchSession:
    """An engine of int8 weights and per-tensor scales whose calibration did not smooth."""
    family, _, config = hf.read_model(model)
    pairs = hf.match_tensors(family, config, hf_files.open_weights(model))
    _, texts = load_texts(str(args.calibration), "text", args.calib_size, None)
    samples = encode_texts(texts, load_tokenizer(model), min(512, config.n_positions), config.vocab_size)
    found = PlainCalibration(plain, calibrate(config, pairs, samples, alpha=None).layers)
    weights = dict(engine_tensors(config, reference.build, Mapping(), plain))
    for tensor in [tensor for tensor in tensors(config) if tensor.kind == "weight"]:
        weights |= quantized_tensors(tensor, lambda: torch.empty(0), "float32", MODE, Mapping(), found)
    return TorchSession(config, dataclasses.replace(reference.build, quant=MODE), Mapping(), weights)


class PlainCalibration:
    """Scales out of the float weights and the ranges that were seen; see gpt.engine.quant_weights.Calibration."""

    def __init__(self, checkpoint: Checkpoint, layers: list[LayerScales]):
        self.checkpoint = checkpoint
        self.layers = layers

    def int8_weight(self, tensor: Tensor, quant: QuantConfig, mapping: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.checkpoint.read(tensor, mapping)
        parts = weight.chunk(3, dim=1) if tensor.split is Split.QKV else (weight,)
        scale = torch.cat([(part.abs().amax() / INT8_MAX).expand(part.shape[1]) for part in parts])
        return (weight / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale

    def largest_input(self, tensor: Tensor) -> float:
        _, _, layer, name = linear_name(tensor).split(".", 3)
        return float(self.layers[int(layer)].linears[name].input_max)

    def smoother(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        raise ValueError("nothing is smoothed")

    def largest_kv(self, layer: int) -> torch.Tensor:
        return self.layers[layer].kv_max


if __name__ == "__main__":
    main()
