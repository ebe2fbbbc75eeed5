"""The figures of an alpha study, drawn from its results.json alone; each is one PNG."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from .plots import BLUE, GREY, INK, MUTED, ORANGE, STYLE, plain_ticks, plt
from .study import DAMPENED, ROWS, by_row, difference, figures, sides

COLORS = {
    "lsq": "#22303c", "default": "#1f6fb2", "freeze": "#2f8f5b", "br-to-alpha": "#d9622b", "weights-only": "#7a9cc6",
    "dampening": "#8a6bbf", "dampening-strong": "#5b3a94", "acts-only": "#c9a227", "br-to-alpha-scaled": "#b0548f",
    "lsq-freeze": "#8c979f", "weights-only-freeze": "#4fb3a5", "weights-only-br-to-alpha": "#e8a07c",
    "freeze-br-to-alpha": "#8fce9f", "weights-reach": "#2c4f8a", "weights-rising": "#45b4d6",
    "dampening-rising": "#c8a2e8",
}  # fmt: skip
DASHED = {"freeze-br-to-alpha"}  # lies on another row's line


def draw_all(results: dict[str, Any]) -> dict[str, Figure]:
    """{name of the PNG: figure} of everything that these results have data for."""
    with plt.rc_context(STYLE):
        drawn = {"accuracy": accuracy(results)}
        if any("br_w" in epoch for run in results["runs"] for epoch in run["epochs"]):
            drawn["br"] = bin_losses(results)
        if any(oscillating(epoch) for run in results["runs"] for epoch in run["epochs"]):
            drawn["oscillation"] = oscillation(results)
        for index, side in enumerate(("weights", "activations")):
            drawn[f"alphas_{side}"] = alphas(results, index, side)
        if any("histograms" in run for run in results["runs"]):
            drawn["weights"] = weights(results)
    return drawn


def accuracy(results: dict[str, Any]) -> Figure:
    """Dots of seeds and bars of means; on the right the differences from the default row, and the guides'."""
    rows = by_row(results)
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 0.42 * len(rows) + 1.5), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    for place, (row, runs) in enumerate(rows.items()):
        tests = [figures(run)["test"] for run in runs]
        axes[0].scatter(tests, [place] * len(tests), color=COLORS[row], s=22, zorder=3, alpha=0.75, linewidth=0)
        axes[0].vlines(statistics.fmean(tests), place - 0.32, place + 0.32, color=COLORS[row], linewidth=2.5)
        against = difference(results, row, "default")
        if against is not None:
            axes[1].scatter(against.mean, place, marker="o", color=COLORS[row], s=40, zorder=3)
            if len(against.each) > 2 and row != "default":
                ends = against.mean - against.half_width, against.mean + against.half_width
                axes[1].hlines(place, *ends, color=COLORS[row], linewidth=1.5)
        if ROWS[row].guide is not None:
            guided = ROWS[row].guide - ROWS["default"].guide
            axes[1].scatter(guided, place, marker="D", facecolor="none", edgecolor=INK, s=45, zorder=4)
    axes[0].set_yticks(range(len(rows)), [ROWS[row].title for row in rows])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("test accuracy, %")
    axes[1].axvline(0, color=MUTED, linewidth=1)
    axes[1].set_xlabel("points from the default row")
    axes[1].scatter([], [], color=INK, s=40, label="measured (line: 95 %)")
    axes[1].scatter([], [], marker="D", facecolor="none", edgecolor=INK, s=45, label="guides")
    axes[1].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure


def bin_losses(results: dict[str, Any]) -> Figure:
    """BR_W and BR_A per epoch, a line for each row and a band over its seeds."""
    rows = by_row(results)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for ax, key, side in zip(axes, ("br_w", "br_a"), ("weights", "activations")):
        shown = {row: runs for row, runs in rows.items() if key != "br_w" or row not in DAMPENED}
        _curves(ax, shown, lambda epoch: epoch.get(key))
        ax.set_title(f"BR of {side}")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def oscillation(results: dict[str, Any]) -> Figure:
    """The share of weights that oscillate at each epoch's end, from the last one of warm-up on."""
    figure, ax = plt.subplots(figsize=(10, 4.2), layout="constrained")
    rows = by_row(results)
    _curves(ax, rows, oscillating)
    ax.set_xlim(left=min(run["warmup_epochs"] for runs in rows.values() for run in runs) - 0.1)
    ax.set_ylabel("oscillating weights, %")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def oscillating(epoch: dict[str, Any]) -> float | None:
    """Percent of weights; None where nothing was seen, or none does: a logarithmic axis has no 0."""
    share = epoch.get("oscillation", {}).get("oscillating")
    return 100 * share if share else None


def _curves(ax, rows: dict[str, Any], value: Callable[[dict[str, Any]], float | None]) -> None:
    """A line for each row, over the epochs in which all its seeds have a value, and a band over the seeds."""
    for row, runs in rows.items():
        curves = [{e["epoch"]: value(e) for e in run["epochs"] if value(e) is not None} for run in runs]
        epochs = sorted(set.intersection(*map(set, curves)))
        if not epochs:
            continue
        seeds = [[curve[epoch] for curve in curves] for epoch in epochs]
        style = {"linestyle": (0, (4, 3))} if row in DASHED else {}
        marker = "o" if len(epochs) <= 20 else None
        ax.plot(epochs, [statistics.fmean(each) for each in seeds], color=COLORS[row], label=ROWS[row].title,
                linewidth=1.5, marker=marker, markersize=3.5, **style)  # fmt: skip
        lows, highs = [min(each) for each in seeds], [max(each) for each in seeds]
        ax.fill_between(epochs, lows, highs, color=COLORS[row], alpha=0.15, linewidth=0)
    ax.set_yscale("log")
    plain_ticks(ax)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch")


def _panels(rows: dict[str, Any], height: float, **shared) -> tuple[Figure, list]:
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    size = (2.6 * columns, height * lines + 0.3)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, **shared)
    for ax in axes.flat[len(rows) :]:
        ax.set_visible(False)
    return figure, list(axes.flat)


def alphas(results: dict[str, Any], index: int, side: str) -> Figure:
    """One panel for each row: every layer's alpha relative to the end of warm-up, first seed, coloured by depth."""
    rows = by_row(results)
    figure, axes = _panels(rows, 2.1, sharex=True, sharey=True)
    for ax, (row, runs) in zip(axes, rows.items()):
        epochs, warmup = runs[0]["epochs"], runs[0]["warmup_epochs"]
        layers = sides(epochs[-1]["alphas"])[index]
        colors = plt.get_cmap("viridis")([i / max(len(layers) - 1, 1) * 0.92 for i in range(len(layers))])
        for color, name in zip(colors, layers):
            at = epochs[warmup - 1]["alphas"][name]
            ax.plot([e["epoch"] for e in epochs], [e["alphas"][name] / at for e in epochs], color=color, linewidth=1)
        ax.axvline(warmup, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        ax.set_title(ROWS[row].title, fontsize=8)
        low, high = ax.get_ylim()
        if high > 3 * low:
            ax.set_yscale("log")
            plain_ticks(ax)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch (dashed: warm-up ends)", fontsize=9)
    figure.supylabel(f"alpha of {side}, relative", fontsize=9)
    return figure


def weights(results: dict[str, Any]) -> Figure:
    """One panel for each row: weights / alpha before BR and at the end, all weights of the layers of most layers' bits,
    first seed."""
    rows = {row: run for row, runs in by_row(results).items() for run in runs if "histograms" in run}
    figure, axes = _panels(rows, 1.8, sharex=True)
    for ax, (row, run) in zip(axes, rows.items()):
        for when, look in (("before", {"color": GREY, "fill": True}), ("after", {"color": ORANGE, "linewidth": 1.2})):
            found = run["histograms"].get(when, {"layers": {}})["layers"].values()
            if not found:
                continue
            ((range_, _),) = Counter((each["qn"], each["qp"]) for each in found).most_common(1)
            layers = [each for each in found if (each["qn"], each["qp"]) == range_]  # others have another axis
            low, high, bins = layers[0]["low"], layers[0]["high"], len(layers[0]["counts"])
            width = (high - low) / bins
            counts = [sum(each["counts"][i] for each in layers) for i in range(bins)]
            density = [count / sum(counts) / width for count in counts]
            ax.stairs(density, [low + i * width for i in range(bins + 1)], **look)
        for level in range(layers[0]["qn"], layers[0]["qp"] + 1) if layers[0]["qp"] - layers[0]["qn"] < 16 else ():
            ax.axvline(level, color=BLUE, linewidth=0.7, linestyle=(0, (2, 2)))
        ax.set_title(ROWS[row].title, fontsize=8)
        ax.set_yticks([])
        ax.grid(False)
    figure.supxlabel("weight / alpha", fontsize=9)
    return figure
