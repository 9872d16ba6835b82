"""What each quantisation does to a model: perplexity, agreement, ROUGE-1 and bytes beside float32, one CSV row a mode.

    python3 hf_gpt_convert.py -i assets/gpt2-tiny -o ft -sq 0.5 -t float32 --calib-data assets/calibration.txt
    python3 benchmarks/bench_quality.py ft/1-gpu assets/articles.jsonl --name gpt2-tiny --texts_name "bundled articles"

The checkpoint is one made with -sq, which has all scales.  Texts as for `build.py --check_quality`.  ROUGE-1's loss is
the mean over the texts, with the interval that holds 95 of 100 drawings of as many texts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import RESULTS, append_csv, describe_device, describe_versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig
from gpt.engine.weights import engine_bytes, engine_tensors
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.torch_session import TorchSession
from gpt.text.quality import compare, compare_rouge1, read_rows, summary_scores, windows_of
from gpt.text.tokenizer import load_tokenizer

MODES = {
    "float": QuantConfig(),
    "int8 weight-only": QuantConfig("int8"),
    "int4 weight-only, column": QuantConfig("int4"),
    "int4 weight-only, groups of 128": QuantConfig("int4", group_size=128),
    "int4 weight-only, groups of 64": QuantConfig("int4", group_size=64),
    "int4 weight-only, groups of 32": QuantConfig("int4", group_size=32),
    "SmoothQuant": QuantConfig("int8", "per_tensor"),
    "SmoothQuant, per channel": QuantConfig("int8", "per_tensor", per_channel=True),
    "SmoothQuant, per token": QuantConfig("int8", "per_token"),
    "SmoothQuant, per token and channel": QuantConfig("int8", "per_token", per_channel=True),
    "fp8, calibrated": QuantConfig("fp8", "per_tensor"),
    "fp8, per token": QuantConfig("fp8", "per_token"),
    "int8 cache": QuantConfig(kv_cache="int8"),
    "fp8 cache": QuantConfig(kv_cache="fp8"),
    "int8 weight-only, int8 cache": QuantConfig("int8", kv_cache="int8"),
    "SmoothQuant, per token and channel, int8 cache": QuantConfig("int8", "per_token", True, kv_cache="int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the table")
    parser.add_argument("--texts_name", required=True, help="of the texts, for the table")
    parser.add_argument("--dtype", default="float16", help="of the engines")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--max_windows", type=int, default=48, help="of 256 tokens each")
    parser.add_argument("--max_summaries", type=int, default=400)
    parser.add_argument("--csv", type=Path, default=RESULTS / "quant_quality.csv")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    rows = read_rows(args.texts)
    reference = open_session(checkpoint, "float32", QuantConfig())
    windows = windows_of([row.whole for row in rows], tokenizer, reference.model, reference.build, args.max_windows)
    summarised = [row for row in rows if row.reference is not None][: args.max_summaries]
    float_scores = summary_scores(reference, summarised, tokenizer)
    for mode in args.modes:
        session = open_session(checkpoint, args.dtype, MODES[mode])
        found = compare(session, reference, windows)
        rouge1 = compare_rouge1(summary_scores(session, summarised, tokenizer), float_scores) if summarised else None
        row: dict[str, object] = {
            "device": describe_device(),
            "versions": describe_versions("torch"),
            "model": args.name,
            "dtype": args.dtype,
            "mode": mode,
            "texts": args.texts_name,
            "tokens": found.num_tokens,
            "float_perplexity": round(found.float_perplexity, 4),
            "perplexity": round(found.perplexity, 4),
            "rise_percent": round(found.perplexity_rise_percent, 4),
            "same_top1_percent": round(found.same_top1_percent, 2),
            "kl": round(found.kl, 6),
            "summaries": len(summarised),
            "rouge1": rouge1 and round(rouge1.engine, 2),
            "float_rouge1": rouge1 and round(rouge1.float_model, 2),
            "rouge1_loss": rouge1 and round(rouge1.loss.mean, 2),
            "rouge1_loss_low": rouge1 and round(rouge1.loss.low, 2),
            "rouge1_loss_high": rouge1 and round(rouge1.loss.high, 2),
            "weight_bytes": engine_bytes(session.model, Mapping(), args.dtype, MODES[mode]),
            "cache_bytes_per_token": session.build.kv_cache_bytes(session.model, 1, 1),
        }
        shown = ("mode", "rise_percent", "same_top1_percent", "rouge1", "rouge1_loss_low", "rouge1_loss_high")
        print({key: row[key] for key in shown}, flush=True)
        append_csv(args.csv, [row])


def open_session(checkpoint: Checkpoint, dtype: str, quant: QuantConfig) -> TorchSession:
    model = checkpoint.model
    output_len = min(128, model.n_positions // 2)
    build = BuildConfig(
        dtype=dtype,
        max_batch_size=16,
        max_input_len=model.n_positions - output_len,
        max_output_len=output_len,
        gpt_attention_plugin=dtype,
        quant=quant,
    )
    return TorchSession(model, build, Mapping(), dict(engine_tensors(model, build, Mapping(), checkpoint)))


if __name__ == "__main__":
    main()
