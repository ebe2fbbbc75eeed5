"""The search over hyper-parameters: what it draws, that it sees no test image, and that it goes on where it was."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
engine, files, runs, space, trials = (
    importlib.import_module(f"cifar10.{name}") for name in ("engine", "files", "runs", "space", "trials")
)
main = importlib.import_module("search").main

FIXED = [*tiny.FLAGS, "--qat-epochs", "4"]
SPACE = ["--space", "lr=log:0.01:0.1", "--space", "lambda_br=0,1,10", "--space", "warmup_share=lin:0.2:0.6"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(runs.MODELS, "resnet20", tiny.model)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(folder: Path, *flags: str) -> int:
    return main(["--output-dir", str(folder), *SPACE, *flags, "--", *FIXED])


def _saved(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


# What is drawn


def test_draws_are_within_their_range_and_evenly_spread():
    low, high = 1e-4, 1.0
    source = random.Random(0)
    drawn = [space.Axis.read(f"lr=log:{low}:{high}").draw(source) for _ in range(400)]
    assert low <= min(drawn) and max(drawn) <= high
    assert 150 < sum(value < 1e-2 for value in drawn) < 250  # half of the decades
    assert {space.Axis.read("lr=1,2,3").draw(source) for _ in range(50)} == {1.0, 2.0, 3.0}
    drawn = [space.Axis.read("momentum=lin:0.5:0.9").draw(source) for _ in range(400)]
    assert 0.5 <= min(drawn) and max(drawn) <= 0.9 and 150 < sum(value < 0.7 for value in drawn) < 250


def test_a_longer_search_begins_with_the_shorter_one():
    axes = space.read(None)
    assert space.trials(axes, "random", 9, 3)[:5] == space.trials(axes, "random", 5, 3)
    assert space.trials(axes, "random", 5, 3) != space.trials(axes, "random", 5, 4)
    fewer = space.trials(axes[:2], "random", 5, 3)  # nor does a value depend on what else is searched
    assert all(few.items() <= many.items() for few, many in zip(fewer, space.trials(axes, "random", 5, 3)))


def test_a_grid_has_every_combination():
    axes = space.read(["lr=log:0.01:1:3", "momentum=0,0.9", "lr-warmup=lin:0:0.5:2"])
    made = space.trials(axes, "grid", 0, 0)
    assert len(made) == 3 * 2 * 2 == len({tuple(each.values()) for each in made})
    assert sorted({each["lr"] for each in made}) == [0.01, 0.1, 1.0]
    assert {each["lr_warmup"] for each in made} == {0.0, 0.5}
    with pytest.raises(files.UserError, match="a grid needs :POINTS"):
        space.trials(space.read(["lr=log:0.01:1"]), "grid", 0, 0)


@pytest.mark.parametrize(
    "text", ["lr", "lr=", "epochs=3", "lr=log:0:1", "lr=lin:2:1", "lr=log:1:2:1", "lr=1,x", "lr=nan", "lr=lin:1:2:3:4"]
)
def test_other_texts_are_no_axis(text):
    with pytest.raises(files.UserError, match="--space .*: expected NAME="):
        space.read([text])


@pytest.mark.parametrize(
    ("count", "halving", "epochs", "warmup", "rungs", "kept"),
    [
        (20, 3, 100, 0, [11, 33, 100], [20, 6, 2]),
        (20, 3, 100, 40, [46, 60, 100], [20, 6, 2]),
        (4, 2, 4, 0, [2, 4], [4, 2]),
        (2, 0, 9, 3, [9], [2]),
        (8, 2, 2, 0, [1, 2], [8, 4]),
        (8, 2, 2, 1, [2], [8]),
    ],
)
def test_rungs_of_successive_halving(count, halving, epochs, warmup, rungs, kept):
    assert trials.rungs(epochs, count, halving, warmup) == rungs
    assert [trials.kept(count, halving, rung) if halving else count for rung in range(len(rungs))] == kept


# Two tiny trials


def test_two_trials_never_see_a_test_image_and_leave_a_table(tmp_path, monkeypatch, capsys):
    load, evaluated = trials.data.load, []

    def poisoned(*args, **kwargs):
        """The splits as they are, the test images turned into something that cannot be evaluated."""
        splits = load(*args, **kwargs)
        assert len(splits.test) == 80
        return trials.data.Splits(splits.train, splits.val, None, splits.classes, splits.source)

    def evaluate(self, split, original=engine.Trainer.evaluate):
        evaluated.append(split)
        assert split is self.validation
        return original(self, split)

    monkeypatch.setattr(trials.data, "load", poisoned)
    monkeypatch.setattr(engine.Trainer, "evaluate", evaluate)
    assert _run(tmp_path, "--trials", "2") == 0
    printed = capsys.readouterr().out
    assert len(evaluated) == 2 * 4 and "and 0 test images" in printed
    search = _saved(tmp_path)
    assert [trial["status"] for trial in search["trials"]] == ["finished", "finished"]
    for trial in search["trials"]:
        results = json.loads((tmp_path / "trials" / f"{trial['number']:03d}" / "results.json").read_text())
        assert trial["val_acc"] == max(e["val_acc"] for e in results["epochs"] if e["phase"] == "BR")
        assert (trial["versions"], trial["device"]) == (results["versions"], results["device"])
        assert results["final"] == {} and results["data"]["test"] == 0
        wanted = {"lr": trial["params"]["lr"], "lambda_br": trial["params"]["lambda_br"], "qat_epochs": 4,
                  "warmup_epochs": round(4 * trial["params"]["warmup_share"])}  # fmt: skip
        assert results["options"].items() >= wanted.items()
    assert not list(tmp_path.rglob("*.pth"))
    # The table, from the JSON alone.
    table = (tmp_path / "search.md").read_text()
    (tmp_path / "search.md").unlink()
    assert main(["--output-dir", str(tmp_path), "--table"]) == 0
    assert (tmp_path / "search.md").read_text() == table and capsys.readouterr().out == table + "\n"
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and float(rows[2].split("|")[5]) >= float(rows[3].split("|")[5])


def test_the_sealed_split_has_nothing_to_read():
    sealed = trials.SealedSplit()
    assert len(sealed) == 0
    for use in (lambda: sealed.images, lambda: sealed.to("cpu"), lambda: list(sealed)):
        with pytest.raises(AssertionError, match="validation split alone"):
            use()


def test_a_killed_search_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    flags = ["--trials", "4", "--halving", "2"]
    assert _run(tmp_path / "one", *flags) == 0
    for steps in (3, 22, 13, 33):  # 5 an epoch, rungs of 3 and 4: within trial 1, trial 2, trial 3, and the second rung
        with monkeypatch.context() as patch:
            tiny.interrupt(patch, engine, steps)
            assert _run(tmp_path / "two", *flags) == 130
        running = [trial for trial in _saved(tmp_path / "two")["trials"] if trial["status"] == "running"]
        assert len(running) == 1
    assert _run(tmp_path / "two", *flags) == 0
    one, two = _saved(tmp_path / "one"), _saved(tmp_path / "two")
    assert tiny.equal(one, two, frozenset({"options"}))
    assert sorted(trial["status"] for trial in one["trials"]) == ["dropped"] * 2 + ["finished"] * 2
    assert sorted(trial["epochs"] for trial in one["trials"]) == [3, 3, 4, 4]
    first = [tmp_path / run / "trials" / "001" / "results.json" for run in ("one", "two")]
    assert tiny.equal(*(json.loads(path.read_text())["epochs"] for path in first))
    before = (tmp_path / "two" / "search.json").read_bytes()
    assert _run(tmp_path / "two", *flags) == 0  # nothing is left to do
    assert (tmp_path / "two" / "search.json").read_bytes() == before


def test_a_trial_that_diverges_ranks_last_and_stops_nothing(tmp_path, monkeypatch):
    begin = engine.Trainer.train_epoch

    def poisoned(self, epoch):
        if epoch == 2 and self.lambda_weights == 10:
            self.model[3].weight.data[0] = float("nan")
        return begin(self, epoch)

    monkeypatch.setattr(engine.Trainer, "train_epoch", poisoned)
    flags = ["--method", "grid", "--space", "lambda_br=10,1"]
    assert main(["--output-dir", str(tmp_path), *flags, "--", *tiny.QAT]) == 0
    search = _saved(tmp_path)
    assert [(t["status"], t["epochs"], t["val_acc"] is None) for t in search["trials"]] == [
        ("diverged", 1, True), ("finished", 3, False),
    ]  # fmt: skip
    assert "| 1 | 10 | – | – | 1 | diverged |" in (tmp_path / "search.md").read_text().splitlines()[-1]


@pytest.mark.parametrize(("share", "rungs"), [("0.25,0.5", [3, 4]), ("1", [2, 4]), ("0", [2, 4]), ("0.25,0.75", [4])])
def test_no_rung_lies_in_a_warmup(share, rungs, tmp_path):
    """Where a trial is nothing but warm-up, there is no BR to wait for."""
    axes = space.read(["lambda_br=1,2,5,10", f"warmup_share={share}"])
    assert trials.Search(tmp_path, axes, "grid", 0, 0, 2, FIXED).head["rungs"] == rungs


def test_a_dry_run_lists_the_trials_and_writes_nothing(tmp_path, capsys):
    assert _run(tmp_path / "search", "--trials", "3", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("3 trials of 4 epochs") and "lambda_br" in lines[3]
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("flags", "fixed", "expected"),
    [
        ([], [*FIXED, "--lr", "1"], "--lr among the flags of the trials: it is searched"),
        ([], [*FIXED, "--warmup-epochs", "1"], "--warmup-epochs among the flags of the trials: it is searched"),
        ([], [*FIXED, "--quick"], "--quick among the flags of the trials: a search decides it"),
        ([], [*FIXED, "--output-dir", "y"], "--output-dir y among the flags of the trials: a search decides it"),
        ([], [*FIXED, "--val-fraction", "0"], "leave some"),
        ([], [*FIXED, "--momentum", "2"], "--momentum 2.0: expected"),
        (["--space", "momentum=1"], FIXED, "trial 1: --momentum 1.0: expected"),
        (["--space", "lr=1"], FIXED, "--space lr: given 2 times"),
        (["--trials", "0"], FIXED, "--trials 0: expected 1 or more"),
        (["--halving", "1"], FIXED, "--halving 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(flags, fixed, expected, tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path / "search"), *SPACE, *flags, "--", *fixed]) == 2
    message = capsys.readouterr().err
    assert expected in message and len(message.strip().splitlines()) == 1 and not (tmp_path / "search").exists()


def test_a_search_without_validation_images_is_refused(tmp_path, capsys):
    flags = [*FIXED, "--limit", "12", "--val-fraction", "0.01"]
    assert main(["--output-dir", str(tmp_path / "search"), *SPACE, "--trials", "1", "--", *flags]) == 2
    assert "--val-fraction 0.01 of so few images leaves none to choose by" in capsys.readouterr().err


def test_another_search_is_not_continued(tmp_path, capsys):
    search = trials.Search(tmp_path, space.read(SPACE[1::2]), "random", 2, 0, 0, FIXED)
    search._write()
    for flags, what in ((["--seed", "1"], "seed"), (["--trials", "1"], "trials"), (["--halving", "2"], "halving")):
        assert _run(tmp_path, "--dry-run", "--trials", "2", *flags) == 2
        assert f"holds another search ({what}" in capsys.readouterr().err
    assert _run(tmp_path, "--dry-run", "--trials", "5") == 0  # more of the same
