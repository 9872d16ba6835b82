#!/usr/bin/env python3
"""Many prompts through one engine: static batches in the order of arrival, continuous batching, drafts; vLLM if given.

Prompts are pieces of the texts in --text_file (.jsonl, one text per row), random ids without one; their lengths are
drawn evenly from 8 to what the engine holds.  With --output_lens a text ends after a number of tokens drawn for its
prompt, the same one in every way, as if its end token came there.  On a CPU the ways run in turn, round by round, so
that a machine that slows down slows all of them, and seconds are those of the processor (one process, all its threads),
where other processes do not count.  On a GPU each way has the memory to itself, one after the other, and seconds are
those of the clock.  Before it is measured each way runs a part of the prompts, so that what is made once (compiled
kernels, recorded steps, memory) counts for none: the first --warm_up of them as they are, and on a GPU the longest ones
and a step of every batch size.  With --static_prompts the first way takes the first so many prompts alone, and its rate
stands for all: static batches are alike, and rows of results name the prompts they are of.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from batching_steps import StepLog, print_table, summarize
from common import Sample, append_csv, describe_device, describe_versions

from gpt.engine.folder import EngineInfo, open_engine
from gpt.runtime.batcher import generate_paged
from gpt.runtime.batching_config import BatchingConfig
from gpt.runtime.generate import Generation, generate
from gpt.runtime.load import load_session, pick_device
from gpt.runtime.request import Request
from gpt.runtime.session import PagedSession, Session
from gpt.text.pipeline import choose_tokenizer, require_tokenizer


@dataclass(frozen=True)
class Work:
    """limits: new tokens of each prompt where they are drawn, else `max_new_tokens` for all."""

    prompts: list[list[int]]
    limits: list[int] | None
    max_new_tokens: int
    end_id: int | None

    def part(self, first: int, count: int) -> Work:
        limits = None if self.limits is None else self.limits[first : first + count]
        return Work(self.prompts[first : first + count], limits, self.max_new_tokens, self.end_id)

    def request(self) -> Request:
        stops = None if self.limits is None else EndsAfter(iter(self.limits))
        return Request(self.prompts, self.max_new_tokens, self.end_id, stops=stops)


@dataclass
class EndsAfter:
    """Stop words' place in the loop: each sequence, in the order of the prompts, ends after so many tokens."""

    limits: Iterator[int]

    def start(self) -> Countdown:
        return Countdown(next(self.limits))


@dataclass
class Countdown:
    left: int

    def add(self, token: int) -> bool:
        self.left -= 1
        return self.left == 0

    def copy(self) -> Countdown:
        return Countdown(self.left)


@dataclass
class Result:
    """Of one way.  num_prompts: that it ran, the first ones.  rates: tokens per second of each round.  rows: of the
    last one.  steps: what `batching_steps.summarize` says of it."""

    num_prompts: int
    rates: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    steps: list[dict[str, object]] = field(default_factory=list)


Run = Callable[[Session, Work], list[Generation]]


@dataclass(frozen=True)
class Way:
    """num_rows: sequences at a time, where it is always the same.  paged: whether its steps can be listened to."""

    run: Run
    num_rows: int | None = None
    paged: bool = False


def static(size: int) -> Way:
    def run(session: Session, work: Work) -> list[Generation]:
        parts = [work.part(first, size) for first in range(0, len(work.prompts), size)]
        return [generate(session, part.request()) for part in parts]

    return Way(run, size)


def continuous(batching: BatchingConfig) -> Way:
    def run(session: Session, work: Work) -> list[Generation]:
        return [generate_paged(cast(PagedSession, session), work.request(), batching=batching)]

    return Way(run, paged=True)


def vllm(model: str) -> Way:
    from vllm import LLM, SamplingParams

    engines: list[Any] = []  # made by the first run, when the card's memory is free

    def run(session: Session, work: Work) -> list[Generation]:
        limits = work.limits or [work.max_new_tokens] * len(work.prompts)
        choice = [SamplingParams(temperature=0, max_tokens=limit) for limit in limits]
        requests = [{"prompt_token_ids": prompt} for prompt in work.prompts]
        if not engines:
            engines.append(LLM(model, dtype="float16"))
        outputs = engines[0].generate(requests, choice, use_tqdm=False)
        return [Generation(tokens=[list(one.outputs[0].token_ids) for one in outputs])]

    return Way(run)


def main() -> int:
    args = parse()
    info = open_engine(args.engine_dir)
    prompts, end_id = make_prompts(args, info)
    works = {kind: make_work(args, prompts, end_id, kind) for kind in args.output_lens or [None]}
    ways = make_ways(args, info)
    on_gpu = pick_device(args.device).type == "cuda"
    if args.library_rows is not None:
        from gpt.engine import cuda_ops

        cuda_ops.LIBRARY_ROWS = args.library_rows
    if args.steps_ahead is not None:
        from gpt.runtime import batcher

        batcher.STEPS_AHEAD = args.steps_ahead
    first = next(iter(ways))
    counts = {name: (name == first and args.static_prompts) or len(prompts) for name in ways}
    results = {kind: {name: Result(min(counts[name], len(prompts))) for name in ways} for kind in works}
    failed = False
    for names in [[name] for name in ways] if on_gpu else [list(ways)]:
        try:
            measure(info, args, {name: ways[name] for name in names}, works, results)
        except Exception:  # what the other ways gave is worth having
            traceback.print_exc()
            failed = True
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    for kind, work in works.items():
        report(args, info, results[kind], work, kind, "cuda" if on_gpu else "cpu")
    return int(failed)


def make_ways(args: argparse.Namespace, info: EngineInfo) -> dict[str, Way]:
    plain = BatchingConfig(max_cache_tokens=args.max_tokens_in_paged_kv_cache)
    makers: dict[str, Callable[[], tuple[str, Way]]] = {
        "static": lambda: (f"static {args.static_batch}", static(args.static_batch)),
        "continuous": lambda: (f"continuous {info.build.max_batch_size}", continuous(plain)),
        "drafts": lambda: (
            f"drafts of {args.max_draft_len}",
            continuous(replace(plain, max_draft_len=args.max_draft_len)),
        ),
        "vllm": lambda: ("vllm", vllm(args.vllm_model)),
    }
    return dict(makers[name]() for name in args.ways)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True, help="built with --paged_kv_cache")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=("static", "continuous", "drafts", "vllm"),
        default=["static", "continuous"],
        help="the first one is what the others are compared with",
    )
    parser.add_argument("--text_file", type=Path, help="without it prompts are random token ids")
    parser.add_argument("--column", default="article")
    parser.add_argument("--suffix", default="", help="text behind each text, which is then a prompt by itself")
    parser.add_argument("--tokenizer")
    parser.add_argument("--num_prompts", type=int, default=10000)
    parser.add_argument("--longest", type=int, help="tokens of a prompt (default: what the engine holds)")
    parser.add_argument("--max_output_len", type=int, default=100)
    parser.add_argument(
        "--output_lens", nargs="+", metavar="KIND", help="uniform:LOW:HIGH, or geometric:MEAN up to --max_output_len"
    )
    parser.add_argument("--static_batch", type=int, default=64)
    parser.add_argument("--max_draft_len", type=int, default=8)
    parser.add_argument("--static_prompts", type=int, help="the first way runs only the first so many prompts")
    parser.add_argument("--warm_up", type=int, help="prompts that each way runs before (default: a batch)")
    parser.add_argument("--profile", action="store_true", help="a table of the last round's steps over a paged cache")
    parser.add_argument("--library_rows", type=int, help="rows from which on a GPU's products are the libraries'")
    parser.add_argument("--steps_ahead", type=int, help="steps that a GPU runs between two looks of the host")
    parser.add_argument("--max_tokens_in_paged_kv_cache", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vllm_model", help="Hugging Face folder of the same model")
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    return parser.parse_args()


def make_prompts(args: argparse.Namespace, info: EngineInfo) -> tuple[list[list[int]], int | None]:
    """The prompts, and the end token where they are texts."""
    longest = args.longest or min(info.build.max_input_len, info.build.max_seq_len - args.max_output_len)
    generator = random.Random(0)
    if args.text_file is None:
        lengths = [generator.randint(8, longest) for _ in range(args.num_prompts)]
        vocabulary = range(info.model.vocab_size)
        return [generator.choices(vocabulary, k=length) for length in lengths], None
    tokenizer = require_tokenizer(choose_tokenizer(info, args.tokenizer, None), info, "read the texts")
    lines = args.text_file.read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.encode(json.loads(line)[args.column] + args.suffix) for line in lines]
    if args.suffix:
        return [text for text in texts if len(text) <= longest][: args.num_prompts], tokenizer.end_id
    stream = [token for text in texts for token in text]
    lengths = [generator.randint(8, longest) for _ in range(args.num_prompts)]
    starts = [generator.randrange(len(stream) - length) for length in lengths]
    return [stream[start : start + length] for start, length in zip(starts, lengths, strict=True)], tokenizer.end_id


def make_work(args: argparse.Namespace, prompts: list[list[int]], end_id: int | None, kind: str | None) -> Work:
    """kind: of the lengths of the outputs, None for the end token's."""
    if kind is None:
        return Work(prompts, None, args.max_output_len, end_id)
    return Work(prompts, draw_limits(kind, args.max_output_len, len(prompts)), args.max_output_len, None)


def draw_limits(kind: str, longest: int, count: int) -> list[int]:
    name, *numbers = kind.split(":")
    generator = random.Random(1)
    if name == "uniform":
        low, high = map(int, numbers)
        return [generator.randint(low, min(high, longest)) for _ in range(count)]
    if name == "geometric":
        return [min(longest, 1 + int(generator.expovariate(1 / float(numbers[0])))) for _ in range(count)]
    raise SystemExit(f"--output_lens {kind}: uniform:LOW:HIGH or geometric:MEAN")


def measure(
    info: EngineInfo,
    args: argparse.Namespace,
    ways: dict[str, Way],
    works: dict[str | None, Work],
    results: dict[str | None, dict[str, Result]],
) -> None:
    session = load_session(info, args.device)
    clock = time.perf_counter if session.device.type == "cuda" else time.process_time
    for name, way in ways.items():
        begin = time.perf_counter()
        num_rows = way.num_rows or session.build.max_batch_size
        warm_up(session, way, next(iter(works.values())), num_rows if args.warm_up is None else args.warm_up)
        print(f"{name}: warmed up in {time.perf_counter() - begin:.1f} s", flush=True)
    for kind, work in works.items():
        for number in range(args.rounds):
            for name, way in ways.items():
                result = results[kind][name]
                log = StepLog(cast(PagedSession, session)) if args.profile and way.paged else None
                if log is not None:
                    log.start()
                begin = clock()
                batches = way.run(session, work.part(0, result.num_prompts))
                seconds = clock() - begin
                if log is not None:
                    log.end()
                    result.steps = summarize(log.calls)
                result.rows = [row for batch in batches for row in batch.tokens]
                result.rates.append(sum(map(len, result.rows)) / seconds)
                rate = f"{seconds:.2f} s, {result.rates[-1]:.1f} tokens/s"
                print(f"{kind or 'end token'}, {name}, round {number}: {rate}; {describe_steps(batches)}", flush=True)
                print_table(result.steps)


def describe_steps(batches: list[Generation]) -> str:
    context_s = sum(batch.context_ms for batch in batches) / 1e3
    steps = [ms for batch in batches for ms in batch.step_ms]
    middle = f", median {statistics.median(steps):.2f} ms" if steps else ""
    return f"steps with prompts {context_s:.2f} s, {len(steps)} others {sum(steps) / 1e3:.2f} s{middle}"


def warm_up(session: Session, way: Way, work: Work, num_prompts: int) -> None:
    if session.device.type == "cuda":
        from gpt.engine.kv_cache import batch_bucket

        # The longest prompts first: graphs hold the addresses of the memory that those need.
        most = way.num_rows or session.build.max_batch_size
        longest = sorted(work.prompts, key=len, reverse=True)[:most]
        sizes = [way.num_rows] if way.num_rows else sorted({batch_bucket(rows) for rows in range(1, most + 1)})[::-1]
        for prompts in (longest, *([prompt[:8] for prompt in work.prompts[:size]] for size in sizes)):
            way.run(session, Work(prompts, [3] * len(prompts), work.max_new_tokens, None))
    if num_prompts > 0:
        way.run(session, work.part(0, num_prompts))


def report(
    args: argparse.Namespace,
    info: EngineInfo,
    results: dict[str, Result],
    work: Work,
    kind: str | None,
    device: str,
) -> None:
    measured = {name: result for name, result in results.items() if result.rates}
    if not measured:
        return
    base = next(iter(measured.values()))
    rows: list[dict[str, object]] = []
    print(f"\n{len(work.prompts)} prompts, {sum(map(len, work.prompts))} tokens, outputs: {kind or 'end token'}")
    for name, result in measured.items():
        rate = Sample(result.rates)
        pairs = list(zip(result.rows, base.rows, strict=False))
        equal = sum(a == b for a, b in pairs)
        ratio = rate.median / Sample(base.rates).median
        some = "" if result.num_prompts == len(work.prompts) else f"  (the first {result.num_prompts} prompts)"
        spread = f"({min(rate.values):.1f} to {max(rate.values):.1f})"
        print(
            f"{name:20} {rate.median:10.1f} tokens/s {spread} {ratio:6.2f}x  equal ids {equal}/{len(pairs)}{some}",
            flush=True,
        )
        rows.append(
            {
                "device": torch.cuda.get_device_name() if device == "cuda" else describe_device(),
                "versions": describe_versions("torch"),
                "engine": info.describe(),
                "prompts": result.num_prompts,
                "prompt_tokens": sum(map(len, work.prompts[: result.num_prompts])),
                "output_lens": f"{kind or 'end token'}, at most {args.max_output_len}",
                "new_tokens": sum(map(len, result.rows)),
                "way": name,
                "rounds": len(result.rates),
                "tokens_per_s": f"{rate.median:.1f}",
                "tokens_per_s_min": f"{min(rate.values):.1f}",
                "tokens_per_s_max": f"{max(rate.values):.1f}",
                "ratio": f"{ratio:.3f}",
                "equal_rows": equal,
            }
        )
    if args.csv is None:
        return
    append_csv(args.csv, rows)
    steps = [
        {"output_lens": kind, "way": name, "prompts": result.num_prompts, **row}
        for name, result in measured.items()
        for row in result.steps
    ]
    if steps:
        append_csv(args.csv.with_name(f"{args.csv.stem}_steps.csv"), steps)


if __name__ == "__main__":
    sys.exit(main())
