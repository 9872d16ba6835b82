"""Reading a folder of FT binaries: found, checked whole, then memory-mapped tensor by tensor."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping as Section
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.checkpoint import manifest
from gpt.checkpoint.config_ini import CONFIG_NAME, model_from_ini, read_section, storage_dtype
from gpt.checkpoint.expected import ExpectedFile, check_files, expected_files, find_quant_files
from gpt.checkpoint.layout import QKV, QuantFiles, Tensor, quant_tensors
from gpt.checkpoint.manifest import Manifest
from gpt.config import ModelConfig
from gpt.dtypes import torch_dtype
from gpt.errors import CheckpointError, ConfigError, Problems, rethrow_as
from gpt.files import listing
from gpt.mapping import Mapping, check_divides

if TYPE_CHECKING:
    import torch

HEAD_FILE = "model.lm_head.weight.bin"
# What tokenizers and generation settings are called in model folders; whatever is there travels with the weights.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "generation_config.json",
)
_BESIDE_A_TOKENIZER = {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"}
_FOLDER_NAME = re.compile(r"(\d+)-gpu")
_RANK_FILE = re.compile(r"model\.layers\.0\.attention\.dense\.weight\.(\d+)\.bin")


def find_tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in `folder`, with what goes with one; none where there is nothing but that."""
    names = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return [folder / name for name in names] if set(names) - _BESIDE_A_TOKENIZER else []


class Checkpoint:
    """A checked folder.  `open` is the way to get one."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        storage_dtype: str,
        world_size: int,
        listed: Manifest | None,
        quant: QuantFiles,
    ):
        self.folder = folder
        self.model = model
        self.storage_dtype = storage_dtype
        self.world_size = world_size
        self.manifest = listed  # None in folders that other tools wrote
        self.quant = quant

    @property
    def tokenizer_files(self) -> list[Path]:
        return find_tokenizer_files(self.folder)

    @classmethod
    def open(cls, folder: Path, world_size: int | None = None) -> Checkpoint:
        """Checks everything but the values: configuration, number of ranks, presence and length of each file.

        `folder` is a `<N>-gpu` folder or the parent of one; of several, that of `world_size` is taken.  Folders of
        FasterTransformer's own converters are read too (their key names, no manifest).  Raises CheckpointError listing
        every problem.
        """
        folder = find_folder(folder, world_size)
        section = read_section(folder)
        listed = Manifest.load(folder) if (folder / manifest.FILE_NAME).is_file() else None
        tied_head = listed.model.tied_head if listed else not (folder / HEAD_FILE).exists()
        try:
            model = model_from_ini(section, tied_head=tied_head)
            dtype = storage_dtype(section)
            world_size = _world_size(folder, section, listed)
            check_divides(model, world_size)
        except ConfigError as error:
            raise rethrow_as(error, CheckpointError, f"{error.what}: {folder / CONFIG_NAME}") from error
        problems = Problems()
        if listed:
            _compare(problems, listed, model, dtype)
        quant = find_quant_files(folder, listed)
        check_files(problems, folder, model, dtype, world_size, listed, quant)
        problems.raise_if_any(CheckpointError, f"this checkpoint cannot be used: {folder}", hint=_hint(listed))
        return cls(folder, model, dtype, world_size, listed, quant)

    def read(self, tensor: Tensor, mapping: Mapping) -> torch.Tensor:
        """This rank's part of `tensor` in FT local shape and in its own or the storage dtype, memory-mapped.

        Raises CheckpointError for another number of ranks than the folder's, where the bytes are not those that the
        manifest vouches for, and for scales that are not finite and positive.
        """
        self.check_world_size(mapping.world_size)
        import torch

        path = self.folder / tensor.file_name(mapping.rank)
        shape = tensor.file_shape(mapping, self.model)
        dtype = torch_dtype(tensor.dtype or self.storage_dtype)
        values = torch.from_file(str(path), size=math.prod(shape), dtype=dtype)
        self._check_bytes(path, values)
        values = values.view(shape)
        if tensor.kind == "factor" and (problem := bad_scales(values)):
            what = f"scales must be finite and above 0: {path}"
            raise CheckpointError(what, found=problem, hint=_hint(self.manifest))
        return mapping.shard(tensor.split, values, self.model) if tensor.sliced else values

    def read_kv_scales(self, layer: int) -> torch.Tensor:
        """float32 [2]: what an INT8 cache of `layer` multiplies its K and its V by when it is read.  The original's
        folders have one number for both.  Raises CheckpointError where there is neither."""
        name = "scale_kv_quant_orig" if self.quant.kv_separate else "scale_y_quant_orig"
        wanted = f"model.layers.{layer}.{QKV}.{name}"
        for tensor in quant_tensors(self.model, self.quant) if self.quant.kv_scales else ():
            if tensor.name == wanted:
                return self.read(tensor, Mapping(self.world_size, 0)).expand(2)
        raise CheckpointError(
            f"no scales for an INT8 cache: {self.folder}",
            found=f"no {wanted}.bin",
            hint=self.quantize_command("--calibrate-kv-cache"),
        )

    def quantize_command(self, *flags: str) -> str:
        """The command line that makes this checkpoint again with `flags` added."""
        return shlex.join([*self._command(self.world_size), *flags, "--force"])

    def _command(self, world_size: int) -> list[str]:
        """What made the folder, for another number of ranks; paths as they are now."""
        parent = str(self.folder.parent)
        if self.manifest is None:
            words = ["python", "hf_gpt_convert.py", "-i", "<the original model>", "-o", parent, "-tp", str(world_size)]
            return [*words, "-t", self.storage_dtype]
        words = shlex.split(self.manifest.command)
        changes = {"-i": self.manifest.source, "-o": parent, "-tp": str(world_size)}
        for flag, value in changes.items():
            if flag in words[:-1]:
                words[words.index(flag) + 1] = value
        return words

    def check_world_size(self, world_size: int) -> None:
        """Raises CheckpointError, with the command that cuts the model anew, for another number of ranks than the
        folder's, and ConfigError for one that the model cannot be cut for."""
        if world_size == self.world_size:
            return
        check_divides(self.model, world_size)
        raise CheckpointError(
            f"the checkpoint is cut for another number of ranks: {self.folder}",
            found=f"{self.world_size}, which build.py takes with --world_size {self.world_size}",
            allowed=world_size,
            hint=shlex.join(self._command(world_size)),
        )

    def check_scales(self) -> None:
        """Raises CheckpointError listing every file of scales that are not finite and positive."""
        files = expected_files(self.model, self.world_size, self.storage_dtype, self.quant)
        problems = Problems()
        for name, file in files:
            if file.scales and (problem := bad_scales(map_file(self.folder / name, file))):
                problems.add(f"{name}: {problem}")
        what = f"scales must be finite and above 0: {self.folder}"
        problems.raise_if_any(CheckpointError, what, hint=_hint(self.manifest))

    def _check_bytes(self, path: Path, values: torch.Tensor) -> None:
        if self.manifest is None:
            return
        import torch
        import xxhash

        expected = self.manifest.files[path.name].xxh3_128
        found = xxhash.xxh3_128_hexdigest(values.view(torch.uint8).numpy().data)
        if found != expected:
            raise CheckpointError(
                f"the file was changed after it was written: {path}",
                found=f"xxh3_128 {found}",
                allowed=expected,
                hint=_hint(self.manifest),
            )


def find_folder(folder: Path, world_size: int | None = None) -> Path:
    """`folder` itself, or its `<N>-gpu` child: the only one, else that of `world_size` ranks.

    Raises CheckpointError with what is there instead.
    """
    if not folder.is_dir():
        raise ConfigError("no such checkpoint folder", found=folder, allowed="a folder made by a converter")
    if (folder / CONFIG_NAME).is_file():
        return folder
    children = sorted(child for child in folder.iterdir() if _FOLDER_NAME.fullmatch(child.name) and child.is_dir())
    wanted = children if len(children) == 1 else [child for child in children if child.name == f"{world_size}-gpu"]
    if wanted:
        return find_folder(wanted[0])
    if children:
        raise CheckpointError(
            f"several checkpoints are here: {folder}",
            found=", ".join(child.name for child in children),
            hint=f"choose one, for example {children[0]}",
        )
    names = [child.name for child in folder.iterdir()]
    hint = "convert the model first: python hf_gpt_convert.py -i <model folder> -o <output folder>"
    if any(".partial-" in name for name in names):
        hint = "a conversion was interrupted here, run it again"
    elif "config.json" in names:
        hint = f"this looks like a model not yet converted: python hf_gpt_convert.py -i {folder} -o <output folder>"
    raise CheckpointError(f"no {CONFIG_NAME} in {folder}", found=listing(folder), hint=hint)


def _world_size(folder: Path, section: Section[str, str], listed: Manifest | None) -> int:
    """The number of ranks, on which everything that speaks of it must agree."""
    said: dict[str, int] = {}
    if listed:
        said[manifest.FILE_NAME] = listed.tensor_parallelism
    for key in ("tensor_parallelism", "tensor_para_size"):
        if section.get(key, "").isdecimal():
            said[f"{CONFIG_NAME}, {key}"] = int(section[key])
    if match := _FOLDER_NAME.fullmatch(folder.resolve().name):
        said["the folder's name"] = int(match[1])
    ranks = {int(match[1]) for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))}
    if ranks:
        said["the highest rank among the files"] = max(ranks) + 1
    if not said:
        raise ConfigError("no weights here", found=f"only {CONFIG_NAME}", allowed="model.*.bin files", hint=_hint(None))
    if len(set(said.values())) > 1 or 0 in said.values():
        raise ConfigError(
            "the number of ranks is contradictory", found=[f"{who}: {count}" for who, count in said.items()]
        )
    return next(iter(said.values()))


def _compare(problems: Problems, listed: Manifest, model: ModelConfig, storage_dtype: str) -> None:
    said, ours = listed.model.to_json(), model.to_json()
    said["storage_dtype"], ours["storage_dtype"] = listed.storage_dtype, storage_dtype
    for name, value in ours.items():
        if said[name] != value:
            problems.add(f"{name}: {CONFIG_NAME} says {value}, {manifest.FILE_NAME} {said[name]}")


def map_file(path: Path, file: ExpectedFile) -> torch.Tensor:
    """The values of a file that has the expected length, memory-mapped, in one row."""
    import torch

    return torch.from_file(str(path), size=math.prod(file.shape), dtype=torch_dtype(file.dtype))


def bad_scales(values: torch.Tensor) -> str | None:
    """How many of the values nothing can be multiplied by: those that are not finite and positive."""
    import torch

    bad = values[~(torch.isfinite(values) & (values > 0))]
    return f"{bad.numel()} of {values.numel()}, the first is {float(bad[0])}" if bad.numel() else None


def _hint(listed: Manifest | None) -> str:
    return f"convert the model again, with --force: {listed.command}" if listed else "convert the model again"
