"""The columns of bench_gpu.py's CSV files, and their rows in words."""

from __future__ import annotations

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
