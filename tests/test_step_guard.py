"""Around an optimizer's step: frozen alphas stay, first steps from data stay, whatever runs inside of the step."""

from __future__ import annotations

import copy

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import qbr
from qbr.quantizers import quantizers


def made(bits: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return qbr.prepare(model, qbr.QATConfig(weight_bits=bits, act_bits=bits))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def alphas(model: nn.Module) -> list[float]:
    return [quantizer.alpha.item() for quantizer in quantizers(model).values()]


def optimizer_of(model, kind=torch.optim.SGD, **options):
    return kind(qbr.parameter_groups(model, lr=0.05, weight_decay=0.1), **options)


def closure_of(model, optimizer):
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


OPTIMIZERS = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"betas": (0.9, 0.9)}), (torch.optim.LBFGS, {})]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS[:2])
def test_frozen_alphas_stay_where_a_closure_makes_their_gradients(kind, options, monkeypatch):
    """As torch.distributed has it, where frozen alphas have gradients; and in one process, for who asks for them."""
    monkeypatch.setattr(qbr.distributed, "is_initialised", lambda: True)
    monkeypatch.setattr(qbr.distributed, "ranks", lambda: 1)
    model = made()
    qbr.calibrate(model, [batch()])
    control = qbr.AlphaControl(qbr.Freeze(epoch=2, release_epoch=3), qbr.Freeze(epoch=2, release_epoch=3),
                               warmup_epochs=0).attach(model)  # fmt: skip
    optimizer = optimizer_of(model, kind, **options)
    closure, moved = closure_of(model, optimizer), []
    for epoch in (1, 2, 3):
        control.begin_epoch(epoch)
        before = alphas(model)
        for _ in range(3):
            optimizer.step(closure)
        moved.append([a != b for a, b in zip(alphas(model), before)])
    assert [any(each) for each in moved] == [True, False, True] and all(moved[0]) and all(moved[2])


def test_frozen_alphas_stay_where_all_gradients_are_asked_for():
    model = made()
    qbr.calibrate(model, [batch()])
    qbr.AlphaControl(True, True, warmup_epochs=0).attach(model)
    model.requires_grad_(True)
    optimizer, before = optimizer_of(model, momentum=0.9), alphas(model)
    closure = closure_of(model, optimizer)
    for _ in range(3):
        optimizer.step(closure)
    assert alphas(model) == before


@pytest.mark.parametrize("bits", [1, 2])
def test_first_steps_from_data_stay_where_a_closure_sets_them(bits):
    model, expected = made(bits), made(bits)
    expected(batch()[0])
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.0, weight_decay=0.0))
    optimizer.step(closure_of(model, optimizer))
    assert alphas(model) == alphas(expected)


def test_first_steps_of_frozen_alphas_stay_where_a_closure_sets_them(monkeypatch):
    """Under torch.distributed a frozen alpha has a gradient, and what it was before the closure was a placeholder."""
    monkeypatch.setattr(qbr.distributed, "is_initialised", lambda: True)
    monkeypatch.setattr(qbr.distributed, "ranks", lambda: 1)
    model, expected = made(2), made(2)
    expected(batch()[0])
    qbr.AlphaControl(freeze_weights=True, freeze_acts=True).attach(model)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.1), momentum=0.9)
    optimizer.step(closure_of(model, optimizer))
    assert alphas(model) == alphas(expected)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_distributed_checkpoints_resume_a_frozen_run(warmup, first, tmp_path):
    """get_state_dict and set_state_dict make the optimizer's state by a step of their own."""
    (resumed,) = ranks.run(_resume, tmp_path / "ranks", warmup, first, str(tmp_path / "saved"), world=1)
    assert resumed


def _resume(warmup: int, control_first: bool, folder: str) -> bool:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start():
        model = made()
        qbr.calibrate(model, [batch()])
        control = qbr.AlphaControl(True, True, warmup_epochs=warmup).attach(model)
        optimizer = optimizer_of(model, torch.optim.AdamW)
        return model, control, optimizer

    def train(model, optimizer):
        closure_of(model, optimizer)()
        optimizer.step()

    model, control, optimizer = start()
    for epoch in (1, 2):
        control.begin_epoch(epoch)
        train(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    resumed, other, its_optimizer = start()
    if control_first:
        other.load_state_dict(control.state_dict())
    weights, state = get_state_dict(resumed, its_optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(resumed, its_optimizer, model_state_dict=weights, optim_state_dict=state)
    other.load_state_dict(control.state_dict())
    for each, its in ((model, optimizer), (resumed, its_optimizer)):
        train(each, its)
    pairs = zip(model.state_dict().values(), resumed.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


def test_alphas_that_were_frozen_before_there_were_ranks_are_not_released(monkeypatch):
    model = made()
    control = qbr.AlphaControl(qbr.Freeze(epoch=1, release_epoch=2), warmup_epochs=0).attach(model)
    monkeypatch.setattr(qbr.distributed, "is_initialised", lambda: True)
    monkeypatch.setattr(qbr.distributed, "ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="attach the AlphaControl after init_process_group"):
        control.begin_epoch(2)
    before, other = {name: vars(q).copy() for name, q in quantizers(model).items()}, qbr.AlphaControl(warmup_epochs=7)
    with pytest.raises(RuntimeError, match="attach the AlphaControl after init_process_group"):
        other.attach(model)
    assert before == {name: vars(q) for name, q in quantizers(model).items()}
    with pytest.raises(RuntimeError, match="before attach"):
        other.begin_epoch(1)


def test_a_copy_of_each_step_is_made_where_parameters_may_be_reclaimed_alone(monkeypatch):
    """FSDP takes their memory back after a layer has run; DistributedDataParallel does not."""
    monkeypatch.setattr(qbr.distributed, "is_initialised", lambda: True)
    monkeypatch.setattr(qbr.distributed, "ranks", lambda: 1)
    model = made()
    qbr.calibrate(model, [batch()])
    ddp = nn.Module()  # stands for the DistributedDataParallel whose forward runs
    for running in (None, ddp):
        monkeypatch.setattr(qbr.distributed, "running_ddp", lambda: running)
        monkeypatch.setattr(qbr.distributed, "check_known", lambda *_: None)
        model(batch()[0])
        found = quantizers(model).values()
        shared = [q._retained[0].bins.alpha.data_ptr() == q.alpha.data_ptr() for q in found]
        assert set(shared) == {running is ddp}


def test_quantizers_that_come_after_attach_are_controlled_too():
    model = made()
    control = qbr.AlphaControl(True, True, warmup_epochs=1).attach(model)
    model[4] = qbr.prepare(nn.Linear(6, 2), qbr.QATConfig(act_bits=None))
    model.append(qbr.QuantizedLinear(2, 2, num_bits=2))
    control.begin_epoch(1)
    model(batch()[0])
    assert not qbr.bin_loss(model).layers
    control.begin_epoch(2)
    model(batch()[0])
    assert {"4", "5"} <= set(qbr.bin_loss(model).layers)
    assert all(quantizer.frozen for quantizer in quantizers(model).values())


def test_alphas_that_the_user_asks_for_while_they_are_frozen_learn_when_released():
    model = made()
    model[0].requires_grad_(False)
    control = qbr.AlphaControl(qbr.Freeze(epoch=2, release_epoch=3), warmup_epochs=0).attach(model)
    control.begin_epoch(2)
    model[0].requires_grad_(True)
    control.begin_epoch(2)
    assert not model[0].weight_quantizer.alpha.requires_grad
    control.begin_epoch(3)
    assert model[0].weight_quantizer.alpha.requires_grad


def test_quantizers_that_came_after_an_optimizer_s_first_step_are_missed_by_it():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    qbr.prepare(model[0], qbr.QATConfig(act_bits=None))
    optimizer = optimizer_of(model)
    closure_of(model, optimizer)()
    optimizer.step()
    qbr.prepare(model[2], qbr.QATConfig(act_bits=None))
    closure_of(model, optimizer)()
    with pytest.raises(RuntimeError, match="1 step sizes"):
        optimizer.step()


def test_a_head_that_is_added_without_its_step_sizes_is_noticed():
    model = made()
    optimizer = optimizer_of(model)
    control = qbr.AlphaControl().attach(model)
    closure_of(model, optimizer)()
    optimizer.step()
    model[4] = qbr.prepare(nn.Sequential(nn.Linear(6, 3)), qbr.QATConfig(act_bits=None))[0]
    optimizer.add_param_group({"params": [model[4].weight, model[4].bias]})
    control.begin_epoch(2)
    closure_of(model, optimizer)()
    with pytest.raises(RuntimeError, match="1 step sizes"):
        optimizer.step()
    optimizer.add_param_group({"params": [model[4].weight_quantizer.alpha], "weight_decay": 0.0})
    optimizer.step()


def _pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


@pytest.mark.parametrize("change", [_pruned, _parametrized])
def test_weights_that_get_another_name_are_known(change):
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4)), qbr.QATConfig(weight_bits=2, act_bits=None))
    change(model)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "alpha" not in name], lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="1 step sizes .alpha. are in no optimizer"):
        optimizer.step()


def _a_look_between_backward_and_step() -> list[int]:
    from torch.distributed.fsdp import fully_shard

    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    qbr.calibrate(qbr.prepare(model, qbr.QATConfig(weight_bits=4, act_bits=4)), [x])
    for part in (model[0], model[2], model):
        fully_shard(part)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=0.0))
    steps = []
    for step in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        with torch.no_grad():
            model(x)
        optimizer.step()
        steps.append(step)
    return steps


def test_unsharded_copies_of_alphas_are_in_no_optimizer(tmp_path):
    """FSDP2's root stays unsharded from a forward to its backward."""
    assert ranks.run(_a_look_between_backward_and_step, tmp_path, world=1) == [[0, 1]]


class DecaysAll(torch.optim.SGD):
    """Decoupled decay of all that a group has, with or without a gradient."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)


def test_frozen_alphas_stay_where_an_optimizer_moves_what_has_no_gradient():
    model = made()
    qbr.calibrate(model, [batch()])
    qbr.AlphaControl(True, True).attach(model)
    before = alphas(model)
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # torch then hooks its step, which the subclass's calls, too
    optimizer = optimizer_of(model, DecaysAll)
    closure = closure_of(model, optimizer)
    weight = model[0].weight.detach().clone()
    for _ in range(3):
        closure()
        optimizer.step()
    assert alphas(model) == before and not torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS[:2])
def test_released_alphas_do_not_go_on_where_they_were_going(kind, options):
    """Nor with an optimizer's state of before, loaded while they are frozen."""
    model = made()
    qbr.calibrate(model, [batch()])
    freeze = qbr.Freeze(epoch=2, release_epoch=3)
    control = qbr.AlphaControl(freeze, freeze).attach(model)
    optimizer = optimizer_of(model, kind, **options)
    closure = closure_of(model, optimizer)
    held, state = {}, None
    for epoch in (1, 2, 3):
        control.begin_epoch(epoch)
        for step in range(2):
            if epoch == 2 and step == 1:
                optimizer.load_state_dict(state)
            closure()
            if epoch == 3:
                for quantizer in quantizers(model).values():
                    quantizer.alpha.grad.zero_()
            optimizer.step()
        held[epoch] = alphas(model)
        state = state or copy.deepcopy(optimizer.state_dict())
    assert held[1] == held[2] == held[3]


def test_alphas_that_a_closure_releases_learn_in_that_step():
    model = made()
    qbr.calibrate(model, [batch()])
    control = qbr.AlphaControl(qbr.Freeze(step=1, release_step=2)).attach(model)
    optimizer = optimizer_of(model)
    closure, moved = closure_of(model, optimizer), []

    def step():
        control.begin_step()
        return closure()

    for _ in range(2):
        before = alphas(model)
        optimizer.step(step)
        moved.append(alphas(model)[0] != before[0])
    assert moved == [False, True]


def test_an_optimizer_of_pruned_weights_alone_is_noticed():
    """What pruning has made of a weight lies behind the bias in its layer."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    qbr.prepare(model, qbr.QATConfig())
    optimizer = torch.optim.SGD([model[0].weight_orig, model[2].weight_orig], lr=0.1)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with pytest.raises(RuntimeError, match="no optimizer, so they would never be trained"):
        optimizer.step()
