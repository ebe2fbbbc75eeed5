"""calibrate(): the steps of each method, what it leaves alone, bad input, and two processes with different data."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import qbr
from qbr import QATConfig, QuantSpec, calibrate, functional, prepare, sketch
from qbr.quantizers import quantizers


def x_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**config) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    return prepare(model, QATConfig(**config))


def alphas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: quantizer.alpha.detach().clone() for name, quantizer in quantizers(model).items()}


CONFIGS = [{}, {"weight_per_channel": True, "quantize_inputs": True}, {"weight_bits": 1, "act_bits": 1, "clip": 1.0}]


@pytest.mark.parametrize("config", CONFIGS)
def test_one_batch_with_lsq_is_the_first_training_forward_to_the_bit(config):
    model, first = make(**config), make(**config)
    calibrate(model, [x_(2, 3, 8, 8)])
    with torch.random.fork_rng():
        first(x_(2, 3, 8, 8))
    got, expected = alphas(model), alphas(first)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(q.initialised and q.init_state.item() == 1 for q in quantizers(model).values())
    model(5 * x_(2, 3, 8, 8))
    assert all(torch.equal(alphas(model)[name], got[name]) for name in got)


class Scaled(nn.Module):
    """A vector with a step for each of its elements."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(x_(5))
        self.weight_quantizer = qbr.LSQQuantizer(QuantSpec(4, channel_axis=0), "weight", initial_alpha=0.1, channels=5)

    def forward(self, x):
        return x * self.weight_quantizer(self.weight)


@pytest.mark.parametrize("method", ["lsq", "mse", "percentile"])
def test_a_vector_with_a_step_for_each_element(method):
    model, first = Scaled(), Scaled()
    calibrate(model, method=method)
    first(torch.ones(5))
    size = first.weight.detach().abs()
    expected = {"lsq": alphas(first)["weight_quantizer"], "mse": size / 7, "percentile": size / 8}[method]
    got = alphas(model)["weight_quantizer"]
    if method == "mse":  # any of the steps of which the value is a multiple is as good
        got = (size / got).round() * got
        expected = size
    assert torch.allclose(got, expected, rtol=0.01)


class Drawing(nn.Module):
    """A forward that draws from every generator there is."""

    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x, *more):
        return self.relu(self.linear(x)) * random.random() * np.random.rand() * torch.rand(1)


def test_all_random_number_generators_are_as_before():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    model, prepared = Drawing(), prepare(Drawing())
    for run in (lambda: qbr.plan(model, example=x_(2, 4)), lambda: calibrate(prepared, [x_(2, 4)])):
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        expected = drawn()
        random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])
        run()
        assert drawn() == expected


@pytest.mark.parametrize("method", ["lsq", "mse", "percentile"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_steps_changes(method, training):
    model = make().train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert calibrate(model, [x_(2, 3, 8, 8), x_(4, 3, 8, 8)], method=method) is model
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in model.modules()] == modes
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {key for key in state if "quantizer" in key}
    assert not any(q._forward_pre_hooks or q._retained for q in quantizers(model).values())


def test_buffers_that_a_forward_assigns_anew_are_as_before():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()
            self.register_buffer("mean", torch.ones(4))
            self.register_buffer("last", None)

        def forward(self, x):
            self.last = self.relu(self.fc(x)).detach()
            self.mean = 0.9 * self.mean + 0.1 * self.last.mean(0)
            return self.last

    model = prepare(Averaging(), QATConfig())
    mean = model.mean
    calibrate(model, [x_(3, 4)])
    assert model.mean is mean and mean.tolist() == [1.0] * 4 and model.last is None


def test_all_batches_count_and_their_order_of_magnitude_does_not_matter():
    relu = nn.Sequential(nn.ReLU())
    model = prepare(relu, QATConfig(weight_bits=None, act_bits=4))
    data = [x_(10), 3 * x_(1000, seed=1), x_(20, seed=2)]
    calibrate(model, data)
    everything = torch.cat(data).relu()
    torch.testing.assert_close(model[0].quantizer.alpha.detach(), (2 * everything.mean() / 15**0.5).reshape(1))
    for scale in (1e-6, 1.0, 1e6):
        calibrate(model, [scale * x for x in data], method="mse")
        step = model[0].quantizer.alpha.item() / scale
        assert step == pytest.approx(best_step(everything, QuantSpec(bits=4, signed=False)), rel=0.02)


def error(x, alpha, spec) -> float:
    return (functional.fake_quantize(x, float(alpha), spec) - x).double().square().sum().item()


def best_step(x, spec) -> float:
    """By brute force."""
    grid = x.abs().max().item() / max(spec.qp, 1) * torch.linspace(0.02, 1.1, 1500)
    return min(grid.tolist(), key=lambda alpha: error(x, alpha, spec))


@pytest.mark.parametrize("bits, signed", [(1, False), (2, True), (2, False), (4, True), (8, True), (8, False)])
def test_mse_finds_the_best_step_from_bins_and_from_elements(bits, signed):
    x = x_(20000) if signed else x_(20000).relu()
    spec = QuantSpec(bits=bits, signed=signed)
    least = error(x, best_step(x, spec), spec)
    bins = sketch.Sketch("cpu")
    for part in x.split(7000):
        bins.add(part)
    for merged in (1, 8) if bits <= 5 else (1,):
        assert error(x, sketch.mse_step(bins.bins(merged), spec), spec) < 1.003 * least
    rows = torch.stack([x, torch.zeros_like(x), x * 1e-30, x.roll(1) * 1e30])
    rows = torch.cat([rows, torch.full((4, 2), torch.inf)], 1)  # which counts nowhere
    one, zero, small, large = sketch.mse_step_of(rows, spec)
    assert error(x, one, spec) < 1.003 * least and zero.isnan()
    torch.testing.assert_close(torch.stack([small * 1e30, large / 1e30]), torch.stack([one, one]))


def test_the_percentile_lands_on_the_outermost_level():
    model = prepare(nn.Sequential(nn.Linear(100, 80), nn.ReLU()), QATConfig(weight_bits=4, act_bits=3))
    calibrate(model, [x_(50, 100)], method="percentile", percentile=99.0)
    weight = model[0].weight.detach().abs().flatten()
    assert model[0].weight_quantizer.alpha.item() * 8 == pytest.approx(weight.quantile(0.99).item(), rel=0.02)
    pre = model[0](x_(50, 100)).relu().detach().flatten()
    assert model[1].quantizer.alpha.item() * 7 == pytest.approx(pre.quantile(0.99).item(), rel=0.02)
    calibrate(model, [x_(50, 100)], method="percentile", percentile=100)
    assert model[0].weight_quantizer.alpha.item() * 8 == pytest.approx(weight.max().item(), rel=0.002)


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_a_step_per_channel(method):
    model = prepare(nn.Sequential(nn.Linear(300, 3)), QATConfig(4, None, weight_per_channel=True))
    with torch.no_grad():
        model[0].weight.copy_(x_(3, 300) * torch.tensor([[0.01], [1.0], [30.0]]))
    calibrate(model, None, method=method, percentile=99)  # weights need no data
    for row, alpha in zip(model[0].weight.detach(), model[0].weight_quantizer.alpha.tolist()):
        expected = best_step(row, QuantSpec(bits=4)) if method == "mse" else row.abs().quantile(0.99).item() / 8
        assert alpha == pytest.approx(expected, rel=0.05)


def test_binary_takes_its_least_squares_step_whatever_the_method():
    for method in qbr.calibrate.__globals__["METHODS"]:
        model = prepare(nn.Sequential(nn.Linear(30, 30)), QATConfig(1, None))
        calibrate(model, method=method)
        assert model[0].weight_quantizer.alpha.item() == pytest.approx(model[0].weight.abs().mean().item())


def test_kinds_of_batches_and_wrapped_models():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x, shift=0.0):
            return self.relu(x + shift)

    model = prepare(Named(), QATConfig(weight_bits=None))
    steps = []
    for batch, forward in [
        (x_(9), None),
        ((x_(9), torch.tensor(1)), None),
        ([x_(9), "label"], None),
        ({"x": x_(9), "shift": 0.0}, None),
        ("anything", lambda m, batch: m(x_(9))),
    ]:
        calibrate(torch.compile(model), iter([batch]), forward=forward)
        steps.append(model.relu.quantizer.alpha.item())
        model.relu.quantizer.reset_parameters()
    assert len(set(steps)) == 1
    with pytest.raises(TypeError, match="a batch is a str"):
        calibrate(model, ["anything"])


def test_looking_for_who_reads_weights_draws_nothing_from_the_callers_generator():
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), qbr.QATConfig(act_bits=None))
    before = torch.get_rng_state()
    calibrate(model, torch.utils.data.DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_input():
    model = make()
    before = alphas(model)
    for batches in ([], None, iter(())):
        with pytest.raises(ValueError, match="batches has no batch"):
            calibrate(model, batches)
    for bad in (x_(2, 3, 8, 8), {"x": x_(2, 3, 8, 8)}, "path", 3):
        with pytest.raises(TypeError, match="batches is one"):
            calibrate(model, bad)
    with pytest.raises(ValueError, match="method='max'"):
        calibrate(model, [x_(2, 3, 8, 8)], method="max")
    with pytest.raises(ValueError, match="percentile=0"):
        calibrate(model, [x_(2, 3, 8, 8)], percentile=0)
    with pytest.raises(TypeError, match="percentile='99'"):
        calibrate(model, [x_(2, 3, 8, 8)], percentile="99")
    with pytest.raises(ValueError, match="has no quantizers"):
        calibrate(nn.Linear(2, 2), [x_(2, 2)])
    assert all(torch.equal(before[n], a) for n, a in alphas(model).items() if "weight" not in n)


@pytest.mark.parametrize("batches", [[], [3], [x_(2, 3, 8, 8), 3]])
@pytest.mark.parametrize("seen", [False, True])
def test_a_calibration_that_fails_changes_nothing(batches, seen):
    model = make()
    if seen:
        model(x_(4, 3, 8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError)):
        calibrate(model, batches, method="mse")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(quantizer.initialised is seen for quantizer in quantizers(model).values())


def test_what_no_batch_reaches_and_what_is_zero_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.zero = nn.ReLU(), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.used(x) + self.zero(-x.abs())

    for method in ("lsq", "mse", "percentile"):
        model = prepare(Two(), QATConfig(weight_bits=None))
        before = alphas(model)
        with pytest.warns(UserWarning) as seen:
            calibrate(model, [x_(9)], method=method)
        assert [str(w.message).partition("]")[0] for w in seen] == [
            "no batch reached ['spare.quantizer'", "the data of ['zero.quantizer'"
        ]  # fmt: skip
        assert not model.spare.quantizer.initialised and model.used.quantizer.initialised
        assert torch.equal(alphas(model)["zero.quantizer"], before["zero.quantizer"])


def test_not_finite_values_count_nowhere():
    bins, spec = sketch.Sketch("cpu"), QuantSpec(bits=4)
    bins.add(torch.cat([x_(100), torch.tensor([float("nan"), float("inf"), -float("inf")])]))
    clean = sketch.Sketch("cpu")
    clean.add(x_(100))
    assert torch.equal(sketch.mse_step(bins.bins(), spec), sketch.mse_step(clean.bins(), spec))
    bins.add(torch.empty(0, 3))


# An optimizer that was built before prepare()


def test_an_optimizer_without_the_steps_is_refused_at_its_first_step():
    def step(model, *optimizers):
        model(x_(2, 3, 8, 8)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, QATConfig())
    weight = model[0].weight.detach().clone()
    for _ in range(2):  # whoever catches the error is told again
        with pytest.raises(RuntimeError, match=r"(?s)2 step sizes .* Was it built before prepare\(\)\?"):
            step(model, early)
    assert torch.equal(model[0].weight, weight)
    alone = torch.optim.SGD([q.alpha for q in quantizers(model).values()], lr=0.1)
    step(model, torch.optim.SGD(model[0].parameters(), lr=0.1), alone)
    for quantizer in quantizers(model).values():
        quantizer.alpha.requires_grad_(False)
    del alone
    step(model, torch.optim.SGD([model[0].weight, model[0].bias], lr=0.1))
    step(make(), torch.optim.SGD([nn.Parameter(x_(2))], lr=0.1))


def test_so_is_one_without_the_steps_of_activations_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, QATConfig(weight_bits=None))
    model(x_(2, 3, 8, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"(?s)1 step sizes .* Was it built before prepare\(\)\?"):
        optimizer.step()


def test_optimizers_that_share_a_model_need_not_have_the_steps_between_them():
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), QATConfig(weight_bits=None))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    model(x_(2, 3, 8, 8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("frozen", ["freeze_weights", "freeze_acts"])
def test_so_is_one_without_steps_that_are_released_later(frozen):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, QATConfig(*((2, None) if frozen == "freeze_weights" else (None, 2))))
    control = qbr.AlphaControl(**{frozen: qbr.Freeze(epoch=1, release_epoch=3)}).attach(model)
    for epoch in (1, 2, 3):
        control.begin_epoch(epoch)
        model(x_(2, 3, 8, 8)).sum().backward()
        if epoch == 3:
            with pytest.raises(RuntimeError, match="1 step sizes"):
                optimizer.step()
        else:
            optimizer.step()  # alphas that are frozen need no optimizer


# Two processes


def _calibrate_on_rank(rank, path, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = []
    with qbr.use_backend("reference"):
        for method in ("lsq", "mse", "percentile"):
            model = make(act_bits=4, weight_bits=4, weight_per_channel=method == "mse", quantize_inputs=True).eval()
            calibrate(model, _rank_batches(rank), method=method)
            found.append([alpha.tolist() for alpha in alphas(model).values()])
        try:
            calibrate(model, [])
        except ValueError as error:
            found.append(str(error))
        calibrate(model, _rank_batches(rank) if rank else [])  # one rank has none: enough
        found.append(model[2].quantizer.alpha.tolist())
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


def _rank_batches(rank):
    return [x_(2, 3, 8, 8, seed=10 * rank + i) * (1 + rank) for i in range(1 + 2 * rank)]  # one batch, and three


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_with_different_data_get_the_same_steps(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_calibrate_on_rank, args=(r, tmp_path / "store", queue)) for r in range(2)]
    for process in ranks:
        process.start()
    got = dict([queue.get(), queue.get()])
    for process in ranks:
        process.join(300)  # seconds; a busy machine takes long to import torch twice
        assert process.exitcode == 0
    assert got[0] == got[1]
    assert "batches has no batch" in got[0][3]
    model = make(act_bits=4, weight_bits=4, quantize_inputs=True).eval()
    calibrate(model, [*_rank_batches(0), *_rank_batches(1)])
    first_input = model[0].input_quantizer.alpha.tolist()  # its data does not depend on other steps
    at = list(alphas(model)).index("0.input_quantizer")
    assert got[0][0][at] == pytest.approx(first_input)


def test_copies_are_calibrated_alike():
    model = make()
    other = copy.deepcopy(model)
    for each in (model, other):
        calibrate(each, [x_(2, 3, 8, 8)], method="mse")
    assert all(torch.equal(a, b) for a, b in zip(alphas(model).values(), alphas(other).values()))


def test_a_batch_that_the_forward_does_not_take_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x, y):
            return self.act(self.fc(x)) + y

    model, x = qbr.prepare(Two(), qbr.QATConfig()), torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"Two.forward cannot be called with the batch \(missing .* 'y'\).*forward="):
        qbr.calibrate(model, [(x, x)])
    qbr.calibrate(model, [{"x": x, "y": x}])


def test_empty_batches_are_told_as_such():
    model = qbr.prepare(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), qbr.QATConfig())
    with pytest.warns(UserWarning, match="the data of .'1.quantizer'. has no element: empty batches: their step sizes"):
        qbr.calibrate(model, [torch.randn(0, 3)])
    assert not model[1].quantizer.initialised and model[0].weight_quantizer.initialised


def test_a_model_on_meta_is_to_be_made_first():
    with torch.device("meta"):
        model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), qbr.QATConfig())
    with pytest.raises(ValueError, match=r"on meta, without data \(0.weight_quantizer.alpha\): .*to_empty"):
        qbr.calibrate(model, [torch.randn(2, 4)])
