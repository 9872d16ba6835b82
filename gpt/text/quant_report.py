"""What a quantising conversion tells about its quality: a few lines, a table of everything, a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.console import aligned
from gpt.engine.quant_errors import STATIC_CHANNEL, STATIC_TENSOR, TOKEN_CHANNEL, ErrorRow
from gpt.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSV_NAME, PLOT_NAME = "quantization.csv", "quantization.svg"
_WORST, _BEST = STATIC_TENSOR, TOKEN_CHANNEL
# Heading, quantity and variant of each column of the terminal's table.
_LINEAR_COLUMNS = (
    *((f"weight {mode}", "weight", mode) for mode in (STATIC_TENSOR, STATIC_CHANNEL)),
    *((f"output {mode}", "output", mode) for mode in (STATIC_TENSOR, STATIC_CHANNEL, TOKEN_CHANNEL)),
)
_CACHE_COLUMNS = tuple(
    (f"{quantity} {variant} scale", quantity, variant) for variant in ("shared", "separate") for quantity in "KV"
)


def describe_errors(errors: Sequence[ErrorRow]) -> str:
    """For each linear layer and for the cache the mean over the layers and, in brackets, the worst one; then a line per
    layer; then where everything is."""
    linears = [row for row in errors if row.part != "cache"]
    cache = [row for row in errors if row.part == "cache"]
    means = [_mean_table("cache", _CACHE_COLUMNS, cache)]
    what = "K and V with separate scales"
    if linears:
        means.insert(0, _mean_table("linear layer", _LINEAR_COLUMNS, linears))
        what = f"outputs {_WORST} / {_BEST}, {what}"
    return "\n".join(
        [
            "Relative error of INT8, mean of the layers (worst layer)",
            *means,
            f"Layer by layer: {what}",
            _layer_table(errors),
            f"All numbers: {CSV_NAME} beside the weights, drawn in {PLOT_NAME}",
        ]
    )


def _mean_table(heading: str, columns: Sequence[tuple[str, str, str]], rows: Sequence[ErrorRow]) -> str:
    lines = [[heading, *(title for title, _, _ in columns)]]
    for part in dict.fromkeys(row.part for row in rows):
        cells = [part if part != "cache" else "K and V"]
        for _, quantity, variant in columns:
            chosen = [row for row in rows if (row.part, row.quantity, row.variant) == (part, quantity, variant)]
            worst = max(chosen, key=lambda row: row.relative_error)
            mean = sum(row.relative_error for row in chosen) / len(chosen)
            cells.append(f"{mean:.4f} ({worst.layer}: {worst.relative_error:.4f})")
        lines.append(cells)
    return "\n".join(aligned(lines))


def _layer_table(errors: Sequence[ErrorRow]) -> str:
    """Each linear layer's output in the worst and the best mode, K and V."""
    found = {(row.layer, row.part, row.quantity, row.variant): f"{row.relative_error:.4f}" for row in errors}
    linears = list(dict.fromkeys(row.part for row in errors if row.quantity == "output"))
    lines = [["layer", *linears, "K", "V"]]
    for layer in dict.fromkeys(row.layer for row in errors):
        outputs = [" / ".join(found[layer, part, "output", mode] for mode in (_WORST, _BEST)) for part in linears]
        lines.append([str(layer), *outputs, *(found[layer, "cache", quantity, "separate"] for quantity in "KV")])
    return "\n".join(aligned(lines))


def save_errors(errors: Sequence[ErrorRow], folder: Path) -> None:
    """Every number as CSV_NAME, and PLOT_NAME, in `folder`."""
    text = io.StringIO()
    names = [field.name for field in fields(errors[0])]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(row), "relative_error": f"{row.relative_error:.6g}"} for row in errors)
    write_text(folder / CSV_NAME, text.getvalue())
    write_text(folder / PLOT_NAME, _plot(errors))


def _plot(errors: Sequence[ErrorRow]) -> str:
    """One panel each for outputs of the linear layers per-tensor and per-token per-channel, and for the cache."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: list[tuple[str, Callable[[ErrorRow], str | None]]] = [("cache", _cache_label)]
    if any(row.quantity == "output" for row in errors):
        panels = [(f"outputs, {mode}", _output_label(mode)) for mode in (_WORST, _BEST)] + panels
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "quantization", "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, label) in zip(axes, panels, strict=True):
            _draw(axis, errors, label)
            axis.set(title=title, xlabel="layer", yscale="log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(axis="y", linewidth=0.5, alpha=0.5)
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        axes[0].set_ylabel("relative error of INT8")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw(axis: Axes, errors: Sequence[ErrorRow], label: Callable[[ErrorRow], str | None]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in errors:
        name = label(row)
        if name is not None and row.relative_error > 0:
            lines.setdefault(name, []).append((row.layer, row.relative_error))
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.4, label=name)


def _output_label(mode: str) -> Callable[[ErrorRow], str | None]:
    return lambda row: row.part if (row.quantity, row.variant) == ("output", mode) else None


def _cache_label(row: ErrorRow) -> str | None:
    return f"{row.quantity}, {row.variant} scale" if row.part == "cache" else None
