"""A checkpoint that is made again with scales added: the one case in which it is replaced without --force."""

from __future__ import annotations

from pathlib import Path

from gpt.checkpoint import manifest
from gpt.checkpoint.expected import expected_files
from gpt.checkpoint.layout import QuantFiles
from gpt.checkpoint.manifest import Manifest
from gpt.errors import ConfigError, GptError


def find_extendable(folder: Path, files: QuantFiles, *, tool: str, source: Path, storage_dtype: str) -> Manifest | None:
    """The manifest of the checkpoint in `folder`, if converting `source` with `files` can only add to it.

    That is so where the same tool made it from the same source in the same dtype, it lacks nothing that it has now, and
    its float weights stay as they are, which SmoothQuant's do not.  None where any of this is not given.
    """
    if not files or files.smoothquant or not (folder / manifest.FILE_NAME).is_file():
        return None
    try:
        found = Manifest.load(folder)
    except GptError:
        return None
    same = (found.tool, found.source, found.storage_dtype) == (tool, str(source.resolve()), storage_dtype)
    names = {name for name, _ in expected_files(found.model, found.tensor_parallelism, storage_dtype, files)}
    return found if same and found.files.keys() <= names else None


def check_unchanged(earlier: Manifest | None, folder: Path) -> None:
    """Raises ConfigError where the float weights in `folder` are not those of `earlier`."""
    if earlier is None:
        return
    new = Manifest.load(folder).files
    size = earlier.tensor_parallelism
    names = [name for name, _ in expected_files(earlier.model, size, earlier.storage_dtype, QuantFiles())]
    changed = [name for name in names if new.get(name) != earlier.files[name]]
    if changed:
        raise ConfigError(
            "the model has changed since it was converted into the output folder",
            found=f"{len(changed)} other files, the first is {changed[0]}",
            allowed="the same weights, to which scales are added",
            hint="choose another output folder, or replace this one with --force",
        )
