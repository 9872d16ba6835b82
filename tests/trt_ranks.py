"""This rank's TensorRT network of a torch engine, its collectives executed between the processes."""

from __future__ import annotations

import dataclasses

import torch

from gpt.engine.folder import EngineInfo
from gpt.engine.trt_stand_in import stand_in_engine
from gpt.mapping import Mapping
from gpt.runtime.load import load_torch_weights
from gpt.runtime.ranks import join_ranks
from gpt.runtime.trt_session import TrtSession


def stand_in_session(info: EngineInfo, layout: str) -> TrtSession:
    """layout: words, of which "packed", "fused" and "plugins" mean something."""
    ranks = join_ranks(info)
    mapping = Mapping.of_build(info.build, ranks.rank)
    build = dataclasses.replace(
        info.build,
        backend="tensorrt",
        remove_input_padding="packed" in layout,
        gpt_attention_plugin=info.build.dtype if "fused" in layout else None,
        plugins=("attention", "gemm", "layernorm", "lookup") if "plugins" in layout else (),
    )
    weights = load_torch_weights(info, mapping, torch.device("cpu"))
    engine = stand_in_engine(info.model, build, mapping, weights)
    return TrtSession(engine, info.model, build, mapping, "cpu", engine.trt, ranks)
