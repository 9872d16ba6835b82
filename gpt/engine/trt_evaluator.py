"""Executes a TensorRT network with PyTorch, on a CPU, from nothing but the network itself.

Without a GPU the library builds and cannot run.  So that a network is nevertheless checked number by number, it is
walked layer by layer as the library holds it: types, attributes, weights, connections.  Nothing of how it was made is
known to this module, and whatever it does not know exactly it refuses.  What this shows: the network computes the
model.  What it cannot show: TensorRT's kernels compute the network.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from typing import Any

import torch

from gpt.comm import Communicator, NullCommunicator
from gpt.engine.trt_evaluator_layers import LAYERS, Evaluation
from gpt.engine.trt_layers import to_torch_dtype
from gpt.errors import EngineError


class NetworkEvaluator:
    """A network that can be called.

    Within a layer everything is float32, products of half-precision tensors included; its result is then rounded to the
    type that the network declares for it.

    comm: what the network's collectives go through.
    """

    def __init__(self, trt: Any, network: Any, side_table: Dict[str, torch.Tensor]):
        """side_table: constants by tensor name; used for those types alone that cannot be read from the network."""
        self.comm: Communicator = NullCommunicator()
        self.trt = trt
        self.network = network
        self.side_table = side_table

    def __call__(self, inputs: Dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every tensor of the network by its name, outputs among them, from its inputs by name.

        A cache input is updated in place, and the output that is declared to live in its memory is that same tensor.
        Raises EngineError for inputs that do not fit and for layers or settings this evaluator does not know.
        """
        self._check_inputs(inputs)
        values = dict(inputs)
        evaluation = Evaluation(self.trt, values, self.side_table, self.comm)
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            for tensor, result in zip(_outputs(layer), evaluate_layer(evaluation, layer), strict=True):
                values[tensor.name] = self._as_declared(tensor, result)
        return values

    def outputs(self, values: Dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The network's outputs among the tensors of a call."""
        names = [self.network.get_output(index).name for index in range(self.network.num_outputs)]
        return {name: values[name] for name in names}

    def _check_inputs(self, inputs: Dict[str, torch.Tensor]) -> None:
        for index in range(self.network.num_inputs):
            tensor = self.network.get_input(index)
            given = inputs.get(tensor.name)
            expected = to_torch_dtype(self.trt, tensor.dtype), tuple(tensor.shape)
            if given is None or given.dtype != expected[0] or not _shape_fits(given.shape, expected[1]):
                found = None if given is None else f"{given.dtype} {tuple(given.shape)}"
                raise EngineError(
                    f"network input {tensor.name} does not fit", found=found, allowed=f"{expected[0]} {expected[1]}"
                )

    def _as_declared(self, tensor: Any, result: torch.Tensor) -> torch.Tensor:
        """`result` in the declared type; a shape that contradicts the declared one is a mistake of this evaluator."""
        if not _shape_fits(result.shape, tuple(tensor.shape)):
            raise EngineError(
                f"{tensor.name} came out in another shape",
                found=str(tuple(result.shape)),
                allowed=str(tuple(tensor.shape)),
            )
        return result.to(to_torch_dtype(self.trt, tensor.dtype))


def evaluate_layer(evaluation: Evaluation, layer: Any) -> list[torch.Tensor]:
    """The outputs of one layer, before rounding to their types.  Raises EngineError for an unknown type of layer."""
    kind = layer.type.name  # read before the cast: an activation's own `type` hides the layer's
    if kind not in LAYERS:
        raise EngineError(
            f"the evaluator does not know the layer type {kind}", found=layer.name, allowed=", ".join(LAYERS)
        )
    class_name, function = LAYERS[kind]
    layer.__class__ = getattr(evaluation.trt, class_name)
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    result = function(evaluation, layer, *(None if x is None else evaluation.values[x.name] for x in inputs))
    return list(result) if isinstance(result, tuple) else [result]


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(index) for index in range(layer.num_outputs)]


def _shape_fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    return len(shape) == len(declared) and all(
        wanted in (-1, size) for size, wanted in zip(shape, declared, strict=True)
    )
