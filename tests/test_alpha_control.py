"""AlphaControl: which loss moves which alpha in each phase, trained for a few steps; and the parameter groups."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import qbr
from qbr import AlphaControl, QATConfig
from qbr.quantizers import quantizers


def _model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return qbr.prepare(model, QATConfig(weight_bits=2, act_bits=2))


def _data(seed=0):
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))


def _alphas(model, kind):
    return [q.alpha for q in quantizers(model).values() if q.kind == kind]


def _moved_by(model, which):
    """{kind: whether the alphas of that kind are moved by training 3 steps on this loss alone}, and the gradients."""
    moved = {}
    before = {kind: [a.detach().clone() for a in _alphas(model, kind)] for kind in ("weight", "activation")}
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=1e-3, weight_decay=1e-4), momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        y = model(_data(step))
        br = qbr.bin_loss(model)
        loss = y.square().mean() if which == "CE" else br.weights + br.activations
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    for kind, old in before.items():
        changed = [not torch.equal(a, b) for a, b in zip(_alphas(model, kind), old, strict=True)]
        assert len(set(changed)) == 1, (kind, changed)
        moved[kind] = changed[0]
    return moved


# freeze, BR to alpha -> does CE move alpha, does BR (the four rows of the guide)
ROWS = [(False, False, True, False), (True, False, False, False), (False, True, True, True), (True, True, False, False)]


@pytest.mark.parametrize("freeze,to_alpha,ce_moves,br_moves", ROWS)
@pytest.mark.parametrize("side", ["both", "weight", "activation"])
def test_the_four_rows(freeze, to_alpha, ce_moves, br_moves, side):
    settings = {}
    if side in ("both", "weight"):
        settings.update(freeze_weights=freeze, br_to_alpha_weights=to_alpha)
    if side in ("both", "activation"):
        settings.update(freeze_acts=freeze, br_to_alpha_acts=to_alpha)
    model = _model()
    control = AlphaControl(**settings, warmup_epochs=2).attach(model)
    for epoch in (1, 2):
        control.begin_epoch(epoch)
        assert not control.br_active
        assert _moved_by(model, "CE") == {"weight": True, "activation": True}
        assert _moved_by(model, "BR") == {"weight": False, "activation": False}
        y = model(_data())
        br = qbr.bin_loss(model)
        assert not br.layers and br.weights.item() == br.activations.item() == 0
        y.sum().backward()
    control.begin_epoch(3)
    assert control.br_active
    for kind in ("weight", "activation"):
        mine = side in ("both", kind)
        assert all(a.requires_grad != (mine and freeze) for a in _alphas(model, kind))
        assert all(a.grad is None for a in _alphas(model, kind) if mine and freeze)
    expected_ce, expected_br = {}, {}
    for kind in ("weight", "activation"):
        mine = side in ("both", kind)
        expected_ce[kind], expected_br[kind] = (ce_moves, br_moves) if mine else (True, False)
    assert _moved_by(model, "CE") == expected_ce
    # An activation's bin loss depends on the alphas of the layers before it through their outputs: that gradient
    # is cut off here, so that what is left is the loss of each tensor on its own step.
    assert _own_gradients(model) == expected_br


def _own_gradients(model):
    """{kind: whether each quantizer's own bin loss has a gradient to its own alpha}."""
    model(_data())
    layers = qbr.bin_loss(model).layers
    got = {}
    for name, q in quantizers(model).items():
        loss = layers[name.rpartition(".")[0]].loss
        grad = torch.autograd.grad(loss, q.alpha, allow_unused=True, retain_graph=True)[0] if (
            q.alpha.requires_grad and loss.requires_grad) else None  # fmt: skip
        got.setdefault(q.kind, set()).add(grad is not None and bool(grad.abs().sum() > 0))
    return {kind: value.pop() for kind, value in got.items() if len(value) == 1}


def test_scaled_is_the_lsq_scale_times_the_unscaled_gradient():
    grads = []
    for setting in (True, "scaled"):
        model = _model()
        AlphaControl(br_to_alpha_weights=setting).attach(model)
        model(_data())
        qbr.bin_loss(model).weights.backward()
        grads.append(_alphas(model, "weight")[0].grad.item())
    assert grads[1] == pytest.approx(grads[0] / 48**0.5)


def test_release_and_any_order():
    model = _model()
    control = AlphaControl(freeze_weights=True, freeze_acts=True, warmup_epochs=1).attach(model)
    assert all(a.requires_grad for kind in ("weight", "activation") for a in _alphas(model, kind))
    control.begin_epoch(2)
    assert not any(a.requires_grad for kind in ("weight", "activation") for a in _alphas(model, kind))
    control.begin_epoch(1)
    assert all(a.requires_grad for kind in ("weight", "activation") for a in _alphas(model, kind))


def test_no_warmup_starts_with_br():
    model = _model()
    control = AlphaControl().attach(model)
    assert control.br_active
    model(_data())
    assert qbr.bin_loss(model).weights.item() > 0


def test_frozen_alphas_stay_under_momentum_and_weight_decay():
    model = _model()
    control = AlphaControl(freeze_weights=True, warmup_epochs=1).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for epoch in (1, 2):
        control.begin_epoch(epoch)
        before = [a.detach().clone() for a in _alphas(model, "weight")]
        for _ in range(2):
            optimizer.zero_grad()
            model(_data()).square().sum().backward()
            optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(_alphas(model, "weight"), before, strict=True)]
        assert all(same) if epoch == 2 else not any(same)


def test_describe():
    text = AlphaControl(True, False, True, "scaled", warmup_epochs=30).describe()
    rows = text.splitlines()
    assert "epochs 1 to 30" in text and "from epoch 31" in text and len(rows) == 5
    assert "freeze wins" in rows[3] and "frozen" in rows[3] and "scaled" in rows[4]
    assert len(AlphaControl().describe().splitlines()) == 3


def test_state():
    model = _model()
    control = AlphaControl(True, False, False, "scaled", 3).attach(model)
    control.begin_epoch(4)
    state = control.state_dict()
    model = _model()
    other = AlphaControl().attach(model)
    other.load_state_dict(state)
    assert other.state_dict() == state and other.br_active
    assert not any(a.requires_grad for a in _alphas(model, "weight"))
    fresh = AlphaControl()
    fresh.load_state_dict(state)
    asked = AlphaControl(freeze_weights=True, freeze_acts=True, warmup_epochs=5)
    with pytest.warns(UserWarning, match="freeze_acts=False instead of True, .*warmup_epochs=3 instead of 5"):
        asked.load_state_dict(state)
    assert asked.state_dict() == state
    same = AlphaControl(qbr.Freeze(), br_to_alpha_acts=(1.0, "scaled"), warmup_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(AlphaControl(True, br_to_alpha_acts="scaled", warmup_epochs=2).state_dict())
    assert same.freeze_weights is True
    with pytest.warns(UserWarning, match="freeze_weights=True instead of False"):
        AlphaControl.strategy("S2", warmup_epochs=2).load_state_dict(AlphaControl.strategy("S1").state_dict())
    assert fresh.attach(_model()).br_active
    with pytest.raises(ValueError, match="keys"):
        other.load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="warmup_epochs=-1"):
        other.load_state_dict({**state, "warmup_epochs": -1})
    assert other.state_dict() == state


def test_bad_arguments():
    with pytest.raises(ValueError, match="warmup_epochs=-1"):
        AlphaControl(warmup_epochs=-1)
    with pytest.raises(TypeError, match="freeze_weights='yes'"):
        AlphaControl(freeze_weights="yes")
    with pytest.raises(ValueError, match="br_to_alpha_acts='some'"):
        AlphaControl(br_to_alpha_acts="some")
    with pytest.raises(RuntimeError, match="attach"):
        AlphaControl().begin_epoch(1)
    with pytest.raises(ValueError, match="epoch=0"):
        AlphaControl().attach(_model()).begin_epoch(0)
    with pytest.raises(ValueError, match="no quantizers"):
        AlphaControl().attach(nn.Linear(2, 2))
    for call in (AlphaControl().attach, qbr.bin_loss, qbr.summary, qbr.convert, qbr.Monitor, qbr.set_regularizer):
        with pytest.raises(TypeError, match="model is a NoneType: expected an nn.Module"):
            call(None)


def test_parameter_groups():
    model = _model()
    weights, alphas = qbr.parameter_groups(model, lr=0.1, weight_decay=5e-4, alpha_lr=0.01)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 5e-4)
    assert (alphas["lr"], alphas["weight_decay"]) == (0.01, 0.0)
    assert len(alphas["params"]) == 5 and len(weights["params"]) == 6
    assert {id(p) for g in (weights, alphas) for p in g["params"]} == {id(p) for p in model.parameters()}
    assert qbr.parameter_groups(model, lr=0.1, weight_decay=0)[1]["lr"] == 0.1
    torch.optim.AdamW([weights, alphas], lr=1.0)
    _, alphas, acts = qbr.parameter_groups(model, lr=0.1, weight_decay=5e-4, act_alpha_lr=0.3)
    assert (alphas["lr"], acts["lr"], acts["weight_decay"]) == (0.1, 0.3, 0.0)
    kinds = {id(q.alpha): q.kind for q in model.modules() if hasattr(q, "kind")}
    assert [[kinds[id(p)] for p in g["params"]] for g in (alphas, acts)] == [["weight"] * 3, ["activation"] * 2]
    with pytest.raises(ValueError, match="call qbr.prepare"):
        qbr.parameter_groups(nn.Linear(2, 2), lr=0.1, weight_decay=0)


def test_alphas_of_named_layers_have_an_lr_of_their_own():
    model = _model()
    rates = {"lr": 0.1, "weight_decay": 0.0, "act_alpha_lr": 0.3}
    names = {id(q.alpha): name for name, q in qbr.quantizers.quantizers(model).items()}
    acts = [name for name, q in qbr.quantizers.quantizers(model).items() if q.kind == "activation"]
    first, *others = [name for name in names.values() if name not in acts]
    layer = first.rpartition(".")[0]
    overrides = {"*.weight_quantizer": 0.02, layer: 0.001}  # a container covers what is in it; the later one wins
    groups = qbr.parameter_groups(model, **rates, alpha_lr_overrides=overrides)
    torch.optim.SGD(groups, lr=1.0)
    assert [(g["lr"], [names[id(p)] for p in g["params"]]) for g in groups[1:]] == [
        (0.1, []), (0.3, acts), (0.02, others), (0.001, [first]),
    ]  # fmt: skip
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(g["weight_decay"] == 0.0 for g in groups[1:])
    with pytest.raises(ValueError, match=r"alpha_lr_overrides\['head'\] matches no quantizer: expected names as"):
        qbr.parameter_groups(model, **rates, alpha_lr_overrides={"head": 0.1})
    compiled = qbr.parameter_groups(torch.compile(model), **rates, alpha_lr_overrides=overrides)
    assert [len(g["params"]) for g in compiled] == [len(g["params"]) for g in groups]
    for rate, error in ((-1e-3, ValueError), (float("nan"), ValueError), ("5e-4", TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"alpha_lr_overrides\['\*'\]="):
            qbr.parameter_groups(model, **rates, alpha_lr_overrides={"*": rate})
    for decay, error in ((-5.0, ValueError), (float("nan"), ValueError), ("5e-4", TypeError), (None, TypeError)):
        with pytest.raises(error, match="weight_decay="):
            qbr.parameter_groups(model, lr=0.1, weight_decay=decay)
    with pytest.raises(ValueError, match="alpha_lr=-1"):
        qbr.parameter_groups(model, **rates, alpha_lr=-1)
    with pytest.raises(TypeError, match=r"alpha_lr_overrides=0.1: expected \{pattern: lr\}"):
        qbr.parameter_groups(model, **rates, alpha_lr_overrides=0.1)


@pytest.mark.parametrize(
    "settings, warns",
    [({}, False), ({"freeze_acts": True}, False), ({"warmup_epochs": 2}, True),
     ({"freeze_weights": qbr.Freeze(epoch=3)}, True), ({"freeze_acts": qbr.Freeze(step=3)}, False)],
)  # fmt: skip
def test_a_control_that_no_epoch_begins_is_told(settings, warns):
    model = _model()
    control = AlphaControl(**settings).attach(model)

    def messages() -> list[str]:
        model(_data()).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qbr.bin_loss(model)
        return [str(each.message) for each in caught]

    assert [("begin_epoch" in each) for each in messages()] == [True] * warns
    control.begin_epoch(1)
    assert not messages()


def test_going_back_to_warm_up_drops_what_was_collected():
    """A forward's bin loss is of the phase it ran in: none is left for an epoch that collects none."""
    model = _model()
    control = AlphaControl(warmup_epochs=1).attach(model)
    control.begin_epoch(2)
    model(_data())
    control.begin_epoch(1)
    assert not qbr.bin_loss(model).layers
    control.begin_epoch(2)
    model(_data())
    assert qbr.bin_loss(model).layers


def test_a_control_has_one_model():
    first, second = _model(), _model()
    control = AlphaControl(freeze_weights=True, warmup_epochs=1).attach(first)
    with pytest.raises(RuntimeError, match="has a Sequential already"):
        control.attach(second)
    control.begin_epoch(2)
    assert all(q.collecting for q in quantizers(first).values())
    assert not any(q.frozen for q in quantizers(second).values())
    assert control.attach(first) is control.attach(nn.Sequential(first))  # the same one, or one around it
    first[4] = nn.Linear(8, 3)  # whose quantizer is gone
    control.attach(nn.Sequential(first)).begin_epoch(3)


def test_a_damaged_record_changes_nothing():
    control = AlphaControl(warmup_epochs=3).attach(_model())
    state = AlphaControl(warmup_epochs=9, freeze_weights=qbr.Freeze(tolerance=0.1)).state_dict()
    state["convergence"]["weights"]["alphas"] = [1, 2]
    with pytest.raises(ValueError, match="damaged record of weights"):
        control.load_state_dict(state)
    assert control.warmup_epochs == 3 and control.freeze_weights is False
