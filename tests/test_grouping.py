"""The weights of a model are quantized in one call per forward, and wherever that would be wrong each by its layer."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import qbr
from qbr import functional, grouping
from qbr.quantizers import quantizers


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)
    )
    qbr.prepare(model, qbr.QATConfig(weight_bits=2, act_bits=2))
    model(images())  # sets the alphas
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def calls(monkeypatch):
    """How many weights each group had, and how many were quantized alone."""
    seen = {"together": [], "alone": 0}
    one, many = functional.fake_quantize_with_bin_loss, functional.foreach_fake_quantize_with_bin_loss

    def count_one(x, alpha, spec, **options):
        seen["alone"] += spec.signed
        return one(x, alpha, spec, **options)

    def count_many(xs, *rest, **options):
        seen["together"].append(len(xs))
        return many(xs, *rest, **options)

    monkeypatch.setattr(functional, "fake_quantize_with_bin_loss", count_one)
    monkeypatch.setattr(functional, "foreach_fake_quantize_with_bin_loss", count_many)
    return seen


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Loss and gradients of one training step without the update."""
    model.zero_grad()
    out = model(images())
    br = qbr.bin_loss(model)
    assert len(br.layers) == 5
    loss = out.square().mean() + br.weights + br.activations
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def alone(model: nn.Module) -> nn.Module:
    for quantizer in quantizers(model).values():
        quantizer.alone = True
    return model


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def test_one_call_for_all_weights_gives_the_same_step(calls):
    together = step(make())
    assert calls == {"together": [3], "alone": 3}  # alone: the forward that set alpha
    assert_same(together, step(alone(make())))
    assert calls["alone"] == 9


def test_evaluation_and_warm_up():
    model, single = make(), alone(make())
    for each in (model, single):
        each.eval()
    assert torch.equal(model(images()), single(images()))
    for each in (model, single):
        each.train()
        for quantizer in quantizers(each).values():
            quantizer.collecting = False
    assert torch.equal(model(images()), single(images()))
    assert all(quantizer._ready is None for quantizer in quantizers(model).values())


def test_two_forwards_before_a_backward_and_a_second_step(calls):
    results = []
    for model in (make(), alone(make())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            (model(images()).square().mean() + model(images() * 2).square().mean()).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert calls["together"] == [3] * 4
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_quantizes_layer_by_layer(reentrant):
    def checkpointed(model, x):
        return model[2:](checkpoint(model[:2], x.requires_grad_(), use_reentrant=reentrant))

    class Whole(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return checkpointed(self.body, x)

    torch.manual_seed(0)
    whole = Whole(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
                                nn.Linear(6 * 16, 5)))  # fmt: skip
    qbr.prepare(whole, qbr.QATConfig(weight_bits=2, act_bits=2))
    whole(images())
    for _ in range(2):
        whole.zero_grad()
        whole(images()).square().mean().backward()
        assert whole.body[0].weight_quantizer.alone and not whole.body[2].weight_quantizer.alone
    plain = alone(make())
    plain(images()).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, whole.get_parameter(f"body.{name}").grad), name


def test_a_layer_that_did_not_run_quantizes_alone_and_has_no_gradient():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, spare=False):
            return (self.spare if spare else self.other)(self.used(x))

    model = qbr.prepare(Two(), qbr.QATConfig(act_bits=None))
    x = torch.randn(3, 4)
    model(x), model(x, spare=True)
    model(x).sum().backward()
    assert model.spare.weight.grad is None and model.spare.weight_quantizer.alpha.grad is None
    assert model.spare.weight_quantizer.alone and not model.used.weight_quantizer.alone
    model(x, spare=True).sum().backward()
    assert model.spare.weight.grad is not None


def test_a_weight_that_is_replaced_or_changed_meanwhile_is_not_taken_from_the_group():
    model, single = make(), alone(make())
    weights = {name: torch.randn_like(p) if "weight" in name else p for name, p in model.named_parameters()}
    weights = {name: p.abs() if "alpha" in name else p for name, p in weights.items()}
    got = torch.func.functional_call(model, weights, (images(),))
    assert torch.equal(got, torch.func.functional_call(single, weights, (images(),)))

    def in_place(layer):
        with torch.no_grad():
            layer.weight.mul_(2)

    def elsewhere(layer):
        layer.weight.data = layer.weight.data * 2

    for change in (in_place, elsewhere):
        for each in (model, single):
            each[1].register_forward_hook(lambda *_, layer=each[2], change=change: change(layer))
        assert torch.equal(model(images()), single(images()))
        model[1]._forward_hooks.clear()
        single[1]._forward_hooks.clear()
        model(images()), single(images())
        for quantizer in quantizers(model).values():
            quantizer.alone = False
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    single[0].weight = nn.Parameter(torch.ones_like(single[0].weight))
    assert torch.equal(model(images()), single(images()))


def test_an_exception_in_forward_leaves_nothing_behind():
    model = make()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 9, 8, 8))
    assert all(quantizer._ready is None for quantizer in quantizers(model).values())
    assert_same(step(model), step(alone(make())))


def test_copies_and_compiled_models():
    model, copies = make(), []
    out = model(images())
    hook = model[2].register_forward_hook(lambda *_: copies.extend([copy.deepcopy(model), pickle.dumps(model[5])]))
    assert torch.equal(model(images()), out)  # copied while results wait for their layers
    hook.remove()
    assert copies[0][5].weight_quantizer._ready is None and pickle.loads(copies[1]).weight_quantizer._ready is None
    assert torch.equal(copy.deepcopy(model)(images()), out)
    assert torch.equal(torch.compile(model, backend="aot_eager")(images()), out)


def test_a_sharded_weight_is_left_to_its_layer():
    model = make()
    weight = model[0].weight
    size = weight.untyped_storage().size()
    kept = weight.detach().clone()

    def gather(module, _):
        weight.untyped_storage().resize_(size)
        weight.data.copy_(kept)

    weight.untyped_storage().resize_(0)
    model[0].register_forward_pre_hook(gather)
    assert not grouping.is_there(weight)
    assert torch.equal(model(images()), alone(make())(images()))


class Branches(nn.Module):
    """Two losses that share no weight."""

    def __init__(self, dtype=torch.float32, **config):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.apart = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 3)
        self.apart.weight = nn.Parameter(torch.randn(4, 3).t())  # kernels need a copy of it
        qbr.prepare(self.to(dtype), qbr.QATConfig(act_bits=None, **config))
        self.x = torch.randn(5, 4, dtype=dtype)
        self()

    def forward(self):
        return (self.one(self.x) + self.apart(self.x)).square().mean(), self.two(self.x).square().mean()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.named_parameters()}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("collecting", [True, False])
def test_losses_of_different_weights_may_have_backwards_of_their_own(collecting, dtype, single):
    at_once, apart = (Branches(dtype, collect_bin_loss=collecting) for _ in range(2))
    if single:
        alone(at_once), alone(apart)
    sum(at_once()).backward()
    one, two = apart()
    (of_one,) = torch.autograd.grad(one, [apart.one.weight], retain_graph=True)
    one.backward()
    assert apart.two.weight.grad is None and torch.equal(of_one, apart.one.weight.grad)
    with torch.no_grad():
        apart.one.weight.mul_(2), apart.one.weight_quantizer.alpha.mul_(2)  # an optimizer's step
    two.backward()
    assert_same(apart.gradients(), at_once.gradients())


def test_the_weights_bin_loss_may_have_a_backward_of_its_own():
    at_once, apart = Branches(), Branches()
    for model, backwards in ((at_once, lambda *losses: sum(losses).backward()),
                             (apart, lambda *losses: [loss.backward() for loss in losses])):  # fmt: skip
        one, two = model()
        losses = qbr.bin_loss(model).layers
        backwards(losses["one"].loss + losses["two"].loss, two, one)
    for name, gradient in at_once.gradients().items():
        torch.testing.assert_close(apart.gradients()[name], gradient, msg=name)


@pytest.mark.parametrize("change", ["weight", "alpha"])
@pytest.mark.parametrize("single", [False, True])
def test_a_weight_that_has_changed_before_its_backward_is_refused(change, single):
    model = alone(Branches()) if single else Branches()
    one, two = model()
    with torch.no_grad():
        (model.one.weight if change == "weight" else model.one.weight_quantizer.alpha).mul_(2)
    two.backward()
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\), or its step size, has been modified by an inplace .*step"):
        one.backward()


def test_a_model_made_under_inference_mode():
    expected = make().eval()(images())
    with torch.inference_mode():
        model = make().eval()
        assert torch.equal(model(images()), expected)
    with torch.no_grad():
        assert torch.equal(model(images()), expected)
        quantizer = model[0].weight_quantizer
        (each,) = functional.foreach_bin_loss([model[0].weight], [quantizer.alpha], quantizer.spec)
        assert each.bins.table.sum() > 0



def test_layers_behind_an_exception_are_quantized_together_again():
    class Fails(nn.Module):
        fails = True

        def forward(self, x):
            if self.fails:
                raise ValueError("once")
            return x

    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Fails(), nn.Linear(4, 4)), qbr.QATConfig())
    qbr.calibrate(model, [torch.randn(2, 4)], forward=lambda model, x: model[3](model[1](model[0](x))))
    with pytest.raises(ValueError, match="once"):
        model(torch.randn(2, 4))
    assert not any(q.alone for q in model.modules() if hasattr(q, "alone"))


@pytest.mark.parametrize("write", ["data", "data in place"])
def test_a_hook_that_writes_to_data_is_seen(write):
    """As for a weight's norm to be bounded before each use: .data has no version."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    qbr.prepare(model, qbr.QATConfig(weight_bits=4, act_bits=4))
    x = torch.randn(8, 4)
    model(x)

    def halve(layer, args):
        if write == "data":
            layer.weight.data = layer.weight.data * 0.5
        else:
            layer.weight.data.mul_(0.5)

    model[0].register_forward_pre_hook(halve)
    got = model(x)
    alone = nn.functional.linear(x, model[0].weight_quantizer(model[0].weight), model[0].bias)
    expected = model[2](model[1](alone))
    assert torch.equal(got, expected)


def test_a_part_that_is_compiled_alone_is_not_compiled_at_every_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    qbr.prepare(model, qbr.QATConfig(weight_bits=4, act_bits=4))
    x = torch.randn(8, 4)
    model(x)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=0.0))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model[2].compile(backend=backend, fullgraph=True)
    for _ in range(4):
        model(x).sum().backward()
        optimizer.step()
    assert len(graphs) <= 2  # with and without what its root has made ready


def test_weights_that_are_tied_after_prepare_are_told_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    qbr.prepare(model, qbr.QATConfig(act_bits=None))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match=r"\['0.weight', '1.weight'\] are one weight .* tie weights before prepare"):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))


@pytest.mark.parametrize("how", ["untied", "assigned", "given"])
def test_weights_of_one_quantizer_that_are_not_one_are_told_once(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if how != "given":
        model[1].weight = model[0].weight
    qbr.prepare(model, qbr.QATConfig(act_bits=None))
    if how == "untied":
        model[1].weight = nn.Parameter(torch.randn(4, 4))
    elif how == "assigned":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        model[1].weight_quantizer = model[0].weight_quantizer
    names = r"\['0.weight_quantizer', '1.weight_quantizer'\] are one quantizer of weights that are not one"
    with pytest.warns(UserWarning, match=names):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))


def test_every_walk_finds_the_weights_of_a_layer_of_ones_own():
    """Quantizers of weights by any name that ends so: figures, calibration and the packed file agree."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 4))
            self.kernel_quantizer = qbr.LSQ_WeightQuantizer(2)

        def forward(self, x):
            return x @ self.kernel_quantizer(self.kernel).T

    model = nn.Sequential(Own())
    qbr.calibrate(model, None)
    (row,) = qbr.summary(model).rows
    assert row.numel == 12 and model[0].kernel_quantizer.initialised
    assert torch.equal(qbr.convert(model)[0].kernel, model[0].kernel_quantizer(model[0].kernel))


@pytest.mark.parametrize("name", ["input", "lin", "bias"])
def test_signed_quantizers_of_what_is_no_weight_are_left_alone(name):
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(4, 3, bias=False)
            self.lin = nn.Identity()
            self.add_module(f"{name}_quantizer", qbr.LSQ_WeightQuantizer(4))

        def forward(self, x):
            return super().forward(self._modules[f"{name}_quantizer"](x))

    model = nn.Sequential(Own())
    control = qbr.AlphaControl().attach(model)
    with qbr.Monitor(model) as monitor:
        control.begin_epoch(1)
        model(torch.randn(2, 4)).sum().backward()
        assert monitor.read() and qbr.summary(model).rows and qbr.bin_loss(model).layers


def test_hooks_that_name_no_module():
    model = make()
    expected = model(images())
    model[0].register_forward_pre_hook({}.setdefault)
    model[2].register_forward_pre_hook({}.__setitem__)
    assert torch.equal(model(images()), expected)
