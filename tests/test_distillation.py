"""Knowledge distillation in the experiments (--distill): the loss, its frozen teacher, resumption, refusals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
distillation, engine, optim, runs = (
    importlib.import_module(f"cifar10.{name}") for name in ("distillation", "engine", "optim", "runs")
)
qat = importlib.import_module("cifar10_qat_br").main


@pytest.fixture(autouse=True)
def small(monkeypatch):
    yield from tiny.small(monkeypatch, runs, optim)


def _float(path: Path, seed: int = 7) -> Path:
    torch.manual_seed(seed)
    model = tiny.model(10)
    model[1].running_mean.uniform_(-1, 1)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def flags(tmp_path):
    return [*tiny.QAT, "--lr", "0.05", "--pretrained-baseline", str(_float(tmp_path / "float.pth")), "--distill", "0.5"]


def _last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)


def test_the_loss_is_the_divergence_from_the_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 10, dtype=torch.float64, requires_grad=True), torch.randn(5, 10).double()
    p, q = teacher.softmax(1), student.softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation.loss(student, teacher), expected)
    assert distillation.loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    distillation.loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (q - p).detach() / 5)  # as that of cross-entropy with soft labels
    assert torch.autograd.gradcheck(lambda logits: distillation.loss(logits, teacher), student)


def test_its_share_is_of_the_training_loss_alone(flags, tmp_path, monkeypatch):
    seen = []
    forward = engine.Trainer._forward

    def kept(self, net, x, y, images, br):
        out = forward(self, net, x, y, images, br)
        if not seen:
            seen.append((self, x, out))
        return out

    monkeypatch.setattr(engine.Trainer, "_forward", kept)
    assert qat([*flags, "--label-smoothing", "0.1", "--output-dir", str(tmp_path / "run")]) == 0
    trainer, x, (logits, ce, loss, _) = seen[0]
    teacher = tiny.model(10)
    teacher.load_state_dict(torch.load(tmp_path / "float.pth", weights_only=True))
    with torch.no_grad():
        far = distillation.loss(logits, teacher.eval()(x))
    assert far > 0.001 and loss.item() == pytest.approx(0.5 * ce.item() + 0.5 * far.item(), rel=1e-5)
    for name, value in teacher.state_dict().items():  # the network that it learns from stays what it was
        assert torch.equal(value, trainer.teacher.state_dict()[name]), name
    assert not any(name.startswith("teacher") for name in trainer.model.state_dict())
    assert not {id(p) for p in trainer.teacher.parameters()} & {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"]
    }


def test_compiled_steps_learn_from_the_teacher_too(flags, tmp_path):
    epochs = []
    for mode in ("none", "default"):
        assert qat([*flags, "--compile", mode, "--output-dir", str(tmp_path / mode)]) == 0
        epochs.append(json.loads((tmp_path / mode / "results.json").read_text())["epochs"])
    for eager, compiled in zip(*epochs, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4) != pytest.approx(compiled["ce"], rel=1e-2)


def test_a_resumed_run_has_the_same_teacher_and_ends_the_same(flags, tmp_path, monkeypatch, capsys):
    whole, parts, without = (str(tmp_path / name) for name in ("whole", "parts", "without"))
    assert qat([*flags, "--output-dir", whole]) == 0
    assert "distillation: 0.5 of the loss" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        tiny.interrupt(patch, engine, 6)
        assert qat([*flags, "--output-dir", parts]) == 130
    other = _float(tmp_path / "other.pth", seed=8)
    assert qat(["--output-dir", parts, "--resume", "--pretrained-baseline", str(other)]) == 2
    assert "not the network that this run has been distilled from" in capsys.readouterr().err
    moved = (tmp_path / "float.pth").rename(tmp_path / "moved.pth")
    assert qat(["--output-dir", parts, "--resume"]) == 2
    assert "float.pth: no such file" in capsys.readouterr().err
    assert qat(["--output-dir", parts, "--resume", "--pretrained-baseline", str(moved)]) == 0
    a, b = _last(tmp_path / "whole"), _last(tmp_path / "parts")
    assert tiny.equal(a, b, frozenset({"args"}))
    again = [*flags, "--pretrained-baseline", str(moved)]
    assert qat([*again, "--distill", "0", "--output-dir", without]) == 0
    c = _last(tmp_path / "without")
    assert c["teacher"] is None and not tiny.equal(a["model_state_dict"], c["model_state_dict"])


def test_a_warm_up_with_another_teacher_is_refused(flags, tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert qat([*flags, "--keep-warmup", "--output-dir", first]) == 0
    assert qat([*flags, "--warmup-from", first, "--lambda-br", "3", "--output-dir", second]) == 0
    _float(tmp_path / "float.pth", seed=8)
    for change, expected in (
        ([], "not the network that this run has been distilled from"),
        (["--distill", "0.2"], "--distill 0.2 (there 0.5)"),
    ):
        assert qat([*flags, *change, "--warmup-from", first, "--output-dir", str(tmp_path / "third")]) == 2
        assert expected in capsys.readouterr().err and not (tmp_path / "third").exists()


def test_quick_learns_from_the_network_that_it_trains_first(tmp_path, monkeypatch, capsys):
    quick = ["--quick", "--limit", "8", "--batch-size", "16", "--distill", "0.5", "--output-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        tiny.interrupt(patch, engine, 20)
        assert qat(quick) == 130
    assert qat([*quick, "--resume"]) == 0
    state = torch.load(tmp_path / "baseline/checkpoints/best.pth", weights_only=True)["model_state_dict"]
    model = tiny.model(10)
    model.load_state_dict(state)
    assert _last(tmp_path)["teacher"] == distillation.digest(model)


def test_a_share_without_a_network_or_beyond_the_whole_is_refused(tmp_path, capsys):
    for given, expected in (
        (["--distill", "0.5"], "name the float network to learn from, --pretrained-baseline"),
        (["--distill", "1.5"], "--distill 1.5: expected 0 to 1"),
        (["--distill", "nan"], "--distill nan: expected 0 to 1"),
    ):
        assert qat([*tiny.QAT, *given, "--output-dir", str(tmp_path / "run")]) == 2
        assert expected in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_finite_stops_the_run(flags, tmp_path, capsys):
    state = torch.load(tmp_path / "float.pth", weights_only=True)
    state["7.bias"][0] = float("nan")
    torch.save(state, tmp_path / "float.pth")
    whole = torch.load(_float(tmp_path / "start.pth"), weights_only=True)
    assert torch.isfinite(whole["7.bias"]).all()
    assert qat([*flags, "--output-dir", str(tmp_path / "run")]) == 1
    assert "NaN or infinity in epoch 1, step 1" in capsys.readouterr().err
