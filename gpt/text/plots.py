"""The plots of a report: inline SVG whose colours come from the page, so that they follow its dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from gpt.text.evaluation import SideResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn with these stand-ins, which become variables of the page's style sheet.
_INK, _FAINT = "#010203", "#010204"
_SERIES = ("#010205", "#010206")
_VARIABLES = {_INK: "var(--ink-soft)", _FAINT: "var(--line)", _SERIES[0]: "var(--first)", _SERIES[1]: "var(--second)"}
_BIN_WIDTH = 10
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
}


def plot_scores(results: Sequence[SideResult]) -> str:
    """How many articles got which ROUGE-1, one bar per side and ten points, the mean of each side as a line."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new_figure()
    edges = np.arange(0, 101, _BIN_WIDTH)
    width = 0.8 * _BIN_WIDTH / len(results)
    for index, (result, colour) in enumerate(zip(results, _SERIES, strict=False)):
        values = np.array([row["rouge1"] for row in result.scores])
        counts, _ = np.histogram(values, bins=edges)
        left = edges[:-1] + 0.1 * _BIN_WIDTH + index * width
        axes.bar(left, counts, width * 0.94, align="edge", color=colour, label=result.side.name)
        axes.axvline(values.mean(), color=colour, linewidth=1.4, linestyle=(index * 4, (4, 4)))
    axes.margins(y=0.12)
    axes.set(xlabel="ROUGE-1 of an article (dashed: mean)", ylabel="articles", xlim=(0, 100))
    axes.set_xticks(edges)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _to_svg(figure, axes, "Distribution of ROUGE-1 over the articles")


def plot_step_times(results: Sequence[SideResult]) -> str:
    """Milliseconds of each generation step over its index: median of the batches, and where their middle 80 % lie."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new_figure()
    for result, colour in zip(results, _SERIES, strict=False):
        columns = [[ms for ms in column if ms is not None] for column in zip_longest(*result.step_ms)]
        if not columns:
            continue
        low, median, high = np.array([np.percentile(column, (10, 50, 90)) for column in columns]).T
        steps = np.arange(2, len(columns) + 2)  # the first token comes out of the prompt's step
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            steps, median, color=colour, linewidth=1.8, label=result.side.name, marker="o" if len(steps) == 1 else ""
        )
    axes.set(xlabel="new token (line: median of the batches, band: middle 80 %)", ylabel="ms per step")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _to_svg(figure, axes, "Time per generation step")


def _new_figure() -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.2, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    return figure, axes


def _to_svg(figure: Figure, axes: Axes, title: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # Text takes the page's font; ids of two plots on one page must differ.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def plot_agreement(kl_by_position: Sequence[float], prompt_len: int) -> str:
    """The mean divergence of an engine's predictions from the float model's over the position in a text; the line
    parts prompts from generation steps."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new_figure()
    positions = range(1, len(kl_by_position) + 1)
    axes.plot(positions, kl_by_position, color=_SERIES[0], linewidth=1.4, label="KL(float || engine)")
    axes.axvline(prompt_len + 0.5, color=_INK, linewidth=1, linestyle=(0, (4, 4)))
    axes.set(xlabel="predicted token (dashed: the prompt's end)", ylabel="nats")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    svg = _to_svg(figure, axes, "Divergence from the float model")
    for variable, colour in zip(_VARIABLES.values(), ("#555", "#ddd", "#2563a8", "#b4541a"), strict=True):
        svg = svg.replace(variable, colour)  # a file of its own has no style sheet
    return svg
