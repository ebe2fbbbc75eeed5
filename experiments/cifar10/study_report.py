"""The report of an alpha study, as Markdown and as one HTML page, from its results.json alone."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from . import report, study
from .files import UserError, atomic_write, markdown_table
from .study import ROWS, by_row, difference, mean_and_spread

COLUMNS = {
    "test": ("test accuracy, %", 2),
    "br_w": ("final BR_W", 4),
    "br_a": ("final BR_A", 3),
    "distance": ("weights' distance to their level, alpha", 3),
    "converged": ("epochs to converge", 1),
    "oscillating": ("oscillating weights, %", 2),
    "drift_w": ("drift of weights' alpha, %", 1),
    "drift_a": ("drift of activations' alpha, %", 1),
    "seconds": ("seconds", 0),
}
LEGEND = (
    "Mean ± standard deviation over seeds. Test accuracy is that of the last epoch: no epoch is chosen. BR_W and BR_A: "
    "sums over the layers of their bin losses, to which a weight of a small layer adds more than one of a large layer. "
    "Distance: mean over all quantized weights; 0.25 where they lie evenly between levels. Converged: the first epoch "
    f"after warm-up within {study.WITHIN:g} point of the best that the seed's run of LSQ alone reaches after warm-up "
    "(where not all seeds do, how many). Oscillating: weights whose "
    "frequency of changing their bin and changing back is above 0.005 (Nagel et al., 2022), a mean of about the last "
    "100 steps, at the end of each epoch after warm-up, in the mean of these; where lr ends at 0 few are left. Drift: "
    "the relative change of alpha from the end of warm-up to the end, mean over layers. Seconds of a run, its warm-up "
    "included, beside whatever else the machine did."
)
INTERVALS = (
    "Test accuracy, seed by seed; mean ± half its 95 % interval (Student's t of the paired differences). Each stands "
    "for itself: of twenty comparisons of equals one would seem to differ."
)
CAPTIONS = {
    "accuracy": "Test accuracy after the last epoch, each seed a dot and the mean a bar; on the right, its difference "
    "from the default row with its 95 % interval, and the differences between the figures that the guides give.",
    "br": "The bin losses per epoch of the BR phase, means over seeds; the band spans the seeds.",
    "oscillation": "The share of weights that oscillate at each epoch's end, from warm-up's last epoch on, means over "
    "seeds; the band spans the seeds. There is no point where none does.",
    "alphas_weights": "alpha of each layer's weights relative to its value when warm-up ended, first seed; dark: first "
    "layers.",
    "alphas_activations": "The same of activations.",
    "weights": "Weights in units of alpha, all weights together (without layers of other bits than most), first seed: "
    "before BR (grey) and at the end (orange); dashed: the levels.",
}


def write(folder: Path) -> Path:
    """Write report.md, report.html and the figures into ``folder``; return the page's path.

    Raises:
        UserError: where there is no results.json of a study, or no finished run in it.
    """
    results = study.read(folder / "results.json")
    if "runs" not in results:
        raise UserError(f"{folder / 'results.json'}: not of an alpha study; name the --output of one")
    if not by_row(results):
        raise UserError(f"{folder / 'results.json'}: holds no finished run; nothing to report")
    from . import study_plots  # matplotlib takes a second to import

    images = report.save_figures(folder, study_plots.draw_all(results))
    for name, text in (("report.md", _markdown(results, images)), ("report.html", _page(results, images))):
        with atomic_write(folder / name, "w") as file:
            file.write(text)
    return folder / "report.html"


def table(results: dict[str, Any]) -> list[list[str]]:
    """Head and rows of the table, as text."""
    cells = [["row", *(title for title, _ in COLUMNS.values()), "seeds", "guide, %"]]
    for row, figures in study.in_numbers(results).items():
        line = [ROWS[row].title]
        line += [_cell([each[key] for each in figures], digits) for key, (_, digits) in COLUMNS.items()]
        cells.append([*line, str(len(figures)), "" if ROWS[row].guide is None else f"{ROWS[row].guide:g}"])
    return cells


def _cell(values: list[float | None], digits: int) -> str:
    there = [value for value in values if value is not None]
    if not there or len(there) < len(values):  # a mean of those that got there would flatter a row
        return f"{len(there)} of {len(values)}" if there else ""
    mean, spread = mean_and_spread(there)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(there) > 1 else "")


def findings(results: dict[str, Any]) -> list[str]:
    """What the differences of test accuracy say, in sentences: mean ± half its 95 % interval, each for itself."""
    rows = by_row(results)
    found = []

    def compare(row: str, other: str, about: str) -> None:
        this = difference(results, row, other)
        if this is None:
            return
        each = ", ".join(f"{value:+.2f}" for value in this.each)
        if len(this.each) < 3:
            found.append(f"{about}: {this.mean:+.2f} points ({each}): too few seeds to say.")
            return
        verdict = ("better" if this.mean > 0 else "worse") if this.clear else "no difference that these seeds show"
        found.append(f"{about}: {this.mean:+.2f} ± {this.half_width:.2f} points ({each}): {verdict}.")

    compare("default", "lsq", "BR on weights and activations against LSQ alone")
    compare("weights-only", "lsq", "BR on weights only against LSQ alone")
    compare("acts-only", "lsq", "BR on activations only against LSQ alone")
    compare("weights-reach", "lsq", "Strong BR on weights only, which reaches every layer, against LSQ alone")
    compare("weights-rising", "lsq", "Strong BR with a lambda that rises against LSQ alone")
    compare("weights-rising", "weights-reach", "Strong BR with a lambda that rises against a constant one")
    compare("dampening", "lsq", "Dampening of weights against LSQ alone")
    compare("dampening-rising", "lsq", "Dampening with a lambda that rises against LSQ alone")
    compare("dampening-rising", "dampening", "Dampening with a lambda that rises against a constant one")
    compare("dampening-strong", "lsq", "Dampening of weights ten times as strong against LSQ alone")
    compare("freeze", "default", "alpha frozen after warm-up (S1) against alpha that goes on learning (S2)")
    compare("lsq-freeze", "lsq", "The same without BR")
    compare("weights-only-freeze", "weights-only", "The same with BR on weights only, as the BR paper has it")
    compare("br-to-alpha", "default", "BR moving the weights' alphas against BR kept off them")
    compare("weights-only-br-to-alpha", "weights-only", "The same with BR on weights only")
    compare("br-to-alpha-scaled", "default", "BR moving them times LSQ's gradient scale against BR kept off them")
    compare("br-to-alpha-scaled", "br-to-alpha", "BR moving them with that scale against without")
    numbers = study.in_numbers(results)
    both = [numbers.get(row, []) for row in ("freeze", "freeze-br-to-alpha")]
    if all(both) and len(both[0]) == len(both[1]):
        for figures in both:
            for each in figures:
                each.pop("seconds")
        same = "the same in every figure: freezing wins"
        if both[0] != both[1]:
            devices = {run["device"] for row in ("freeze", "freeze-br-to-alpha") for run in rows[row]}
            if not all(device.startswith("cpu") for device in devices):
                same = "the same but for rounding, which is not repeatable on a GPU"
            elif len(devices) > 1:
                same = f"not to be compared: they ran as {' and '.join(sorted(devices))}, which round differently"
            else:
                same = "not the same: a defect"
        found.append(f"Frozen alphas with and without BR's gradient: {same}.")
    guided = [row for row in rows if ROWS[row].guide is not None]
    if len(guided) > 1:
        means = {row: mean_and_spread([each["test"] for each in numbers[row]])[0] for row in guided}
        ours, theirs = (sorted(guided, key=key, reverse=True) for key in (means.get, lambda row: ROWS[row].guide))
        agree = "the guides' order" if ours == theirs else f"the guides say {' > '.join(theirs)}"
        found.append(f"Order of the guides' three rows by mean accuracy: {' > '.join(ours)}; {agree}.")
    return found


def _facts(results: dict[str, Any]) -> list[str]:
    run, baseline = results["runs"][0], results["baseline"]
    data, tests = run.get("data") or baseline["data"], baseline["final"]["best"]["test_acc"]
    devices = sorted({each["device"] for each in results["runs"]})
    return [
        f"Scale {results['scale']}: float baseline {' '.join(results['baseline_flags'])} ({tests:.2f} % test), from "
        f"which every run starts; then {' '.join(results['qat'])}, with {' '.join(results['strength'])} where a row "
        f"does not say otherwise{' and ' + ' '.join(results['extra']) if results['extra'] else ''}.",
        f"{data['test']:,} test images; seeds {', '.join(map(str, results['seeds']))}; {' and '.join(devices)}; torch "
        f"{run['versions']['torch']}, qbr {run['versions']['qbr']}.",
    ]


def _titles() -> dict[str, str]:
    return {"accuracy": "Accuracy", "br": "Bin losses", "oscillation": "Oscillating weights",
            "alphas_weights": "Step sizes of weights",
            "alphas_activations": "Step sizes of activations", "weights": "Weights before and after BR"}  # fmt: skip


def _flags(results: dict[str, Any]) -> list[list[str]]:
    return [["row", "name", "flags beside those above"]] + [
        [ROWS[row].title, row, " ".join(study.own_flags(row, results))] for row in by_row(results)
    ]


def _markdown(results: dict[str, Any], images: dict[str, bytes]) -> str:
    parts = ["# Who may move alpha: LSQ with bin regularization on CIFAR-10", ""]
    for fact in _facts(results):
        parts += [fact, ""]
    parts += [markdown_table(*_split(table(results))), "", LEGEND, "", "## What the differences say", "", INTERVALS, ""]
    parts += [f"- {line}" for line in findings(results)]
    for name in images:
        parts += ["", f"## {_titles()[name]}", "", CAPTIONS[name], "", f"![{_titles()[name]}]({name}.png)"]
    parts += ["", "## Rows", "", markdown_table(*_split(_flags(results))), "", f"    {_command(results)}"]
    return "\n".join(parts) + "\n"


def _command(results: dict[str, Any]) -> str:
    data = "" if results["data"] is None else f" --data {results['data']}"
    extra = f" -- {' '.join(results['extra'])}" if results["extra"] else ""
    seeds, rows = results["seeds"], by_row(results)
    if seeds != list(range(study.SCALES[results["scale"]].seeds)):
        data += f" --seeds {' '.join(map(str, seeds))}"
    if len(rows) < len(ROWS):
        data += f" --rows {' '.join(rows)}"
    return f"python experiments/alpha_study.py --scale {results['scale']}{data}{extra}"


def _page(results: dict[str, Any], images: dict[str, bytes]) -> str:
    title = "Who may move alpha: LSQ with bin regularization on CIFAR-10"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{report.STYLE}</style>',
        f"<body><h1>{title}</h1>",
        *(f"<p class='note'>{html.escape(fact)}</p>" for fact in _facts(results)),
        report.as_table(*_split(table(results))),
        f"<p class='note'>{html.escape(LEGEND)}</p><h2>What the differences say</h2>",
        f"<p class='note'>{html.escape(INTERVALS)}</p><ul>",
        *(f"<li>{html.escape(line)}</li>" for line in findings(results)),
        "</ul>",
    ]
    for name, image in images.items():
        parts += report.with_image(_titles()[name], html.escape(CAPTIONS[name]), image)
    parts.append(f"<h2>Rows</h2>{report.as_table(*_split(_flags(results)))}<pre>{html.escape(_command(results))}</pre>")
    return "\n".join(parts) + "</body></html>\n"


def _split(cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return cells[0], cells[1:]
