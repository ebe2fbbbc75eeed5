"""The experiment scripts in two processes: the same losses as in one for the same global batch, files, resumption."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

# 70 training images in batches of 20, the last of 10.
FLAGS = ["--model", "resnet20", "--limit", "8", "--batch-size", "20", "--gpu", "-1", "--qat-epochs", "3",
         "--warmup-epochs", "1", "--lambda-br-act", "0.1", "--br-backprop-to-alpha-act", "scaled",
         "--freeze-weight-alpha", "--lr", "0.02"]  # fmt: skip
FIGURES = ("loss", "ce", "train_acc", "val_loss", "val_acc", "br_w", "br_a", "br_a_start", "br_a_end", "lr")


def _small(classes: int) -> nn.Module:
    """Without BatchNorm, whose statistics would be those of a process's share: on the CPU there is no SyncBatchNorm."""
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), relu, nn.Conv2d(8, 16, 3, stride=2), relu, nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, classes),
    )  # fmt: skip


def _run(folder: Path, *flags: str, stop: tuple[int, int] | None = None) -> list[int]:
    """Exit codes of the script: run to its end, or interrupted at (epoch, step) and then resumed."""
    qat = importlib.import_module("cifar10_qat_br").main
    engine, models, runs = (importlib.import_module(f"cifar10.{name}") for name in ("engine", "models", "runs"))
    make, update, write = models.resnet20, engine.Trainer._update, runs.report.write
    runs.MODELS["resnet20"] = _small
    runs.report.write = lambda folder: folder / "report.html"  # has its own test
    seen = [0]

    def interrupted(self, loss, step, failed_at):
        seen[0] += 1
        if stop is not None and seen[0] == 4 * (stop[0] - 1) + stop[1]:
            raise KeyboardInterrupt
        return update(self, loss, step, failed_at)

    try:
        engine.Trainer._update = interrupted
        codes = [qat([*FLAGS, *flags, "--output-dir", str(folder)])]
        if stop is not None:
            codes.append(qat([*FLAGS, *flags, "--output-dir", str(folder), "--resume"]))
    finally:
        engine.Trainer._update, runs.report.write, runs.MODELS["resnet20"] = update, write, make
    return codes


def _on_rank(folder: Path) -> dict:
    return {
        "whole": _run(folder / "whole"),
        "resumed": _run(folder / "resumed", stop=(2, 3)),
        "rank": _run(folder / "rank", "--br-bins", "rank"),
        "refused": _run(folder / "refused", "--batch-size", "69"),
        # The first forward sets the steps, and nothing has before, on whatever rank the weights are counted.
        "no warm-up": _run(folder / "no warm-up", "--warmup-epochs", "0", "--qat-epochs", "1"),
        "distilled": _run(folder / "distilled", "--distill", "0.5", "--pretrained-baseline", str(_float(folder))),
    }


def _float(folder: Path) -> Path:
    """A float network of other weights than the run's seed gives, written by rank 0 alone, which alone reads it."""
    path = folder / "float.pth"
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            torch.save(_small(10).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def codes(folder):
    return ranks.run(_on_rank, folder / "store", folder)


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_two_processes_train_as_one_with_the_same_global_batch(codes, folder, tmp_path):
    _compare(codes, folder, tmp_path, "whole")


def test_two_processes_are_taught_as_one(codes, folder, tmp_path):
    _compare(codes, folder, tmp_path, "distilled", "--distill", "0.5", "--pretrained-baseline", str(_float(tmp_path)))


def _compare(codes, folder: Path, tmp_path: Path, name: str, *flags: str) -> None:
    assert [c[name] for c in codes] == [[0], [0]]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert _run(tmp_path / "one", *flags) == [0]
    torch.set_num_threads(before)
    one, two = _results(tmp_path / "one"), _results(folder / name)
    assert (one["processes"], two["processes"]) == (1, 2) and len(two["epochs"]) == 3
    for a, b in zip(two["epochs"], one["epochs"]):
        for key in FIGURES:
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4, abs=1e-6), (a["epoch"], key)
        assert a["alphas"] == pytest.approx(b["alphas"], rel=1e-3)
        assert a.get("br_layers", {}) == pytest.approx(b.get("br_layers", {}), rel=1e-4, abs=1e-6)
    for which in ("best", "last"):
        assert two["final"][which] == pytest.approx(one["final"][which], rel=1e-3)
    one, two = (torch.load(f / "checkpoints/last.pth", weights_only=True)["model_state_dict"]
                for f in (tmp_path / "one", folder / name))  # fmt: skip
    assert one.keys() == two.keys()  # no "module." before the names
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_resumed_run_in_two_processes_equals_the_uninterrupted_one(codes, folder):
    assert [c["resumed"] for c in codes] == [[130, 0]] * 2
    whole, resumed = _results(folder / "whole"), _results(folder / "resumed")
    for a, b in zip(resumed["epochs"], whole["epochs"], strict=True):
        assert all(a.get(key) == b.get(key) for key in (*FIGURES, "alphas", "br_layers"))
    assert {k: v for k, v in resumed["final"].items() if k != "seconds"} == {
        k: v for k, v in whole["final"].items() if k != "seconds"
    }


def test_a_run_without_warm_up_ends(codes, folder):
    assert [c["no warm-up"] for c in codes] == [[0], [0]]
    assert set(json.loads((folder / "no warm-up" / "histograms.json").read_text())) == {"before", "after"}


def test_bins_per_rank_by_choice(codes, folder):
    whole, own = _results(folder / "whole")["epochs"][1], _results(folder / "rank")["epochs"][1]
    assert own["br_w_start"] == whole["br_w_start"]
    assert own["br_a_start"] != pytest.approx(whole["br_a_start"], rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused(codes, folder):
    assert [c["refused"] for c in codes] == [[2], [2]]
    assert not (folder / "refused").exists()


def test_torchrun_with_batch_norm(tmp_path):
    """As the README has it: torchrun starts the script, which finishes, with one set of files and alphas that moved."""
    flags = ["--model", "resnet20", "--limit", "2", "--batch-size", "10", "--gpu", "-1", "--qat-epochs", "2",
             "--warmup-epochs", "1", "--freeze-alpha", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "experiments/cifar10_qat_br.py"), *flags]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=ranks.TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1 and "2 processes, each on cpu" in done.stdout
    results = _results(tmp_path / "run")
    assert results["status"] == "finished" and results["processes"] == 2
    assert results["epochs"][0]["alphas"] == results["epochs"][1]["alphas"]
    assert (tmp_path / "run/report.html").exists()
