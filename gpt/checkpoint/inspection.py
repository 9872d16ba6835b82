"""What a folder or file of weights is, and whether it is whole: everything is read, nothing is run.

Each `inspect_*` function fills in an `Inspection` as far as it gets; what stands in the way becomes a problem.
"""

from __future__ import annotations

import math
import shlex
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.checkpoint import manifest
from gpt.checkpoint.expected import expected_files, find_quant_files
from gpt.checkpoint.hf import match_tensors, read_model, with_own_head
from gpt.checkpoint.hf_files import find_tokenizer, open_weights
from gpt.checkpoint.layout import QuantFiles, describe_architecture, tensors
from gpt.checkpoint.manifest import Manifest
from gpt.checkpoint.nemo import read_config
from gpt.checkpoint.nemo_archive import CONFIG_NAME, find_config, has_prompts, is_compressed, read_yaml
from gpt.checkpoint.prompt_table import description_path, read_tasks
from gpt.checkpoint.source import SourceTensor
from gpt.checkpoint.store import Checkpoint, bad_scales, find_folder, find_tokenizer_files, map_file
from gpt.config import ModelConfig
from gpt.console import human_bytes, progress
from gpt.dtypes import FLOAT_DTYPES
from gpt.errors import CheckpointError, GptError
from gpt.files import file_checksum, is_lfs_pointer

if TYPE_CHECKING:
    import torch

_BLOCK_VALUES = 1 << 22
_MAX_CONFIG_BYTES = 11 << 20  # a little more than the reader of the file accepts


@dataclass
class Inspection:
    """`facts` are for people and machines alike, in the order in which they are worth reading.

    `model` and `tokenizer_dir` are there where the artifact has them.  `next_step` is a command that uses it.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    model: ModelConfig | None = None
    tokenizer_dir: Path | None = None
    next_step: str | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Turns an error inside the block into problems."""
        try:
            yield
        except GptError as error:
            what = error.what.partition(f": {self.path}")[0]  # the heading says which path it is
            if isinstance(error.found, (list, tuple)):
                self.problems += [f"{what}: {item}" for item in error.found]
            else:
                found = "" if error.found is None else f": found {error.found}"
                allowed = "" if error.allowed is None else f", allowed {error.allowed}"
                self.problems.append(what + found + allowed)

    def describe_model(self, model: ModelConfig) -> None:
        self.model = model
        count = sum(math.prod(tensor.shape) for tensor in tensors(model))
        ids = {"begin": model.bos_token_id, "end": model.eos_token_id, "padding": model.pad_token_id}
        self.facts.update(
            architecture=describe_architecture(model), parameters=count, vocabulary=model.vocab_size, token_ids=ids
        )


def inspect_checkpoint(path: Path, *, checksums: bool, values: bool) -> Inspection:
    """An FT folder, ours or one of FasterTransformer's own converters; `path` may be the parent of the only one."""
    result = Inspection(path, "FT checkpoint")
    folder = path
    with result.collecting():
        folder = find_folder(path)
        if not (folder / manifest.FILE_NAME).is_file():
            result.kind = f"FT checkpoint of another tool (no {manifest.FILE_NAME})"
        checkpoint = Checkpoint.open(folder)
        model, dtype, quant = checkpoint.model, checkpoint.storage_dtype, checkpoint.quant
        _describe_checkpoint(result, folder, model, dtype, checkpoint.world_size, quant)
        ranks = f" --world_size {checkpoint.world_size}" if checkpoint.world_size > 1 else ""
        result.next_step = f"python build.py --model_dir {shlex.quote(str(folder))}{ranks}"
    listed = _manifest(folder)
    if listed is not None:
        if result.model is None:  # what is wrong with the folder is known; the files that are whole are still looked at
            quant = find_quant_files(folder, listed)
            _describe_checkpoint(result, folder, listed.model, listed.storage_dtype, listed.tensor_parallelism, quant)
        result.facts.update(made_by=f"{listed.tool} {listed.tool_version}", made_with=listed.command)
        result.facts["made_from"] = listed.source
        missing = [name for name in listed.tokenizer_files if not (folder / name).is_file()]
        result.problems += [f"{name}: missing, {manifest.FILE_NAME} lists it" for name in missing]
        if checksums:
            whole = {name: record for name, record in listed.files.items() if _has_size(folder / name, record.bytes)}
            result.problems += wrong_checksums({folder / name: record.xxh3_128 for name, record in whole.items()})
    if find_tokenizer_files(folder):
        result.tokenizer_dir = folder
    if values and result.model is not None:
        quant = find_quant_files(folder, listed)
        files = dict(expected_files(result.model, result.facts["ranks"], result.facts["dtype"], quant))
        files = {name: file for name, file in files.items() if _has_size(folder / name, file.bytes)}
        floats = ((name, map_file(folder / name, file)) for name, file in files.items() if not file.scales)
        result.problems += bad_values(floats)
        for name, file in files.items():
            if file.scales and (problem := bad_scales(map_file(folder / name, file))):
                result.problems.append(f"{name}: scales must be finite and above 0: {problem}")
    return result


def _manifest(folder: Path) -> Manifest | None:
    """None too for a damaged one, which opening the checkpoint has complained about."""
    try:
        listed = Manifest.load(folder)
    except GptError:
        return None
    # A damaged number must not become a list of billions of names.
    return listed if listed.model.n_layer * listed.tensor_parallelism <= len(listed.files) else None


def _describe_checkpoint(
    result: Inspection, folder: Path, model: ModelConfig, dtype: str, world_size: int, quant: QuantFiles
) -> None:
    result.describe_model(model)
    names = {name for name, _ in expected_files(model, world_size, dtype, quant)}
    present = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    size = human_bytes(sum(count for name, count in present.items() if name in names))
    result.facts.update(dtype=dtype, ranks=world_size, files=len(names & present.keys()), size=size)
    if quant:
        result.facts["quantisation"] = describe_quant_files(quant)
    if unused := sorted(present.keys() - names):
        result.facts["files_not_used"] = unused


def describe_quant_files(quant: QuantFiles) -> str:
    """One line: what is there beside the float weights."""
    kinds = {
        "INT8 weights and scales (SmoothQuant)": quant.smoothquant,
        "smoothers of dense and proj": quant.smoothers,
        "scales of an INT8 cache, K and V apart": quant.kv_separate,
        "scales of an INT8 cache, K and V together": quant.kv_shared and not quant.kv_separate,
    }
    return ", ".join(name for name, present in kinds.items() if present)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def inspect_hugging_face(path: Path, *, values: bool) -> Inspection:
    """A Hugging Face folder of a family that can be converted."""
    result = Inspection(path, "Hugging Face model")
    weights: dict[str, SourceTensor] = {}
    with result.collecting():
        weights = open_weights(path)
        dtypes = sorted({tensor.dtype for tensor in weights.values()})
        result.facts.update(tensors=len(weights), dtype=", ".join(dtypes))
        if values:
            result.problems += bad_values(_source_blocks(weights))
    with result.collecting():
        family, _, model = read_model(path)
        model = with_own_head(model, weights)
        result.kind = f"Hugging Face model ({family.name})"
        result.describe_model(model)
        if weights:
            match_tensors(family, model, weights)
        if find_tokenizer(path):
            result.tokenizer_dir = path
        result.next_step = f"python hf_gpt_convert.py -i {shlex.quote(str(path))} -o <output folder>"
    return result


def inspect_nemo(path: Path) -> Inspection:
    """A .nemo archive or its unpacked folder: its configuration.  A compressed archive is only named."""
    result = Inspection(path, "NeMo archive" if path.is_file() else "unpacked NeMo archive")
    with result.collecting(), tempfile.TemporaryDirectory(prefix="nemo-check-") as scratch:
        if path.is_dir():
            _describe_nemo(result, find_config(path))
            return result
        result.facts["size"] = human_bytes(path.stat().st_size)
        compressed = is_compressed(path)
        result.facts["compression"] = "gzip; what is inside shows when it is converted" if compressed else "none"
        result.next_step = f"python nemo_ckpt_convert.py -i {shlex.quote(str(path))} -o <output folder>"
        if not compressed:
            config = Path(scratch) / CONFIG_NAME
            result.facts["files"] = _extract_config(path, config)
            _describe_nemo(result, config)
    return result


def inspect_prompt_table(path: Path) -> Inspection:
    """A table of virtual tokens, or the folder of an adapter that has one."""
    result = Inspection(path, "prompt table" if path.is_file() else "prompt-tuning adapter")
    with result.collecting():
        tasks = read_tasks(path)
        longest = max(len(task.values) for task in tasks)
        result.facts.update(
            tasks=[f"{index}: {task.name}, {len(task.values)} virtual tokens" for index, task in enumerate(tasks)],
            hidden_size=tasks[0].values.shape[1],
            build_with=f"--max_prompt_embedding_table_size {len(tasks) * longest}",
        )
        if path.is_file() and not description_path(path).is_file():
            result.facts["description"] = f"no {description_path(path).name}: every row counts as a virtual token"
    return result


def wrong_checksums(expected: dict[Path, str]) -> list[str]:
    """One problem per file whose bytes are not those that `expected` (xxh3_128) tells."""
    problems = []
    with progress(total=sum(path.stat().st_size for path in expected), what="checksums", unit="B") as bar:
        for path, checksum in expected.items():
            found = file_checksum(path)
            if found != checksum:
                problems.append(f"{path.name}: changed after it was written: xxh3_128 {found}, recorded {checksum}")
            bar.update(path.stat().st_size)
    return problems


def bad_values(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """One problem per name under which NaN or infinite values come; a name may come several times, once per block."""
    import torch

    counts: dict[str, list[int]] = {}
    with progress(total=None, what="values", unit="B") as bar:
        for name, tensor in named:
            flat = tensor.reshape(-1)
            for first in range(0, flat.numel(), _BLOCK_VALUES):
                block = flat[first : first + _BLOCK_VALUES]
                if not torch.isfinite(block).all():
                    count = counts.setdefault(name, [0, 0])
                    count[0] += int(block.isnan().sum())
                    count[1] += int(block.isinf().sum())
                bar.update(block.nbytes)
    return [f"{name}: {nan} NaN and {infinite} infinite values" for name, (nan, infinite) in counts.items()]


def _source_blocks(weights: dict[str, SourceTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights.items():
        if tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
            continue  # masks and other buffers, which no converter reads
        num_rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
        step = max(1, _BLOCK_VALUES // tensor.shape[-1])
        for first in range(0, num_rows, step):
            yield name, tensor.read(first, min(first + step, num_rows))


def _extract_config(archive_path: Path, target: Path) -> int:
    """Copies model_config.yaml, wherever it lies, to `target`; returns the number of files in the archive."""
    if is_lfs_pointer(archive_path):
        raise CheckpointError("a Git LFS pointer instead of the archive", hint="git lfs pull")
    try:
        with tarfile.open(archive_path, mode="r:") as archive:
            members = [member for member in archive if member.isreg()]
            for member in members:
                if Path(member.name).name == CONFIG_NAME and (file := archive.extractfile(member)):
                    target.write_bytes(file.read(_MAX_CONFIG_BYTES))
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise CheckpointError("no archive, or a damaged one", found=error, allowed="a tar file") from error
    if not target.is_file():
        raise CheckpointError(
            f"no {CONFIG_NAME} in the archive", found=", ".join(Path(member.name).name for member in members[:8])
        )
    return len(members)


def _describe_nemo(result: Inspection, config_path: Path) -> None:
    values = read_yaml(config_path)
    source = shlex.quote(str(result.path))
    if has_prompts(values):
        result.kind = result.kind.replace("NeMo", "NeMo prompt-learning")
        templates = values.get("task_templates") or []
        result.facts["tasks"] = [str(entry.get("taskname")) for entry in templates if isinstance(entry, dict)]
        result.next_step = f"python nemo_prompt_convert.py -i {source} -o <prompts.npy>"
        return
    config = read_config(values)
    result.facts["configuration"] = dict(config.fields)
    training = config.training
    result.facts["trained_on"] = f"{training.tensor_parallel} x {training.pipeline_parallel} ranks (tensor x pipeline)"
    result.next_step = f"python nemo_ckpt_convert.py -i {source} -o <output folder>"
