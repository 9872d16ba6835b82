"""Launch parameters measured for an engine and kept beside it, where the next session finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gpt.console import log
from gpt.dtypes import torch_dtype
from gpt.engine.folder import EngineInfo
from gpt.errors import ConfigError
from gpt.mapping import Mapping
from gpt.quant import FLOAT


def tune_engine(info: EngineInfo, batch_sizes: Sequence[int]) -> Path:
    """Measures for decoding `batch_sizes` sequences at the engine's longest, on the first GPU; returns the file.

    Raises ConfigError without a GPU, for engines of another backend and for batches above the engine's limit.
    """
    if info.backend != "torch":
        raise ConfigError("only torch engines have kernels to tune", found=f"a {info.backend} engine")
    if not torch.cuda.is_available():
        raise ConfigError("launch parameters are measured on a GPU", found="none that PyTorch can use")
    too_large = [size for size in batch_sizes if size > info.build.max_batch_size]
    if too_large:
        raise ConfigError(
            "the engine takes no such batch",
            found=", ".join(map(str, too_large)),
            allowed=f"1 to {info.build.max_batch_size}",
        )
    from gpt.engine.autotune import autotune  # with Triton, which comes with PyTorch for CUDA
    from gpt.engine.kv_cache import batch_bucket, cache_slots
    from gpt.engine.tuning import tuning_path

    device = torch.device("cuda")
    rows = [batch_bucket(size) for size in batch_sizes]
    slots = cache_slots(info.build.max_seq_len)
    mapping = Mapping.of_build(info.build)
    quant = info.build.quant
    if quant != FLOAT:
        log.info("%s: what is float is measured, the rest keeps its default parameters", quant.describe())
    tuning = autotune(info.model, mapping, torch_dtype(info.build.dtype), rows, slots, device, quant)
    path = tuning_path(info.folder, device)
    tuning.save(path)
    return path
