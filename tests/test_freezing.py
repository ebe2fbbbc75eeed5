"""Freeze: alphas held fixed and released by epoch, by step and by convergence; strategies, states and the table."""

from __future__ import annotations

import io
import json

import pytest
import torch
from guards import no_host_reads
from torch import nn

import qbr
from qbr import AlphaControl, Freeze, QATConfig
from qbr.freezing import mean_distance
from qbr.quantizers import quantizers


def _model(**config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return qbr.prepare(model, QATConfig(**{"weight_bits": 2, "act_bits": 2, **config}))


def _x():
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


def _frozen(model) -> tuple[bool, bool]:
    """(weights, activations)"""
    sides = {"weight": set(), "activation": set()}
    for quantizer in quantizers(model).values():
        sides[quantizer.kind].add(not quantizer.alpha.requires_grad)
    (weights,), (acts,) = sides["weight"], sides["activation"]
    return weights, acts


def _scale(model, factor):
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.alpha.mul_(factor)


def test_by_epoch():
    model = _model()
    control = AlphaControl(Freeze(epoch=3, release_epoch=5), Freeze(epoch=2), warmup_epochs=2).attach(model)
    seen = []
    for epoch in (1, 2, 3, 4, 5, 6, 4, 1):
        control.begin_epoch(epoch)
        seen.append(_frozen(model))
    acts_only, both = (False, True), (True, True)
    assert seen == [(False, False), acts_only, both, both, acts_only, acts_only, both, (False, False)]


def test_released_alphas_learn_again_and_frozen_ones_do_not():
    model = _model()
    control = AlphaControl(Freeze(release_epoch=3), True, warmup_epochs=1).attach(model)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0), momentum=0.9)
    moved = []
    for epoch in (1, 2, 3):
        control.begin_epoch(epoch)
        before = {name: q.alpha.detach().clone() for name, q in quantizers(model).items()}
        for _ in range(2):
            optimizer.zero_grad()
            model(_x()).square().mean().backward()
            optimizer.step()
        moved.append({q.kind: not torch.equal(q.alpha, before[name]) for name, q in quantizers(model).items()})
    both, neither = {"weight": True, "activation": True}, {"weight": False, "activation": False}
    assert moved == [both, neither, {"weight": True, "activation": False}]


def test_a_frozen_alpha_whose_gradient_is_0_stays_under_momentum(monkeypatch):
    """As under DistributedDataParallel, where there is such a gradient: an optimizer that sees it adds its momentum."""
    model = _model()
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0), momentum=0.9)
    monkeypatch.setattr(qbr.distributed, "is_initialised", lambda: True)
    monkeypatch.setattr(qbr.distributed, "ranks", lambda: 1)
    for frozen in (False, True):
        for quantizer in quantizers(model).values():
            quantizer.freeze(frozen)
        before = [q.alpha.detach().clone() for q in quantizers(model).values()]
        model(_x()).square().mean().backward()
        assert all(q.alpha.grad is not None for q in quantizers(model).values())
        optimizer.step()
        same = [torch.equal(q.alpha, alpha) for q, alpha in zip(quantizers(model).values(), before)]
        assert all(same) if frozen else not any(same)
        optimizer.zero_grad()


def test_an_alpha_that_was_fixed_by_hand_stays_fixed():
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    fixed, free = model[0].weight_quantizer, model[2].weight_quantizer
    fixed.alpha.requires_grad_(False)
    control = qbr.AlphaControl(freeze_weights=qbr.Freeze(epoch=2, release_epoch=3)).attach(model)
    for epoch, frozen in ((1, False), (2, True), (3, False), (2, True), (1, False)):
        control.begin_epoch(epoch)
        assert not fixed.alpha.requires_grad and free.alpha.requires_grad != frozen and free.frozen == frozen


def test_by_step():
    model = _model()
    control = AlphaControl(Freeze(step=3, release_step=5), Freeze(epoch=1, release_step=4)).attach(model)
    seen = []
    with no_host_reads():
        for _ in range(6):
            control.begin_step()
            seen.append(_frozen(model))
    assert seen == [(False, True), (False, True), (True, True), (True, False), (False, False), (False, False)]
    control.begin_step(3)
    assert _frozen(model) == (True, True)
    control.begin_epoch(2)
    assert _frozen(model) == (True, True)


def test_steps_that_nobody_counts():
    control = AlphaControl(Freeze(step=3)).attach(_model())
    control.begin_epoch(1)
    with pytest.raises(RuntimeError, match=r"begin_epoch\(2\).*call control.begin_step"):
        control.begin_epoch(2)
    control.begin_step()
    control.begin_epoch(2)
    AlphaControl(Freeze(epoch=3)).attach(_model()).begin_epoch(2)
    fresh = AlphaControl(Freeze(step=3)).attach(_model())
    fresh.begin_epoch(31)  # nothing was skipped
    with pytest.raises(RuntimeError, match=r"begin_epoch\(32\)"):
        fresh.begin_epoch(32)


def test_by_convergence():
    model = _model()
    control = AlphaControl(Freeze(tolerance=0.01, window=2), warmup_epochs=1).attach(model)
    frozen = []
    for epoch, change in enumerate((1.0, 1.0, 1.2, 1.004, 1.004, 1.5), start=1):
        with no_host_reads(count=True) as guard:
            control.begin_epoch(epoch)
        # One for the side that has a tolerance and is not frozen, none where there is nothing yet to compare with.
        assert sum("aten" in read for read in guard.reads) == (epoch == 3)
        frozen.append(_frozen(model)[0])
        _scale(model, change)
    # Epoch 3 compares with 1, and nothing has moved yet; only epoch 1 is warm-up.
    assert frozen == [False, False, True, True, True, True]
    control.begin_epoch(1)  # what later epochs decided is forgotten
    assert _frozen(model) == (False, False)

    control = AlphaControl(Freeze(tolerance=0.01, window=2)).attach(model)
    frozen = []
    for epoch, change in enumerate((1.2, 1.004, 1.004, 1.004, 1.004), start=1):
        control.begin_epoch(epoch)
        frozen.append(_frozen(model))
        _scale(model, change)
    assert frozen == [(False, False)] * 3 + [(True, False)] * 2  # at 3 since 1: 1.2; at 4 since 2: 1.004 ** 2


def test_one_alpha_that_moves_keeps_its_side_free():
    model = _model()
    control = AlphaControl(Freeze(tolerance=0.01)).attach(model)
    control.begin_epoch(1)
    with torch.no_grad():
        model[2].weight_quantizer.alpha.mul_(1.1)
    control.begin_epoch(2)
    assert _frozen(model) == (False, False)
    control.begin_epoch(2)
    assert _frozen(model) == (False, False)
    control.begin_epoch(3)
    assert _frozen(model) == (True, False)


def test_convergence_waits_for_the_end_of_warm_up():
    model = _model()
    control = AlphaControl(Freeze(tolerance=0.01), warmup_epochs=3).attach(model)
    frozen = []
    for epoch in range(1, 6):
        control.begin_epoch(epoch)
        frozen.append(_frozen(model)[0])
    assert frozen == [False, False, False, True, True]


def test_release_by_convergence():
    model = _model()
    model(_x())
    control = AlphaControl(True, Freeze(release_tolerance=0.05, window=1), warmup_epochs=1).attach(model)
    frozen = []
    for epoch, towards in enumerate((0.0, 0.5, 0.5, 0.0, 0.9), start=1):
        control.begin_epoch(epoch)
        frozen.append(_frozen(model))
        with torch.no_grad():  # the weights go this far towards their levels
            for module in model:
                if isinstance(module, nn.Linear):
                    module.weight.lerp_(module.weight_quantizer(module.weight), towards)
    # Frozen from epoch 2; the distance halves in epochs 2 and 3 and stays in 4, so 5 releases; the weights never do.
    assert frozen == [(False, False), (True, True), (True, True), (True, True), (True, False)]


def test_mean_distance():
    model = _model()
    model(_x())
    total, count = 0.0, 0
    for module in model:
        if isinstance(module, nn.Linear):
            d = module.weight - module.weight_quantizer(module.weight)
            total += (d.abs().sum() / module.weight_quantizer.alpha).item()
            count += d.numel()
    assert mean_distance(model).item() == pytest.approx(total / count)


def test_no_weights_whose_distance_could_settle():
    model = _model(weight_bits=None)
    with pytest.raises(ValueError, match="release_tolerance: the model has no quantized weights"):
        AlphaControl(False, Freeze(release_tolerance=0.1)).attach(model)


@pytest.mark.parametrize("arguments, error, message", [
    ({"epoch": 0}, ValueError, "epoch=0"),
    ({"step": 1.5}, TypeError, "step=1.5"),
    ({"tolerance": -1.0}, ValueError, "tolerance=-1.0"),
    ({"tolerance": "small"}, TypeError, "tolerance='small'"),
    ({"window": 0}, ValueError, "window=0"),
    ({"epoch": 3, "step": 5}, ValueError, "epoch=3, step=5: name one of"),
    ({"release_epoch": 3, "release_tolerance": 0.1}, ValueError, "release_epoch=3, release_tolerance=0.1"),
    ({"epoch": 3, "release_epoch": 3}, ValueError, "release_epoch=3: expected more than epoch=3"),
    ({"step": 30, "release_step": 3}, ValueError, "release_step=3: expected more than step=30"),
])  # fmt: skip
def test_bad_plans(arguments, error, message):
    with pytest.raises(error, match=message):
        Freeze(**arguments)


def test_bad_use():
    with pytest.raises(TypeError, match="freeze_weights=3"):
        AlphaControl(freeze_weights=3)
    with pytest.raises(ValueError, match="freeze_acts: release_epoch=4: expected more than 4, the epoch after warm-up"):
        AlphaControl(freeze_acts=Freeze(release_epoch=4), warmup_epochs=3)
    with pytest.raises(RuntimeError, match="begin_step.*attach"):
        AlphaControl().begin_step()
    with pytest.raises(ValueError, match="step=0"):
        AlphaControl().attach(_model()).begin_step(0)
    for bad in (1.5, "some", (0.5, "plain")):
        with pytest.raises(ValueError, match="br_to_alpha_acts"):
            AlphaControl(br_to_alpha_acts=bad)


def test_strategies_by_name():
    s1, s2 = (AlphaControl.strategy(name, warmup_epochs=2) for name in ("S1", "S2"))
    assert s1.freeze_weights is s1.freeze_acts is True and s2.freeze_weights is s2.freeze_acts is False
    for control, expected in ((s1, (True, True)), (s2, (False, False))):
        model = _model()
        control.attach(model).begin_epoch(3)
        assert _frozen(model) == expected and control.br_active
    assert AlphaControl.strategy("S2", br_to_alpha_acts=0.5).br_to_alpha_acts == 0.5
    with pytest.raises(ValueError, match="name='S3'"):
        AlphaControl.strategy("S3")
    with pytest.raises(TypeError, match="freeze_acts=False: S1 decides"):
        AlphaControl.strategy("S1", freeze_acts=False)


def test_a_fraction_reaches_the_quantizers():
    grads = []
    for way in (True, 0.25, (0.25, "scaled")):
        model = _model()
        AlphaControl(br_to_alpha_weights=way).attach(model)
        for _ in range(2):  # each layer alone, then all together
            model.zero_grad()
            model(_x())
            qbr.bin_loss(model).weights.backward()
        grads.append(model[0].weight_quantizer.alpha.grad.item())
    assert grads[1] == pytest.approx(grads[0] / 4) and grads[2] == pytest.approx(grads[0] / 4 / 48**0.5)


def _run(control, model, epochs):
    frozen = []
    for epoch in epochs:
        control.begin_epoch(epoch)
        frozen.append(_frozen(model))
        for _ in range(2):
            control.begin_step()
        _scale(model, 1.2 if epoch < 4 else 1.001)
    return frozen


def _through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved", [_through_torch, lambda state: json.loads(json.dumps(state))])
def test_state_goes_on_where_it_was(saved):
    plans = {
        "freeze_weights": Freeze(tolerance=0.01, window=2, release_tolerance=0.1),
        "freeze_acts": Freeze(step=6, release_epoch=7),
        "br_to_alpha_acts": (0.5, "scaled"),
    }
    model = _model()
    model(_x())
    whole = _run(AlphaControl(**plans).attach(model), model, range(1, 10))
    assert {(False, False), (True, False), (False, True), (True, True)} <= set(whole) and whole[-1] == (False, False)
    for cut in range(1, 9):
        model = _model()
        model(_x())
        control = AlphaControl(**plans).attach(model)
        first = _run(control, model, range(1, cut + 1))
        other = AlphaControl()
        other.load_state_dict(saved(control.state_dict()))
        assert other.state_dict() == control.state_dict()
        other.attach(model)
        assert first + _run(other, model, range(cut + 1, 10)) == whole, cut


def test_states_of_an_older_form_and_bad_ones():
    model = _model()
    control = AlphaControl().attach(model)
    old = {"freeze_weights": True, "freeze_acts": False, "br_to_alpha_weights": "scaled", "br_to_alpha_acts": True,
           "warmup_epochs": 1, "epoch": 2}  # fmt: skip
    control.load_state_dict(old)
    assert _frozen(model) == (True, False) and control.br_to_alpha_weights == "scaled"
    state = control.state_dict()
    for bad in ({**old, "freeze_weights": {"epoch": 0}}, {**old, "step": -1}, {**old, "convergence": {}}):
        with pytest.raises(ValueError):
            control.load_state_dict(bad)
        assert control.state_dict() == state


# The table


def test_describe_every_kind_of_phase():
    control = AlphaControl(
        Freeze(epoch=10, release_epoch=20), Freeze(tolerance=1e-3, window=3, release_step=9000), 0.5, (0.1, "scaled"), 5
    )
    text = control.describe()
    assert text == """\
phase                                            alphas of    CE -> alpha  BR -> alpha       BR loss
warm-up, epochs 1 to 5                           weights      yes          no                no
warm-up, epochs 1 to 5                           activations  yes          no                no
BR, epochs 6 to 9                                weights      yes          0.5               yes
BR, from epoch 6                                 activations  yes          0.1, scaled       yes
BR, epochs 10 to 19                              weights      no (frozen)  no (freeze wins)  yes
BR, from epoch 20                                weights      yes          0.5               yes
once alpha moves <= 0.001 of itself in 3 epochs  activations  no (frozen)  no (freeze wins)  after warm-up
from step 9000                                   activations  yes          0.1, scaled       after warm-up"""
    text = AlphaControl(Freeze(step=7, release_epoch=9), Freeze(release_tolerance=0.1)).describe()
    assert text == """\
phase                                                alphas of    CE -> alpha  BR -> alpha  BR loss
BR, from epoch 1                                     weights      yes          no           yes
BR, from epoch 1                                     activations  no (frozen)  no           yes
from step 7, until epoch 9                           weights      no (frozen)  no           yes
once the distance moves <= 0.1 of itself in 1 epoch  activations  yes          no           yes"""
    assert "warm-up, epoch 1 " in AlphaControl(warmup_epochs=1).describe()


def test_a_side_that_is_left_in_float_has_no_rows():
    text = AlphaControl(True, True, warmup_epochs=2).attach(_model(act_bits=None)).describe()
    assert "activations" not in text and text.count("weights") == 2
    text = AlphaControl(True, True, warmup_epochs=2).attach(_model(weight_bits=None)).describe()
    assert "weights" not in text and text.count("activations") == 2


@pytest.mark.parametrize("before", [1, 3])
def test_a_convergence_begins_anew_where_layers_join(before):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(before)]
    model = qbr.prepare(nn.Sequential(*layers), QATConfig(weight_bits=2, act_bits=None))
    control = AlphaControl(freeze_weights=Freeze(tolerance=1e-3)).attach(model)
    model(_x())
    control.begin_epoch(1)
    head = qbr.prepare(nn.Sequential(nn.Linear(6, 3)), QATConfig(weight_bits=2, act_bits=None))[0]
    model.append(head)
    model(_x())
    state = control.state_dict()
    control.begin_epoch(2)
    assert not any(q.frozen for q in quantizers(model).values())
    resumed = AlphaControl(freeze_weights=Freeze(tolerance=1e-3)).attach(model)
    resumed.load_state_dict(json.loads(json.dumps(state)))  # the history of a model with one quantizer less
    resumed.begin_epoch(2)
    assert not any(q.frozen for q in quantizers(model).values())
    control.begin_epoch(3)
    assert all(q.frozen for q in quantizers(model).values())
