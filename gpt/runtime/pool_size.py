"""How many blocks the pool of a paged cache gets."""

from __future__ import annotations

import math

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.console import human_bytes, log
from gpt.engine.estimate import available_memory_bytes
from gpt.errors import ConfigError
from gpt.runtime.batching_config import BatchingConfig


def pool_blocks(
    model: ModelConfig,
    build: BuildConfig,
    device: torch.device,
    config: BatchingConfig,
    longest: int,
    num_held: int = 0,
) -> int:
    """As many blocks as a full batch of sequences of `longest` tokens needs, less where memory or `config` says so.

    num_held: of the pool that is there already, whose memory is not free and need not be.

    Raises ConfigError where not even one such sequence would fit.
    """
    per_block = build.tokens_per_block
    per_sequence = math.ceil(longest / per_block)
    num_blocks = build.max_batch_size * per_sequence
    limit = f"--max_batch_size {build.max_batch_size}"
    if config.max_cache_tokens is not None and config.max_cache_tokens // per_block < num_blocks:
        num_blocks = config.max_cache_tokens // per_block
        limit = f"--max_tokens_in_paged_kv_cache {config.max_cache_tokens}"
    block_bytes = build.kv_cache_bytes(model, 1, per_block)
    free = _free_bytes(device)
    if free is not None:
        free += num_held * block_bytes
    if free is not None and num_held < num_blocks > free * config.free_memory_fraction / block_bytes:
        num_blocks = max(num_held, int(free * config.free_memory_fraction / block_bytes))
        limit = f"{config.free_memory_fraction:g} of {human_bytes(free)} of free memory"
    if num_blocks < per_sequence:
        raise ConfigError(
            "the paged cache does not hold one sequence",
            found=f"{num_blocks} blocks of {per_block} tokens ({limit})",
            allowed=f"at least {per_sequence}, for {longest} tokens",
            hint="a larger limit, more free memory, or shorter requests",
        )
    size = human_bytes(num_blocks * block_bytes)
    log.info("Paged cache: %d blocks of %d tokens, %s (%s)", num_blocks, per_block, size, limit)
    return num_blocks


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()
