"""Monitor: its sums against the forwards' own, its oscillations against a loop over codes, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from guards import no_host_reads
from torch import nn
from torch.utils.checkpoint import checkpoint

import qbr
from qbr import Monitor, QATConfig
from qbr.monitor import Observer
from qbr.quantizers import quantizers


def _model(**config):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 16, 5)
    )
    return qbr.prepare(model, QATConfig(**config))


def _x(seed=0, batch=4):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _train(model, steps, lr=0.5, control=None):
    """Steps with BR, and what each forward collected: [{layer: Bins}] with tables copied."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    seen = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = model(_x(i)).square().mean()
        br = qbr.bin_loss(model)
        seen.append({name: each.bins for name, each in br.layers.items()})
        (loss + br.weights + br.activations).backward()
        optimizer.step()
    return seen


@pytest.mark.parametrize("config", [{}, {"weight_bits": 4, "weight_per_channel": True}], ids=["w2", "w4-channel"])
def test_the_sums_are_those_of_the_forwards(config):
    model = _model(**config)
    monitor = Monitor(model)
    seen = _train(model, 5)
    figures = monitor.read()
    assert list(figures) == ["0", "1", "2", "3", "5"]
    for name, row in figures.items():
        tables = [each[name].table for each in seen]
        spec = seen[0][name].spec
        total = sum(tables)
        n, q = total[: spec.num_slots], total[2 * spec.num_slots : 3 * spec.num_slots]
        assert row.quantization_mse == pytest.approx((q.sum() / n.sum()).item())
        assert row.mean_distance == pytest.approx((total[-2] / n.sum()).item())
        assert row.pct_near_levels == pytest.approx((100 * total[-1] / n.sum()).item())
        assert row.loss == pytest.approx((q[n > 0] / n[n > 0]).sum().item())
        assert row.mse + row.var == pytest.approx(row.loss)
        assert row.bins_used == (n > 0).sum().item() and row.levels == len(spec.codes) and row.bits == spec.bits
        assert row.alpha == pytest.approx(seen[-1][name].alpha.mean().item(), rel=0.5)
        assert (row.steps == 4) if row.kind == "weight" else (row.steps is row.changed is None)
    monitor.reset()
    assert all(row.loss is row.bins_used is None for row in monitor.read().values())


def _written_out(codes):
    """(changed, oscillated) shares over steps, and every element's frequency, element by element and step by step."""
    steps, size = len(codes) - 1, codes[0].numel()
    changed = back = 0
    frequency = []
    for element in range(size):
        last, f = 0, 0.0
        for step in range(steps):
            turn = int(torch.sign(codes[step + 1].view(-1)[element] - codes[step].view(-1)[element]))
            hit = turn != 0 and turn == -last
            changed, back = changed + (turn != 0), back + hit
            f = 0.1 * hit + 0.9 * f
            last = turn or last
        frequency.append(f)
    return changed / steps / size, back / steps / size, sum(f > 0.005 for f in frequency) / size


SPECS = [
    qbr.QuantSpec(bits=1),
    qbr.QuantSpec(bits=2),
    qbr.QuantSpec(bits=8, channel_axis=1),
    qbr.QuantSpec(bits=8, qn=0, qp=255),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("spec", SPECS, ids=["w1", "w2", "w8-channel1", "u8"])
def test_oscillations(spec, dtype):
    torch.manual_seed(1)
    channels = 1 if spec.channel_axis is None else 9
    quantizer = qbr.LSQQuantizer(spec, "weight", initial_alpha=0.1, channels=channels)
    quantizer.init_state.fill_(1)
    quantizer._initialised = True
    layer = nn.Linear(9, 15, dtype=dtype)  # 135 elements: two whole runs of 64, and a rest
    layer.weight_quantizer = quantizer
    monitor = Monitor(layer, frequency=0.1)
    span = spec.qp - spec.qn
    codes = []
    with torch.no_grad():
        start = (torch.randint(spec.qn, spec.qp + 1, (15, 9)) + torch.rand(15, 9) - 0.5) * 0.1
    for step in range(9):
        with torch.no_grad():
            quantizer.alpha.copy_(0.1 + 0.01 * torch.rand(channels))
            layer.weight.copy_(start + torch.randn(15, 9) * 0.1 * (0.4 if step % 3 else 0.02 * span))
        for _ in range(2):  # a layer that runs twice in one step
            xhat = quantizer(layer.weight)
        codes.append((xhat.detach().double() / quantizer.alpha.double()).round())
    assert len(codes[0].unique()) > 1 and codes[0].min() >= spec.qn and codes[0].max() <= spec.qp
    (row,) = monitor.read().values()
    changed, back, often = _written_out(codes)
    assert row.steps == 8 and back > 0
    assert (row.changed, row.oscillated, row.oscillating) == pytest.approx((changed, back, often))
    assert next(iter(monitor.read(reset=True).values())) == row and next(iter(monitor.read().values())).steps == 0


@pytest.mark.parametrize("alone", [False, True])
def test_grouped_and_plain_weights_are_watched_alike(alone):
    model = _model(act_bits=None)
    model(_x())
    for quantizer in quantizers(model).values():
        quantizer.alone = alone
    monitor = Monitor(model)
    _train(model, 20)
    figures = monitor.read()
    assert sum(row.changed for row in figures.values()) > 0 and all(row.steps == 19 for row in figures.values())
    other = _model(act_bits=None)
    other(_x())
    for quantizer in quantizers(other).values():
        quantizer.alone = not alone
    monitor = Monitor(other)
    _train(other, 20)
    assert monitor.read() == figures


@pytest.mark.parametrize("collecting", [True, False], ids=["BR", "warm-up"])
def test_training_is_the_same_to_the_bit(collecting):
    trained = []
    for watched in (False, True):
        model = _model()
        for quantizer in quantizers(model).values():
            quantizer.collecting = collecting
            quantizer.br_to_alpha = True
        monitor = Monitor(model, frequency=0.01) if watched else None
        collected = _train(model, 6)
        assert all(bool(each) == collecting for each in collected)
        trained.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    figures = monitor.read()
    assert all(row.loss > 0 for row in figures.values())
    assert [row.steps for row in figures.values()] == [5, None, 5, None, 5]


def test_no_host_reads_until_read_and_then_one():
    model = _model()
    _train(model, 1)  # whose step looks whether its forward could set the alphas
    monitor = Monitor(model, frequency=0.01)
    with no_host_reads():
        _train(model, 3)
    with no_host_reads(count=True) as guard:
        monitor.read(reset=True)
    assert len(guard.reads) == 1


def test_what_is_not_training_is_not_seen():
    model = _model()
    model(_x())
    monitor = Monitor(model)
    model.eval()
    model(_x())
    model.train()
    with torch.no_grad():
        model(_x())
    assert all(row.loss is None for row in monitor.read().values())
    for _ in range(3):  # gradients of several batches before a step: the weights are the same ones
        model(_x()).sum().backward()
    rows = monitor.read()
    assert rows["0"].steps == 0 and rows["0"].changed is None and rows["0"].loss > 0


def test_a_step_that_leaves_no_trace_in_versions_is_seen():
    class Silent(torch.optim.SGD):
        """Steps as sharded parameters do: the version counters stay."""

        def step(self):
            params = tuple(p for group in self.param_groups for p in group["params"])
            with torch.autograd._unsafe_preserve_version_counter(params):
                super().step()

    model = _model()
    model(_x())
    qbr.AlphaControl(True, True).attach(model)  # or the step guard would change the versions of alphas
    monitor = Monitor(model)
    optimizer = Silent(model.parameters(), lr=0.5)
    for i in range(4):
        optimizer.zero_grad()
        model(_x(i)).square().mean().backward()
        optimizer.step()
    assert [row.steps for row in monitor.read().values()] == [3, None, 3, None, 3]


def test_a_weight_that_is_made_anew_in_every_forward_is_seen_in_each():
    quantizer = qbr.LSQ_WeightQuantizer(2)
    quantizer(torch.ones(4))
    quantizer.observer = observer = Observer(quantizer, None)
    for i in range(6):
        quantizer(torch.full((4,), 1.0 + i))  # lies where the last one lay, which is gone
    kept = torch.ones(4)
    quantizer(kept), quantizer(kept)
    assert observer.table[: quantizer.spec.num_slots].sum() == 7 * 4


def test_checkpointed_layers_are_seen_once():
    model = _model(weight_bits=None)
    model(_x())
    expected = Monitor(model)
    model(_x()).sum().backward()
    figures = expected.read()
    expected.close()
    monitor = Monitor(model)
    counts = []
    for reentrant in (False, True):
        out = checkpoint(model, _x().requires_grad_(), use_reentrant=reentrant)
        out.sum().backward()
        counts.append(monitor._observers["1"].table[:4].sum().item())
        if not reentrant:
            assert monitor.read() == figures
    assert counts[0] == 4 * 4 * 36


def test_compiled():
    rows = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = qbr.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), QATConfig())
        x = torch.randn(16, 6)
        model(x)
        monitor = Monitor(model, frequency=0.01)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(12):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        rows.append(monitor.read())
    assert rows[0]["0"].oscillated > 0
    for name, row in rows[0].items():
        for figure, value in row._asdict().items():
            got = getattr(rows[1][name], figure)
            same = got == value if value is None or isinstance(value, str) else got == pytest.approx(value, rel=1e-3)
            assert same, (name, figure)


def test_a_monitor_that_cannot_be_made_watches_nothing(monkeypatch):
    from qbr import monitor

    made = iter([monitor.CodeChanges])

    def no_memory(*arguments):
        try:
            return next(made)(*arguments)
        except StopIteration:
            raise torch.OutOfMemoryError from None

    model = _model()
    with monkeypatch.context() as patched:
        patched.setattr(monitor, "CodeChanges", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            Monitor(model)
    Monitor(model).close()


def test_the_model_is_left_as_it_was():
    model = _model()
    keys = list(model.state_dict())
    with Monitor(model) as monitor:
        with pytest.raises(ValueError, match="watched by a Monitor already"):
            Monitor(model)
        model(_x())
        assert list(model.state_dict()) == keys
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(quantizer.observer is None for quantizer in quantizers(made).values())
            Monitor(made)
        torch.save(model, io.BytesIO())
        assert monitor.read()["0"].loss > 0
    assert all(quantizer.observer is None for quantizer in quantizers(model).values())
    assert monitor.read()["0"].loss > 0
    with pytest.raises(ValueError, match="call qbr.prepare"):
        Monitor(nn.Linear(2, 2))
    for bad in ({"frequency": 2.0}, {"frequency": 0.1, "oscillations": False}):
        with pytest.raises(ValueError, match="frequency="):
            Monitor(model, **bad)
    assert all(quantizer.observer is None for quantizer in quantizers(model).values())


def test_a_model_that_changes_its_layout():
    plain, moved = _model(act_bits=None), _model(act_bits=None)
    figures = []
    for model in (plain, moved):
        model(_x())
        monitor = Monitor(model, frequency=0.01)
        _train(model, 3)
        if model is moved:
            model.to(memory_format=torch.channels_last)
        _train(model, 3)
        figures.append(monitor.read())
    for name, row in figures[0].items():
        assert figures[1][name].steps == row.steps == 5
        assert figures[1][name].changed == pytest.approx(row.changed, abs=0.02)


def test_looking_at_weights_trains_no_parametrization():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(
        qbr.prepare(nn.Sequential(nn.Linear(6, 6)), QATConfig(weight_bits=2, act_bits=None))[0]
    )
    model = nn.Sequential(layer).train()
    qbr.AlphaControl().attach(model)
    model(torch.rand(4, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Monitor(model).close()
    str(qbr.summary(model))
    qbr.freezing.mean_distance(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())
