"""LSQQuantizer: initialisation from data, casts and copies, loading, the step guard, compile, two processes."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from guards import HostRead, no_host_reads
from torch import nn

import qbr
from qbr import LSQ_ActivationQuantizer, LSQ_WeightQuantizer, LSQQuantizer, QuantSpec, functional
from qbr.step_guard import SMALLEST_ALPHA


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Initialisation


@pytest.mark.parametrize("bits", range(1, 9))
def test_alpha_before_data(bits):
    weight, act = LSQ_WeightQuantizer(bits), LSQ_ActivationQuantizer(bits, 6.0)
    assert weight.alpha.item() == pytest.approx(0.1 / max(abs(weight.Qn), abs(weight.Qp)))
    assert act.alpha.item() == pytest.approx(6.0 / (2**bits - 1))
    assert LSQ_ActivationQuantizer(bits).alpha.item() == pytest.approx(4.0 / (2**bits - 1))
    assert (act.Qn, act.Qp, act.num_bits) == (0, 2**bits - 1, bits)
    assert weight.num_levels == 2**bits and not hasattr(act, "num_levels")
    for q in (weight, act):
        assert q.alpha.shape == q.init_state.shape == (1,) and q.init_state.item() == 0
        assert q.alpha.dtype == q.init_state.dtype == torch.float32


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_first_training_forward_sets_alpha(bits):
    x = _x(40, 7)
    q = LSQ_WeightQuantizer(bits)
    q.eval()(x)
    assert q.init_state.item() == 0 and not q.initialised
    y = q.train()(x)
    expected = x.abs().mean() * (1 if bits == 1 else 2 / math.sqrt(2 ** (bits - 1) - 1))
    torch.testing.assert_close(q.alpha.detach(), expected.reshape(1))
    assert q.init_state.item() == 1 and q.initialised
    torch.testing.assert_close(y, functional.fake_quantize(x, q.alpha, q.spec))
    q(10 * x)
    torch.testing.assert_close(q.alpha.detach(), expected.reshape(1))


def test_activation_is_initialised_after_relu_and_clip():
    x = 3 * _x(100)
    relu = qbr.QuantizedClippedReLU(1.5, 4)
    relu(x)
    torch.testing.assert_close(relu.quantizer.alpha.detach(), (2 * x.clamp(0, 1.5).mean() / 15**0.5).reshape(1))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_step_per_channel(axis):
    x = _x(3, 4, 5) * torch.arange(1, 6)
    q = LSQ_WeightQuantizer(3, channel_axis=axis, channels=x.shape[axis])
    q(x)
    dims = [i for i in range(3) if i != axis % 3]
    torch.testing.assert_close(q.alpha.detach(), 2 * x.abs().mean(dims) / 3**0.5)
    assert q.get_quantization_levels().shape == (x.shape[axis], 8)


@pytest.mark.parametrize("x", [torch.zeros(9), torch.full((9,), math.nan), torch.full((9,), math.inf)])
def test_data_without_a_usable_mean_leaves_alpha_positive(x):
    q = LSQ_ActivationQuantizer(2)
    before = q.alpha.detach().clone()
    q(x)
    assert torch.equal(q.alpha, before) and q.init_state.item() == 0


def test_no_data_does_not_count_as_data():
    q = LSQ_ActivationQuantizer(2)
    q(torch.empty(0, 3))
    assert not q.initialised and q.init_state.item() == 0


def test_alpha_set_by_hand_stays_and_reset_undoes_it():
    q = LSQ_WeightQuantizer(2)
    with torch.no_grad():
        q.alpha.fill_(0.25)
        q.init_state.fill_(1)
    q(_x(50))
    assert q.alpha.item() == 0.25
    q.reset_parameters()
    assert q.alpha.item() == pytest.approx(0.05) and q.init_state.item() == 0
    q(_x(50))
    assert q.alpha.item() != 0.25 and q.init_state.item() == 1


@pytest.mark.parametrize(
    "alpha, error, message",
    [
        (torch.tensor([0.5, -0.5]), ValueError, "alpha has -0.5: expected positive, finite"),
        (torch.tensor([0.5, math.inf]), ValueError, "alpha has inf"),
        (math.nan, ValueError, "alpha has nan"),
        (0, ValueError, "alpha has 0"),
        (torch.tensor([1e-60, 1.0], dtype=torch.float64), ValueError, "alpha has 0"),
        (torch.ones(3), ValueError, "alpha has 3 elements: expected 2"),
        ("0.5", TypeError, "alpha='0.5': expected a tensor or a number"),
    ],
)
def test_a_bad_alpha_is_not_set(alpha, error, message):
    q = LSQ_WeightQuantizer(4, channel_axis=0, channels=2)
    before = q.alpha.tolist()
    with pytest.raises(error, match=message):
        q.set_alpha(alpha)
    assert q.alpha.tolist() == before and not q.initialised
    for good in (0.25, torch.tensor([0.25, 0.25], dtype=torch.float64), torch.tensor(0.25)):
        q.set_alpha(good)
        assert q.alpha.tolist() == [0.25, 0.25] and q.initialised


def test_levels():
    with torch.no_grad():
        q = LSQ_WeightQuantizer(2)
        q.alpha.fill_(0.5)
        assert q.get_quantization_levels().tolist() == [-1.0, -0.5, 0.0, 0.5]
        assert LSQ_WeightQuantizer(1).get_quantization_levels().tolist() == pytest.approx([-0.1, 0.1])
    assert not q.get_quantization_levels().requires_grad


# No synchronisation


@pytest.mark.parametrize("collecting", [False, True])
def test_no_host_reads(collecting):
    q = LSQ_WeightQuantizer(2)
    q.collecting = collecting
    x = _x(30).requires_grad_()
    optimizer = torch.optim.SGD([q.alpha, x], lr=0.1, momentum=0.9)
    for step in range(3):  # the first one initialises, of which the optimizer's step looks whether it could
        with no_host_reads():
            (q(x).square().sum() + qbr.bin_loss(q).weights).backward()
        with no_host_reads(count=step == 0):
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, bool, float, lambda t: t[t > 0]])
def test_the_guard_itself_sees_host_reads(read):
    with pytest.raises(HostRead), no_host_reads():
        read(torch.ones(1))


# Casts, copies, loading


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.half)])
def test_casts_keep_alpha_float32_to_the_bit(cast):
    layer = qbr.QuantizedLinear(8, 4)
    layer(_x(2, 8))
    alpha = layer.weight_quantizer.alpha.detach().clone()
    cast(layer)
    assert layer.weight_quantizer.alpha.dtype == layer.weight_quantizer.init_state.dtype == torch.float32
    assert torch.equal(layer.weight_quantizer.alpha, alpha)
    x = _x(2, 8).to(layer.weight.dtype)
    y = layer(x)
    assert y.dtype == x.dtype
    y.sum().backward()
    assert layer.weight_quantizer.alpha.grad.dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_carry_everything_but_the_graph(copied):
    q = LSQ_WeightQuantizer(2)
    q.collecting = True
    x = _x(20).requires_grad_()
    q(x)
    other = copied(q)
    assert torch.equal(other.alpha, q.alpha) and other.initialised and other.collecting and other.spec == q.spec
    assert not other._retained and len(q._retained) == 1


def test_restored_alpha_is_not_initialised_again():
    q = LSQ_WeightQuantizer(2)
    q(_x(20))
    other = LSQ_WeightQuantizer(2)
    other.load_state_dict(q.state_dict())
    with no_host_reads():
        other(5 * _x(20))
    assert torch.equal(other.alpha, q.alpha)
    other.load_state_dict(LSQ_WeightQuantizer(2).state_dict())
    assert not other.initialised


@pytest.mark.parametrize("bad", [[0.0], [-1.0], [math.nan], [math.inf], [0.1, 0.1], []])
def test_a_bad_alpha_is_refused_before_anything_is_written(bad):
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), qbr.QATConfig())
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in before.items()}
    state["2.weight_quantizer.alpha"] = torch.tensor(bad)
    with pytest.raises(ValueError, match=r"2\.weight_quantizer\.alpha"):
        model.load_state_dict(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_16_bit_checkpoint_gives_a_float32_alpha():
    q = LSQ_WeightQuantizer(2)
    q.load_state_dict({"alpha": torch.tensor([0.5]).half(), "init_state": torch.ones(1).half()}, assign=True)
    assert q.alpha.dtype == torch.float32 and q.initialised


# Bad arguments


@pytest.mark.parametrize("bits", [0, 9, 32, -1])
@pytest.mark.parametrize(
    "make",
    [
        LSQ_WeightQuantizer, LSQ_ActivationQuantizer, qbr.BinRegularizer,
        lambda b: qbr.QuantizedLinear(2, 2, num_bits=b), lambda b: qbr.QuantizedConv2d(2, 2, 1, num_bits=b),
        lambda b: qbr.QuantizedClippedReLU(num_bits=b),
    ],
)  # fmt: skip
def test_bits_are_checked(make, bits):
    with pytest.raises(ValueError, match=f"num_bits={bits}: expected 1 to 8"):
        make(bits)


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="num_bits=2.0"):
        LSQ_WeightQuantizer(2.0)
    with pytest.raises(ValueError, match="clip_value=-1"):
        LSQ_ActivationQuantizer(2, -1)
    with pytest.raises(ValueError, match="kind='bias'"):
        LSQQuantizer(QuantSpec(bits=2), "bias", initial_alpha=1.0)
    with pytest.raises(ValueError, match="initial_alpha=0"):
        LSQQuantizer(QuantSpec(bits=2), "weight", initial_alpha=0)
    with pytest.raises(ValueError, match="initial_alpha=1e-50: expected a positive, finite step size, in float32"):
        LSQQuantizer(QuantSpec(bits=2), "weight", initial_alpha=1e-50)
    with pytest.raises(TypeError, match="initial_alpha='1'"):
        LSQQuantizer(QuantSpec(bits=2), "weight", initial_alpha="1")
    with pytest.raises(TypeError, match="channels='3'"):
        LSQ_WeightQuantizer(2, channels="3")
    with pytest.raises(ValueError, match="channels=3"):
        LSQ_WeightQuantizer(2, channels=3)


# The step guard


def _through_pickle(q):
    return pickle.loads(pickle.dumps(q))


def _assigned(q):
    q.load_state_dict({k: v.clone() for k, v in q.state_dict().items()}, assign=True)
    return q


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e6),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e3, momentum=0.9, nesterov=True),
    "decay": lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=50.0),
    "adam": lambda p: torch.optim.Adam(p, lr=5.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=10.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=10.0),
}


@pytest.mark.parametrize("make_copy", [lambda q: q, copy.deepcopy, _through_pickle, _assigned])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_alpha_stays_positive_and_recovers(name, make_copy):
    x = _x(400)
    q = LSQ_WeightQuantizer(4)
    q(x)
    q = make_copy(q)
    good = q.alpha.item()
    optimizer = OPTIMIZERS[name]([q.alpha])
    least = good
    for _ in range(5):  # pushed down as hard as can be
        optimizer.zero_grad()
        (q.alpha.sum() * 1e3).backward()
        optimizer.step()
        assert q.alpha.item() >= least / 10.1 and q.alpha.item() > 0
        least = min(least, q.alpha.item())
    assert q.alpha.item() < good / 50
    # An ordinary optimizer then finds back to a step that quantizes well.
    optimizer = torch.optim.Adam([q.alpha], lr=good / 20)
    for _ in range(100):
        optimizer.zero_grad()
        (q(x) - x).square().sum().backward()
        optimizer.step()
    assert good / 3 < q.alpha.item() < good * 3


def test_guard_never_reaches_zero_and_leaves_others_alone():
    q = LSQ_WeightQuantizer(2)
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([q.alpha, other], lr=1.0)
    for _ in range(60):
        q.alpha.grad, other.grad = torch.full((1,), 1e30), torch.full((3,), 2.0)
        optimizer.step()
    assert q.alpha.item() == pytest.approx(SMALLEST_ALPHA) and other.tolist() == [-119.0] * 3


def test_guard_keeps_nan_visible_and_ordinary_steps_exact():
    q = LSQ_WeightQuantizer(2)
    optimizer = torch.optim.SGD([q.alpha], lr=0.5)
    q.alpha.grad = torch.full((1,), 0.01)
    expected = q.alpha.detach() - 0.5 * 0.01
    optimizer.step()
    assert torch.equal(q.alpha, expected)
    q.alpha.grad = torch.full((1,), math.nan)
    optimizer.step()
    assert math.isnan(q.alpha.item())


def test_guard_is_not_part_of_any_state():
    q = LSQ_WeightQuantizer(2)
    optimizer = torch.optim.SGD([q.alpha], lr=0.5)
    assert set(q.state_dict()) == {"alpha", "init_state"}
    torch.save(optimizer.state_dict(), io.BytesIO())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# torch.compile


@pytest.mark.parametrize("collecting", [False, True])
def test_compile_fullgraph_equals_eager(collecting):
    torch._dynamo.reset()
    layer = qbr.QuantizedLinear(6, 5)
    layer.weight_quantizer.collecting = collecting
    x = _x(3, 6)
    layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results, alphas = [], []
    for run in (layer, compiled):
        layer.zero_grad()
        y = run(x)
        loss = qbr.bin_loss(run).weights
        assert (loss != 0) == collecting
        (y.square().sum() + 100 * loss).backward()
        results.append([y.detach(), loss.detach(), layer.weight.grad, layer.bias.grad])
        alphas.append(layer.weight_quantizer.alpha.grad)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(*alphas, rtol=1e-6, atol=0)  # scaled in the kernel, and outside of it


# Two processes


def _initialise_on_rank(rank, path, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    with qbr.use_backend("reference"):
        q, channels = LSQ_ActivationQuantizer(2), LSQ_WeightQuantizer(2, channel_axis=0, channels=2)
        q(_rank_data(rank))
        channels(_rank_data(rank).reshape(2, -1))
    queue.put((rank, q.alpha.tolist(), channels.alpha.tolist()))
    torch.distributed.destroy_process_group()


def _rank_data(rank):
    return _x(10 + 20 * rank, seed=rank).abs() * (1 + 9 * rank)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_get_the_same_alpha(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_initialise_on_rank, args=(r, tmp_path / "store", queue)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)  # seconds; a busy machine takes long to import torch twice
        assert process.exitcode == 0
    got = {rank: (a, c) for rank, a, c in (queue.get(), queue.get())}
    assert got[0] == got[1]
    everything = torch.cat([_rank_data(0), _rank_data(1)])
    assert got[0][0] == pytest.approx([2 * everything.mean().item() / 3**0.5])


@pytest.mark.parametrize(
    ("make", "x", "options"),
    [
        (lambda: LSQ_ActivationQuantizer(4), torch.arange(255, dtype=torch.uint8), {}),
        (lambda: LSQ_ActivationQuantizer(4, signed=True), torch.ones(7), {"relu": True}),
        (lambda: LSQ_WeightQuantizer(4, channel_axis=0, channels=4), torch.ones(1, 7), {}),
        (lambda: LSQ_ActivationQuantizer(4), torch.eye(3).to_sparse(), {}),
    ],
    ids=["uint8", "relu of a signed one", "other channels", "sparse"],
)
def test_what_is_refused_sets_no_step(make, x, options):
    quantizer = make()
    before = quantizer.alpha.detach().clone()
    with pytest.raises((TypeError, ValueError)):
        quantizer(x, **options)
    assert torch.equal(quantizer.alpha, before) and quantizer.init_state == 0 and not quantizer.initialised
