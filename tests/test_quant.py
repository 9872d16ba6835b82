"""Quantisation: the formulas written once more in integers and float64, and every product against them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from gpt import quant
from gpt.config import BuildConfig, ModelConfig
from gpt.engine import int8_product
from gpt.engine.int8_product import FbgemmProduct, OneDnnProduct, PlainProduct, integer_product
from gpt.engine.kv_cache import KEYS, VALUES, KvCache
from gpt.engine.original_config import builder_config, plugin_config
from gpt.engine.quant_linear import QuantizedRows, quantized_linears
from gpt.errors import ConfigError
from gpt.mapping import Mapping
from gpt.quant import QuantConfig

# Odd rows; 64 outputs are what PyTorch's packed int4 product takes, 60 are not.
SHAPES = [(1, 64, 128), (7, 60, 96), (60, 128, 64)]
# One rounding to bfloat16 of each term and of the result, where the engine's dtype is bfloat16.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 6e-3}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


# The record.


def test_the_bits_of_the_original() -> None:
    """INT4 1, INT8 2, activations 4, per channel 8, per token 16, groups 32, caches 64 and 128, FP8 256."""
    modes = {
        QuantConfig(): 0,
        QuantConfig("int8"): 2,
        QuantConfig("int4"): 1,
        QuantConfig("int4", group_size=64): 1 + 32,
        QuantConfig("int8", "per_tensor"): 2 + 4,
        QuantConfig("int8", "per_token", per_channel=True): 2 + 4 + 8 + 16,
        QuantConfig(kv_cache="int8"): 64,
        QuantConfig("fp8", "per_tensor", kv_cache="fp8"): 256 + 128,
    }
    assert {mode: mode.quant_mode for mode in modes} == modes


@pytest.mark.parametrize("mode", [QuantConfig("int4", group_size=32, kv_cache="int8"), QuantConfig("fp8", "per_token")])
def test_a_build_keeps_its_quantisation(mode: QuantConfig) -> None:
    build = BuildConfig(quant=mode)
    assert BuildConfig.from_json(json.loads(json.dumps(build.to_json()))) == build
    old = {key: value for key, value in build.to_json().items() if key != "quant"}
    assert BuildConfig.from_json(old).quant == QuantConfig()


def test_config_json_of_the_original() -> None:
    model = ModelConfig(vocab_size=9, n_positions=8, n_embd=8, n_head=2, n_layer=1, n_kv_head=2, inter_size=32)
    smooth = BuildConfig(dtype="float16", quant=QuantConfig("int8", "per_token", per_channel=True))
    plugins, builder = plugin_config(smooth), builder_config(model, smooth)
    assert (plugins["smooth_quant_gemm_plugin"], plugins["layernorm_quantization_plugin"]) == ("float16", "float16")
    assert plugins["quantize_per_token_plugin"] is plugins["quantize_tensor_plugin"] is True
    assert (builder["int8"], builder["fp8"], builder["quant_mode"]) == (True, False, 30)
    plugins = plugin_config(BuildConfig(dtype="float16", quant=QuantConfig("int8")))
    assert (plugins["weight_only_quant_matmul_plugin"], plugins["smooth_quant_gemm_plugin"]) == ("float16", False)
    assert builder_config(model, BuildConfig(quant=QuantConfig(kv_cache="fp8")))["fp8"] is True


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"weights": "int3"}, "'int3'"),
        ({"weights": "int4", "activations": "per_token"}, "int4 weights"),
        ({"weights": "fp8"}, "without a scale for activations"),
        ({"weights": "int8", "per_channel": True}, "per_channel"),
        ({"weights": "int8", "group_size": 64}, "group_size 64"),
        ({"weights": "int4", "group_size": 48}, "found 48"),
        ({"kv_cache": "int4"}, "kv_cache"),
        ({"smoothers": True}, "smoothers"),
    ],
)
def test_nonsense_is_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match="quantisation is not valid") as caught:
        QuantConfig(**values)  # type: ignore[arg-type]
    assert told in str(caught.value)


def test_the_cache_takes_one_byte() -> None:
    model = ModelConfig(vocab_size=9, n_positions=8, n_embd=8, n_head=2, n_layer=3, n_kv_head=2, inter_size=32)
    plain = BuildConfig(dtype="float16")
    small = dataclasses.replace(plain, quant=QuantConfig(kv_cache="int8"))
    assert small.kv_cache_bytes(model, 5, 7) * 2 == plain.kv_cache_bytes(model, 5, 7)
    cache = KvCache.empty(model, small, Mapping(), torch.device("cpu"), num_blocks=5, tokens_per_block=7)
    assert cache.blocks.nbytes == small.kv_cache_bytes(model, 5, 7)


# Weights.


def test_int8_weights_by_hand() -> None:
    """colmax / 128; the positive extreme is clipped to 127; a half goes to the even neighbour."""
    weight = torch.tensor([[1.0, -1.0, 0.5 / 128, 1.5 / 128], [0.0, 0.0, 0.0, 0.0]])
    steps, scale = quant.quantize_weight_int8(weight, torch.float32)
    assert scale[0] == 1 / 128
    assert steps.tolist() == [[127, -128, 0, 2], [0, 0, 0, 0]]
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_int8_weights_in_plain_integers(dtype: torch.dtype) -> None:
    weight = random(40, 33, seed=0)
    steps, scale = quant.quantize_weight_int8(weight, dtype)
    expected_scale = (weight.abs().max(1).values / 128).to(dtype)
    assert torch.equal(scale, expected_scale)
    plain = [
        [max(-128, min(127, round(value / step))) for value in row]
        for row, step in zip(weight.tolist(), expected_scale.float().tolist(), strict=True)
    ]
    assert (steps.int() - torch.tensor(plain)).abs().max() <= 1  # float64 here, float32 there: a tie may differ
    assert (steps.int() != torch.tensor(plain)).float().mean() < 2e-3


def test_int4_packing() -> None:
    """Two's complement, the even input in the low four bits."""
    weight = torch.tensor([[-8.0, 7.0, 1.0, -1.0]])
    packed, scale = quant.quantize_weight_int4(weight, torch.float32)
    assert scale.tolist() == [1.0]
    assert packed.tolist() == [[0x78, 0xF1]]
    assert quant.unpack_int4(packed).tolist() == [[-8, 7, 1, -1]]


@pytest.mark.parametrize("group_size", [32, 64])
def test_groups_of_int4_are_no_worse_than_the_plain_scale(group_size: int) -> None:
    weight = random(24, 128, seed=1)
    packed, scale = quant.quantize_weight_int4(weight, torch.float32, group_size)
    assert scale.shape == (24, 128 // group_size)
    groups = weight.unflatten(1, (-1, group_size))
    largest = groups.abs().amax(2, keepdim=True) / 8
    plain = ((groups / largest).round().clamp(-8, 7) * largest - groups).square().sum(2)
    found = quant.dequantize_weight(quant.unpack_int4(packed), scale).unflatten(1, (-1, group_size))
    errors = (found - groups).square().sum(2)
    assert (errors <= plain * 1.0001).all()
    assert errors.sum() < 0.95 * plain.sum()


def test_fp8_saturates() -> None:
    """448 is the largest; the format itself would make NaN of more."""
    values = quant.to_fp8(torch.tensor([[1e9, -1e9, 448.0, 0.3]]), 1.0)
    assert values.float().tolist()[0][:3] == [448.0, -448.0, 448.0]
    weight = random(8, 16, seed=2)
    steps, scale = quant.quantize_weight_fp8(weight)
    assert relative(quant.dequantize_weight(steps, scale), weight.double()) < 2**-4  # three bits behind the leading one


# Activations.


def test_the_example_of_the_original() -> None:
    """mx 4: x 1 is 31.75 steps; mw 0.5: w 0.25 is 63.5 steps, half to even."""
    assert quant.to_int8(torch.tensor([[1.0]]), 4 / 127).item() == 32
    assert quant.to_int8(torch.tensor([[0.25]]), 0.5 / 127).item() == 64


def test_rows_find_their_own_scale() -> None:
    x = torch.tensor([[1.0, -4.0], [0.0, 0.0]])
    scale = quant.row_scales(x, 127)
    assert scale.flatten().tolist() == pytest.approx([4 / 127, 1e-6 / 127])
    assert quant.to_int8(x, scale).tolist() == [[32, -127], [0, 0]]


# Products.


# oneDNN and FBGEMM are used, and exact, where the processor has the instructions.
PRODUCTS = [PlainProduct, *(product for product in (OneDnnProduct, FbgemmProduct) if product.is_fast())]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("rows", "num_out", "num_in"), SHAPES)
def test_integer_sums_are_exact(
    rows: int, num_out: int, num_in: int, product: type[PlainProduct | OneDnnProduct | FbgemmProduct]
) -> None:
    """Extremes included: -128 and 127 on both sides must not saturate on the way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (rows, num_in), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (num_out, num_in), dtype=torch.int8, generator=generator)
    x[0], weight[0], weight[1] = 127, 127, -128
    expected = x.long() @ weight.long().t()
    y = product(weight, torch.ones(num_out))(x.to(product.takes))
    assert torch.equal(y.long(), expected)  # below 2^24, which float32 holds


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({"avx512_vnni", "amx_int8"}, OneDnnProduct), ({"avx512_vnni"}, FbgemmProduct), (set(), PlainProduct)],
)
def test_the_product_follows_the_processor(
    instructions: set[str], expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN without AMX would multiply int8 in a plain loop, FBGEMM without VNNI would saturate."""
    monkeypatch.setattr(int8_product, "cpu_has", instructions.__contains__)
    weight = torch.ones(4, 8, dtype=torch.int8)
    assert isinstance(integer_product(weight.t().contiguous().t(), torch.ones(4)), expected)


def weights_of(
    mode: QuantConfig, num_out: int, num_in: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An engine's tensors of one layer `l`, and the weight that they stand for in float64."""
    weight = random(num_out, num_in, seed=1)
    result: dict[str, torch.Tensor] = {}
    if mode.weights == "int4":
        result["l.weight"], result["l.weight_scale"] = quant.quantize_weight_int4(weight, dtype, mode.group_size)
        steps = quant.unpack_int4(result["l.weight"])
    elif mode.weights == "fp8":
        result["l.weight"], result["l.weight_scale"] = quant.quantize_weight_fp8(weight)
        steps = result["l.weight"]
    else:
        kind = torch.float32 if mode.smooth_quant else dtype
        result["l.weight"], result["l.weight_scale"] = quant.quantize_weight_int8(weight, kind)
        steps = result["l.weight"]
    scale = result["l.weight_scale"].double()
    groups = steps.double().unflatten(1, (scale.shape[1] if scale.dim() == 2 else 1, -1))
    if mode.activations == "per_tensor":
        result["l.input_scale"] = torch.tensor(3.0 / (448 if mode.weights == "fp8" else 127))
    if mode.smoothers:
        result["l.smoother"] = random(num_in, seed=4).abs() + 0.5
    return result, (groups * scale.view(num_out, -1, 1)).flatten(1)


def plain_input(mode: QuantConfig, x: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the product sees of x, in float64: quantised and back."""
    if mode.activations is None:
        return x.double()
    x = x.float() / layer.get("l.smoother", torch.tensor(1.0))
    largest = 448.0 if mode.weights == "fp8" else 127.0
    scale = layer.get("l.input_scale", x.abs().amax(1, keepdim=True).clamp_min(1e-6) / largest)
    if mode.weights == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    return (x / scale).round().clamp(-128, 127).double() * scale.double()


MODES = {
    "int8": QuantConfig("int8"),
    "int4": QuantConfig("int4"),
    "int4 groups": QuantConfig("int4", group_size=32),
    "smooth per tensor": QuantConfig("int8", "per_tensor"),
    "smooth per token": QuantConfig("int8", "per_token", per_channel=True),
    "smoothers": QuantConfig("int8", "per_token", smoothers=True),
    "fp8 per tensor": QuantConfig("fp8", "per_tensor"),
    "fp8 per token": QuantConfig("fp8", "per_token"),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(("rows", "num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_products(mode: QuantConfig, rows: int, num_out: int, num_in: int, with_bias: bool, dtype: torch.dtype) -> None:
    layer, weight = weights_of(mode, num_out, num_in, dtype)
    linear = quantized_linears(layer, mode, dtype)["l"]
    x = random(rows, num_in, seed=2).to(dtype)
    x[rows // 2] *= 40  # rows of different sizes
    bias = random(num_out, seed=3) if with_bias else None
    y = linear.multiply(linear.prepare(x), bias)
    expected = plain_input(mode, x, layer) @ weight.t() + (0 if bias is None else bias.double())
    assert y.shape == (rows, num_out)
    assert relative(y, expected) < BOUNDS[dtype]


def values_of(rows: QuantizedRows | torch.Tensor) -> torch.Tensor:
    assert isinstance(rows, QuantizedRows)
    return rows.values


def test_int8_activations_equal_the_plain_ones() -> None:
    mode = QuantConfig("int8", "per_token", per_channel=True)
    layer, _ = weights_of(mode, 8, 48, torch.float32)
    x = random(9, 48, seed=5)
    rows = quantized_linears(layer, mode, torch.float32)["l"].prepare(x)
    scale = x.abs().amax(1, keepdim=True) / 127
    assert torch.equal(values_of(rows).to(torch.int8), (x * (1 / scale)).round().to(torch.int8))


def test_the_digits_of_weight_only_products() -> None:
    """Two int8 numbers per value, exact to half a unit of 1 / 127 / 254 of the row's largest."""
    layer, _ = weights_of(QuantConfig("int8"), 8, 200, torch.float32)
    x = random(5, 200, seed=6)
    x[3] = 0
    x[4] *= 1e-20
    rows = quantized_linears(layer, QuantConfig("int8"), torch.float32)["l"].prepare(x)
    high, low = values_of(rows).double().chunk(2)
    largest = x.double().abs().amax(1, keepdim=True)
    assert high.abs().max() == low.abs().max() == 127
    back = (high + low / 254) / 127 * largest
    assert ((back - x.double()).abs() <= largest * 0.51 / 127 / 254).all()


# The cache.


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.51 / 127), ("fp8", 2**-4)])
def test_cache_of_its_own_scales(kind: str, bound: float) -> None:
    """K and V differ by a factor of 50; each is kept to a step of its own range."""
    model = ModelConfig(vocab_size=9, n_positions=8, n_embd=8, n_head=2, n_layer=2, n_kv_head=2, inter_size=32)
    build = BuildConfig(dtype="float32", quant=QuantConfig(kv_cache=kind))
    new = torch.stack([random(6, 2, 4, seed=0) * 50, random(6, 2, 4, seed=1)], dim=1)  # [N, 2, G, D]
    largest = new.abs().amax((0, 2, 3))
    scales = torch.stack([torch.ones(2), largest / (127 if kind == "int8" else 448)])
    cache = KvCache.empty(model, build, Mapping(), torch.device("cpu"), num_blocks=1, tokens_per_block=6, scales=scales)
    stored = cache.encode(new, 1)
    assert stored.dtype == cache.blocks.dtype
    for part in (KEYS, VALUES):
        assert torch.equal(stored[:, part].float(), cache.encode(new[:, part], 1, part).float())
        back = cache.decode(stored[:, part], 1, part)
        assert (back - new[:, part]).abs().max() <= largest[part] * bound
