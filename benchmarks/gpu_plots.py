"""The plots of the GPU benchmarks' CSV files: latency over batch and over ranks, shares, kernels of one step."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, str]
LABELS = {
    "ours": "this project",
    "ours_int8": "this project, int8 weights",
    "ours_int4": "this project, int4 weights in groups of 64",
    "ours_smoothquant": "this project, SmoothQuant per token and channel",
    "ours_smoothquant_static": "this project, SmoothQuant per channel",
    "ours_fp8": "this project, FP8",
    "hf_eager": "transformers, eager",
    "hf_static": "transformers, static cache in a CUDA graph",
    "hf_compile": "transformers, static cache + compile",
    "vllm": "vLLM",
    "ctranslate2": "CTranslate2",
}
_COLOURS = dict(zip(LABELS, (
    "#0072b2", "#117733", "#44aa99", "#56b4e9", "#332288", "#88ccee", "#999999", "#e69f00", "#d55e00", "#009e73",
    "#cc79a7",
), strict=True))  # fmt: skip
_NUM_KERNELS = 12
# What rows of one measurement have in common.
_SAME = ("kind", "case", "dtype", "batch_size", "input_len", "output_len", "system", "run", "kernel")


def draw(path: Path, folder: Path) -> list[Path]:
    """Draws what the rows of a CSV file hold; returns the files, named after it, in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = latest_rows(path)
    target = folder / path.name
    if rows and "kernel" in rows[0]:
        return draw_kernels(target, rows)
    decode = [row for row in rows if row["kind"] == "decode"]
    return [draw_latency(target, decode), draw_share(target, decode)] if decode else []


def latest_rows(path: Path) -> list[Row]:
    """The rows of a CSV file on the device of the last one; of several of the same measurement, the last."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["device"] == rows[-1]["device"]]
    return list({tuple(row.get(key) for key in _SAME): row for row in own}.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: ms per token of each model and batch, and how near it is to the limit of the memory."""
    rows = [row for row in rows if row["kind"] == "decode" and "kernel" not in row]
    systems = in_order(rows)
    lines = []
    groups = {(row["case"], int(row["batch_size"])) for row in rows}
    for case, batch in sorted(groups, key=lambda group: case_order(rows, group)):
        own = {row["system"]: row for row in rows if (row["case"], int(row["batch_size"])) == (case, batch)}
        cells = [f"{float(own[system]['token_ms']):.3f}" if system in own else "-" for system in systems]
        share = f"{float(own['ours']['share']):.0%}" if "ours" in own else "-"
        lines.append([case, str(batch), *cells, f"{limit_ms(own.values()):.3f}", share])
    if not lines:
        return ""
    head = ["ms per token", "batch", *(LABELS[system] for system in systems), "limit of the memory", "reached"]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def limit_ms(rows: Iterable[Row]) -> float:
    """What rows of one model and batch are compared with: the limit of float weights where one of them has these."""
    return max(float(row["limit_ms"]) for row in rows)


def draw_latency(path: Path, rows: Sequence[Row]) -> Path:
    """One panel per model: ms per token over the batch, a line per system, bars from the fastest to the slowest round,
    and what reading weights and cache takes at the copy's speed."""
    from matplotlib.ticker import LogLocator

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = new_figure(max(6.2, 3.1 * len(cases)), 3.4)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        own = sorted((row for row in rows if row["case"] == case), key=lambda row: int(row["batch_size"]))
        for system in in_order(own):
            mine = [row for row in own if row["system"] == system]
            low, mid, high = (numbers(mine, name) for name in ("token_ms_min", "token_ms", "token_ms_max"))
            spread = [[m - a for m, a in zip(mid, low, strict=True)], [b - m for m, b in zip(mid, high, strict=True)]]
            axes.errorbar(
                numbers(mine, "batch_size"), mid, spread, label=LABELS[system], color=_COLOURS[system], marker="o",
                markersize=4, linewidth=1.6, capsize=2,
            )  # fmt: skip
        groups = {batch: [row for row in own if row["batch_size"] == batch] for batch in (r["batch_size"] for r in own)}
        limits = {float(batch): limit_ms(rows) for batch, rows in groups.items()}
        style = {"marker": "_"} if len(limits) == 1 else {}
        axes.plot(list(limits), list(limits.values()), "k--", linewidth=1.2, label="limit of the memory", **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(list(limits), [f"{batch:.0f}" for batch in limits])
        axes.set(title=f"{case}, {own[-1]['dtype']}", xlabel="sequences in the batch")
        axes.grid(axis="y", which="both", linewidth=0.4, alpha=0.5)
    panels[0].set_ylabel("ms per token")
    add_legend(figure, panels)
    return save(figure, path, "latency")


def draw_share(path: Path, rows: Sequence[Row]) -> Path:
    """Bars: GB/s of weights and cache as a share of the copy's."""
    groups = sorted({(row["case"], int(row["batch_size"])) for row in rows}, key=lambda g: case_order(rows, g))
    systems = in_order(rows)
    figure = new_figure(max(5.0, 0.9 * len(groups) + 2), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        found = {(r["case"], int(r["batch_size"])): 100 * float(r["share"]) for r in rows if r["system"] == system}
        places = [place + index * width - 0.4 for place, group in enumerate(groups) if group in found]
        heights = [found[group] for group in groups if group in found]
        axes.bar(places, heights, width * 0.92, align="edge", color=_COLOURS[system], label=LABELS[system])
    axes.set_xticks(range(len(groups)), [f"{case}\nbatch {batch}" for case, batch in groups], fontsize=8)
    axes.set(ylabel="% of a copy's bandwidth", title="Weights and cache read per second of a step")
    axes.axhline(100, color="black", linestyle="--", linewidth=1)
    add_legend(figure, [axes])
    return save(figure, path, "share")


def draw_kernels(path: Path, rows: Sequence[Row]) -> list[Path]:
    """One file per kind of step, model, batch and system: the kernels by time, the smaller ones in one bar."""

    def key(row: Row) -> tuple[str, str, str, str]:
        return row["kind"], row["case"], row["batch_size"], row["system"]

    files = []
    for kind, case, batch, system in dict.fromkeys(map(key, rows)):
        mine = [row for row in rows if key(row) == (kind, case, batch, system)]
        last = max(row["run"] for row in mine)
        mine = [row for row in mine if row["run"] == last]
        bars = [(shorten(row["kernel"]), float(row["us_per_step"])) for row in mine[:_NUM_KERNELS]]
        rest = sum(float(row["us_per_step"]) for row in mine[_NUM_KERNELS:])
        bars += [(f"{len(mine) - _NUM_KERNELS} others", rest)] if rest else []
        figure = new_figure(7.5, 0.9 + 0.28 * len(bars))
        axes = figure.subplots()
        axes.barh([name for name, _ in bars][::-1], [us for _, us in bars][::-1], color=_COLOURS[system])
        total = sum(us for _, us in bars)
        what, mark = ("prompts of batch", "_prompts") if kind == "prompt_profile" else ("batch", "")
        mark += "" if system == "ours" else f"_{system}"
        axes.set(xlabel="µs per step", title=f"{LABELS[system]}\n{case}, {what} {batch}: {total:.0f} µs in kernels")
        axes.tick_params(axis="y", labelsize=7)
        files.append(save(figure, path, f"{case}_{batch}{mark}"))
    return files


def draw_ranks(path: Path) -> Path:
    """Two panels: ms per token over the number of ranks, with the limit of the memory dashed, and the sums' share of a
    step; a line per model, batch and kind of card.  Of several rows of the same measurement the last counts."""
    from matplotlib import color_sequences

    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # An engine's folder may name its ranks last: starcoder_4.
    latest = {(*line_of(row), int(row["ranks"])): row for row in rows}
    figure = new_figure(8.5, 3.8)
    times, shares = figure.subplots(1, 2)
    colours = color_sequences["tab20"]  # more lines than matplotlib's usual ten colours
    for place, line in enumerate(sorted({key[:3] for key in latest})):
        found = {key[3]: row for key, row in sorted(latest.items()) if key[:3] == line}
        ranks, mine, colour = list(found), list(found.values()), colours[place % len(colours)]
        label = f"{line[0]}, batch {line[1]}, {line[2]}"
        times.plot(ranks, numbers(mine, "token_ms"), color=colour, marker="o", markersize=4, label=label)
        times.plot(ranks, numbers(mine, "limit_ms"), color=colour, linestyle="--", linewidth=1)
        shared = {n: 100 * float(row["sums_share"]) for n, row in found.items() if row["sums_share"]}
        shares.plot(list(shared), list(shared.values()), color=colour, marker="o", markersize=4, label=label)
    all_ranks = sorted({key[3] for key in latest})
    for axes in (times, shares):
        axes.set_xscale("log", base=2)
        axes.set_xticks(all_ranks, list(map(str, all_ranks)))
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    times.set_yscale("log")
    times.set(xlabel="ranks", ylabel="ms per token", title="A step, and the limit of the memory")
    shares.set(xlabel="ranks", ylabel="% of a step", title="What sums over the ranks cost")
    add_legend(figure, [times])
    return save(figure, path, "ranks")


def line_of(row: Row) -> tuple[str, int, str]:
    """Model, batch and card of "4 x NVIDIA H100 80GB HBM3"."""
    card = row["device"].split(" x ")[-1].removeprefix("NVIDIA ").split()[0]
    return row["model"].removesuffix("_" + row["ranks"]), int(row["batch_size"]), card


def shorten(name: str, width: int = 60) -> str:
    """A kernel's name without its return type and arguments, cut where it is still too long."""
    name = name.removeprefix("void ").split("(")[0]
    return name if len(name) <= width else name[: width - 3] + "..."


def numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def in_order(rows: Sequence[Row]) -> list[str]:
    found = {row["system"] for row in rows}
    return [system for system in LABELS if system in found]


def case_order(rows: Sequence[Row], group: tuple[str, int]) -> tuple[int, int]:
    return list(dict.fromkeys(row["case"] for row in rows)).index(group[0]), group[1]


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, below them."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = int(figure.get_figwidth() // 3.1)  # as wide as the longest name
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def save(figure: Figure, path: Path, what: str) -> Path:
    from matplotlib import rc_context

    target = path.with_name(f"{path.stem}_{what}.svg")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):  # small, and the same from the same rows
        figure.savefig(target, metadata={"Date": None})
    return target
