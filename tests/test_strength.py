"""How far BR pulls, and what is too strong for SGD: what the experiments say of it against what SGD does."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

import qbr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
for _needed in ("tqdm", "PIL"):
    pytest.importorskip(_needed)
optim, options, recipes, strength = (
    importlib.import_module(f"cifar10.{name}") for name in ("optim", "options", "recipes", "strength")
)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_strength_that_sgd_can_follow(momentum, nesterov):
    """A weight alone in its bin comes to its level below the limit, and leaves it above."""
    most = strength.limit(momentum, nesterov)
    for times, comes in ((0.97, True), (1.03, False)):
        distance = torch.tensor([0.01], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([distance], lr=times * most / 2, momentum=momentum, nesterov=nesterov)
        for _ in range(1000):
            optimizer.zero_grad()
            distance.square().sum().backward()
            optimizer.step()
        assert (distance.abs().item() < 0.01) == comes


def test_shipped_strengths_can_be_followed():
    """None of --recipe and --quick, alone or together, is beyond what SGD follows."""
    for recipe in recipes.NAMES:
        for quick in ([], ["--quick"]):
            chosen, _ = options.parse(options.qat_parser(), ["--recipe", recipe, "--output-dir", "x", *quick])
            steps, begin = 1000 * chosen.qat_epochs, 1000 * chosen.warmup_epochs
            at = optim.factor(chosen.lr_schedule, steps, chosen.lr_warmup)
            rate = 2 * chosen.lambda_br * chosen.lr * max(map(at, range(begin, steps)), default=0)
            assert rate < strength.limit(chosen.momentum, chosen.nesterov), (recipe, quick)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_pull_of_br_is_that_of_the_formula(schedule):
    """Under SGD, where BR is all of the loss, every bin moves as far as is told."""
    torch.manual_seed(0)
    model = qbr.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64)), qbr.QATConfig(act_bits=None))
    model(torch.randn(2, 64))
    steps, begin, lam, lr, momentum = 400, 100, 2.0, 0.1, 0.9
    chosen = argparse.Namespace(
        lr=lr, lambda_br=lam, momentum=momentum, regularizer="br", lr_schedule="cosine", lr_warmup=0.0,
        lambda_br_schedule=schedule, nesterov=False,
    )  # fmt: skip
    line = strength.expected_pull(model, chosen, begin, steps, ())
    assert "oscillate" not in line
    chosen.lambda_br = 400.0
    told = "now) will oscillate and grow: 2 * lambda * lr is up to"
    assert told in strength.expected_pull(model, chosen, begin, steps, ())
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    quantizer.alpha.requires_grad_(False)
    optimizer = torch.optim.SGD([weight], lr=lr, momentum=momentum)
    at, rise = optim.factor("cosine", steps, 0.0), optim.rise(schedule, begin, steps)
    start = qbr.functional.bin_loss(weight, quantizer.alpha.detach(), quantizer.spec)
    for step in range(begin, steps):
        optimizer.param_groups[0]["lr"] = lr * at(step)
        optimizer.zero_grad()
        model(torch.randn(2, 64))
        (lam * (rise(step) if rise else 1) * qbr.bin_loss(model).weights).backward()
        optimizer.step()
    end = qbr.functional.bin_loss(weight, quantizer.alpha.detach(), quantizer.spec)
    sizes = start.bins.counts
    expected = -torch.expm1(-float(line.split("strength ")[1].split(":")[0]) / sizes)
    moved = 1 - (end.bins.squares / start.bins.squares).sqrt()
    assert torch.equal(end.bins.counts, sizes)
    assert torch.allclose(moved[sizes > 0], expected[sizes > 0], rtol=0.15)  # momentum lags behind
