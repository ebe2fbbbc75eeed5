"""bin_loss(model), BinRegularizer and the metrics, against the formulas written out bin by bin."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from guards import no_host_reads
from torch import nn

import qbr
from qbr import BinRegularizer, QATConfig, QuantSpec, functional, metrics


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(**config):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 16, 5)
    )
    return qbr.prepare(model, QATConfig(**config))


# bin_loss(model)


def test_it_is_the_sum_of_the_layers_and_their_functional_values():
    model, x = _model(weight_bits=3, act_bits=2, clip=1.0), _x(2, 3, 8, 8)
    model(x)
    qbr.bin_loss(model)
    y = model(x)
    pre = {name: model[int(name)].pre_quant_activation for name in "13"}
    got = qbr.bin_loss(model)
    assert list(got.layers) == ["0", "1", "2", "3", "5"]
    expected = {}
    for name in "025":
        q = model[int(name)].weight_quantizer
        expected[name] = functional.bin_loss(model[int(name)].weight, q.alpha, q.spec).loss
    for name in "13":
        q = model[int(name)].quantizer
        expected[name] = functional.bin_loss(pre[name], q.alpha, q.spec).loss
    for name, loss in expected.items():
        torch.testing.assert_close(got.layers[name].loss, loss)
        assert got.metrics()[name].loss == pytest.approx(loss.item())
    torch.testing.assert_close(got.weights, expected["0"] + expected["2"] + expected["5"])
    torch.testing.assert_close(got.activations, expected["1"] + expected["3"])
    assert got.weights.dtype == got.activations.dtype == torch.float32
    parameters = list(model.parameters())
    fused = torch.autograd.grad(y.sum() + got.weights + got.activations, parameters, retain_graph=True)
    apart = torch.autograd.grad(model(x).sum() + sum(expected.values()), parameters)
    for a, b in zip(fused, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_that_are_skipped_regularize_nothing_and_keep_their_figures():
    model = _model()
    x = _x(4, 3, 8, 8)
    model(x)
    whole = qbr.bin_loss(model)
    model.zero_grad()
    model(x)
    first = next(iter(whole.layers))
    part = qbr.bin_loss(model, skip=[first])
    assert part.layers.keys() == whole.layers.keys()
    assert part.weights.item() == pytest.approx((whole.weights - whole.layers[first].loss).item(), rel=1e-6)
    assert part.activations.item() == whole.activations.item()
    part.weights.backward()
    weight = model.get_submodule(first).weight
    assert weight.grad is None or not weight.grad.any()
    call = torch.compile(lambda x: (model(x), qbr.bin_loss(model, skip=[first]))[1], fullgraph=True, backend="eager")
    assert call(x).weights.item() == pytest.approx(part.weights.item())
    model(x)
    with pytest.raises(ValueError, match=f"skip: 'head' matches no layer with a quantizer: expected names as {first}"):
        qbr.bin_loss(model, skip=["head"])
    with pytest.raises(TypeError, match="skip='head': expected a list or tuple of patterns"):
        qbr.bin_loss(model, skip="head")


def test_nothing_survives():
    model, x = _model(), _x(2, 3, 8, 8)

    def collected():
        return list(qbr.bin_loss(model).layers)

    model(x)
    assert collected() and not collected()
    empty = qbr.bin_loss(model)
    assert empty.weights.item() == empty.activations.item() == 0 and empty.weights.shape == ()
    model(x)
    model(x)  # what nobody took goes at the next forward
    assert collected() == ["0", "1", "2", "3", "5"]
    with torch.no_grad():
        model(x)
    assert not collected()
    model.eval()
    model(x)
    assert not collected()
    model.train()
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # the graph is stale now
    assert not collected()
    assert qbr.prepare(nn.Linear(2, 2), QATConfig(act_bits=None, collect_bin_loss=False))(_x(1, 2)) is not None


class _Twice(nn.Module):
    """A weight module called twice and an activation module called three times in one forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(self.fc(self.relu(self.fc(x)))) - 0.1)


def test_modules_called_more_than_once():
    torch.manual_seed(1)
    model = qbr.prepare(_Twice(), QATConfig())
    x = _x(9, 6)
    model(x)
    for _ in range(2):
        model(x)
        got = qbr.bin_loss(model)
        assert list(got.layers) == ["fc", "relu", "relu@2", "relu@3"]
        torch.testing.assert_close(got.weights, got.layers["fc"].loss)
        torch.testing.assert_close(got.activations, sum(got.layers[n].loss for n in ("relu", "relu@2", "relu@3")))


class _Around(nn.Module):
    """Calls a model that was prepared by itself twice, as a siamese network does."""

    def __init__(self):
        super().__init__()
        self.inner = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x) + self.inner(2 * x))


def test_the_calls_of_a_model_within_a_watched_one_all_count(monkeypatch):
    model, x = _Around(), torch.randn(5, 4)
    model(x), model(x)
    assert list(qbr.bin_loss(model).layers) == ["inner.0", "inner.1", "inner.2"]  # the inner one's last forward
    qbr.AlphaControl().attach(model)
    groups, together = [], functional.foreach_fake_quantize_with_bin_loss

    def counted(xs, *rest, **options):
        groups.append(len(xs))
        return together(xs, *rest, **options)

    monkeypatch.setattr(functional, "foreach_fake_quantize_with_bin_loss", counted)
    for each in (model, copy.deepcopy(model)):
        each(x), each(x)
        assert sorted(qbr.bin_loss(each).layers) == ["inner.0", "inner.1", "inner.1@2", "inner.2"]
    assert groups == [2] * 4
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    model.inner(x), model.inner(x)  # by itself it is the root again
    assert list(qbr.bin_loss(model).layers) == ["inner.0", "inner.1", "inner.2"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x), compiled(x)
    assert sorted(qbr.bin_loss(model).layers) == ["inner.0", "inner.1", "inner.1@2", "inner.2"]
    assert not [key for each in qbr.convert(model.eval()).modules() for key in vars(each) if key.startswith("_qbr")]


def test_a_whole_step_reads_nothing_on_the_host_and_all_metrics_are_one_read():
    model, x = _model(), _x(2, 3, 8, 8)
    control = qbr.AlphaControl(br_to_alpha_weights=True, br_to_alpha_acts="scaled").attach(model)
    groups = qbr.parameter_groups(model, lr=0.1, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for epoch in (1, 2, 3):
        # Once, in the step after the first forward: whether that could set the step sizes.
        with no_host_reads(count=epoch == 1) as guard:
            control.begin_epoch(epoch)
            y = model(x)
            br = qbr.bin_loss(model)
            (y.square().mean() + br.weights + br.activations).backward()
            assert not guard.reads
            optimizer.step()
            optimizer.zero_grad()
        assert len(guard.reads) == (1 if epoch == 1 else 0)
    with no_host_reads(count=True) as guard:
        assert len(br.metrics()) == 5
    assert len(guard.reads) == 1


def test_metrics_read_after_the_step_use_the_alpha_of_the_forward():
    model, x = _model(act_bits=None), _x(2, 3, 8, 8)
    model(x)
    br = qbr.bin_loss(model)
    before = br.metrics()
    with torch.no_grad():
        for q in model.modules():
            if isinstance(q, qbr.LSQQuantizer):
                q.alpha.mul_(3)
    assert br.metrics() == before


def test_a_model_without_quantizers():
    with pytest.raises(ValueError, match="call qbr.prepare"):
        qbr.bin_loss(nn.Linear(2, 2))


def test_submodules_and_wrappers():
    model = _model(act_bits=None)
    nn.Sequential(model)(_x(2, 3, 8, 8))
    assert list(qbr.bin_loss(nn.ModuleDict({"net": model})).layers) == ["net.0", "net.2", "net.5"]
    model(_x(2, 3, 8, 8))  # under torch.compile's name the layers keep theirs
    assert list(qbr.bin_loss(torch.compile(model, backend="eager")).layers) == ["0", "2", "5"]


# BinRegularizer


def _written_out(x, alpha, low, high):
    """The predecessor's figures, bin by bin in float64."""
    x = x.detach().double()
    codes = (x / alpha).clamp(low, high).round()
    if (low, high) == (-1, 1):
        codes = torch.where(x >= 0, 1.0, -1.0).double()
    mse = var = 0.0
    used, statistics = 0, []
    for k in ((-1, 1) if (low, high) == (-1, 1) else range(low, high + 1)):
        members = x[codes == k]
        if len(members):
            used += 1
            mse += (members.mean() - k * alpha).square().item()
            var += members.var(unbiased=False).item()
        statistics.append((
            len(members), members.mean().item() if len(members) else 0.0,
            members.std().item() if len(members) > 1 else 0.0,
        ))  # fmt: skip
    d = (x - codes * alpha).abs()
    mean = d.mean().item()
    figures = {
        "quantization_mse": d.square().mean().item(),
        "mean_distance": mean,
        "effectiveness": min(max(100 * (1 - mean / (alpha / 2)), 0), 100),
        "pct_near_levels": 100 * (d < 0.01 * alpha).double().mean().item(),
        "bins_used": used,
    }
    return mse, var, figures, statistics


RANGES = {(1, True): (-1, 1), (2, True): (-2, 1), (4, True): (-8, 7), (1, False): (0, 1), (3, False): (0, 7)}


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("bits,signed", RANGES)
def test_compute_bin_loss(bits, signed, as_tensor):
    x = (_x(500) if signed else _x(500).abs()).requires_grad_()
    with torch.no_grad():
        x[:50] = 0.25
    alpha = 0.25
    loss, mse, var, info = BinRegularizer(bits, signed).compute_bin_loss(
        x, torch.tensor([alpha]) if as_tensor else alpha
    )
    want_mse, want_var, figures, _ = _written_out(x, alpha, *RANGES[bits, signed])
    assert loss.item() == pytest.approx(want_mse + want_var, rel=1e-5)
    assert mse.item() == pytest.approx(want_mse, rel=1e-4, abs=1e-9)
    assert var.item() == pytest.approx(want_var, rel=1e-5)
    expected = {**figures, "br_mse_loss": want_mse, "br_var_loss": want_var}
    assert set(info) == set(expected) and isinstance(info["bins_used"], int)
    for key, value in expected.items():
        assert info[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key
    loss.backward()
    assert x.grad is not None and not mse.requires_grad and not var.requires_grad


@pytest.mark.parametrize("to_alpha", [False, True, "scaled"])
def test_backprop_to_alpha(to_alpha):
    x, alpha = _x(300), torch.tensor([0.3], requires_grad=True)
    loss, *_ = BinRegularizer(2).compute_bin_loss(x, alpha, to_alpha)
    if not to_alpha:
        x.requires_grad_()
        BinRegularizer(2).compute_bin_loss(x, alpha)[0].backward()
        assert alpha.grad is None and x.grad is not None
        return
    loss.backward()
    codes = (x / 0.3).clamp(-2, 1).round()
    means = [(k, (x - 0.3 * codes)[codes == k].mean().item()) for k in (-2, -1, 0, 1)]
    expected = -2 * sum(k * m for k, m in means) * (1 if to_alpha is True else 300**-0.5)
    assert alpha.grad.item() == pytest.approx(expected, rel=1e-4)


def test_compute_total_loss():
    tensors = {"a": _x(100), "b": _x(70, seed=1), "none": _x(5), "a@2": _x(30, seed=2)}
    alphas = {"a": torch.tensor([0.3]), "b": 0.5, "none": None}
    regularizer = BinRegularizer(2, True, name="weights")
    with no_host_reads(count=True) as guard:
        loss, info = regularizer.compute_total_loss(tensors, alphas)
        assert len(info) == 8 and "avg_loss" in info and "loss" not in info
        assert not guard.reads
        avg = info["avg_loss"]
        assert len(guard.reads) == 1
        dict(info), list(info.items()), json.dumps(info), info["layer_losses"]["a"]["bins_used"]
    assert len(guard.reads) == 1
    layers = info["layer_losses"]
    assert list(layers) == ["a", "b", "a@2"]
    parts = {n: regularizer.compute_bin_loss(tensors[n], alphas[n[0]]) for n in layers}
    assert loss.item() == pytest.approx(sum(p[0].item() for p in parts.values())) == pytest.approx(avg)
    assert info["avg_mse"] + info["avg_var"] == pytest.approx(avg)
    for name, (one, mse, var, figures) in parts.items():
        row = layers[name]
        assert row["loss"] == pytest.approx(one.item())
        assert (row["mse"], row["var"]) == pytest.approx((mse.item(), var.item()))
        for key in ("quantization_mse", "bins_used", "mean_distance", "effectiveness", "pct_near_levels"):
            assert row[key] == figures[key]
    for key, of in [
        ("avg_quantization_mse", "quantization_mse"), ("avg_mean_distance", "mean_distance"),
        ("avg_effectiveness", "effectiveness"), ("avg_pct_near", "pct_near_levels"),
    ]:  # fmt: skip
        assert info[key] == pytest.approx(sum(row[of] for row in layers.values()) / 3)


def test_total_of_nothing():
    loss, info = BinRegularizer().compute_total_loss({}, {})
    assert loss.item() == 0 and info["avg_loss"] == 0 and info["avg_effectiveness"] == 0 and not info["layer_losses"]


@pytest.mark.parametrize("bits,signed", RANGES)
def test_get_bin_statistics(bits, signed):
    x = _x(200) if signed else _x(200).abs()
    tensors = {"x": x, "three": torch.tensor([0.1, 0.9, 0.95])}
    with no_host_reads(count=True) as guard:
        got = BinRegularizer(bits, signed).get_bin_statistics(tensors, {"x": torch.tensor([0.5]), "three": 1.0})
    assert len(guard.reads) == 1
    for name, alpha in (("x", 0.5), ("three", 1.0)):
        *_, statistics = _written_out(tensors[name], alpha, *RANGES[bits, signed])
        row = got[name]
        assert set(row) == {"bin_counts", "bin_means", "bin_stds", "total_values", "levels"}
        assert row["bin_counts"] == [s[0] for s in statistics]
        assert row["bin_means"] == pytest.approx([s[1] for s in statistics], rel=1e-5, abs=1e-6)
        assert row["bin_stds"] == pytest.approx([s[2] for s in statistics], rel=1e-4, abs=1e-6)
        assert row["total_values"] == sum(row["bin_counts"]) == tensors[name].numel()
        assert row["levels"] == [k * alpha for k in QuantSpec(bits=bits, signed=signed).codes]


def test_one_bit_is_binary_in_quantizer_and_regularizer():
    q = qbr.LSQ_WeightQuantizer(1)
    x = _x(60)
    levels = q(x).detach().unique()
    torch.testing.assert_close(levels, q.get_quantization_levels())
    statistics = BinRegularizer(1).get_bin_statistics({"w": x}, {"w": q.alpha})
    assert statistics["w"]["levels"] == pytest.approx(levels.tolist())
    assert sum(statistics["w"]["bin_counts"]) == 60


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha="):
        BinRegularizer().compute_bin_loss(_x(3), alpha)


def test_layers_that_nobody_told_to_collect():
    """The drop-in's, beside qbr.bin_loss: a loss of 0 would look like one."""
    model = torch.nn.Sequential(qbr.QuantizedLinear(4, 4), qbr.QuantizedClippedReLU())
    model(_x(2, 4))
    with pytest.raises(ValueError, match=r"collect no bin loss.*qbr.AlphaControl\(\).attach\(model\)"):
        qbr.bin_loss(model)
    qbr.AlphaControl(warmup_epochs=1).attach(model)
    model(_x(2, 4))
    assert qbr.bin_loss(model).layers == {}


def test_bad_tensors():
    with pytest.raises(TypeError, match="weights is a list: expected a tensor"):
        BinRegularizer().compute_bin_loss([1.0], 0.5)
    with pytest.raises(TypeError, match="layer 'fc': x is a torch.int64 tensor"):
        BinRegularizer().compute_total_loss({"conv": _x(3), "fc": torch.arange(3)}, {"conv": 0.5, "fc": 0.5})
    with pytest.raises(TypeError, match="int64"):
        BinRegularizer().compute_bin_loss(torch.arange(3), 1.0)
    with pytest.raises(ValueError, match="2 elements"):
        BinRegularizer().compute_bin_loss(_x(3), torch.ones(2))


# The lazy dict, the metrics


def test_lazy_info_is_a_dict():
    def lazy():
        return metrics.LazyInfo(("a", "b"), lambda: {"a": 1, "b": {"c": 2.5}})

    plain = {"a": 1, "b": {"c": 2.5}}
    assert lazy() == plain and plain == lazy() and lazy() != {}
    for view in (dict, lambda i: {**i}, copy.copy, copy.deepcopy, lambda i: i.copy(), lambda i: pickle.loads(
        pickle.dumps(i)), lambda i: json.loads(json.dumps(i)), lambda i: json.loads(json.dumps(i, indent=1)),
        lambda i: i | {}, lambda i: {} | i, lambda i: dict(i.items()), lambda i: {k: i[k] for k in i},
        lambda i: {k: i.get(k) for k in i}, lambda i: dict(zip(i, i.values()))):  # fmt: skip
        assert view(lazy()) == plain
    assert repr(lazy()) == repr(plain) and f"{lazy()}" == str(plain)
    info = lazy()
    info["d"] = 3
    info.update(a=0)
    assert info == {**plain, "d": 3, "a": 0} and info.pop("d") == 3 and isinstance(info, dict)


def test_metrics_of_odd_tensors():
    spec = QuantSpec(bits=2)
    empty, one, nan = metrics.read([functional.bin_loss(x, 0.5, spec).bins for x in (
        torch.empty(0), torch.tensor([0.4]), torch.tensor([math.nan, 0.1]))])  # fmt: skip
    assert empty.loss == empty.mean_distance == empty.effectiveness == empty.bins_used == 0
    assert one.var == 0 and one.mse == pytest.approx(0.01) and one.bins_used == 1
    assert math.isnan(nan.loss) and math.isnan(nan.effectiveness) and sum(nan.counts) == 2
    channels = QuantSpec(bits=2, channel_axis=0)
    bins = functional.bin_loss(_x(3, 50), torch.tensor([0.2, 0.4, 0.6]), channels).bins
    assert metrics.read([bins])[0].loss == pytest.approx(sum(t.item() for t in metrics.mse_and_var(bins)))


@pytest.mark.parametrize("mode", ["no_grad", "eval"])
def test_another_forward_leaves_the_losses_of_a_training_forward(mode):
    """Targets of a second view, a look at validation data, between the forward and its loss."""
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), qbr.QATConfig())
    x = torch.randn(8, 4)
    model(x)
    expected = [loss.item() for loss in qbr.bin_loss(model)[:2]]
    model(x)
    with torch.set_grad_enabled(mode != "no_grad"):
        model.train(mode != "eval")(2 * x)
    model.train()
    found = qbr.bin_loss(model)
    assert [loss.item() for loss in found[:2]] == expected and found.weights.requires_grad
    with pytest.warns(UserWarning, match="nothing was collected"):
        assert qbr.bin_loss(model).weights == 0


def test_a_kth_of_every_accumulated_batch_s_br_is_one_br():
    torch.manual_seed(0)
    model = qbr.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), qbr.QATConfig(2, 2))
    batches = torch.randn(4, 5, 6)
    qbr.calibrate(model, list(batches))

    def gradient(count: int, share: float) -> torch.Tensor:
        model.zero_grad()
        for batch in batches[:count]:
            model(batch)
            (share * qbr.bin_loss(model).weights).backward()
        return model[0].weight.grad.clone()

    assert torch.equal(gradient(4, 0.25), gradient(1, 1.0))
