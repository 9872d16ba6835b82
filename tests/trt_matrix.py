"""Which combinations of options the tests built and compared for TensorRT, as a table made from their own run.

GPT_TRT_MATRIX=rows.jsonl python -m pytest -m "tensorrt and not gpu"
python tests/trt_matrix.py rows.jsonl > docs/tensorrt-matrix.md
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.errors import GptError

_VARIABLE = "GPT_TRT_MATRIX"
_KEYS = ("model", "type", "attention", "input", "options")
# Enough for any mode that is no product of large integers; the whole bound stands in each test.
_HEAD = """# What was built and compared for TensorRT

Made by `tests/trt_matrix.py` from a run of the tests marked `tensorrt`, with TensorRT-RTX {version} on a CPU; how to
make it again stands there. *Built for*: plans that the library's ahead-of-time compiler accepted, `default` being its
own choice of cards. *Compared*: the largest relative L2 distance of the evaluated network from the torch executor (for
quantised products, and networks of weights rounded at random, from the same arithmetic written plainly); all are below
the bounds of the tests, which are in `tests/`. Networks with plugins are those of the library `tensorrt`, compared over
a stand-in for it. No plan was executed: see [tensorrt.md](tensorrt.md).

The models are small ones of each architecture: GPT-2 (learned positions, GELU, biases, tied head), rotary SwiGLU with
grouped key/value heads, rotary RMSNorm with scaled positions and GEGLU, and multi-query as in SantaCoder and StarCoder.
"""


def record(model: str, build: Any, *, built: str = "", error: float | None = None, options: str = "") -> None:
    """Adds a row for this combination; does nothing unless a table is being made.

    build: a BuildConfig.  built: the targets of a plan.  error: the largest that was found.  options: what the
    configuration does not say.
    """
    path = os.environ.get(_VARIABLE)
    if not path:
        return
    said = [options] if options else []
    if build.world_size > 1:
        embedding = ("by vocabulary", "by hidden size")[build.embedding_sharding_dim]
        said.append(f"{build.world_size} ranks" + (f", embedding {embedding}" if build.use_parallel_embedding else ""))
    said += ["prompt tuning"] * (build.max_prompt_embedding_table_size > 0)
    said += ["batch buckets"] * bool(build.batch_buckets)
    said += [f"plugins {' '.join(build.plugins)}"] * bool(build.plugins)
    said += [build.quant.describe()] * bool(build.quant.describe())
    row = {
        "model": model,
        "type": build.dtype,
        "attention": "plugin" if "attention" in build.plugins else "fused" if build.fused_attention else "plain",
        "input": "packed" if build.remove_input_padding else "padded",
        "options": ", ".join(said),
        "built": built,
        "error": error,
    }
    with open(path, "a", encoding="utf-8") as file:  # one short line in one write: processes do not mix
        file.write(json.dumps(row) + "\n")


def record_refusal(error: GptError) -> None:
    """Adds the reasons of an error to the table of what cannot be built."""
    path = os.environ.get(_VARIABLE)
    if not path:
        return
    reasons = error.found if isinstance(error.found, list) else [f"{error.what}: {error.found}"]
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"refused": [str(reason) for reason in reasons]}) + "\n")


def table(rows: list[dict[str, Any]], version: str) -> Iterator[str]:
    """Markdown: one line per combination, whatever number of tests it had."""
    refused = sorted({reason for row in rows for reason in row.get("refused", ())})
    rows = [row for row in rows if "refused" not in row]
    merged: dict[tuple[str, ...], tuple[list[str], list[float]]] = {}
    for row in rows:
        targets, errors = merged.setdefault(tuple(row[key] for key in _KEYS), ([], []))
        targets += [target for target in row["built"].split() if target not in targets]
        errors += [row["error"]] if row["error"] is not None else []
    yield _HEAD.format(version=version)
    yield "| model | type | attention | input | options | built for | compared |"
    yield "|---|---|---|---|---|---|---|"
    order = {"float32": 0, "float16": 1, "bfloat16": 2}
    for key in sorted(merged, key=lambda key: (key[4], key[0], order[key[1]], key[2], key[3])):
        targets, errors = merged[key]
        compared = f"{max(errors):.1e}" if errors else "-"
        yield "| " + " | ".join([*key, ", ".join(targets) or "-", compared]) + " |"
    both = sum(bool(targets) and bool(errors) for targets, errors in merged.values())
    yield f"\n{len(merged)} combinations, {both} of them built and compared."
    if refused:
        yield "\n## Refused before building, or by the library, with the reason that is shown\n"
        yield from (f"- {reason}" for reason in refused)


def main() -> None:
    from gpt.engine.trt_library import load

    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print("\n".join(table([json.loads(line) for line in lines], load().__version__)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
