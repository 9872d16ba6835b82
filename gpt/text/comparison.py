"""The evaluation that summarize.py runs: texts in, ROUGE and speed of each side out, side by side."""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gpt.comm import start
from gpt.console import log
from gpt.engine.folder import EngineInfo, open_engine
from gpt.errors import ConfigError, GptError
from gpt.files import write_text
from gpt.runtime.batching_config import DEFAULT_BATCHING, BatchingConfig
from gpt.runtime.execution import DEFAULT_EXECUTION, Execution
from gpt.runtime.ranks import check_same_input
from gpt.runtime.request import Request
from gpt.text.dataset import Article, load_articles
from gpt.text.decoding_options import GREEDY_DECODING, DecodingOptions
from gpt.text.evaluation import (
    TASKS,
    Side,
    SideResult,
    Task,
    count_identical,
    encode_articles,
    evaluate,
    max_prompt_tokens,
)
from gpt.text.pipeline import choose_end_id, choose_tokenizer, run_batches, tell_recording
from gpt.text.prompts import check_output_file
from gpt.text.rouge import ROUGE_KEYS
from gpt.text.run_results import final_text
from gpt.text.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

    from gpt.runtime.generate import Generation
    from gpt.runtime.session import Session
    from gpt.text.hf_baseline import HfBaseline

_RULE = "-" * 57


@dataclass(frozen=True)
class SummarizeConfig:
    """What to compare.

    eval_type: a key of TASKS.  dataset_path: see `load_articles`; columns of None are those of the task's data set.
    hf_model: None leaves the Hugging Face side out.  threshold: ROUGE-1 that the engine must exceed, None for no check.
    report: HTML file to write.  command: what the report says it was made by.  decoding: of both sides.
    batching: of an engine with a paged cache.
    """

    engine_dir: Path
    test_engine: bool
    hf_model: str | None
    hf_dtype: str = "float32"
    tokenizer: str | None = None
    vocab_file: Path | None = None
    dataset_path: Path | None = None
    article_column: str | None = None
    highlights_column: str | None = None
    batch_size: int = 1
    max_batches: int = 20
    output_len: int = 100
    device: str = "auto"
    threshold: float | None = None
    report: Path | None = None
    command: str = ""
    eval_type: str = "summarize"
    decoding: DecodingOptions = GREEDY_DECODING
    execution: Execution = DEFAULT_EXECUTION
    batching: BatchingConfig = DEFAULT_BATCHING

    @property
    def task(self) -> Task:
        return TASKS[self.eval_type]


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows."""

    config: SummarizeConfig
    engine: EngineInfo | None
    device: str
    tokenizer_name: str
    prompt_limit: int
    articles: list[Article]
    prompts: list[list[int]]
    results: list[SideResult]


def compare(config: SummarizeConfig, out: TextIO) -> Comparison:
    """Runs the sides that are asked for, prints their results to `out` and writes the report.

    Among several ranks all run the engine, and the first one does everything else.

    Raises ConfigError for input that cannot be used, EngineError or CheckpointError for a bad engine or model, and
    GptError where the engine's ROUGE-1 is not above the threshold.
    """
    ranks = start()
    if ranks.rank > 0:
        # Only the engine needs the other ranks; results, files and the Hugging Face model are the first one's.
        config = replace(config, hf_model=None, report=None, threshold=None)
        out = io.StringIO()
    if config.report is not None:
        check_output_file(config.report)
    if ranks.size > 1 and not config.test_engine:
        raise ConfigError(
            "several ranks were started, but no engine is tested",
            found=f"{ranks.size} ranks",
            hint="--test_trt_llm, or start it without mpirun or srun",
        )
    config = replace(config, decoding=config.decoding.with_seed())
    info = _open_engine(config)
    tokenizer = _choose_tokenizer(config, info)
    limit = config.batch_size * config.max_batches
    data = config.task.data
    columns = config.article_column or data.text_column, config.highlights_column or data.reference_column
    articles = load_articles(config.dataset_path, *columns, limit, data)
    check_same_input(ranks, articles)
    comparison = _run_sides(config, info, tokenizer, articles, out)
    print(f"Measured: {config.task.measured}", file=out)
    for result in comparison.results:
        _print_result(result, out)
    if len(comparison.results) == 2:
        _print_differences(comparison.results[0], comparison.results[1], config.task, out)
    if config.report is not None:
        from gpt.text.report import render

        write_text(config.report, render(comparison))
        log.info("Report written: %s", config.report)
    if config.threshold is not None:
        check_threshold(comparison.results[0].rouge["rouge1"], config.threshold, config.task.output_noun)
    return comparison


def check_threshold(rouge1: float, threshold: float, what: str = "summaries") -> None:
    """Raises GptError (exit code 1) unless `rouge1` is above the threshold."""
    if not rouge1 > threshold:
        raise GptError(
            f"the engine's {what} are not good enough",
            found=f"ROUGE-1 {rouge1:.3f}",
            allowed=f"above {threshold:g} (--tensorrt_llm_rouge1_threshold)",
        )


def _open_engine(config: SummarizeConfig) -> EngineInfo | None:
    """The engine; without --test_trt_llm only its limits are used, so that both sides get the same prompts."""
    if not config.test_engine and not (config.engine_dir / "config.json").is_file():
        return None
    info = open_engine(config.engine_dir)
    if config.test_engine and config.batch_size > info.build.max_batch_size:
        raise ConfigError(
            "the batch is larger than the engine",
            found=f"--batch_size {config.batch_size}",
            allowed=f"at most {info.build.max_batch_size}, the engine's --max_batch_size",
        )
    if config.test_engine:
        config.batching.check_fits(info.build)
    return info


def _choose_tokenizer(config: SummarizeConfig, info: EngineInfo | None) -> Tokenizer:
    """As the flags say, else the engine's own, else the Hugging Face model's."""
    tokenizer: Tokenizer | None = None
    if info is not None:
        tokenizer = choose_tokenizer(info, config.tokenizer, config.vocab_file)
    elif config.vocab_file is not None:
        tokenizer = SentencePieceTokenizer(config.vocab_file)
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is None and config.hf_model is not None:
        tokenizer = load_tokenizer(config.hf_model)
    if tokenizer is None:
        raise ConfigError(
            "no tokenizer to read the texts",
            found=f"none in the engine folder {config.engine_dir}",
            hint="--tokenizer <folder or hub name> or --vocab_file <sentencepiece model>",
        )
    return tokenizer


def _run_sides(
    config: SummarizeConfig, info: EngineInfo | None, tokenizer: Tokenizer, articles: list[Article], out: TextIO
) -> Comparison:
    from gpt.runtime.load import load_session, pick_device

    session: Session | None = None
    baseline: HfBaseline | None = None
    if config.test_engine and info is not None:
        session = load_session(info, config.device, config.execution)
    device = session.device if session is not None else pick_device(config.device)
    if config.hf_model is not None:
        from gpt.text.hf_baseline import HfBaseline

        baseline = HfBaseline(config.hf_model, config.hf_dtype, device)
    model, build = (None, None) if info is None else (info.model, info.build)
    positions = None if baseline is None else baseline.n_positions
    limit = max_prompt_tokens(config.output_len, model, build, positions)
    vocab_sizes = [side.vocab_size for side in (model, baseline) if side is not None]
    if len(set(vocab_sizes)) > 1:
        log.warning(
            "the engine has %d tokens, %s has %d: are they the same model?",
            vocab_sizes[0],
            config.hf_model,
            vocab_sizes[1],
        )
    config.decoding.check_fits(None if session is None else build, min(vocab_sizes), config.output_len)
    sampling = config.decoding.choice(tokenizer)
    sampling.check_fits(min(vocab_sizes), config.output_len)
    stops = config.decoding.stops(tokenizer, skip_special=True)
    prompts = encode_articles(tokenizer, articles, min(vocab_sizes), limit, config.task.prompt)
    end_id = tokenizer.end_id if model is None else choose_end_id(None, tokenizer, model)

    settings = {"max_new_tokens": config.output_len, "end_id": end_id, "sampling": sampling, "stops": stops}
    sides = _make_sides(session, baseline, config, settings)
    for side in sides:
        tokens = side.generate(prompts[:1], first_row=0).tokens[0]  # once, before anything is timed: it warms up, too
        _print_demo(side, articles[0], final_text(tokens, tokenizer, end_id, stops, skip_special=True), out)
    references = [article.reference for article in articles]
    results = [
        evaluate(side, prompts, references, tokenizer, end_id, config.batch_size, config.task, stops) for side in sides
    ]
    if session is not None:
        tell_recording(session)
    return Comparison(config, info, _describe_device(device), tokenizer.name, limit, articles, prompts, results)


def _describe_device(device: torch.device) -> str:
    """The device with what timings on it depend on."""
    import torch

    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device}, {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _make_sides(
    session: Session | None, baseline: HfBaseline | None, config: SummarizeConfig, settings: dict[str, Any]
) -> list[Side]:
    """settings: what both sides take by the same names."""
    from gpt.runtime.generate import joined

    decoding = config.decoding
    names = decoding.num_results, "beam" if decoding.uses_beams or decoding.num_results == 1 else "sample"

    def ours(prompts: Sequence[Sequence[int]], /, *, first_row: int) -> Generation:
        assert session is not None
        request = Request(prompts, keys=[(first_row + row,) for row in range(len(prompts))], **settings)
        result = joined(run_batches(session, request, decoding, batching=config.batching))
        if session.comm.rank > 0 and not result.tokens:  # over a paged cache the first rank alone knows them
            result.tokens = [[] for _ in range(len(prompts) * decoding.num_results)]
        return result

    def theirs(prompts: Sequence[Sequence[int]], /, *, first_row: int) -> Generation:
        assert baseline is not None
        return baseline.generate(prompts, first_row=first_row, beams=decoding.search, **settings)

    sides = [Side("Engine", "Engine", ours, *names)] if session is not None else []
    return sides if baseline is None else [*sides, Side("Hugging Face", "HF", theirs, *names)]


def _print_demo(side: Side, article: Article, text: str, out: TextIO) -> None:
    """The first article as the original shows it."""
    lines = (_RULE, f"{side.label} Generated : ", f" Input : {article.text}", f"\n Reference : {article.reference}")
    print(*lines, f"\n Output : {text}", _RULE, sep="\n", file=out, flush=True)


def _print_result(result: SideResult, out: TextIO) -> None:
    print(f"{result.side.name} (total latency: {result.latency_s:.3f} sec)", file=out)
    print(f"{result.side.label} {result.side.noun} 0 result", file=out)
    for key in ROUGE_KEYS:
        print(f"  {key} : {result.rouge[key]}", file=out)
    for number, rouge in enumerate(result.others, start=1):
        print(f"{result.side.label} {result.side.noun} {number} result", file=out)
        for key in ROUGE_KEYS:
            print(f"  {key} : {rouge[key]}", file=out)
    if result.first_line_percent is not None:
        print(f"  equal first lines : {result.first_line_percent:.1f} %", file=out)
    print(f"  tokens/s : {result.tokens_per_second:.1f}", file=out)
    if result.ms_per_token is not None:
        print(f"  ms per token : {result.ms_per_token:.3f}", file=out)


def _print_differences(ours: SideResult, theirs: SideResult, task: Task, out: TextIO) -> None:
    rows = [(key, ours.rouge[key], theirs.rouge[key]) for key in ROUGE_KEYS]
    if ours.first_line_percent is not None and theirs.first_line_percent is not None:
        rows.append(("first lines, %", ours.first_line_percent, theirs.first_line_percent))
    rows.append(("tokens/s", ours.tokens_per_second, theirs.tokens_per_second))
    if ours.ms_per_token is not None and theirs.ms_per_token is not None:
        rows.append(("ms per token", ours.ms_per_token, theirs.ms_per_token))
    print(f"\n{'':14}{ours.side.name:>14}{theirs.side.name:>14}{'difference':>14}", file=out)
    for name, left, right in rows:
        print(f"{name:14}{left:14.3f}{right:14.3f}{left - right:+14.3f}", file=out)
    identical = count_identical([ours, theirs])
    print(f"identical output ids: {identical} of {task.count(len(ours.tokens))}", file=out, flush=True)
