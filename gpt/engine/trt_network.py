"""The network of gpt.network.gpt in TensorRT's layers."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from typing import Any

import torch

from gpt.config import BuildConfig, ModelConfig
from gpt.engine.trt_layers import Layers
from gpt.engine.trt_ops import TrtOps
from gpt.engine.trt_plugin_ops import PluginOps
from gpt.mapping import Mapping
from gpt.network.gpt import forward


def define_network(
    layers: Layers,
    model: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    weights: Dict[str, torch.Tensor],
) -> None:
    """Adds the whole network, inputs and outputs as in gpt.engine.trt_io.

    weights: as `gpt.engine.weights.engine_tensors` makes them.
    Raises EngineError with the library's messages where it refuses a layer.
    """
    layers.operation = "inputs"
    kind = PluginOps if build.plugins else TrtOps
    ops = kind(layers, model, build, mapping, weights)
    logits: Any = forward(_Marked(ops), model, mapping)
    layers.output(logits, "logits")


class _Marked:
    """`ops`, telling `Layers` which operation, with which tensor or layer, the layers to come belong to."""

    def __init__(self, ops: TrtOps):
        self._ops = ops

    def __getattr__(self, operation: str) -> Any:
        function = getattr(self._ops, operation)

        def marked(*args: Any, **options: Any) -> Any:
            subjects = [str(arg) for arg in args if isinstance(arg, (str, int))]
            self._ops.layers.operation = " ".join([operation, *subjects])
            return function(*args, **options)

        return marked
