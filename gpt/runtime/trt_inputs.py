"""The step inputs of a TensorRT engine, as gpt.engine.trt_io lists them, from prompts and batch sizes."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from gpt.dtypes import torch_dtype
from gpt.engine.trt_io import Port


def padded_inputs(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    rows = [
        list(prompt) + [0] * (width - len(prompt)) for prompt in prompts
    ]  # any valid id: padding is never looked at
    return int32(
        input_ids=rows,
        position_ids=[list(range(width))] * len(prompts),
        last_token_ids=[len(prompt) - 1 for prompt in prompts],
        cache_write_index=[0] * len(prompts),
    )


def packed_inputs(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    slots = [(row, slot) for row, length in enumerate(lengths) for slot in range(length)]
    return int32(
        input_ids=list(chain.from_iterable(prompts)),
        position_ids=[slot for _, slot in slots],
        last_token_ids=[end - 1 for end in ends],
        cache_write_index=[0] * len(prompts),
        padded_from_packed=[
            [min(start + slot, end - 1) for slot in range(width)] for start, end in zip(starts, ends, strict=True)
        ],
        packed_from_padded=[row * width + slot for row, slot in slots],
    )


def generation_inputs(ports: Sequence[Port], num_rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Memory for the inputs of generation steps of `num_rows` sequences, one token each, at the beginning of a cache.

    The first rows of each tensor but prompt_embedding_table and prompt_vocab_size are those of a smaller batch.
    """
    sizes = {"B": num_rows, "S": 1, "N": num_rows, "P": 1}
    tensors = {
        port.name: torch.zeros(port.shape_for(sizes), dtype=torch_dtype(port.dtype), device=device) for port in ports
    }
    packed = "packed_from_padded" in tensors
    for name in ("last_token_ids", "padded_from_packed", "packed_from_padded") if packed else ():
        tensors[name].view(-1).copy_(torch.arange(num_rows))
    if "prompt_vocab_size" in tensors:
        tensors["prompt_vocab_size"].fill_(1)
    return tensors


def first_rows(tensors: Dict[str, torch.Tensor], num_rows: int) -> dict[str, torch.Tensor]:
    """What `generation_inputs` would hold for `num_rows` sequences, in the same memory."""
    return {
        name: tensor if name in ("prompt_embedding_table", "prompt_vocab_size") else tensor[:num_rows]
        for name, tensor in tensors.items()
    }


def int32(**values: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}
