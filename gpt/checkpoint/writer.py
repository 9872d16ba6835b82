"""Writing FT binaries as a stream: rows are read, cast, checked, cut for the ranks, hashed and written block by block.

A tensor in flight is two threads, one that reads, casts and checks the next block while the other hashes and writes
this one; numpy, torch, xxhash and file writes release the interpreter lock, so nothing needs a process of its own.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import gpt
from gpt.checkpoint.config_ini import model_to_ini, write_config
from gpt.checkpoint.layout import Tensor
from gpt.checkpoint.manifest import FileRecord, Manifest
from gpt.checkpoint.source import SourceTensor
from gpt.config import ModelConfig
from gpt.console import human_bytes, log, progress
from gpt.dtypes import ITEMSIZE, torch_dtype
from gpt.errors import CheckpointError, GptError, Problems
from gpt.mapping import Mapping as Ranks
from gpt.mapping import Split

if TYPE_CHECKING:
    import torch

Pair = tuple[Tensor, SourceTensor]
BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Target:
    """Where and how the tensors are written."""

    folder: Path
    model: ModelConfig
    storage_dtype: str
    world_size: int


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: the converter, the command line that does the same again, folder or file."""

    tool: str
    command: str
    source: Path


def write_checkpoint(
    target: Target,
    pairs: Sequence[Pair],
    section: Mapping[str, object],
    tokenizer_files: Mapping[str, Path],
    origin: Origin,
    *,
    in_flight: int,
) -> None:
    """Fills `target.folder`: tensors, config.ini with `section`, tokenizer files under their names here, and last the
    manifest.  Raises what `write_tensors` raises."""
    started = time.perf_counter()
    files = write_tensors(target, pairs, in_flight=in_flight)
    own = {"storage_dtype": target.storage_dtype, "tensor_parallelism": target.world_size}
    write_config(target.folder, {**section, **model_to_ini(target.model), **own})
    for name, path in tokenizer_files.items():
        shutil.copyfile(path, target.folder / name)
    manifest = Manifest(
        tool=origin.tool,
        tool_version=gpt.__version__,
        command=origin.command,
        source=str(origin.source.resolve()),
        model=target.model,
        storage_dtype=target.storage_dtype,
        tensor_parallelism=target.world_size,
        files=files,
        tokenizer_files=tuple(tokenizer_files),
    )
    manifest.save(target.folder)
    num_bytes = sum(record.bytes for record in files.values())
    log.info("%d files, %s, in %.1f s", len(files), human_bytes(num_bytes), time.perf_counter() - started)


def write_tensors(target: Target, pairs: Sequence[Pair], *, in_flight: int) -> dict[str, FileRecord]:
    """Writes every pair's files, `in_flight` tensors at a time, and returns their records in the order of `pairs`.

    Peak memory is about `in_flight` * BLOCK_ELEMENTS * 20 bytes, whatever the model's size.  Raises CheckpointError
    naming every tensor that holds NaN or infinity, or values that the storage dtype cannot hold.
    """
    problems = Problems()
    records: dict[str, FileRecord] = {}
    num_bytes = sum(_num_bytes(tensor, target.storage_dtype) for tensor, _ in pairs)
    check_space(target.folder, num_bytes)
    with (
        _one_torch_thread(),
        ThreadPoolExecutor(in_flight, "read") as readers,
        ThreadPoolExecutor(in_flight, "write") as writers,
        progress(total=num_bytes, what="saving weights", unit="B") as bar,
    ):
        futures = [writers.submit(_write_tensor, target, *pair, readers) for pair in pairs]
        try:
            for (tensor, _), future in zip(pairs, futures, strict=True):
                written, problem = future.result()
                records.update(written)
                if problem:
                    problems.add(f"{tensor.name}: {problem}")
                bar.update(_num_bytes(tensor, target.storage_dtype))
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    problems.raise_if_any(
        CheckpointError,
        f"these weights cannot be stored as {target.storage_dtype}",
        hint="values out of range fit --storage-type bfloat16 or float32; NaN and infinity are damage in the source",
    )
    return records


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Blocks are small and the threads here keep the cores busy; torch's own would only spin beside them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _num_bytes(tensor: Tensor, storage_dtype: str) -> int:
    return math.prod(tensor.shape) * ITEMSIZE[tensor.dtype or storage_dtype]


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises GptError where `num_bytes` do not fit on the device of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise GptError(
            "not enough space on the device of the output folder",
            found=f"{human_bytes(free)} free",
            allowed=f"at least {human_bytes(num_bytes)}",
            hint="free space or choose another output folder",
        )


def _write_tensor(
    target: Target, tensor: Tensor, source: SourceTensor, readers: ThreadPoolExecutor
) -> tuple[dict[str, FileRecord], str | None]:
    """The records of one tensor's files, and what is wrong with its values, if anything."""
    dtype = tensor.dtype or target.storage_dtype
    check = ValueCheck()
    num_files = 1 if tensor.file_split is Split.NONE else target.world_size
    shape = tensor.file_shape(Ranks(target.world_size, 0), target.model)
    with ExitStack() as stack:
        files = [
            _OutputFile(stack.enter_context(open(target.folder / tensor.file_name(rank), "wb")))
            for rank in range(num_files)
        ]
        for row_rank, block in _ahead(readers, _blocks(target, tensor, source, check)):
            if tensor.file_split is Split.ROW:
                files[row_rank].append(block)
                continue
            for rank, file in enumerate(files):
                file.append(Ranks(target.world_size, rank).shard(tensor.file_split, block, target.model))
        records = {
            tensor.file_name(rank): FileRecord(shape, dtype, file.num_bytes, file.digest.hexdigest())
            for rank, file in enumerate(files)
        }
    return records, check.problem(dtype)


def _blocks(
    target: Target, tensor: Tensor, source: SourceTensor, check: ValueCheck
) -> Iterator[tuple[int, torch.Tensor]]:
    """Whole rows in the files' dtype, a block at a time, with the rank that owns them if rows are what is divided."""
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    step = max(1, BLOCK_ELEMENTS // tensor.shape[-1])
    rows_per_rank = rows // target.world_size if tensor.file_split is Split.ROW else rows
    dtype = torch_dtype(tensor.dtype or target.storage_dtype)
    for start in range(0, rows, rows_per_rank):
        end = start + rows_per_rank
        for first in range(start, end, step):
            values = source.read(first, min(first + step, end))
            stored = values.to(dtype)
            check.look(values, stored)
            yield start // rows_per_rank, stored


def _ahead(pool: ThreadPoolExecutor, items: Iterator[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """`items`, each made by the pool while the one before is in use."""
    future = pool.submit(next, items, None)
    while (item := future.result()) is not None:
        future = pool.submit(next, items, None)
        yield item


@dataclass
class ValueCheck:
    """Counts the values of one tensor that are not finite, in the source or only after the cast."""

    nan_or_inf: int = 0
    out_of_range: int = 0
    largest: float = 0.0

    def look(self, values: torch.Tensor, stored: torch.Tensor) -> None:
        import torch

        # The fastest pass there is settles the usual case: a finite sum has finite terms.  The converse does not hold.
        if torch.isfinite(stored.sum()):
            return
        finite = torch.isfinite(values)
        lost = finite & ~torch.isfinite(stored)
        self.nan_or_inf += int((~finite).sum())
        self.out_of_range += int(lost.sum())
        if lost.any():
            self.largest = max(self.largest, float(values[lost].abs().max()))

    def problem(self, dtype: str) -> str | None:
        problems = []
        if self.nan_or_inf:
            problems.append(f"{self.nan_or_inf} values are NaN or infinite")
        if self.out_of_range:
            problems.append(f"{self.out_of_range} values up to {self.largest:.4g} do not fit {dtype}")
        return ", ".join(problems) or None


class _OutputFile:
    """One file being written, with the checksum of what went into it."""

    def __init__(self, file: BinaryIO):
        import xxhash

        self.file = file
        self.digest = xxhash.xxh3_128()
        self.num_bytes = 0

    def append(self, part: torch.Tensor) -> None:
        import torch

        data = part.contiguous().view(torch.uint8).numpy().data
        self.digest.update(data)
        self.file.write(data)
        self.num_bytes += data.nbytes
