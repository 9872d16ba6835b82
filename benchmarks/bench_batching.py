#!/usr/bin/env python3
"""Many prompts through one engine: static batches in the order of arrival, continuous batching, drafts; vLLM if given.

Prompts are pieces of the texts in --text_file (.jsonl, one text per row), their lengths drawn evenly from 8 to what the
engine holds.  Every way runs all prompts, round by round in turn, so that a machine that slows down slows all of them.
Seconds are those of the processor on a CPU (one process, all its threads), where other processes do not count, and
those of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpt.engine.folder import open_engine
from gpt.runtime.batcher import generate_paged
from gpt.runtime.batching_config import BatchingConfig
from gpt.runtime.generate import generate
from gpt.runtime.load import load_session
from gpt.runtime.session import PagedSession
from gpt.text.pipeline import choose_tokenizer, require_tokenizer
from gpt.text.tokenizer import Tokenizer


def main() -> None:
    args = parse()
    info = open_engine(args.engine_dir)
    tokenizer = require_tokenizer(choose_tokenizer(info, args.tokenizer, None), info, "read the texts")
    session = load_session(info, args.device)
    longest = args.longest or min(info.build.max_input_len, info.build.max_seq_len - args.max_output_len)
    prompts = make_prompts(args.text_file, args.column, tokenizer, args.num_prompts, longest)
    settings = {"max_new_tokens": args.max_output_len, "end_id": tokenizer.end_id}

    def static() -> list[list[int]]:
        size = args.static_batch
        parts = [prompts[first : first + size] for first in range(0, len(prompts), size)]
        return [row for part in parts for row in generate(session, part, **settings).tokens]

    def continuous(max_draft_len: int) -> list[list[int]]:
        batching = BatchingConfig(max_draft_len=max_draft_len)
        return generate_paged(cast(PagedSession, session), prompts, batching=batching, **settings).tokens

    ways: dict[str, Callable[[], list[list[int]]]] = {
        f"static {args.static_batch}": static,
        "continuous": lambda: continuous(0),
    }
    if args.max_draft_len:
        ways[f"continuous, drafts of {args.max_draft_len}"] = lambda: continuous(args.max_draft_len)
    if args.vllm_model:
        ways["vllm"] = vllm(args.vllm_model, prompts, args.max_output_len)
    clock = time.perf_counter if session.device.type == "cuda" else time.process_time
    for way in ways.values():  # first calls pay for what is made once
        way()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    expected = static()
    equal = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            begin = clock()
            rows = way()
            rates[name].append(sum(map(len, rows)) / (clock() - begin))
            equal[name] = sum(a == b for a, b in zip(rows, expected, strict=True))
    report(args, rates, equal, prompts, str(session.device))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True, help="built with --paged_kv_cache")
    parser.add_argument("--text_file", type=Path, required=True)
    parser.add_argument("--column", default="article")
    parser.add_argument("--tokenizer")
    parser.add_argument("--num_prompts", type=int, default=10000)
    parser.add_argument("--longest", type=int, help="tokens of a prompt (default: what the engine holds)")
    parser.add_argument("--max_output_len", type=int, default=100)
    parser.add_argument("--static_batch", type=int, default=64)
    parser.add_argument("--max_draft_len", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vllm_model", help="Hugging Face folder of the same model")
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    return parser.parse_args()


def make_prompts(path: Path, column: str, tokenizer: Tokenizer, count: int, longest: int) -> list[list[int]]:
    texts = [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]
    stream = [token for text in texts for token in tokenizer.encode(text)]
    generator = random.Random(0)
    lengths = [generator.randint(8, longest) for _ in range(count)]
    starts = [generator.randrange(len(stream) - length) for length in lengths]
    return [stream[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def vllm(model: str, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Callable[[], list[list[int]]]:
    from vllm import LLM, SamplingParams

    engine = LLM(model, dtype="float16")
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return lambda: [list(one.outputs[0].token_ids) for one in engine.generate(requests, greedy, use_tqdm=False)]


def report(
    args: argparse.Namespace,
    rates: dict[str, list[float]],
    equal: dict[str, int],
    prompts: Sequence[Sequence[int]],
    device: str,
) -> None:
    if device != "cpu":
        device = torch.cuda.get_device_name()
    base = statistics.median(next(iter(rates.values())))
    fields = ["device", "engine", "prompts", "prompt_tokens", "max_output_len", "way", "tokens_per_s", "spread"]
    rows = []
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / middle
        setup = [device, args.engine_dir.name, len(prompts), sum(map(len, prompts)), args.max_output_len]
        rows.append([*setup, name, f"{middle:.1f}", f"{spread:.2f}", f"{middle / base:.2f}", equal[name]])
        print(f"{name:28} {middle:10.1f} tokens/s  {middle / base:5.2f}x  equal ids {equal[name]}/{len(prompts)}")
    if args.csv is not None:
        is_new = not args.csv.exists()
        with open(args.csv, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow([*fields, "ratio", "equal_rows"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
