"""The figures of a report, drawn from results.json and histograms.json alone; each is one PNG."""

from __future__ import annotations

import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: E402

from .study import sides  # noqa: E402

INK, MUTED, GRID = "#22303c", "#8a96a3", "#e4e8ec"
BLUE, ORANGE, GREEN, GREY = "#1f6fb2", "#d9622b", "#2f8f5b", "#b8c0c8"
STYLE = {
    "figure.dpi": 130,
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def draw_all(results: dict[str, Any], histograms: dict[str, Any]) -> dict[str, Figure]:
    """{name of the PNG: figure} of everything that these results have data for."""
    with plt.rc_context(STYLE):
        figures = {"losses": losses(results), "accuracy": accuracy(results)}
        if any("br_w" in epoch for epoch in results["epochs"]):
            figures["bin_losses"] = bin_losses(results)
        if any("alphas" in epoch for epoch in results["epochs"]):
            figures["alphas"] = alphas(results)
        if histograms:
            figures["weights"] = weights(histograms)
    return figures


def _series(results: dict[str, Any], key: str) -> tuple[list[int], list[float]]:
    """(epochs, values) of one figure, without the epochs that do not have it."""
    points = [(e["epoch"], e[key]) for e in results["epochs"] if e.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def _line(ax, results, key, label, color, **style) -> None:
    x, y = _series(results, key)
    if x:
        ax.plot(x, y, color=color, label=label, marker=_marker(x), markersize=3.5, **style)


def _marker(points: list) -> str | None:
    return "o" if len(points) <= 20 else None


def _epochs_axis(ax, results) -> None:
    """Whole epochs below, and the end of warm-up marked where there is one."""
    count = max(len(results["epochs"]), 1)
    ax.set_xlabel("epoch")
    ax.set_xlim(0.6, count + 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    warmup = results.get("warmup_epochs")
    if warmup and warmup < count:
        ax.axvspan(0.6, warmup + 0.5, color="#f3f5f7", zorder=0)
        ax.axvline(warmup + 0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        look = {"transform": ax.get_xaxis_transform(), "va": "bottom", "fontsize": 8, "color": MUTED}
        ax.text(warmup + 0.5, 1.0, " BR phase", **look)
        ax.text(warmup + 0.5, 1.0, "warm-up ", ha="right", **look)


def losses(results: dict[str, Any]) -> Figure:
    """Cross-entropy; with BR, beside it, the terms of the training loss, which can differ by orders of magnitude."""
    with_br = any("br_w" in epoch for epoch in results["epochs"])
    figure, axes = plt.subplots(
        1, 1 + with_br, figsize=(9.6 if with_br else 6.4, 3.5), layout="constrained", squeeze=False
    )
    ax = axes[0][0]
    _line(ax, results, "ce", "training (augmented)", BLUE)
    _line(ax, results, "val_loss", "validation", ORANGE)
    _epochs_axis(ax, results)
    ax.set_title("Cross-entropy", pad=16)
    ax.legend()
    if with_br:
        ax, options = axes[0][1], results["options"]
        share = 1 - options.get("distill", 0)  # the teacher's part is not on record
        terms = {"epochs": [_terms(epoch, options, share) for epoch in results["epochs"]]}
        _line(ax, terms, "ce", "cross-entropy" if share == 1 else f"{share:g} · cross-entropy", BLUE)
        rise = " · rise" if options.get("lambda_br_schedule", "constant") != "constant" else ""
        _line(ax, terms, "br_w", f"{options['lambda_br']:g}{rise} · BR_W", ORANGE)
        _line(ax, terms, "br_a", f"{options['lambda_br_act']:g}{rise} · BR_A", GREEN)
        _epochs_axis(ax, results)
        ax.set_yscale("log")
        plain_ticks(ax)
        ax.set_title("Terms of the training loss" + ("" if share == 1 else ", but the teacher's"), pad=16)
        ax.legend()
    return figure


def _terms(epoch: dict[str, Any], options: dict[str, Any], share: float) -> dict[str, Any]:
    strength = {"br_w": options["lambda_br"], "br_a": options["lambda_br_act"]}
    # What older runs have no record of had constant lambdas. A term of 0 has no place on a logarithmic axis.
    weighted = {key: epoch.get(f"{key}_term", factor * epoch[key]) or None
                for key, factor in strength.items() if key in epoch}  # fmt: skip
    return {"epoch": epoch["epoch"], "ce": share * epoch["ce"] or None, **weighted}


def plain_ticks(ax) -> None:
    """0.2 instead of 2 x 10^-1, on a logarithmic axis that spans little."""
    low, high = ax.get_ylim()
    if high < 300 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def accuracy(results: dict[str, Any]) -> Figure:
    figure, ax = plt.subplots(figsize=(6.4, 3.5), layout="constrained")
    _line(ax, results, "train_acc", "training (augmented)", BLUE)
    _line(ax, results, "val_acc", "validation", ORANGE)
    final = results.get("final", {})
    tested = {final[which]["epoch"]: final[which]["test_acc"] for which in ("best", "last") if which in final}
    if tested:
        ax.plot(list(tested), list(tested.values()), "*", color=GREEN, markersize=11, label="test (best, last epoch)")
        for epoch, value in tested.items():
            ax.annotate(f"{value:.1f}", (epoch, value), (0, 7), textcoords="offset points", ha="center", color=GREEN)
    _epochs_axis(ax, results)
    ax.margins(y=0.14)
    ax.set_ylabel("accuracy, %")
    ax.set_title("Accuracy", pad=16)
    ax.legend(loc="lower right")
    return figure


def bin_losses(results: dict[str, Any]) -> Figure:
    """BR_W and BR_A, means of each epoch, on axes of their own: they differ by orders of magnitude."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    sides = (("br_w", "BR_W (weights)", BLUE), ("br_a", "BR_A (activations)", GREEN))
    for ax, (key, title, color) in zip(axes, sides):
        _line(ax, results, key, "mean over the epoch's steps", color)
        ends = results.get("final", {}).get(key)
        epochs, values = _series(results, key)
        if ends and epochs:
            x = [epochs[0] - 0.5, epochs[-1] + 0.5]
            ax.plot(
                x, [ends["start"], ends["end"]], "D", color=INK, markersize=4.5, label="first and last step", zorder=3
            )
        _epochs_axis(ax, results)
        ax.set_xlim(right=len(results["epochs"]) + 0.7)
        every = values + (list(ends.values()) if ends else [])
        if min(every) > 0 and max(every) > 5 * min(every):
            ax.set_yscale("log")
            plain_ticks(ax)
        else:
            ax.set_ylim(0, 1.15 * max(every) or 1)
        ax.set_title(title, pad=16)
        ax.legend(loc="best", fontsize=8.5)
    axes[0].set_ylabel("sum over layers of the bin loss")
    return figure


def alphas(results: dict[str, Any]) -> Figure:
    """The step of every quantizer after each epoch, coloured by depth."""
    found = zip(("weights", "activations"), sides(results["epochs"][-1]["alphas"]))
    found = [(side, layers) for side, layers in found if layers]
    figure, axes = plt.subplots(1, len(found), figsize=(4.8 * len(found), 4.0), layout="constrained", squeeze=False)
    for ax, (side, layers) in zip(axes[0], found):
        colors = plt.get_cmap("viridis")([i / max(len(layers) - 1, 1) * 0.92 for i in range(len(layers))])
        for color, name in zip(colors, layers):
            points = [(e["epoch"], e["alphas"][name]) for e in results["epochs"] if "alphas" in e]
            ax.plot(*zip(*points), color=color, linewidth=1.3, marker=_marker(points), markersize=2.5)
        values = [e["alphas"][name] for e in results["epochs"] if "alphas" in e for name in layers]
        if max(values) > 4 * min(values):
            ax.set_yscale("log")
            plain_ticks(ax)
        _epochs_axis(ax, results)
        ax.set_title(f"alpha of {side}", pad=16)
        bar = figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(1, len(layers) * 1.08), "viridis"), ax=ax, pad=0.02)
        bar.set_label(f"layer, 1 ({_short(layers[0])}) to {len(layers)} ({_short(layers[-1])})", fontsize=8.5)
        bar.outline.set_visible(False)
        bar.ax.set_ylim(1, max(len(layers), 1.01))
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes[0][0].set_ylabel("step size alpha")
    return figure


def _short(name: str) -> str:
    return name.removesuffix(".weight_quantizer").removesuffix(".quantizer")


def weights(histograms: dict[str, Any]) -> Figure:
    """One small panel for each layer: its weights in units of alpha before BR and at the end, and the levels."""
    names = list(next(iter(histograms.values()))["layers"])
    columns = 4 if len(names) > 6 else min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.75 * columns, 1.75 * rows + 0.7), squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    looks = {"before": {"color": GREY, "alpha": 0.85, "fill": True}, "after": {"color": ORANGE, "linewidth": 1.3}}
    for ax, name in zip(axes.flat, names):
        subtitle = []
        for when, look in looks.items():
            if when not in histograms:
                continue
            layer = histograms[when]["layers"][name]
            counts = layer["counts"]
            width = (layer["high"] - layer["low"]) / len(counts)
            edges = [layer["low"] + i * width for i in range(len(counts) + 1)]
            ax.stairs([c / max(sum(counts), 1) / width for c in counts], edges, **look)
            subtitle.append(f"{layer['alpha']:.3g}")
        for level in range(layer["qn"], layer["qp"] + 1) if layer["qp"] - layer["qn"] < 16 else ():
            ax.axvline(level, color=BLUE, linewidth=0.8, linestyle=(0, (2, 2)), zorder=3)
        ax.set_title(name, fontsize=8.5, pad=4)
        ax.text(0.99, 0.97, "α " + " → ".join(subtitle), transform=ax.transAxes, ha="right", va="top", fontsize=7,
                color=INK, backgroundcolor=(1, 1, 1, 0.7))  # fmt: skip
        ax.set_yticks([])
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        ax.tick_params(labelsize=8)
    for column in range(columns):
        shown = [ax for ax in axes[:, column] if ax.get_visible()]
        shown[-1].set_xlabel("weight / alpha", fontsize=8.5)
        shown[-1].tick_params(labelbottom=True)
    handles = [plt.Rectangle((0, 0), 1, 1, color=GREY)] if "before" in histograms else []
    labels = [f"before BR (after epoch {histograms['before']['epoch']})"] if "before" in histograms else []
    if "after" in histograms:
        handles.append(plt.Line2D([], [], color=ORANGE))
        labels.append(f"at the end (epoch {histograms['after']['epoch']})")
    handles.append(plt.Line2D([], [], color=BLUE, linewidth=0.8, linestyle=(0, (2, 2))))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    figure.legend(handles, [*labels, "levels"], loc="upper center", ncols=3)
    return figure
