"""The two objects of config.json that the original suite writes, `builder_config` and `plugin_config`.

Sizes are global, not per rank.  What the original says and this project has no setting for is constant here.
"""

from __future__ import annotations

from typing import Any

from gpt.config import BuildConfig, ModelConfig

_PLUGINS_ABSENT = (
    "bert_attention_plugin",
    "identity_plugin",
    "smooth_quant_gemm_plugin",
    "layernorm_quantization_plugin",
    "attention_qk_half_accumulation",
    "weight_only_groupwise_quant_matmul_plugin",
    "weight_only_quant_matmul_plugin",
    "nccl_plugin",
    "quantize_per_token_plugin",
    "quantize_tensor_plugin",
)


def builder_config(model: ModelConfig, build: BuildConfig) -> dict[str, Any]:
    quant = build.quant
    return {
        "name": "gpt",
        "precision": build.dtype,
        "tensor_parallel": build.world_size,
        "parallel_build": build.parallel_build,
        "num_layers": model.n_layer,
        "num_heads": model.n_head,
        "num_kv_heads": model.n_kv_head,
        "hidden_size": model.n_embd,
        "vocab_size": model.vocab_size,
        "hidden_act": model.hidden_act,
        "max_position_embeddings": model.n_positions,
        "multi_query_mode": model.multi_query,
        "max_batch_size": build.max_batch_size,
        "max_input_len": build.max_input_len,
        "max_output_len": build.max_output_len,
        "max_beam_width": build.max_beam_width,
        "max_prompt_embedding_table_size": build.max_prompt_embedding_table_size,
        "apply_query_key_layer_scaling": False,
        "max_num_tokens": build.max_num_tokens,
        "paged_kv_cache": build.paged_kv_cache,
        "tokens_per_block": build.tokens_per_block,
        "use_prompt_tuning": build.max_prompt_embedding_table_size > 0,
        "use_parallel_embedding": build.use_parallel_embedding,
        "use_refit": build.refit,
        "int8": quant.smooth_quant or "int8" in (quant.weights, quant.kv_cache),
        "fp8": "fp8" in (quant.weights, quant.kv_cache),
        "quant_mode": quant.quant_mode,
    }


def plugin_config(build: BuildConfig) -> dict[str, Any]:
    """A plugin that is on has its dtype, one that is off is false."""
    config: dict[str, Any] = dict.fromkeys(_PLUGINS_ABSENT, False)
    if build.quant.smooth_quant:
        config.update(smooth_quant_gemm_plugin=build.dtype, layernorm_quantization_plugin=build.dtype)
        config.update(quantize_per_token_plugin=True, quantize_tensor_plugin=True)
    if build.quant.weight_only:
        grouped = "groupwise_" if build.quant.group_size else ""
        config[f"weight_only_{grouped}quant_matmul_plugin"] = build.dtype
    config.update(
        gpt_attention_plugin=build.gpt_attention_plugin or False,
        gemm_plugin=build.gemm_plugin or False,
        layernorm_plugin=build.layernorm_plugin or False,
        lookup_plugin=build.lookup_plugin or False,
        context_fmha_type=build.context_fmha,
        remove_input_padding=build.remove_input_padding,
        paged_kv_cache=build.paged_kv_cache,
        in_flight_batching=build.use_inflight_batching,
    )
    return config
