"""The study of who may move alpha: its rows and scales, its results.json, and the figures that follow from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_json, write_json

REFERENCE = "lsq"  # its runs train the warm-ups that the other rows take over
WITHIN = 1.0  # points of validation accuracy below the seed's reference run, at which a run counts as converged
# Student's t, two-sided 95 %, of 1 to 10 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Row:
    """One way to train after warm-up: flags of cifar10_qat_br.py, and the accuracy in percent that a guide names.

    ``strength`` names the field of Scale that gives --lambda-br, ``times`` over; without it, the scale's BR stays.
    """

    title: str
    flags: tuple[str, ...] = ()
    guide: float | None = None
    strength: str | None = None
    times: float = 1.0


_LSQ, _WEIGHTS = ("--lambda-br", "0", "--lambda-br-act", "0"), ("--lambda-br-act", "0")
_DAMPENING = ("--regularizer", "dampening", *_WEIGHTS)
_RISING = ("--lambda-br-schedule", "cosine")
ROWS = {
    REFERENCE: Row("LSQ alone", _LSQ),
    "default": Row("BR; CE moves alpha (default; S2)", (), 91.5),
    "freeze": Row("BR; alpha frozen (S1)", ("--freeze-alpha",), 91.0),
    "br-to-alpha": Row("BR; CE and BR move alpha", ("--br-backprop-to-alpha",), 90.0),
    "weights-only": Row("BR of weights only (published S2)", _WEIGHTS),
    "weights-reach": Row("Strong BR of weights only", _WEIGHTS, strength="reach"),
    "weights-rising": Row("Strong BR of weights, lambda rising", (*_WEIGHTS, *_RISING), strength="reach"),
    "dampening": Row("Dampening of weights only", _DAMPENING, strength="dampening"),
    "dampening-rising": Row("Dampening, lambda rising", (*_DAMPENING, *_RISING), strength="dampening"),
    "dampening-strong": Row("Dampening, ten times as strong", _DAMPENING, strength="dampening", times=10.0),
    "acts-only": Row("BR of activations only", ("--lambda-br", "0")),
    "br-to-alpha-scaled": Row("BR; CE and scaled BR move alpha", ("--br-backprop-to-alpha", "scaled")),
    "lsq-freeze": Row("LSQ alone; alpha frozen", (*_LSQ, "--freeze-alpha")),
    "weights-only-freeze": Row("BR of weights; frozen (published S1)", (*_WEIGHTS, "--freeze-alpha")),
    "weights-only-br-to-alpha": Row("BR of weights only; it moves alpha", (*_WEIGHTS, "--br-backprop-to-alpha")),
    "freeze-br-to-alpha": Row("BR; frozen, and BR to alpha", ("--freeze-alpha", "--br-backprop-to-alpha")),
}


DAMPENED = {row for row, each in ROWS.items() if "dampening" in each.flags}  # their bin loss is another sum


@dataclass(frozen=True)
class Scale:
    """How much is trained; flags of the two scripts, without data, seed and folders."""

    baseline: tuple[str, ...]
    qat: tuple[str, ...]
    strength: tuple[str, ...]  # of BR, in every row that has it
    reach: float  # --lambda-br at which BR alone would take the median weight half of the way to its level
    dampening: float  # the same of dampening, which takes every weight six tenths of the way
    rising: float  # times as large a lambda, where it rises along a cosine, has the same strength over all steps
    seeds: int

    def flags(self, row: str, extra: Sequence[str] = ()) -> list[str]:
        """What cifar10_qat_br.py trains ``row`` with; ``extra`` comes before what makes it this row."""
        return [*self.qat, *(() if row == REFERENCE else self.strength), *extra, *own_flags(row, self.strengths)]

    @property
    def strengths(self) -> dict[str, float]:
        """What own_flags needs to know of this scale."""
        return {key: getattr(self, key) for key in ("reach", "dampening", "rising")}


def own_flags(row: str, strengths: Mapping[str, Any]) -> list[str]:
    """What makes it this row: its flags, and its strength at a scale, by Scale.strengths or by a results.json."""
    flags, strength, times = ROWS[row].flags, ROWS[row].strength, ROWS[row].times
    if strength is None:
        return list(flags)
    times *= float(strengths["rising"]) if _RISING[0] in flags else 1.0
    return [*flags, "--lambda-br", f"{times * float(strengths[strength]):g}"]


SCALES = {
    "cpu": Scale(
        (
            *("--model", "resnet20", "--epochs", "10", "--channels-last"),
            *("--lr", "0.2", "--lr-schedule", "onecycle", "--nesterov"),
        ),
        (
            *("--model", "resnet20", "--limit", "1500", "--batch-size", "64", "--channels-last"),
            *("--warmup-epochs", "2", "--qat-epochs", "5"),
            *("--lr", "0.01", "--lr-alpha-act", "0.2", "--alpha-init", "mse"),
        ),
        ("--lambda-br", "10", "--lambda-br-act", "0.1"),
        reach=250.0,
        dampening=0.03,
        rising=4.68,
        seeds=3,
    ),
    "gpu": Scale(
        ("--model", "resnet18", "--recipe", "fast", "--epochs", "100"),
        (
            *("--model", "resnet18", "--recipe", "fast", "--compile", "none"),  # --monitor needs steps as they are
            *("--warmup-epochs", "30", "--qat-epochs", "100"),
        ),
        ("--lambda-br", "1", "--lambda-br-act", "0.1"),
        reach=220.0,  # bins of half a million weights
        dampening=0.0006,
        rising=4.48,
        seeds=3,
    ),
    "smoke": Scale(  # the course of a study in a minute; its figures mean nothing
        ("--model", "resnet20", "--epochs", "1", "--limit", "20", "--batch-size", "32"),
        (
            *("--model", "resnet20", "--limit", "20", "--batch-size", "32"),
            *("--warmup-epochs", "1", "--qat-epochs", "2"),
        ),
        ("--lambda-br", "10", "--lambda-br-act", "0.1"),
        reach=10.0,
        dampening=0.03,
        rising=4.68,
        seeds=2,
    ),
}
_KEPT = ("epoch", "phase", "ce", "train_acc", "val_acc", "br_w", "br_a", "alphas", "distance_w", "seconds")


def manifest(scale: str, data: Path | None, extra: list[str]) -> dict[str, Any]:
    """What makes two invocations the same study; seeds and rows may be added to one that is there."""
    chosen = SCALES[scale]
    flags = {"baseline_flags": chosen.baseline, "qat": chosen.qat, "strength": chosen.strength}
    flags = {key: list(value) for key, value in flags.items()} | chosen.strengths
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


def figures(run: dict[str, Any], reference: dict[str, Any] | None = None) -> dict[str, float | None]:
    """One finished run in numbers.

    Args:
        run, reference: of results.json; the reference row's run of the same seed.

    Returns:
        test: accuracy after the last epoch, percent (no choice of an epoch enters it). br_w, br_a: the bin losses at
        the last step (br_w of BR alone). distance: mean over all quantized weights of their distance to their level,
        in units of alpha, at the end. converged: the first epoch after warm-up whose validation accuracy is at most 1
        point below the best of the reference's epochs after warm-up; None if there is none, or no reference.
        oscillating: percent of weights, mean over the epochs after warm-up. drift_w, drift_a: mean over layers of
        alpha's relative change from the end of warm-up to the end, percent. seconds: of all epochs, warm-up included.
    """
    epochs, final, warmup = run["epochs"], run["final"], run["warmup_epochs"]
    seen = [epoch.get("oscillation", {}).get("oscillating") for epoch in epochs[warmup:]]
    found = {
        "test": final["last"]["test_acc"],
        "br_w": final.get("br_w", {}).get("end") if run["row"] not in DAMPENED else None,
        "br_a": final.get("br_a", {}).get("end"),
        "distance": epochs[-1].get("distance_w"),
        "converged": None if reference is None else _converged(run, reference),
        "oscillating": 100 * statistics.fmean(seen) if seen and None not in seen else None,
        "seconds": sum(epoch["seconds"] for epoch in epochs),
    }
    for side, layers in zip(("drift_w", "drift_a"), sides(epochs[-1]["alphas"])):
        before, after = epochs[warmup - 1]["alphas"], epochs[-1]["alphas"]
        changes = [100 * (after[name] / before[name] - 1) for name in layers]
        found[side] = statistics.fmean(changes) if changes else None
    return found


def in_numbers(results: dict[str, Any]) -> dict[str, list[dict[str, float | None]]]:
    """{row: figures() of its finished runs by seed}."""
    rows = by_row(results)
    references = {run["seed"]: run for run in rows.get(REFERENCE, ())}
    return {row: [figures(run, references.get(run["seed"])) for run in runs] for row, runs in rows.items()}


def _converged(run: dict[str, Any], reference: dict[str, Any]) -> int | None:
    after, there = (each["epochs"][each["warmup_epochs"] :] for each in (run, reference))
    if any(epoch["val_acc"] is None for epoch in (*after, *there)):  # --val-fraction 0
        return None
    wanted = max(epoch["val_acc"] for epoch in there) - WITHIN
    return next((epoch["epoch"] for epoch in after if epoch["val_acc"] >= wanted), None)


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
        each: by seed. mean: of them. half_width: of the mean's 95 % interval by Student's t of the differences, which
            are paired by seed; infinite of one seed. clear: whether that interval leaves out 0.
    """

    each: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def half_width(self) -> float:
        count = len(self.each)
        if count == 1:
            return math.inf
        return t95(count - 1) * statistics.stdev(self.each) / math.sqrt(count)

    @property
    def clear(self) -> bool:
        return abs(self.mean) > self.half_width


def t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; beyond the table by its expansion (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def difference(results: dict[str, Any], row: str, other: str) -> Difference | None:
    """``row`` minus ``other`` over the seeds that both have; None where there is none."""
    rows = by_row(results)
    tests = [{run["seed"]: figures(run)["test"] for run in rows.get(name, ())} for name in (row, other)]
    seeds = [seed for seed in tests[0] if seed in tests[1]]
    if not seeds:
        return None
    return Difference(tuple(tests[0][seed] - tests[1][seed] for seed in seeds))
