"""The columns of bench_gpu.py's CSV files, and their rows in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import Sample

if TYPE_CHECKING:
    from gpu_cases import Shape
    from gpu_measure import Ceilings, Timing

    from gpt.engine.folder import EngineInfo

COLUMNS = (
    "device", "versions", "kind", "case", "dtype", "batch_size", "input_len", "output_len", "system", "repeat",
    "token_ms", "token_ms_min", "token_ms_max", "tokens_per_s", "call_tokens_per_s",
    "first_token_ms", "first_token_ms_min", "first_token_ms_max", "first_call_s",
    "step_bytes", "gb_per_s", "copy_gb_per_s", "limit_ms", "share",
    "prefill_tflops", "gemm_tflops", "gemm_share",
    "weight_bytes", "cache_bytes", "peak_bytes", "peak_over_needed",
    "load_s", "load_s_min", "load_s_max", "load_cold_s", "load_python_s", "load_torch_s", "load_imports_s",
    "load_weights_s", "load_tokens_s", "load_two_tokens_s", "rows_like_ours", "worst_margin",
)  # fmt: skip


def numbers(info: EngineInfo, shape: Shape, timing: Timing, ceilings: Ceilings) -> dict[str, object]:
    """What a row says of times and bytes, by column; peak_* where the system's allocations were seen."""
    from gpu_cases import prefill_flops, step_bytes

    from gpt.engine.weights import engine_bytes
    from gpt.mapping import Mapping

    model, build = info.model, info.build
    first, token = Sample(timing.first_token_ms), Sample(timing.token_ms)
    flops = prefill_flops(model, shape)
    weight_bytes = engine_bytes(model, Mapping(), build.dtype, build.quant)
    cache_bytes = build.kv_cache_bytes(model, shape.batch_size, shape.num_slots)
    found: dict[str, object] = {
        "first_token_ms": round(first.median, 3),
        "first_token_ms_min": round(min(first.values), 3),
        "first_token_ms_max": round(max(first.values), 3),
        "prefill_tflops": round(flops / first.median / 1e9, 3),
        "gemm_tflops": round(ceilings.gemm_tflops, 2),
        "gemm_share": round(flops / first.median / 1e9 / ceilings.gemm_tflops, 4),
        "first_call_s": round(timing.first_call_s, 3),
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
    }
    if timing.token_ms:
        num_bytes = step_bytes(model, build, shape)
        gb_per_s = num_bytes / token.median / 1e6
        call_ms = first.median + token.median * (shape.output_len - 1)
        found |= {
            "token_ms": round(token.median, 4),
            "token_ms_min": round(min(token.values), 4),
            "token_ms_max": round(max(token.values), 4),
            "tokens_per_s": round(shape.batch_size / token.median * 1e3, 1),
            "call_tokens_per_s": round(shape.batch_size * shape.output_len * 1e3 / call_ms, 1),
            "step_bytes": num_bytes,
            "gb_per_s": round(gb_per_s, 1),
            "copy_gb_per_s": round(ceilings.copy_gb_per_s, 1),
            "limit_ms": round(num_bytes / ceilings.copy_gb_per_s / 1e6, 4),
            "share": round(gb_per_s / ceilings.copy_gb_per_s, 4),
        }
    if timing.peak_bytes is not None:
        found["peak_bytes"] = timing.peak_bytes
        found["peak_over_needed"] = round(timing.peak_bytes / (weight_bytes + cache_bytes), 3)
    return found


def compare(ours: list[list[int]] | None, theirs: list[list[int]], margin: float | None) -> dict[str, object]:
    if ours is None:
        return {}
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return {"rows_like_ours": f"{same}/{len(ours)}", "worst_margin": "" if margin is None else round(margin, 5)}


def describe_row(row: dict[str, object]) -> str:
    parts = [f"{row['first_token_ms']} ms to the first token", f"first call {row['first_call_s']} s"]
    if "token_ms" in row:
        parts = [
            f"{row['token_ms']} ms per token ({row['token_ms_min']} to {row['token_ms_max']}, limit {row['limit_ms']})",
            f"{row['tokens_per_s']} tokens/s",
            f"{row['gb_per_s']} GB/s, {float(str(row['share'])):.1%} of a copy",
            *parts,
        ]
    if row["kind"] == "prefill":
        parts.append(f"{row['prefill_tflops']} TFLOP/s, {float(str(row['gemm_share'])):.1%} of a product")
    if "peak_bytes" in row:
        parts.append(f"peak {row['peak_over_needed']} x (weights + cache)")
    if "rows_like_ours" in row:
        parts.append(f"rows like ours {row['rows_like_ours']} (margin {row['worst_margin'] or 0})")
    lengths = f"{row['batch_size']} x ({row['input_len']} + {row['output_len']})"
    return f"{row['kind']} {row['case']} {lengths} {row['system']}: {'; '.join(parts)}"
