"""Prefill and decoding time per token beside HF `generate`: same weights, dtype, prompt and process, measured in turn.

    python3 benchmarks/bench_decode.py --dtype float32 bfloat16

The model is a random GPT-2 (12 x 768 with 8192 tokens unless told otherwise).  HF runs with its dynamic cache and
greedy search; its prefill is `generate` with one new token, its time per token the difference to many, divided.  Ours
is timed the same way.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, Sample, append_csv, describe_device, describe_versions
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt.checkpoint.random_weights import RandomWeights
from gpt.config import BuildConfig, ModelConfig
from gpt.dtypes import torch_dtype
from gpt.engine.weights import engine_tensors
from gpt.mapping import Mapping
from gpt.runtime.generate import generate
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession

_FT_TO_HF = {
    "model.layers.": "transformer.h.",
    "post_attention_layernorm": "ln_2",
    "input_layernorm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.dense": "attn.c_proj",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
    "model.final_layernorm": "transformer.ln_f",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    parser.add_argument("--input_len", type=int, default=128)
    parser.add_argument("--output_len", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=RESULTS / "decode_cpu.csv")
    args = parser.parse_args()
    rows = [row for dtype in args.dtype for batch_size in args.batch_size for row in compare(args, dtype, batch_size)]
    append_csv(args.csv, rows)


def compare(args: argparse.Namespace, dtype: str, batch_size: int) -> list[dict[str, object]]:
    num_positions = args.input_len + args.output_len
    model = ModelConfig(
        vocab_size=args.vocab_size,
        n_positions=num_positions,
        n_embd=args.n_embd,
        n_head=args.n_head,
        n_layer=args.n_layer,
        n_kv_head=args.n_head,
        inter_size=4 * args.n_embd,
        hidden_act="gelu_new",
    )
    build = BuildConfig(
        dtype=dtype, max_input_len=args.input_len, max_output_len=args.output_len, gpt_attention_plugin=dtype
    )
    weights = {n: t.to(args.device) for n, t in engine_tensors(model, build, Mapping(), RandomWeights(model, 1))}
    session = TorchSession(model, build, Mapping(), weights, args.device)
    reference = hf_model(model, weights, dtype).to(args.device)
    ids = torch.randint(0, model.vocab_size, (batch_size, args.input_len), generator=torch.Generator().manual_seed(0))
    prompts = ids.tolist()
    ids = ids.to(args.device)

    def ours(num_tokens: int) -> list[list[int]]:
        return generate(session, Request(prompts, max_new_tokens=num_tokens)).tokens

    def hf(num_tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            output = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return output[:, args.input_len :].tolist()

    same = ours(args.output_len) == hf(args.output_len)
    rounds = [(measure(hf, args.output_len), measure(ours, args.output_len)) for _ in range(args.repeat)]
    rows = []
    for position, name in enumerate(("prefill_ms", "token_ms")):
        hf_ms = Sample([round_[0][position] for round_ in rounds])
        our_ms = Sample([round_[1][position] for round_ in rounds])
        ratio = Sample([round_[1][position] / round_[0][position] for round_ in rounds])
        print(
            f"{dtype} batch {batch_size} {name}: ours {our_ms}, HF {hf_ms}, ratio {ratio}, same ids {same}", flush=True
        )
        rows.append(
            {
                "device": describe_device() if args.device == "cpu" else torch.cuda.get_device_name(args.device),
                "versions": describe_versions("torch", "transformers"),
                "threads": torch.get_num_threads(),
                "model": f"{args.n_layer}x{args.n_embd}x{args.vocab_size}",
                "dtype": dtype,
                "batch_size": batch_size,
                "input_len": args.input_len,
                "output_len": args.output_len,
                "repeat": args.repeat,
                "quantity": name,
                "ours_median": round(our_ms.median, 3),
                "hf_median": round(hf_ms.median, 3),
                "ratio_median": round(ratio.median, 3),
                "ratio_min": round(min(ratio.values), 3),
                "ratio_max": round(max(ratio.values), 3),
                "same_ids": same,
            }
        )
    return rows


def measure(run: Callable[[int], object], num_tokens: int) -> tuple[float, float]:
    """(prefill, per later token) in ms, from one run of one token and one of many."""
    times = []
    for length in (1, num_tokens):
        begin = time.perf_counter()
        run(length)
        times.append((time.perf_counter() - begin) * 1e3)
    return times[0], (times[1] - times[0]) / (num_tokens - 1)


def hf_model(model: ModelConfig, weights: dict[str, torch.Tensor], dtype: str) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        bos_token_id=0,
        eos_token_id=None,
    )
    state = {}
    for name, tensor in weights.items():
        name = {"model.wte": "transformer.wte.weight", "model.wpe": "transformer.wpe.weight"}.get(name, name)
        for ours, theirs in _FT_TO_HF.items():
            name = name.replace(ours, theirs)
        state[name] = tensor.t() if tensor.dim() == 2 and ".h." in name else tensor
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: model.vocab_size]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    result = GPT2LMHeadModel(config).to(torch_dtype(dtype))
    result.load_state_dict(state)
    return result.eval()


if __name__ == "__main__":
    main()
