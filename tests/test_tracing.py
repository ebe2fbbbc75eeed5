"""Reading a forward: what it does while it is read is undone, and one that a graph cannot repeat is not rewritten."""

from __future__ import annotations

import functools
import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qbr import QATConfig, QuantizedClippedReLU, plan, prepare


def x_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """A layer, a ReLU module, and a forward that is given as a function."""

    def __init__(self, forward):
        super().__init__()
        self.fc, self.act, self.run = nn.Linear(4, 4), nn.ReLU(), forward
        self.log, self.cache, self.seen, self.last = [0], {"a": 1}, {1}, deque([2])
        self.plain, self.n, self.feat = torch.zeros(2), 0, None
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("ema", torch.ones(4))

    def forward(self, x):
        return self.run(self, x)


def relu(layer, x):
    return F.relu(layer.act(layer.fc(x)) - 0.1)


# What does not stop the reading


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.act(s.fc(x).view(x.shape[:-1] + (2, 2))).reshape(x.size()[:-1] + (4,)),
        lambda s, x: torch.add(s.act(s.fc(x)), x, out=None),
        lambda s, x: torch.add(s.act(s.fc(x)), True) + [1.0][0],
    ],
)
def test_sums_of_what_is_no_number(forward):
    model = prepare(Layer(forward), QATConfig())
    assert model(x_(2, 4)).shape == (2, 4) and hasattr(model.act, "quantizer")


# What a forward does while it is read


def count(layer, x):
    layer.steps += 1
    return relu(layer, x)


def average(layer, x):
    layer.ema.mul_(0.5)
    return relu(layer, x)


def write(layer, x):
    layer.plain += 1
    return relu(layer, x)


def momentum(layer, x):
    with torch.no_grad():
        for parameter in layer.fc.parameters():
            parameter.data = parameter.data * 0.9
        for parameter in layer.fc.parameters():
            parameter.data.mul_(0.9)
    return relu(layer, x)


def remember(layer, x):
    layer.feat = layer.fc.feat = x
    layer.n += 1
    return relu(layer, x)


def append(layer, x):
    layer.log.append(x), layer.last.append(x), layer.seen.add(7)
    layer.cache["a"] = x
    return relu(layer, x)


def skip(layer, x):
    return x if random.random() < 2 else relu(layer, x)


def skip_numpy(layer, x):
    return x if np.random.rand() < 2 else relu(layer, x)


def skip_torch(layer, x):
    return x if torch.rand(1).item() < 2 else relu(layer, x)


def look(layer, x):
    return relu(layer, x) * (1.0 if layer.plain.sum().item() < 3 else 100.0)


def look_at_a_buffer(layer, x):
    return relu(layer, x) * (1.0 if layer.steps < 3 else 100.0)


def own_tensor(layer, x):
    return relu(layer, x) + torch.arange(4.0)


def checkpointed(layer, x):
    return relu(layer, checkpoint(layer.fc, x, use_reentrant=False))


def checkpointed_reentrant(layer, x):
    return relu(layer, checkpoint(layer.fc, x, use_reentrant=True))


def offloaded(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return relu(layer, x)


def state(model):
    tensors = [*model.state_dict().values(), model.plain]
    values = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    items = [list(model.log), dict(model.cache), set(model.seen), list(model.last)]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    return values, items, attributes, [model.n, model.feat, model.training, model.fc.training]


def same(a, b) -> bool:
    (values, addresses), *others = a
    (values_b, addresses_b), *others_b = b
    return all(map(torch.equal, values, values_b)) and addresses == addresses_b and others == others_b


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), position


EFFECTS = [count, average, write, momentum, remember, append, skip, skip_numpy, skip_torch]


@pytest.mark.parametrize("forward", EFFECTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_plan_changes_nothing(forward, training):
    model = Layer(forward).train(training)
    before, drawn = state(model), random_states()
    plan(model, QATConfig())
    assert same(state(model), before) and random_states() == drawn
    forward(model, x_(2, 4))
    assert not same(state(model), before) or random_states() != drawn  # it does something when it runs


@pytest.mark.parametrize(
    "forward, why",
    [
        (count, "it changes steps"), (write, "it writes to a tensor"), (momentum, "it writes to a tensor"),
        (remember, "it changes "), (append, "it changes "), (skip, "draws random"), (skip_numpy, "draws random"),
        (skip_torch, "draws random"), (look, "looks at a tensor's values"), (look_at_a_buffer, "control flow"),
        (own_tensor, "makes a tensor of its own"), (checkpointed, "saved for backward"),
        (offloaded, "saved for backward"), (checkpointed_reentrant, "it switches gradients"),
    ],
)  # fmt: skip
def test_a_forward_that_a_graph_does_not_repeat_is_not_rewritten(forward, why, monkeypatch):
    monkeypatch.setattr(Layer, "forward", forward)  # so that the names in it are forward's own
    model = nn.Sequential(Layer(forward), nn.ReLU())
    with pytest.warns(UserWarning, match=f"^0 calls a ReLU as a function.*{why}"):
        prepare(model, QATConfig())
    assert "forward" not in model[0].__dict__ and not hasattr(model[0], "functional_relu_1")
    before, drawn = state(model[0]), random_states()
    model(x_(2, 4))
    assert forward not in EFFECTS or not same(state(model[0]), before) or random_states() != drawn


def test_operations_on_buffers_are_part_of_a_rewritten_forward():
    model = prepare(nn.Sequential(Layer(average), nn.ReLU()), QATConfig())
    assert "forward" in model[0].__dict__ and model[0].ema.tolist() == [1] * 4
    model(x_(2, 4)), model.eval()(x_(2, 4))
    assert model[0].ema.tolist() == [0.25] * 4


def test_forwards_are_rewritten_within_saved_tensor_hooks_of_the_caller():
    with torch.autograd.graph.save_on_cpu():
        model = prepare(nn.Sequential(Layer(relu), nn.ReLU()), QATConfig())
    assert "forward" in model[0].__dict__


# ReLUs that work in place


class PreActivated(nn.Module):
    """A residual block whose ReLU in place changes what the shortcut reads."""

    def __init__(self, relu=None, looks=False):
        super().__init__()
        self.fc, self.r, self.looks = nn.Linear(4, 4), relu or nn.ReLU(inplace=True), looks
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = x + 0
        y = self.fc(self.r(x)) * 1e-3
        if self.looks:
            self.seen = self.seen + 1
        return y + x


def test_what_a_relu_changes_in_place_is_read_from_its_result():
    for relu in (nn.ReLU(inplace=True), nn.ReLU6(inplace=True)):
        assert "part of a rewritten forward" in str(plan(PreActivated(relu), QATConfig()))
        model = prepare(PreActivated(relu), QATConfig(8, 8))
        for mode in (True, False):
            assert model.train(mode)(x_(64, 4)).min() > -0.01 and x_(64, 4).min() < -2
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), QATConfig())
    assert "forward" not in model.__dict__  # nobody reads it


def test_a_relu_in_place_whose_readers_cannot_be_helped_stays_in_float():
    with pytest.warns(UserWarning, match="^0.r is a ReLU in place: what it changes .*it changes seen"):
        model = prepare(nn.Sequential(PreActivated(looks=True), nn.Linear(4, 4), nn.ReLU()), QATConfig(8, 8))
    assert type(model[0].r) is nn.ReLU and model[0](x_(64, 4)).min() > -0.01
    skipped = plan(nn.Sequential(PreActivated(looks=True), nn.Linear(4, 4), nn.ReLU()), QATConfig(skip=["0.r"]))
    assert not skipped.warnings and not skipped.forwards


class Around(nn.Module):
    """A shortcut around a module that changes its input in place."""

    def __init__(self, branch):
        super().__init__()
        self.branch, self.last = branch, nn.ReLU()

    def forward(self, x):
        x = x + 0
        return self.last(self.branch(x)) * 1e-3 + x


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.fc(F.relu_(x)))


@pytest.mark.parametrize(
    "branch, name",
    [
        (lambda: nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))), "branch.0.0"),
        (lambda: nn.Sequential(InPlace()), "branch.0.functional_relu_1"),
        (lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(4, 4)), "branch.2"),
    ],
)
def test_a_relu_that_changes_the_input_of_a_branch_in_place_stays_in_float(branch, name):
    with pytest.warns(UserWarning, match=f"^{name} is a ReLU in place: the model reads what it changes in place"):
        model = prepare(Around(branch()), QATConfig(8, 8))
    assert model(x_(64, 4)).min() > -0.01
    quantized = {name for name, module in model.named_modules() if type(module) is QuantizedClippedReLU}
    assert quantized == {"last", *(["branch.0.functional_relu_2"] if "functional" in name else [])}


class Program(nn.Module):
    """Calls of ReLUs in place and not, by modules and functions, in a random order."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.r, self.s, self.same = nn.ReLU(inplace=True), nn.ReLU(), nn.Identity()
        kinds = ["r", "s", "relu", "relu_", "method", "add", "shift", "dropout", "view", "same"]
        self.steps = tuple((draw.choice(kinds), draw.random(), draw.random()) for _ in range(9))

    def forward(self, x):
        values = [x - 0.1, x * 2]
        for kind, i, j in self.steps:
            a, b = values[int(i * len(values))], values[int(j * len(values))]
            if kind == "relu_":
                F.relu_(a)  # what it returns is not used
            else:
                values.append({
                    "r": self.r, "s": self.s, "relu": F.relu, "method": lambda a: a.relu_(), "add": lambda a: a - b,
                    "shift": lambda a: a - 0.3, "dropout": lambda a: F.dropout(a, 0.5, self.training),
                    "view": lambda a: a.flatten().view(3, 4), "same": self.same,
                }[kind](a))  # fmt: skip
        return torch.stack(values)


def test_with_relus_that_are_not_in_place_a_rewritten_forward_gives_what_it_gave():
    rewritten = 0
    for seed in range(40):
        model = Program(seed)
        expected = model.eval()(x_(3, 4))
        found = plan(model, QATConfig(weight_bits=None))
        for each in found.relus:
            if each.module is None:
                setattr(model, each.name, nn.ReLU())
            each.module and setattr(each.module, "inplace", False)
        rewritten += bool(found.forwards)
        model.forward = found.forwards.get(model, model.forward)
        assert torch.equal(model(x_(3, 4)), expected), seed
    assert rewritten > 20


# Calls that one graph does not serve, and weights that are read past their layers


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, skip=None, scale=1.0):
        y = F.relu(self.fc(x)) * scale
        return y if skip is None else y + skip


CALLS = [lambda f, x: f(x, skip=x), lambda f, x: f(x, None, 2.0), lambda f, x: f(x, scale=2.0)]


@pytest.mark.parametrize("call", CALLS)
def test_a_forward_that_is_called_in_several_ways_is_not_rewritten(call):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.r = Inner(), nn.ReLU()

        def forward(self, x):
            return self.r(call(self.i, self.i(x)))

    with pytest.warns(UserWarning, match="^i calls a ReLU as a function.*called with different arguments"):
        model = prepare(Outer(), QATConfig())
    assert model(x_(2, 4)).shape == (2, 4)
    call = lambda f, x: f(x, scale=float("1"))  # noqa: E731 (what Outer's forward looks up)
    model = prepare(Outer(), QATConfig())
    assert model(x_(2, 4)).shape == (2, 4) and "forward" in model.i.__dict__


def test_a_weight_that_a_forward_reads_itself_is_warned_of():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.r = nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, tokens):
            x = self.r(self.fc(self.embed(tokens).to(self.fc.weight.dtype)))
            return F.linear(x, self.embed.weight)

    found = plan(Tied(), QATConfig()).warnings
    assert len(found) == 1 and found[0].startswith("['embed.weight']: read by forwards that are not their layers' (of ")
    assert not plan(Tied(), QATConfig(skip=["embed"])).warnings
    with pytest.warns(UserWarning, match="embed.weight"):
        prepare(Tied(), QATConfig())


# ReLUs that a forward which cannot be read does not name itself


class Helped(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), act

    def first(self, x):
        return [F.relu(each) for each in (self.fc(x),)][0]


class ByMethod(Helped):
    def forward(self, x):
        return self.first(x) if x.sum() < 1e9 else x


class BySuper(ByMethod):
    def forward(self, x):
        return super().forward(x)


class ByAttribute(Helped):
    def forward(self, x):
        return self.act(self.fc(x)) if x.sum() < 1e9 else x


class ByFunction(Helped):
    def forward(self, x):
        return rectified(self.fc(x)) if x.sum() < 1e9 else x


class NoReLU(Helped):
    def forward(self, x):
        return self.act(self.fc(x), x) if x.sum() < 1e9 else self.cpu()


def rectified(x):
    return (lambda y: y.relu())(x)


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize(
    "make, warned",
    [
        (ByMethod, True), (lambda: ByAttribute(F.relu), True), (ByFunction, True),
        (BySuper, True),
        (lambda: ByAttribute(functools.partial(F.relu, inplace=True)), True),
        (lambda: ByAttribute(torch.relu), True), (lambda: ByAttribute(nn.ReLU()), False),
        (lambda: ByAttribute(torch.tanh), False), (lambda: NoReLU(checkpoint), False),
        (lambda: OwnEncoderLayer(4, 2, 8), True), (lambda: OwnEncoderLayer(4, 2, 8, activation="gelu"), False),
    ],
)  # fmt: skip
def test_a_relu_behind_a_method_a_function_or_an_attribute_is_warned_of(make, warned):
    found = plan(nn.Sequential(make(), nn.Linear(4, 4), nn.ReLU()), QATConfig()).warnings
    assert [text.partition(" calls a ReLU as a function")[0] for text in found] == ["0"] * warned


def test_an_error_names_what_could_not_be_read():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            self.last = x
            return self.fc(x).relu()

    with pytest.raises(ValueError, match="act_bits=2: no ReLU.*the model calls a ReLU as a function.*it changes last"):
        prepare(Remembers(), QATConfig())
    model = prepare(Remembers(), QATConfig(act_bits=None))
    assert not hasattr(model, "last")
