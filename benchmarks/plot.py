"""Draws what benchmarks/run.py measured: bandwidth over size with its limit, peers, and the step.

    python benchmarks/plot.py [benchmarks/results/run-cpu.json]          # writes run-cpu.png beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {2: "#1b6ca8", 4: "#d1495b", 8: "#3a7d44"}
GREY = "#666666"


def bandwidth(axes, parts: dict, dtype: str) -> None:
    """Modelled GB/s of forward and backward together (five passes over the tensor's bytes), by size and bits."""
    rows = [
        r for r in parts["kernels"]["rows"] if r["dtype"] == dtype and not r["per_channel"] and not r["relu"]
    ]
    for backend in dict.fromkeys(r["backend"] for r in rows):
        style = "-" if backend == rows[0]["backend"] else "--"
        mine = [r for r in rows if r["backend"] == backend]
        for bits in sorted({r["bits"] for r in mine}):
            line = sorted((r["log2_size"], r["gb_per_s"]) for r in mine if r["bits"] == bits)
            axes.plot(*zip(*line), style, marker="o", ms=4, color=COLORS[bits], label=f"{backend}, {bits} bits")
    sizes = sorted({r["log2_size"] for r in rows})
    limit = [max(r["limit_gb_per_s"] for r in rows if r["log2_size"] == size) for size in sizes]
    axes.plot(sizes, limit, ":", color=GREY, lw=2, label="limit: clone, add")
    compiled = [r for r in parts.get("compiled", {}).get("rows", []) if r["dtype"] == dtype]
    for bits in sorted({r["bits"] for r in compiled}):
        points = []
        for r in (r for r in compiled if r["bits"] == bits):
            seconds = r["times"]["compiled fwd"]["median_s"] + r["times"]["compiled bwd"]["median_s"]
            points.append((r["log2_size"], 5 * 4 * (1 << r["log2_size"]) / seconds / 1e9))
        axes.plot(*zip(*points), "x", color=COLORS[bits], label=f"torch.compile, {bits} bits")
    axes.set(xlabel="elements, 2^n", ylabel="GB/s, forward + backward", title=f"LSQ + BR, {dtype}", yscale="log")
    axes.set_xticks(sizes)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=6)
    axes.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)
    axes.grid(alpha=0.3, which="both")


def bars(axes, values: dict[str, float], title: str, unit: str, log: bool = False) -> None:
    names = list(values)
    drawn = axes.barh(names, list(values.values()), color=["#9bb7d4" if n != "fused" else COLORS[2] for n in names])
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.set(title=title, xlabel=unit)
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xlim(0.5, max(values.values()) * 2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, max(values.values()) * 1.18)


def draw(parts: dict, target: Path) -> None:
    figure, ((left, right), (below_left, below_right)) = plt.subplots(2, 2, figsize=(11, 9), constrained_layout=True)
    bandwidth(left, parts, "float32")
    bandwidth(right, parts, "bfloat16")
    if "step" in parts:
        row = parts["step"]["rows"][-1]
        ratios = {kind: row[f"ratio {kind}"] for kind in row["times"]}
        bars(below_left, ratios, f"A step of ResNet-18, W2A2, batch {row['batch']}", "times the float step")
    if "peers" in parts:
        row = next(r for r in parts["peers"]["rows"] if r["bits"] == 2 and r["log2_size"] <= 20)
        unit = row["times"]["qbr lsq"]["median_s"]
        seconds = {name: r["median_s"] / unit for name, r in row["times"].items()}
        title = f"2^{row['log2_size']} float32, 2 bits, through autograd"
        bars(below_right, seconds, title, "times qbr's LSQ", log=True)
    where = parts["kernels"]["environment"]
    machine = f"{where['hardware']}, {where['threads']} threads"
    figure.suptitle(f"{machine}, torch {where['torch']}, commit {where['commit']}")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent / "results" / "run-cpu.json"
    parser.add_argument("results", type=Path, nargs="?", default=default)
    args = parser.parse_args()
    target = args.results.with_suffix(".png")
    parts = json.loads(args.results.read_text())
    for part in parts.values():
        part["rows"] = [row for row in part["rows"] if "failed" not in row]
    draw({name: part for name, part in parts.items() if part["rows"]}, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
