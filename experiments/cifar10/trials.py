"""A search over hyper-parameters: trials that see training and validation images alone, one file that says how far
the search is, successive halving, and the table of it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import types
from pathlib import Path
from typing import Any

from . import checkpoints, data, folders, space
from .device import pick_device
from .engine import TrainingDiverged
from .files import UserError, atomic_write, markdown_table, read_json, write_json
from .options import flag, parse, plain, qat_parser
from .runs import NOT_PRETRAINED, QAT, Run

NOT_IN_A_TRIAL = {"resume", "overwrite", "quick", "tensorboard"}


class SealedSplit:
    """What a search has in the place of the test images: none, and an AssertionError for whoever asks for them."""

    def __len__(self) -> int:
        return 0

    def __getattr__(self, name: str):
        raise AssertionError(f"a search reads the validation split alone: nothing may ask for the test split's {name}")

    def __iter__(self):
        raise AssertionError("a search reads the validation split alone: nothing may iterate over the test split")


def without_test(splits: data.Splits) -> data.Splits:
    """The splits with the test images gone."""
    return data.Splits(splits.train, splits.val, SealedSplit(), splits.classes, splits.source)


class Paused(Exception):
    """The trial has trained for as many epochs as this rung gives it."""


class Trial(Run):
    """A run of cifar10_qat_br.py that stops after epoch ``until``, and is neither tested nor reported.

    Its schedules are those of the whole run: a trial that goes on later is, bit for bit, one that never stopped.
    """

    until: int

    def _epoch(self, trainer, epoch: int) -> dict[str, Any]:
        if epoch > self.until:
            raise Paused
        return super()._epoch(trainer, epoch)

    def _header(self, trainer) -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):  # the search has said what all trials share
            return super()._header(trainer)

    def _warn_unless_pretrained(self) -> None:
        pass  # the search has said it once

    def _test(self, trainer, history: list, best: dict, board) -> dict[str, Any]:
        assert len(self.splits.test) == 0, "a search never sees the test images"
        return {}

    def _finish(self, trainer, results: dict[str, Any]) -> None:
        self._write_results(results)


class Search:
    """All trials of one search, in one folder; made again from its search.json, it goes on where it stopped.

    Args:
        folder: gets search.json, search.md and trials/NUMBER/.
        axes: what is searched.
        method, count, seed: as in space.trials.
        halving: 0, or how many times fewer trials, and more epochs, every rung of successive halving has
            (Jamieson and Talwalkar, Non-stochastic Best Arm Identification, AISTATS 2016).
        fixed: flags of cifar10_qat_br.py that all trials share.

    Raises:
        UserError: for flags that a trial cannot have, or a folder that holds another search. Nothing is written.
    """

    def __init__(
        self,
        folder: Path,
        axes: list[space.Axis],
        method: str,
        count: int,
        seed: int,
        halving: int,
        fixed: list[str],
    ) -> None:
        self.folder, self.path = folder, folder / "search.json"
        searched = {"warmup_epochs" if axis.name == space.WARMUP_SHARE else axis.name for axis in axes}
        none_yet = ["--warmup-epochs", "0"] if "warmup_epochs" in searched else []
        base, given = parse(qat_parser(), ["--output-dir", str(folder), *none_yet, *fixed])
        if none_yet and not any(each.startswith("--warmup-epochs") for each in fixed):
            given -= {"warmup_epochs"}
        if base.output_dir != folder:
            raise UserError(f"--output-dir {base.output_dir} among the flags of the trials: a search decides it")
        for name in sorted(given & (NOT_IN_A_TRIAL | searched)):
            why = "it is searched" if name in searched else "a search decides it"
            raise UserError(f"{flag(name)} among the flags of the trials: {why}; leave it out")
        if base.val_fraction == 0:
            raise UserError("--val-fraction 0: a search chooses by validation images; leave some")
        self.epochs = base.qat_epochs
        drawn = space.trials(axes, method, count, seed)
        self.options = [self._options(number, params, fixed) for number, params in enumerate(drawn, start=1)]
        self.head = {
            "script": QAT,
            "flags": fixed,
            "space": space.plain(axes),
            "method": method,
            "seed": seed,
            "halving": halving,
            "of_trials": len(drawn) if halving else None,  # else a search may grow
            "rungs": rungs(self.epochs, len(drawn), halving, self._longest_warmup()),
        }
        waiting = {"status": "waiting", "epochs": 0, "val_acc": None, "best_epoch": None, "seconds": 0.0}
        self.trials = [{"number": i, "params": params, **waiting} for i, params in enumerate(drawn, start=1)]
        if self.path.exists():
            self._go_on(read(folder))

    def _options(self, number: int, params: dict[str, float], fixed: list[str]) -> tuple[argparse.Namespace, set[str]]:
        flags = [*fixed, "--output-dir", str(self._trial_folder(number))]
        try:
            return parse(qat_parser(), [*flags, *space.flags(params, self.epochs)])
        except UserError as error:
            raise UserError(f"trial {number}: {error}; change its --space") from error

    def _longest_warmup(self) -> int:
        warmups = [options.warmup_epochs for options, _ in self.options]
        return max((each for each in warmups if each < self.epochs), default=0)

    def _go_on(self, saved: dict[str, Any]) -> None:
        differing = [key for key in self.head if self.head[key] != saved.get(key)]
        before = [trial["params"] for trial in saved["trials"]]
        if differing or before != [trial["params"] for trial in self.trials[: len(before)]]:
            what = ", ".join(differing) or "trials"
            raise UserError(
                f"{self.path}: holds another search ({what} differ); name another --output-dir, or ask for the same"
            )
        self.trials[: len(before)] = saved["trials"]

    def listing(self) -> str:
        """One line for every trial, and the epochs of the rungs."""
        lines = [f"{len(self.trials)} trials of {self.epochs} epochs; epochs of the rungs: {self.head['rungs']}"]
        lines += [f"{each['number']:4d}  {_named(each['params'])}" for each in self.trials]
        return "\n".join(lines)

    def run(self) -> None:
        """Train what is left; search.json and search.md are written after every trial."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("search.py works in one process: start it without torchrun")
        first = self.options[0][0]
        device = pick_device(first.gpu)
        splits = without_test(
            data.load(first.data, download=first.download, val_fraction=first.val_fraction, limit=first.limit)
        )
        if not len(splits.val):
            share = f"--val-fraction {first.val_fraction:g}"
            raise UserError(f"{share} of so few images leaves none to choose by: raise it, or --limit")
        print(splits.describe())
        if first.pretrained_baseline is None:
            print(NOT_PRETRAINED)
        shared = types.SimpleNamespace(device=device, splits=splits)
        for rung, until in enumerate(self.head["rungs"]):
            for trial in self.trials:
                if trial["status"] in ("waiting", "paused", "running") and trial["epochs"] < until:
                    self._train(trial, until, shared)
            self._drop(rung)
            self._write()

    def _train(self, trial: dict[str, Any], until: int, shared) -> None:
        best = self.best()
        so_far = f"; best so far {best['val_acc']:.2f} % (trial {best['number']})" if best else ""
        print(f"\ntrial {trial['number']}/{len(self.trials)}, to epoch {until}: {_named(trial['params'])}{so_far}")
        options, given = self.options[trial["number"] - 1]
        resume = (options.output_dir / folders.CHECKPOINTS / "last.pth").exists()
        options = argparse.Namespace(**{**vars(options), "resume": resume})
        run = Trial(QAT, options, given, f"search.py, trial {trial['number']}", shared)
        run.until = until
        trial["status"] = "running"
        self._write()
        try:
            results = run.go()
            trial["status"] = "finished"
        except Paused:
            # A kill can leave results.json an epoch behind the checkpoint.
            state = checkpoints.load(run.last_path, "--output-dir")
            results = {"epochs": state["history"], "best": state["best"]}
            trial["status"] = "paused"
        except TrainingDiverged as error:
            print(error)
            results = {"epochs": json.loads((run.folder / "results.json").read_text())["epochs"]}
            trial["status"] = "diverged"
        trial["epochs"] = len(results["epochs"])
        trial["seconds"] = sum(epoch["seconds"] for epoch in results["epochs"])
        best = results.get("best", {"val_acc": None, "epoch": None})
        trial["val_acc"], trial["best_epoch"] = best["val_acc"], best["epoch"]
        ran = json.loads((run.folder / "results.json").read_text())
        trial["versions"], trial["device"] = ran["versions"], ran["device"]
        self._write()
        if trial["status"] != "paused":
            self._forget_weights(trial)

    def _drop(self, rung: int) -> None:
        """Successive halving: after every rung but the last the best trials go on."""
        if rung + 1 == len(self.head["rungs"]):
            return
        alive = ranked([trial for trial in self.trials if trial["status"] in ("paused", "finished")])
        for trial in alive[kept(len(self.trials), self.head["halving"], rung + 1) :]:
            trial["status"] = "dropped"
            self._forget_weights(trial)

    def _trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03d}"

    def _forget_weights(self, trial: dict[str, Any]) -> None:
        """A trial that goes no further keeps its figures: hundreds of checkpoints would fill a disk."""
        shutil.rmtree(self._trial_folder(trial["number"]) / folders.CHECKPOINTS, ignore_errors=True)

    def best(self) -> dict[str, Any] | None:
        done = ranked([trial for trial in self.trials if trial["val_acc"] is not None])
        return done[0] if done else None

    def command(self) -> str:
        """What trains the best trial's hyper-parameters again, test images included."""
        flags = [*self.head["flags"], *space.flags(self.best()["params"], self.epochs)]
        return shlex.join(["python", f"experiments/{QAT}.py", *flags, "--output-dir", str(self.folder / "best")])

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.head, "options": plain(self.options[0][0]), "trials": self.trials})
        with atomic_write(self.folder / "search.md", "w") as file:
            file.write(table(self.folder))


def rungs(epochs: int, count: int, halving: int, warmup: int = 0) -> list[int]:
    """The epochs after which trials are compared, the last being all of them.

    What is divided are the epochs after ``warmup``, the longest of all trials: before its end BR's strengths have
    changed nothing.
    """
    made = [epochs - warmup]
    while halving and made[0] // halving >= 1 and kept(count, halving, len(made)) > 1:
        made.insert(0, made[0] // halving)
    return [warmup + each for each in made]


def kept(count: int, halving: int, rung: int) -> int:
    """How many of ``count`` trials take part in rung ``rung``, counted from 0."""
    return max(count // halving**rung, 1)


def ranked(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best first: by validation accuracy of the best epoch, and of equals the earlier trial."""
    return sorted(trials, key=lambda t: (-1.0 if t["val_acc"] is None else t["val_acc"], -t["number"]), reverse=True)


def read(folder: Path) -> dict[str, Any]:
    """What a search left in ``folder``.

    Raises:
        UserError: where there is none.
    """
    return read_json(folder / "search.json", "name the --output-dir of a search")


def table(folder: Path) -> str:
    """Markdown, from search.json alone: every trial, the best first."""
    search = read(folder)
    names = [axis["name"] for axis in search["space"]]
    titles, rows = ["trial", *names, "validation %", "of epoch", "epochs", "status", "s"], []
    for trial in ranked(search["trials"]):
        values = [f"{trial['params'][name]:g}" for name in names]
        accuracy = "–" if trial["val_acc"] is None else f"{trial['val_acc']:.2f}"
        epoch = "–" if trial["best_epoch"] is None else str(trial["best_epoch"])
        rows.append([str(trial["number"]), *values, accuracy, epoch, str(trial["epochs"]), trial["status"],
                     f"{trial['seconds']:.0f}"])  # fmt: skip
    head = (
        f"{len(search['trials'])} trials, {search['method']}, seed {search['seed']}, epochs of the rungs "
        f"{search['rungs']}; all with `{shlex.join(search['flags'])}`. Validation images alone: the best of many "
        "trials is the best partly by chance, and what it reaches on test images is for a run of its own to say."
    )
    return "\n".join([head, "", markdown_table(titles, rows), ""])


def _named(params: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in params.items())
