"""Runs of the experiments that take a second: a model of two convolutions, and an interruption in the middle."""

from __future__ import annotations

import torch
from torch import nn

# 70 training images in four batches of 16, the last 6 left out where a recipe leaves them out.
FLAGS = ["--model", "resnet20", "--limit", "8", "--batch-size", "16", "--gpu", "-1"]
QAT = [*FLAGS, "--qat-epochs", "3", "--warmup-epochs", "1"]
TIMINGS = {"images_per_second", "train_seconds", "seconds"}


def model(classes: int) -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 16, 3, stride=2), relu,
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def small(monkeypatch, runs, optim):
    """A fixture's body: the model above, no report, one thread, and a compiler that does not take a minute."""
    monkeypatch.setitem(runs.MODELS, "resnet20", model)
    monkeypatch.setattr(runs.report, "write", lambda folder: folder / "report.html")
    monkeypatch.setattr(optim, "BACKEND", "aot_eager")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupt(patch, engine, after: int) -> None:
    """The next run stops after that many steps, as by a kill."""
    update, seen = engine.Trainer._update, [0]

    def counted(self, loss, step, failed_at):
        seen[0] += 1
        if seen[0] > after:
            raise KeyboardInterrupt
        return update(self, loss, step, failed_at)

    patch.setattr(engine.Trainer, "_update", counted)


def equal(a, b, leave: frozenset = frozenset()) -> bool:
    """Whether two nested values are the same to the bit, but for times and what ``leave`` names."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k], leave) for k in a if k not in TIMINGS | leave)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y, leave) for x, y in zip(a, b))
    return a == b
