"""Which launches of a decode step start early, and what they read before they wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_runtime_cuda_session import MODEL, begin, make_build, make_weights, to

from gpt.engine import cuda_ops
from gpt.engine.decode_values import Product, Stream
from gpt.mapping import Mapping
from gpt.quant import QuantConfig
from gpt.runtime.cuda_session import CudaSession


def test_the_stream_is_read_early_where_the_launch_before_left_it_alone(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """Between two sums of a step there is a product or an attention; right behind a sum there is none."""
    found = []

    def spy(multiply: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if options["add_to_out"]:
                found.append(options["settled"])
            multiply(*args, **options)

        return call

    monkeypatch.setattr(cuda_ops, "gemv", spy(cuda_ops.gemv))
    build = make_build("float32")
    session = CudaSession(MODEL, build, Mapping(), to(kernel_device, make_weights(MODEL, build)), kernel_device)
    session.generation(begin(session, [[1, 2, 3]]).argmax(-1).to(kernel_device))
    assert found
    assert all(found)
    ops = session._decode_ops
    stream, sums = Stream(torch.zeros((1, 32), device=kernel_device)), len(found)
    product = Product(torch.ones((1, 32), device=kernel_device), "model.layers.0.attention.dense", "none", bias=True)
    ops.begin(replace(ops.inputs))
    for value in (product, product):
        ops.add(stream, value)
    ops.value(product)
    ops.add(stream, product)
    assert found[sums:] == [False, False, True]


# A layer's products are 3 * 32 * 32 + 32 * 32 + 2 * 32 * 62 weights.
@pytest.mark.parametrize("early_bytes", [8064, 8065])
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_that_start_early_read_nothing_that_a_step_writes(
    weights: str | None,
    batch: int,
    early_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    kernel_device: torch.device,
) -> None:
    """A row's integer products, if large enough, let what follows start at once.  So attention does, and the product of
    FC2, whose rows are no whole words and which `gemv` multiplies, leaves the stream alone until it has waited."""
    settled: list[bool | None] = []
    early: list[bool | None] = []

    def spy(kernel: Callable[..., None], option: str, found: list[bool | None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            found.append(options.get(option))
            kernel(*args, **options)

        return call

    monkeypatch.setattr(cuda_ops, "EARLY_BYTES", early_bytes)
    monkeypatch.setattr(cuda_ops, "gemv", spy(cuda_ops.gemv, "settled", settled))
    monkeypatch.setattr(cuda_ops, "decode_attention", spy(cuda_ops.decode_attention, "early", early))
    model = replace(MODEL, inter_size=62)
    build = replace(make_build("float32"), quant=QuantConfig(weights=weights))
    session = CudaSession(model, build, Mapping(), to(kernel_device, make_weights(model, build)), kernel_device)
    session.generation(begin(session, [[1, 2, 3]] * batch).argmax(-1).to(kernel_device))
    starts_early = weights is not None and batch == 1 and early_bytes == 8064
    assert set(early) == {starts_early}
    assert (True in settled) == (batch == 1 and not starts_early)
    assert (False in settled) == starts_early
