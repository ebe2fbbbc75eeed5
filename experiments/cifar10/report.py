"""The report of a run: PNG plots and one HTML page that holds them, from results.json and histograms.json alone.

python -m experiments.cifar10.report RUN_FOLDER makes them again.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from pathlib import Path
from typing import Any

from .files import UserError, atomic_write, read_json
from .options import FLOAT_BITS

REMEDY = "name the --output-dir of a run"
PLOTS = {
    "losses": "Cross-entropy, and what bin regularization adds to the training loss; means of each epoch.",
    "accuracy": "Accuracy per epoch. Test images are looked at once, after training.",
    "bin_losses": "BR_W and BR_A: sums over the regularized layers of {weights}, and of {activations}.",
    "alphas": "The step size of every quantizer after each epoch.",
    "weights": "Each layer's weights divided by its alpha, so that the levels lie at whole numbers: when the BR phase "
    "began and at the end. Weights beyond the plotted range are counted at its edge.",
}
SUMS = {
    "br": "the mean squared distance to the level, summed over occupied levels",
    "dampening": "the squared distances to the level (dampening)",
}
TITLES = {
    "losses": "Loss",
    "accuracy": "Accuracy",
    "bin_losses": "Bin losses",
    "alphas": "Step sizes",
    "weights": "Weights against their levels",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; max-width: 1020px; margin: 2.5em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin-top: 2.2em; }
.lead { display: flex; gap: 1em; flex-wrap: wrap; margin: 1.4em 0; }
.lead div { background: #f3f5f7; border-radius: 8px; padding: .7em 1.1em; }
.lead b { display: block; font-size: 1.5em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: .25em .7em; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .scroll { overflow-x: auto; }
pre { background: #f3f5f7; border-radius: 8px; padding: .8em 1em; overflow-x: auto; font-size: 13px; }
img { max-width: 100%; } .note { color: #5a6672; } .bad { color: #b3261e; font-weight: bold; }
"""


def write(folder: Path) -> Path:
    """Draw the plots of the run in ``folder`` and write them, and report.html, beside its results.json.

    Returns:
        The page's path.

    Raises:
        UserError: where there is no results.json, or no epoch in it.
    """
    from . import plots  # matplotlib takes a second to import, and only reports need it

    results, histograms = read_json(folder / "results.json", REMEDY), {}
    if (folder / "histograms.json").exists():
        histograms = read_json(folder / "histograms.json", REMEDY)
    if not results.get("epochs"):
        raise UserError(f"{folder / 'results.json'}: holds no epoch; nothing to report")
    (folder / "plots").mkdir(exist_ok=True)
    images = save_figures(folder / "plots", plots.draw_all(results, histograms))
    page = folder / "report.html"
    with atomic_write(page, "w") as file:
        file.write(_page(results, images))
    return page


def save_figures(folder: Path, figures: dict[str, Any]) -> dict[str, bytes]:
    """Write {name: matplotlib's figure} into ``folder`` as NAME.png, and close them; what the files hold."""
    from .plots import plt

    images = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        images[name] = buffer.getvalue()
        with atomic_write(folder / f"{name}.png") as file:
            file.write(images[name])
    return images


def _page(results: dict[str, Any], images: dict[str, bytes]) -> str:
    options = results["options"]
    title = f"{options['model']} on CIFAR-10, {_what(results)}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style><body><h1>{html.escape(title)}</h1>",
        f'<p class="note">{html.escape(_summary(results))}</p>',
    ]
    if results["status"] == "diverged":
        parts.append(f'<p class="bad">{html.escape(results["error"])}</p>')
    parts.append(_lead(results))
    for name, image in images.items():
        caption = PLOTS[name].format(weights=SUMS[options.get("regularizer", "br")], activations=SUMS["br"])
        parts += with_image(TITLES[name], caption, image)
    if "alpha_control" in results:
        parts.append(f"<h2>Which losses moved alpha</h2><pre>{html.escape(results['alpha_control'])}</pre>")
    parts.append(f"<h2>Epochs</h2>{_epochs(results['epochs'])}")
    rows = {"command": results["command"], **{name: value for name, value in options.items()}}
    rows |= {"device": results["device"], **results["versions"]}
    parts.append(f"<h2>Configuration</h2>{as_table([], [[name, _text(value)] for name, value in rows.items()])}")
    return "\n".join(parts) + "</body></html>\n"


def _what(results: dict[str, Any]) -> str:
    options = results["options"]
    if "num_bits_weight" not in options:
        return "float"
    text = f"W{options['num_bits_weight']}A{options['num_bits_act']}"
    ends = {end: options.get(f"num_bits_{end}") for end in ("first", "last")}
    ends = [f"{end} layer {bits} bits" for end, bits in ends.items() if bits not in (None, options["num_bits_weight"])]
    text += f" ({', '.join(ends)}) with LSQ" if ends else " with LSQ"
    way = {"br": "BR", "dampening": "dampening"}[options.get("regularizer", "br")]
    sides = {"weight": ("lambda_br", f"{way} of weights"), "act": ("lambda_br_act", "BR of activations")}
    losses = [what for side, (strength, what) in sides.items()
              if options[strength] > 0 and options[f"num_bits_{side}"] < FLOAT_BITS]  # fmt: skip
    losses = losses if any("br_w" in epoch for epoch in results["epochs"]) else []
    return " and ".join([text, *losses]) if losses else f"{text} alone"


def _summary(results: dict[str, Any]) -> str:
    data, epochs = results["data"], results["epochs"]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return (
        f"{len(epochs)} epochs in {seconds:,.0f} s on {results['device']}; {data['train']:,} training, {data['val']:,} "
        f"validation and {data['test']:,} test images from {data['source']}."
    )


def _lead(results: dict[str, Any]) -> str:
    """The final figures in boxes; the last epoch's where the run has not ended."""
    final = results.get("final")
    if not final:
        return f"<p class='note'>status: {results['status']}; no test figures yet.</p>"
    boxes = [
        (f"test accuracy, {which} epoch ({final[which]['epoch']})", f"{final[which]['test_acc']:.2f} %")
        for which in ("best", "last")
    ]
    boxes += [
        (f"{key.upper()}, first to last step of the BR phase", f"{final[key]['start']:.4g} → {final[key]['end']:.4g}")
        for key in ("br_w", "br_a")
        if key in final
    ]
    return '<div class="lead">' + "".join(f"<div><b>{value}</b>{label}</div>" for label, value in boxes) + "</div>"


def _epochs(epochs: list[dict[str, Any]]) -> str:
    keys = ["epoch", "phase", "loss", "ce", "train_acc", "val_loss", "val_acc", "br_w", "br_a", "lr", "seconds"]
    keys = [key for key in keys if any(epoch.get(key) is not None for epoch in epochs)]
    return as_table(keys, [[_text(epoch.get(key)) for key in keys] for epoch in epochs])


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def with_image(title: str, caption: str, image: bytes) -> list[str]:
    """One figure's part of a page, the PNG in it; title and caption are HTML."""
    encoded = base64.b64encode(image).decode()
    return [f"<h2>{title}</h2><p class='note'>{caption}</p>",
            f'<img alt="{title}" src="data:image/png;base64,{encoded}">']  # fmt: skip


def as_table(head: list[str], rows: list[list[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the report of a run again, from its results.json.")
    parser.add_argument("folder", type=Path, help="the --output-dir of the run")
    try:
        print(f"report: {write(parser.parse_args().folder)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
