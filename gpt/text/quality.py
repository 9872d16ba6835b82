"""How good a quantised engine is: beside the same checkpoint in float32, on texts of the user's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.checkpoint.store import Checkpoint
from gpt.config import BuildConfig, ModelConfig
from gpt.console import aligned, human_bytes, log, progress
from gpt.engine.folder import EngineInfo, open_engine
from gpt.engine.weights import engine_bytes, engine_tensors
from gpt.errors import ConfigError, Problems
from gpt.files import write_text
from gpt.mapping import Mapping
from gpt.quant import FLOAT
from gpt.runtime.generate import generate
from gpt.runtime.load import load_torch_weights
from gpt.runtime.request import Request
from gpt.runtime.torch_session import TorchSession
from gpt.text.dataset import FILE_SUFFIXES, rows_of_file
from gpt.text.evaluation import prompt_text
from gpt.text.pipeline import choose_end_id, choose_tokenizer, require_tokenizer, without_end
from gpt.text.plots import plot_agreement
from gpt.text.rouge import Loss, Scores, aggregate, paired_loss, score_texts
from gpt.text.tokenizer import Tokenizer

REPORT_NAME, PLOT_NAME = "quality.json", "quality.svg"
_WINDOW = 256  # tokens that are scored together, the first half as a prompt
_MAX_WINDOWS = 128
_MAX_SUMMARIES = 100
_SUMMARY_TOKENS = 40
_BATCH_SIZE = 16


@dataclass(frozen=True)
class Agreement:
    """What an engine says of texts beside what the float model says.

    Over `num_tokens` predicted tokens: both perplexities, per cent of equal likeliest tokens, the mean of the
    divergence KL(float || engine) in nats; `kl_by_position` the same per position of a window.
    """

    num_tokens: int
    float_perplexity: float
    perplexity: float
    same_top1_percent: float
    kl: float
    kl_by_position: list[float]

    @property
    def perplexity_rise_percent(self) -> float:
        return 100 * (self.perplexity / self.float_perplexity - 1)


@dataclass(frozen=True)
class Rouge1:
    """Of an engine's and of the float model's summaries of the same texts."""

    engine: float
    float_model: float
    loss: Loss
    num_texts: int


@dataclass(frozen=True)
class Quality:
    """The whole comparison.  rouge1: None where the texts have no references.  Bytes: of one rank's weights, and of the
    cache of one token, of the engine and of the same engine unquantised, in `dtype`."""

    mode: str
    dtype: str
    agreement: Agreement
    rouge1: Rouge1 | None
    weight_bytes: int
    float_weight_bytes: int
    cache_bytes_per_token: int
    float_cache_bytes_per_token: int

    def describe(self) -> str:
        """A table of two columns, the engine and the float model, as text."""
        found = self.agreement
        rows = [
            ("", "engine", "float"),
            ("perplexity", f"{found.perplexity:.3f}", f"{found.float_perplexity:.3f} (float32)"),
            ("  rise, %", f"{found.perplexity_rise_percent:+.3f}", ""),
            ("same likeliest token, %", f"{found.same_top1_percent:.2f}", ""),
            ("KL divergence, nats", f"{found.kl:.2e}", ""),
        ]
        if self.rouge1 is not None:
            name = f"ROUGE-1, {self.rouge1.num_texts} texts"
            rows.append((name, f"{self.rouge1.engine:.2f}", f"{self.rouge1.float_model:.2f} (float32)"))
            rows.append(("  loss, 95 % interval", str(self.rouge1.loss), ""))
        rows += [
            ("weights", human_bytes(self.weight_bytes), f"{human_bytes(self.float_weight_bytes)} ({self.dtype})"),
            (
                "cache per token",
                f"{self.cache_bytes_per_token} B",
                f"{self.float_cache_bytes_per_token} B ({self.dtype})",
            ),
        ]
        return "\n".join([f"Quality of {self.mode} over {found.num_tokens} tokens:", *aligned(rows)])


def check_quality(engine_dir: Path, checkpoint: Checkpoint, rows: Sequence[Row]) -> str:
    """Compares the engine with the checkpoint in float32; returns the table, writes quality.json and quality.svg beside
    the engine.

    rows: see `read_rows`.  Raises ConfigError for texts that are too short.
    """
    info = open_engine(engine_dir)
    tokenizer = require_tokenizer(choose_tokenizer(info, None, None), info, "check the quality")
    engine, reference = _sessions(info, checkpoint)
    windows = windows_of([row.whole for row in rows], tokenizer, info.model, info.build, _MAX_WINDOWS)
    agreement = compare(engine, reference, windows)
    summarised = [row for row in rows if row.reference is not None][:_MAX_SUMMARIES]
    scores = [summary_scores(session, summarised, tokenizer) for session in (engine, reference)]
    build, model = info.build, info.model
    plain = dataclasses.replace(build, quant=FLOAT)
    quality = Quality(
        mode=build.quant.describe() or build.dtype,
        dtype=build.dtype,
        agreement=agreement,
        rouge1=compare_rouge1(*scores) if summarised else None,
        weight_bytes=engine_bytes(model, Mapping(), build.dtype, build.quant),
        float_weight_bytes=engine_bytes(model, Mapping(), build.dtype),
        cache_bytes_per_token=build.kv_cache_bytes(model, 1, 1),
        float_cache_bytes_per_token=plain.kv_cache_bytes(model, 1, 1),
    )
    write_text(engine_dir / REPORT_NAME, json.dumps(dataclasses.asdict(quality), indent=2) + "\n")
    write_text(engine_dir / PLOT_NAME, plot_agreement(agreement.kl_by_position, windows.prompt_len))
    log.info("Quality written to %s and %s", engine_dir / REPORT_NAME, engine_dir / PLOT_NAME)
    return quality.describe()


@dataclass(frozen=True)
class Row:
    """whole: what is scored.  prompt, reference: what is continued and compared, None without a reference."""

    whole: str
    prompt: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Windows:
    """Token ids [num_windows, length]; the first `prompt_len` of each are given as a prompt, the rest one by one."""

    ids: torch.Tensor
    prompt_len: int


def read_rows(path: Path) -> list[Row]:
    """The texts of a file: the whole of a text file, or rows with a column `text`, or `article` and `highlights`.
    Raises ConfigError for a file that is not there or has no texts."""
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", hint="--check_quality takes a text file or rows with texts")
    if path.suffix.lower() not in FILE_SUFFIXES:
        try:
            rows = [Row(path.read_text(encoding="utf-8-sig"))]
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is no UTF-8 text", found=error, hint="iconv -t utf-8 converts it") from error
    else:
        rows = list(_rows_of_table(path))
    if not any(row.whole.strip() for row in rows):
        raise ConfigError(f"no text to check the quality on: {path}", allowed="at least one text")
    return rows


def _rows_of_table(path: Path) -> Iterator[Row]:
    problems = Problems()
    for number, row in enumerate(rows_of_file(path), start=1):
        columns = ("article", "highlights") if {"article", "highlights"} <= row.keys() else ("text",)
        if columns[-1] not in row:
            raise ConfigError(
                f"{path}, row {number} has no text", found=", ".join(row), allowed="text, or article and highlights"
            )
        wrong = [column for column in columns if not isinstance(row[column], str)]
        for column in wrong:
            problems.add(f"row {number}: {column} is {row[column]!r}")
        if wrong:
            continue
        if columns == ("text",):
            yield Row(row["text"])
        else:
            prompt = prompt_text(row["article"])
            yield Row(f"{prompt} {row['highlights']}", prompt, row["highlights"])
    problems.raise_if_any(ConfigError, f"{path} has rows without text", hint="mend or remove them")


def windows_of(
    texts: Sequence[str], tokenizer: Tokenizer, model: ModelConfig, build: BuildConfig, max_windows: int
) -> Windows:
    """The texts one after the other, an end token behind each, cut into windows of one length.

    Raises ConfigError for less than three tokens.
    """
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    ids = list(itertools.chain.from_iterable(tokenizer.encode(text) + end for text in texts))
    length = min(_WINDOW, build.max_seq_len, model.n_positions if model.learned_positions else _WINDOW, len(ids))
    prompt_len = min(max(1, length // 2), build.max_input_len)
    if length < 3:
        raise ConfigError("too little text to check the quality on", found=f"{len(ids)} tokens", allowed="at least 3")
    count = min(len(ids) // length, max_windows)
    return Windows(torch.tensor(ids[: count * length]).view(count, length), prompt_len)


def _sessions(info: EngineInfo, checkpoint: Checkpoint) -> tuple[TorchSession, TorchSession]:
    """The engine and the float32 model, on the CPU."""
    device = torch.device("cpu")
    engine = TorchSession(info.model, info.build, Mapping(), load_torch_weights(info, Mapping(), device))
    plain = BuildConfig(
        dtype="float32",
        max_batch_size=info.build.max_batch_size,
        max_input_len=info.build.max_input_len,
        max_output_len=info.build.max_output_len,
        gpt_attention_plugin="float32",
    )
    weights = dict(engine_tensors(info.model, plain, Mapping(), checkpoint))
    return engine, TorchSession(info.model, plain, Mapping(), weights)


def compare(engine: TorchSession, reference: TorchSession, windows: Windows) -> Agreement:
    """Teacher-forced: both are given the same tokens, half as prompts, half in generation steps through the cache."""
    losses = torch.zeros(2, dtype=torch.float64)
    same = 0
    kl = torch.zeros(windows.ids.shape[1] - 1, dtype=torch.float64)
    batches = windows.ids.split(min(_BATCH_SIZE, engine.build.max_batch_size))
    for batch in progress(batches, what="quality", unit="batch"):
        position = 0
        pieces = [_forced(session, batch, windows.prompt_len) for session in (engine, reference)]
        for logits in zip(*pieces, strict=True):
            ours, theirs = (part.float().log_softmax(-1) for part in logits)  # [B, positions, V]
            num_positions = ours.shape[1]
            targets = batch[:, position + 1 : position + 1 + num_positions, None]
            for index, scores in enumerate((ours, theirs)):
                losses[index] -= scores.gather(2, targets).double().sum()
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            divergence = (theirs.exp() * (theirs - ours)).sum(-1).double()  # [B, positions]
            kl[position : position + num_positions] += divergence.sum(0)
            position += num_positions
    num_windows, length = windows.ids.shape
    num_tokens = num_windows * (length - 1)
    perplexity, float_perplexity = (math.exp(loss) for loss in (losses / num_tokens).tolist())
    return Agreement(
        num_tokens=num_tokens,
        float_perplexity=float_perplexity,
        perplexity=perplexity,
        same_top1_percent=100 * same / num_tokens,
        kl=float(kl.sum()) / num_tokens,
        kl_by_position=(kl / num_windows).tolist(),
    )


def _forced(session: TorchSession, batch: torch.Tensor, prompt_len: int) -> Iterator[torch.Tensor]:
    """Yields the logits that predict tokens 1, 2, ... of batch [B, length], as [B, positions, V] piece by piece."""
    length = batch.shape[1]
    session.start(len(batch), length)
    prompts = batch[:, :prompt_len].tolist()
    yield session.all_logits(prompts).unflatten(0, (len(batch), prompt_len))
    for position in range(prompt_len, length - 1):
        yield session.generation(batch[:, position])[:, None]


def summary_scores(session: TorchSession, rows: Sequence[Row], tokenizer: Tokenizer) -> list[Scores]:
    """Of greedy continuations of the rows' prompts, of which the end is kept where they are too long."""
    model, build = session.model, session.build
    room = min(build.max_seq_len, model.n_positions if model.learned_positions else build.max_seq_len)
    num_new = min(_SUMMARY_TOKENS, build.max_output_len, room - 1)
    end_id = choose_end_id(None, tokenizer, model)
    limit = min(build.max_input_len, room - num_new)
    prompts = [tokenizer.encode(row.prompt or "")[-limit:] for row in rows]
    texts = []
    step = min(_BATCH_SIZE, build.max_batch_size)
    for first in progress(range(0, len(prompts), step), what="ROUGE", unit="batch"):
        result = generate(session, Request(prompts[first : first + step], max_new_tokens=num_new, end_id=end_id))
        texts += [tokenizer.decode(without_end(tokens, end_id)) for tokens in result.tokens]
    return score_texts([row.reference or "" for row in rows], texts)


def compare_rouge1(engine: Sequence[Scores], float_model: Sequence[Scores]) -> Rouge1:
    """engine, float_model: the scores of the same texts, not empty."""
    loss = paired_loss(*([row["rouge1"] for row in scores] for scores in (float_model, engine)))
    return Rouge1(aggregate(engine)["rouge1"], aggregate(float_model)["rouge1"], loss, len(engine))
