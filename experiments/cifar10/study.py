"""The study of who may move alpha: its rows and scales, its results.json, and the figures that follow from it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_json, write_json

REFERENCE = "lsq"  # its runs train the warm-ups that the other rows take over
WITHIN = 1.0  # points of validation accuracy around a run's best, in which it counts as converged


@dataclass(frozen=True)
class Row:
    """One way to train after warm-up: flags of cifar10_qat_br.py, and the accuracy in percent that a guide names."""

    title: str
    flags: tuple[str, ...] = ()
    guide: float | None = None


ROWS = {
    REFERENCE: Row("LSQ alone", ("--lambda-br", "0", "--lambda-br-act", "0")),
    "default": Row("BR; CE moves alpha (default; S2)", (), 91.5),
    "freeze": Row("BR; alpha frozen (S1)", ("--freeze-alpha",), 91.0),
    "br-to-alpha": Row("BR; CE and BR move alpha", ("--br-backprop-to-alpha",), 90.0),
    "freeze-br-to-alpha": Row("BR; frozen, and BR to alpha", ("--freeze-alpha", "--br-backprop-to-alpha")),
    "br-to-alpha-scaled": Row("BR; CE and scaled BR move alpha", ("--br-backprop-to-alpha", "scaled")),
    "weights-only": Row("BR of weights only", ("--lambda-br-act", "0")),
    "acts-only": Row("BR of activations only", ("--lambda-br", "0")),
}


@dataclass(frozen=True)
class Scale:
    """How much is trained; flags of the two scripts, without data, seed and folders."""

    baseline: tuple[str, ...]
    qat: tuple[str, ...]
    strength: tuple[str, ...]  # of BR, in every row that has it
    seeds: int


SCALES = {
    "cpu": Scale(
        (
            *("--model", "resnet20", "--epochs", "10"),
            *("--lr", "0.2", "--lr-schedule", "onecycle", "--nesterov"),
        ),
        (
            *("--model", "resnet20", "--limit", "1500", "--batch-size", "64"),
            *("--warmup-epochs", "2", "--qat-epochs", "5"),
            *("--lr", "0.01", "--lr-alpha-act", "0.2", "--alpha-init", "mse"),
        ),
        ("--lambda-br", "10", "--lambda-br-act", "0.1"),
        3,
    ),
    "gpu": Scale(
        ("--model", "resnet18", "--recipe", "fast", "--epochs", "100"),
        (
            *("--model", "resnet18", "--recipe", "fast", "--compile", "none"),  # --monitor needs steps as they are
            *("--warmup-epochs", "30", "--qat-epochs", "100"),
        ),
        ("--lambda-br", "1", "--lambda-br-act", "0.1"),
        3,
    ),
    "smoke": Scale(  # the course of a study in a minute; its figures mean nothing
        ("--model", "resnet20", "--epochs", "1", "--limit", "20", "--batch-size", "32"),
        (
            *("--model", "resnet20", "--limit", "20", "--batch-size", "32"),
            *("--warmup-epochs", "1", "--qat-epochs", "2"),
        ),
        ("--lambda-br", "10", "--lambda-br-act", "0.1"),
        2,
    ),
}
_KEPT = ("epoch", "phase", "ce", "train_acc", "val_acc", "br_w", "br_a", "alphas", "seconds")


def manifest(scale: str, data: Path | None, extra: list[str]) -> dict[str, Any]:
    """What makes two invocations the same study; seeds and rows may be added to one that is there."""
    chosen = SCALES[scale]
    flags = {"baseline_flags": chosen.baseline, "qat": chosen.qat, "strength": chosen.strength}
    flags = {key: list(value) for key, value in flags.items()}
    return {"scale": scale, **flags, "extra": extra, "data": None if data is None else str(data)}


def read(path: Path) -> dict[str, Any]:
    """A results.json of a run or of a study; UserError where it is missing or damaged."""
    return read_json(path, "name the --output of a study")


def trained(folder: Path) -> bool:
    """Whether the run in ``folder`` has ended well."""
    return _status(folder) == "finished"


def finished(folder: Path) -> bool:
    """Whether the run in ``folder`` needs no more training: it has ended, or it has diverged."""
    return _status(folder) in ("finished", "diverged")


def _status(folder: Path) -> str | None:
    path = folder / "results.json"
    return read(path)["status"] if path.exists() else None


def collect(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Gather the runs under ``folder`` into its results.json, and return what that holds."""
    baseline = read(folder / "baseline" / "results.json")
    runs = []
    paths = {(int(path.parts[-3].removeprefix("seed")), path.parts[-2]): path
             for path in folder.glob("seed*/*/results.json")}  # fmt: skip
    for (seed, row), path in sorted(paths.items()):
        run = read(path)
        entry = {"row": row, "seed": seed}
        entry |= {key: run.get(key) for key in ("status", "command", "device", "versions", "data")}
        entry["epochs"] = [_trimmed(epoch) for epoch in run["epochs"]]
        entry["warmup_epochs"], entry["final"] = run["warmup_epochs"], run.get("final")
        histograms = path.with_name("histograms.json")
        first = row not in {each["row"] for each in runs if "histograms" in each}
        if first and run["status"] == "finished" and histograms.exists():
            entry["histograms"] = read_json(histograms, "delete it: the report then lacks this row's weights")
        runs.append(entry)
    kept = ("command", "device", "versions", "data", "final", "options")
    about = {**about, "seeds": sorted({run["seed"] for run in runs})}
    results = {**about, "baseline": {key: baseline.get(key) for key in kept}, "runs": runs}
    write_json(folder / "results.json", results)
    return results


def _trimmed(epoch: dict[str, Any]) -> dict[str, Any]:
    kept = {key: epoch[key] for key in _KEPT if key in epoch}
    if "oscillation" in epoch:
        kept["oscillation"] = {key: value for key, value in epoch["oscillation"].items() if key != "layers"}
    return kept


def by_row(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{row: its finished runs by seed}, in the order of ROWS, without rows that have none."""
    runs = sorted(results["runs"], key=lambda run: run["seed"])
    rows = {row: [run for run in runs if run["row"] == row and run["status"] == "finished"] for row in ROWS}
    return {row: found for row, found in rows.items() if found}


def figures(run: dict[str, Any]) -> dict[str, float | None]:
    """One finished run in numbers.

    Returns:
        test: accuracy after the last epoch, percent (no choice of an epoch enters it). br_w, br_a: the bin losses at
        the last step. converged: the first epoch whose validation accuracy is within 1 point of the run's best.
        oscillating: percent of weights, in the last epoch. drift_w, drift_a: mean over layers of alpha's relative
        change from the end of warm-up to the end, percent. seconds: of all epochs, warm-up included.
    """
    epochs, final, warmup = run["epochs"], run["final"], run["warmup_epochs"]
    seen = epochs[-1].get("oscillation")
    found = {
        "test": final["last"]["test_acc"],
        "br_w": final.get("br_w", {}).get("end"),
        "br_a": final.get("br_a", {}).get("end"),
        "converged": _converged(epochs),
        "oscillating": 100 * seen["oscillating"] if seen else None,
        "seconds": sum(epoch["seconds"] for epoch in epochs),
    }
    for side, layers in zip(("drift_w", "drift_a"), sides(epochs[-1]["alphas"])):
        before, after = epochs[warmup - 1]["alphas"], epochs[-1]["alphas"]
        changes = [100 * (after[name] / before[name] - 1) for name in layers]
        found[side] = statistics.fmean(changes) if changes else None
    return found


def _converged(epochs: list[dict[str, Any]]) -> int | None:
    accuracy = [epoch["val_acc"] for epoch in epochs]
    if None in accuracy:  # --val-fraction 0
        return None
    return next(e["epoch"] for e, found in zip(epochs, accuracy) if found >= max(accuracy) - WITHIN)


def sides(alphas: dict[str, float]) -> tuple[list[str], list[str]]:
    """Names of the quantizers of weights, and of activations, in the order of the network."""
    weights = [name for name in alphas if name.endswith("weight_quantizer")]
    return weights, [name for name in alphas if name not in weights]


def mean_and_spread(values: list[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds (0 of one seed); None where a value is missing."""
    if not values or any(value is None for value in values):
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """Test accuracy of one row minus another's, seed by seed, in points.

    Attributes:
        each: by seed. mean: of them. spread: the larger of the two rows' standard deviations over seeds.
        clear: at least three seeds, all of one sign, and a mean beyond the spread.
    """

    each: tuple[float, ...]
    mean: float
    spread: float

    @property
    def clear(self) -> bool:
        one_sign = all(value > 0 for value in self.each) or all(value < 0 for value in self.each)
        return len(self.each) >= 3 and one_sign and abs(self.mean) > self.spread


def difference(results: dict[str, Any], row: str, other: str) -> Difference | None:
    """``row`` minus ``other`` over the seeds that both have; None where there is none."""
    rows = by_row(results)
    tests = [{run["seed"]: figures(run)["test"] for run in rows.get(name, ())} for name in (row, other)]
    seeds = [seed for seed in tests[0] if seed in tests[1]]
    if not seeds:
        return None
    each = tuple(tests[0][seed] - tests[1][seed] for seed in seeds)
    spread = max(mean_and_spread([test[seed] for seed in seeds])[1] for test in tests)
    return Difference(each, statistics.fmean(each), spread)
