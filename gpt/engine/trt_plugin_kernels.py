"""The TensorRT plugins of this package: what each takes, gives and launches; the kernels are those of gpt.kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gpt.engine.trt_plugin import CeilDiv, Launch, Output, Plugin, Shape, num_rows, without
from gpt.quant import INT8_MAX

if TYPE_CHECKING:
    from gpt.kernels.aot import KernelCall
    from gpt.kernels.cached_attention import CachedAttentionConfig
    from gpt.kernels.skinny import SkinnyConfig
    from gpt.kernels.w8a8_config import W8a8Config

_ITEMSIZE = {"FLOAT": 4, "HALF": 2, "BF16": 2}


@dataclass(frozen=True)
class Attention(Plugin):
    """qkv [B, S, (H + 2G) * D], past [B] int32, keys and values [B, G, T, D] -> [B, S, H * D] and the caches, in place.

    kv_scale [2] float32 belongs to an int8 cache, cos and sin [T, rotary_dim / 2] float32 to a rotation.
    """

    name = "attention"
    inputs = ("qkv", "past", "keys", "values", "kv_scale", "cos", "sin")
    num_outputs = 3
    aliases: ClassVar[dict[int, int]] = {1: 2, 2: 3}
    num_tactics = 2  # for steps and for prompts
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_slots: int
    rotary_dim: int
    quantized: bool
    scale: float

    def outputs(self, shapes: Sequence[Shape], types: Sequence[str]) -> list[Output]:
        mixed = Output(types[0], (shapes[0][0], shapes[0][1], self.num_heads * self.head_size))
        return [mixed, Output(types[2], tuple(shapes[2])), Output(types[3], tuple(shapes[3]))]

    def _config(self, types: Sequence[str], tactic: int) -> CachedAttentionConfig:
        from gpt.kernels.cached_attention import default_config

        return default_config(self.head_size, _ITEMSIZE[types[0]], prompts=tactic == 2)

    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        from gpt.kernels.aot import KernelCall
        from gpt.kernels.cached_attention import cached_attention_kernel

        config = self._config(types, tactic)
        return KernelCall(
            cached_attention_kernel,
            self.parameter_types(types, ("out", "new_keys", "new_values"), sizes=("S",)),
            {
                "SCALE": self.scale,
                "H": self.num_heads,
                "G": self.num_kv_heads,
                "D": self.head_size,
                "T": self.num_slots,
                "ROTARY_DIM": self.rotary_dim,
                "QUANTIZED": self.quantized,
                "BLOCK_M": config.block_m,
                "BLOCK_T": config.block_t,
                "BLOCK_D": max(16, _power_of_2(self.head_size)),
                "STAGES": config.num_stages,
            },
            config.num_warps,
            config.num_stages,
        )

    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        batch, num_tokens = shapes[0][0], shapes[0][1]
        num_queries = num_tokens * (self.num_heads // self.num_kv_heads)
        block_m = self._config(types, tactic).block_m
        return Launch((ceil_div(num_queries, block_m), self.num_kv_heads, batch), (num_tokens,))


@dataclass(frozen=True)
class Norm(Plugin):
    """x [..., width] -> the same shape in `dtype`; weight and bias [width] float32, no bias for kind "rmsnorm"."""

    name = "norm"
    inputs = ("x", "weight", "norm_bias")
    kind: str
    width: int
    epsilon: float
    dtype: str

    def outputs(self, shapes: Sequence[Shape], types: Sequence[str]) -> list[Output]:
        return [Output(self.dtype, tuple(shapes[0]))]

    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        from gpt.kernels.aot import KernelCall
        from gpt.kernels.norm import add_norm_kernel

        return KernelCall(
            add_norm_kernel,
            self.parameter_types(types, ("out",)),
            {
                **without("parts_ptr", "bias_ptr", "next_weight_ptr"),
                "M": 0,  # rows are counted for parts and fetching alone
                "next_lines": 0,
                "epsilon": self.epsilon,
                "E": self.width,
                "PARTS": 0,
                "HAS_BIAS": False,
                "NORM": self.kind,
                "PADDED_E": _power_of_2(self.width),
                "NEXT_SHARE": 0,
                "DEPENDENT": False,
            },
            4 if self.width <= 4096 else 8,
        )

    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        return Launch((num_rows(shapes[0]),))


@dataclass(frozen=True)
class QuantizeRows(Plugin):
    """x [..., width] -> int8 of norm(x) / smoother, the same shape, and the value of one step of each row, float32
    [...].

    kind: "layernorm", "rmsnorm" or "none".  weight, norm_bias, smoother [width], input_scale [1]: float32.
    """

    name = "quantize_rows"
    inputs = ("x", "weight", "norm_bias", "smoother", "input_scale")
    num_outputs = 2
    kind: str
    width: int
    epsilon: float
    smoothed: bool
    static: bool

    def outputs(self, shapes: Sequence[Shape], types: Sequence[str]) -> list[Output]:
        return [Output("INT8", tuple(shapes[0])), Output("FLOAT", tuple(shapes[0])[:-1])]

    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        from gpt.kernels.aot import KernelCall
        from gpt.kernels.quantize_rows import quantize_rows_kernel

        padded = _power_of_2(self.width)
        return KernelCall(
            quantize_rows_kernel,
            self.parameter_types(types, ("out", "row_scale")),
            {
                **without("parts_ptr", "bias_ptr"),
                "M": 0,
                "epsilon": self.epsilon,
                "K": self.width,
                "PARTS": 0,
                "HAS_BIAS": False,
                "NORM": self.kind,
                "SMOOTHED": self.smoothed,
                "STATIC": self.static,
                "LARGEST": float(INT8_MAX),
                "PADDED_K": padded,
                "DEPENDENT": False,
            },
            max(1, min(16, padded // 512)),
        )

    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        return Launch((num_rows(shapes[0]),))


@dataclass(frozen=True)
class Product(Plugin):
    """activation(x [..., num_in] @ weight.T + bias) -> [..., num_out] in `dtype`, bias [num_out]."""

    num_tactics = 2  # for a few tokens and for many
    num_in: int
    num_out: int
    activation: str
    has_bias: bool
    dtype: str

    def outputs(self, shapes: Sequence[Shape], types: Sequence[str]) -> list[Output]:
        return [Output(self.dtype, (*tuple(shapes[0])[:-1], self.num_out))]


@dataclass(frozen=True)
class Int8Gemm(Product):
    """int8 x and row_scale [...] as `QuantizeRows` gives them; weight int8 [num_out, num_in], col_scale [num_out]
    float32."""

    name = "int8_gemm"
    inputs = ("x", "row_scale", "weight", "col_scale", "bias")

    def _config(self, tactic: int) -> W8a8Config:
        from gpt.kernels.w8a8_config import W8a8Config

        return W8a8Config(16, 32, 256, 4, 3) if tactic < 2 else W8a8Config(64, 128, 64, 4, 3)

    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        from gpt.kernels.aot import KernelCall
        from gpt.kernels.w8a8 import GROUP_M, w8a8_kernel

        config = self._config(tactic)
        return KernelCall(
            w8a8_kernel,
            self.parameter_types(types, ("out",), sizes=("M",)),
            {
                **without("next_scale_ptr", "smoother_ptr", "next_row_scale_ptr"),
                **without("places_ptr", "blocks_ptr", "kv_scales_ptr", "part_stride", "tokens_per_block"),
                "N": self.num_out,
                "K": self.num_in,
                "INTEGER": True,
                "ACTIVATION": self.activation,
                "HAS_BIAS": self.has_bias,
                "QUANTIZES": False,
                "SMOOTHED": False,
                "ADD_TO_OUT": False,
                "GROUPS": 0,
                "HEAD_SIZE": 0,
                "QUERIES_ALONE": False,
                "QUANTIZES_CACHE": False,
                "SPLIT_K": 1,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP_M": GROUP_M,
                "STAGES": config.num_stages,
                "DESCRIPTORS": False,
                "DEPENDENT": False,
            },
            config.num_warps,
            config.num_stages,
        )

    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        config, num_tokens = self._config(tactic), num_rows(shapes[0])
        return Launch((ceil_div(num_tokens, config.block_m) * -(-self.num_out // config.block_n),), (num_tokens,))


@dataclass(frozen=True)
class WeightOnlyGemm(Product):
    """weight int8 [num_out, num_in] with scale [num_out], or with bits 4 two values per byte and scale [num_out] or
    [num_out, num_in / group]; group 0: one scale per row."""

    name = "weight_only_gemm"
    inputs = ("x", "weight", "scale", "bias")
    bits: int
    group: int

    def _config(self, types: Sequence[str], tactic: int) -> SkinnyConfig:
        from gpt.kernels.skinny import SkinnyConfig

        num_stages = 2 if types[0] == "FLOAT" else 3
        block_k = min(64, self.group) if self.group else 64
        if tactic > 1:
            return SkinnyConfig(64, block_k, 4, num_stages, weights_first=False, block_m=64)
        return SkinnyConfig(32, block_k, 4, num_stages, block_m=16)

    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        from gpt.kernels.aot import KernelCall
        from gpt.kernels.int4_skinny import int4_skinny_kernel
        from gpt.kernels.skinny import skinny_kernel

        config = self._config(types, tactic)
        constants = {
            **without("gate_ptr", "gate_scale_ptr", "gate_bias_ptr"),
            "N": self.num_out,
            "K": self.num_in,
            "ACTIVATION": self.activation,
            "HAS_BIAS": self.has_bias,
            "GATED": False,
            "WEIGHTS_FIRST": config.weights_first,
            "SPLIT_K": 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "STAGES": config.num_stages,
            "DEPENDENT": False,
        }
        if self.bits == 4:
            constants["GROUP"] = self.group
        else:
            constants |= {**without("tile_max_ptr", "tile_argmax_ptr"), "num_valid": 0}
            constants |= {"HAS_SCALE": True, "ARGMAX": False, "AHEAD": False}
        return KernelCall(
            int4_skinny_kernel if self.bits == 4 else skinny_kernel,
            self.parameter_types(types, ("out",), sizes=("M",)),
            constants,
            config.num_warps,
            config.num_stages,
        )

    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        config, num_tokens = self._config(types, tactic), num_rows(shapes[0])
        return Launch((-(-self.num_out // config.block_n), 1, ceil_div(num_tokens, config.block_m)), (num_tokens,))


@dataclass(frozen=True)
class Lookup(Plugin):
    """ids [...] int32, words [V, width] -> words[ids] [..., width]."""

    name = "lookup"
    inputs = ("ids", "words")
    width: int

    def outputs(self, shapes: Sequence[Shape], types: Sequence[str]) -> list[Output]:
        return [Output(types[1], (*shapes[0], self.width))]

    @property
    def _block(self) -> int:
        return min(1024, _power_of_2(self.width))

    def call(self, types: Sequence[str], tactic: int) -> KernelCall:
        from gpt.kernels.aot import KernelCall
        from gpt.kernels.norm import embed_kernel

        return KernelCall(
            embed_kernel,
            self.parameter_types(types, ("x",)),
            {
                **without("positions_ptr", "places_ptr"),
                "E": self.width,
                "HAS_PLACES": False,
                "BLOCK": self._block,
                "DEPENDENT": False,
            },
            4,
        )

    def launch(self, shapes: Sequence[Shape], types: Sequence[str], tactic: int, ceil_div: CeilDiv) -> Launch:
        return Launch((num_rows((*shapes[0], self.width)), -(-self.width // self._block)))


PLUGINS: tuple[type[Plugin], ...] = (Attention, Norm, QuantizeRows, Int8Gemm, WeightOnlyGemm, Lookup)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()
