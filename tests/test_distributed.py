"""Two gloo processes against one with the whole batch: DistributedDataParallel and FSDP2, losses step by step."""

from __future__ import annotations

import itertools

import pytest
import ranks
import torch
from torch import nn

import qbr
from qbr import functional, metrics
from qbr.quantizers import quantizers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
STEPS, BATCH = 6, 16
CASES = list(itertools.product((False, True, "scaled"), ("sgd", "adamw")))


def _model(per_channel: bool = False) -> nn.Module:
    """Without BatchNorm, whose statistics would be those of each rank's share."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(96, 32), nn.ReLU(),
        nn.Linear(32, 5),
    )  # fmt: skip
    return qbr.prepare(model, qbr.QATConfig(weight_bits=2, act_bits=3, weight_per_channel=per_channel))


def _world() -> tuple[int, int]:
    started = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if started else (0, 1)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    """[STEPS, BATCH / ranks, ...]: this rank's share of every batch."""
    rank, world = _world()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(STEPS, BATCH, 3, 8, 8, generator=generator)
    y = torch.randint(5, (STEPS, BATCH), generator=generator)
    return x[:, rank * BATCH // world :][:, : BATCH // world], y[:, rank * BATCH // world :][:, : BATCH // world]


def _shard(model: nn.Module, **options) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def _alphas(model: nn.Module) -> torch.Tensor:
    alphas = [q.alpha.detach() for q in quantizers(model).values()]
    return torch.cat([a.full_tensor() if hasattr(a, "full_tensor") else a for a in alphas])


def _train(engine: str, to_alpha, optimizer: str, freeze_acts: bool = False, per_channel: bool = False, **how) -> dict:
    """Warm-up, then BR with the weights' alphas frozen: the loss (whole batch) and all alphas after every step."""
    model, (xs, ys) = _model(per_channel), _data()
    control = qbr.AlphaControl(
        freeze_weights=True, freeze_acts=freeze_acts, br_to_alpha_acts=to_alpha, warmup_epochs=1
    ).attach(model)
    run = model
    if engine == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    elif engine == "fsdp":
        model(xs[0])  # sets the alphas, which fully_shard splits
        _shard(model)
    groups = qbr.parameter_groups(model, lr=0.05, weight_decay=1e-3)
    optimizer = (
        torch.optim.SGD(groups, momentum=0.9, nesterov=True) if optimizer == "sgd" else torch.optim.AdamW(groups)
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = 1e-3  # of the alphas too: what is frozen must not feel it
    losses, alphas = [], []
    for step, (x, y) in enumerate(zip(xs, ys)):
        control.begin_epoch(step // 2 + 1)
        optimizer.zero_grad()
        out = run(x)
        br = qbr.bin_loss(model, **how)
        ce = nn.functional.cross_entropy(out, y)
        (ce + br.weights + 0.1 * br.activations).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        parts = torch.stack([ce.detach(), br.weights.detach(), br.activations.detach()])
        if engine != "one":
            torch.distributed.all_reduce(parts)
        losses.append(parts / _world()[1])
        alphas.append(_alphas(model))
    return {"losses": torch.stack(losses), "alphas": torch.stack(alphas)}


def _on_rank() -> dict:
    """Everything that the tests below look at: two processes are started once for all of it."""
    results = {(engine, *case): _train(engine, *case, global_bins=True)
               for engine in ("ddp", "fsdp") for case in CASES}  # fmt: skip
    results["all frozen"] = _train("ddp", False, "sgd", freeze_acts=True, global_bins=True)
    results["per channel"] = _train("fsdp", False, "sgd", per_channel=True, global_bins=True)
    results["per rank"] = _train("ddp", False, "sgd")
    results["compiled"] = _compiled()
    results["bins"] = _bins()
    results["refusals"] = _refusals()
    results["bfloat16"] = _bfloat16()
    results["reloaded"] = _reloaded()
    results["shares"] = _alpha_with_batch_norm()
    results["rank 0 alone"] = _loaded_on_rank_0()
    results["looked at"] = _looked_at_shards()
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return ranks.run(_on_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("to_alpha, optimizer", CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_losses_and_alphas_are_those_of_one_process_step_by_step(two_ranks, engine, to_alpha, optimizer):
    expected = _train("one", to_alpha, optimizer)
    assert (expected["losses"][2:] > 0).all() and (expected["losses"][:2, 1:] == 0).all()
    for got in two_ranks:
        got = got[engine, to_alpha, optimizer]
        torch.testing.assert_close(got["losses"], expected["losses"], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(got["alphas"], expected["alphas"], rtol=2e-5, atol=2e-6)


def test_alphas_are_the_same_bits_on_all_ranks_after_every_step(two_ranks):
    for case in two_ranks[0]:
        if isinstance(case, tuple) or case in ("all frozen", "per channel", "per rank"):
            assert torch.equal(two_ranks[0][case]["alphas"], two_ranks[1][case]["alphas"]), case
    assert torch.equal(two_ranks[0]["shares"], two_ranks[1]["shares"])


def test_freezing_at_an_epoch_boundary_under_plain_ddp_holds_alphas_to_the_bit(two_ranks):
    alphas = two_ranks[0]["all frozen"]["alphas"]
    assert not torch.equal(alphas[0], alphas[1])  # warm-up, with momentum and weight decay
    assert all(torch.equal(alphas[1], later) for later in alphas[2:])
    losses = two_ranks[0]["all frozen"]["losses"]
    assert losses[:, 0].unique().numel() == STEPS  # the weights went on


def test_steps_per_channel_under_fsdp(two_ranks):
    expected = _train("one", False, "sgd", per_channel=True)
    got = two_ranks[0]["per channel"]
    assert got["alphas"].shape[1] == 4 + 6 + 32 + 5 + 3
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got["alphas"], expected["alphas"], rtol=2e-5, atol=2e-6)


def test_bins_per_rank_are_another_loss(two_ranks):
    per_rank, whole = two_ranks[0]["per rank"]["losses"], two_ranks[0]["ddp", False, "sgd"]["losses"]
    assert torch.equal(per_rank[:2], whole[:2]) and not torch.equal(per_rank[3:], whole[3:])


def _bins():
    """Layers' losses and figures of one forward; per-rank ones first."""
    model, (xs, _) = _model(), _data()
    model(xs[0])
    found = []
    for global_bins in (False, True):
        model(xs[0][: 8 - 3 * _world()[0]])  # shares of different size: 8 and 5 images
        br = qbr.bin_loss(model, global_bins=global_bins)
        found.append({name: (layer.loss.item(), br.metrics()[name]) for name, layer in br.layers.items()})
    return found


def test_figures_of_global_bins_are_those_of_the_whole_batch(two_ranks):
    model, (xs, _) = _model(), _data()
    model(xs[0])
    model(torch.cat([xs[0][:8], xs[0][8:13]]))
    br = qbr.bin_loss(model)
    expected = br.metrics()
    for own, together in (rank["bins"] for rank in two_ranks):
        for name in ("1", "3", "6"):
            loss, figures = together[name]
            assert loss == pytest.approx(br.layers[name].loss.item(), rel=1e-5) == pytest.approx(figures.loss, rel=1e-5)
            assert figures.counts == expected[name].counts and figures.numel == expected[name].numel
            assert figures.mean_distance == pytest.approx(expected[name].mean_distance, rel=1e-5)
            assert own[name][0] != loss
        assert own["0"] == together["0"]  # a weight is the same tensor on all ranks


def _compiled():
    losses = []
    for compiled in (False, True):
        model, (xs, ys) = _model(), _data()
        model(xs[0])
        for quantizer in quantizers(model).values():
            quantizer.br_to_alpha = "scaled"
        run = nn.parallel.DistributedDataParallel(model)
        run = torch.compile(run, backend="aot_eager") if compiled else run
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x, y in zip(xs[:3], ys):
            optimizer.zero_grad()
            ce = nn.functional.cross_entropy(run(x), y)
            br = qbr.bin_loss(model, global_bins=True)
            (ce + br.weights + br.activations).backward()
            optimizer.step()
            losses.append(torch.stack([ce.detach(), br.weights.detach(), br.activations.detach()]))
    return torch.stack(losses).reshape(2, 3, 3)


def test_compiled_steps_under_ddp_with_global_bins(two_ranks):
    eager, compiled = two_ranks[0]["compiled"]
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


def _refusals():
    from torch.utils.checkpoint import checkpoint

    messages = []
    model, (xs, _) = _model(), _data()
    _shard(model)
    with pytest.raises(ValueError) as error:
        model(xs[0])
    messages.append(str(error.value))
    model = _model()
    model(xs[0])
    checkpoint(model[:3], xs[0], use_reentrant=False)
    with pytest.raises(ValueError) as error:
        qbr.bin_loss(model, global_bins=True)
    messages.append(str(error.value))
    channels = qbr.LSQQuantizer(
        qbr.QuantSpec(bits=2, signed=False, channel_axis=1), "activation", initial_alpha=0.1, channels=3
    )
    channels.collecting = channels.br_to_alpha = True
    channels(xs[0].abs())
    with pytest.raises(ValueError) as error:
        qbr.bin_loss(channels, global_bins=True)
    messages.append(str(error.value))
    assert len(qbr.bin_loss(channels).layers) == 1  # what was refused has taken nothing
    for wrapped in (nn.parallel.DistributedDataParallel(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.ReLU())):
        if isinstance(wrapped, nn.Sequential):
            _shard(wrapped)
        with pytest.raises(ValueError, match="would not synchronise the step sizes: call prepare"):
            qbr.prepare(wrapped)
    inside = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    qbr.calibrate(qbr.prepare(inside.module), [xs[0].flatten(1)[:, :8]])  # a forward past the wrapper
    with pytest.raises(ValueError, match="made before prepare.., and would not synchronise the step sizes"):
        inside(xs[0].flatten(1)[:, :8])
    student = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    teacher = inside.module  # no part of the student: what its wrapper does not know is none of its business
    student.module.register_forward_hook(lambda module, inputs, output: output - teacher(*inputs))
    student(xs[0].flatten(1)[:, :8])
    whole = nn.parallel.DistributedDataParallel(_model())
    copies = {name: value.detach().clone() for name, value in whole.named_parameters()}
    torch.func.functional_call(whole, copies, (xs[0],))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    parallel = nn.Sequential(nn.Linear(8, 8))
    shards = torch.distributed.tensor.parallel.ColwiseParallel()
    torch.distributed.tensor.parallel.parallelize_module(parallel, mesh, {"0": shards})
    with pytest.raises(ValueError, match="0.weight is a DTensor: tensor parallelism is not supported"):
        qbr.prepare(parallel)
    channels.br_to_alpha = False
    channels(xs[0].abs())
    messages.append(qbr.bin_loss(channels, global_bins=True).activations.item())
    return messages


def test_what_cannot_be_is_refused_with_its_remedy(two_ranks):
    (fresh, checkpointed, per_channel, loss), other = (rank["refusals"] for rank in two_ranks)
    assert "before fully_shard" in fresh
    assert "global_bins=True: 1 runs under activation checkpointing" in checkpointed
    assert "3 alphas" in per_channel and loss == other[-1] > 0


def _bfloat16():
    """docs/distributed.md: with param_dtype=bfloat16 the quantizers form a group of their own, which keeps float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, (xs, _) = _model(), _data()
    model(xs[0])
    before = _alphas(model)
    fully_shard(list(quantizers(model).values()), mesh=init_device_mesh("cpu", (2,)))
    _shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen, original = {}, functional.fake_quantize_with_bin_loss

    def look(x, alpha, spec, **options):
        seen[len(seen)] = (x.dtype, alpha.dtype, alpha.detach().clone())
        return original(x, alpha, spec, **options)

    functional.fake_quantize_with_bin_loss = look
    try:
        model(xs[0]).float().square().mean().backward()
    finally:
        functional.fake_quantize_with_bin_loss = original
    return before, seen


def test_alphas_stay_float32_under_fsdp_s_mixed_precision(two_ranks):
    before, seen = two_ranks[0]["bfloat16"]
    assert {dtype for dtype, *_ in seen.values()} == {torch.bfloat16} and len(seen) == 7
    assert torch.equal(torch.cat([alpha for *_, alpha in seen.values()]), before)


def _reloaded():
    model, (xs, _) = _model(), _data()
    model(xs[0])
    expected = _alphas(model)
    _shard(model)
    other = _model()
    _shard(other)
    other.load_state_dict(model.state_dict())
    other(xs[1])
    other.reshard()
    return expected, _alphas(other), [q.initialised for q in quantizers(other).values()]


def test_a_sharded_state_dict_brings_its_alphas(two_ranks):
    expected, got, initialised = two_ranks[1]["reloaded"]
    assert torch.equal(got, expected) and all(initialised)


def _alpha_with_batch_norm():
    """Alphas after first forward and training of a model whose BatchNorm differs from rank to rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    qbr.prepare(model, qbr.QATConfig(weight_bits=2, act_bits=2))
    run, (xs, ys) = nn.parallel.DistributedDataParallel(model), _data()
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.05, weight_decay=0.0), momentum=0.9)
    seen = []
    for x, y in zip(xs, ys):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(x), y)
        seen.append(_alphas(model).clone())
        br = qbr.bin_loss(model)
        (loss + br.weights + br.activations).backward()
        optimizer.step()
        seen.append(_alphas(model).clone())
    return torch.stack(seen)


def _loaded_on_rank_0():
    """DistributedDataParallel brings what rank 0 has loaded to the others, which have no step to set any more."""
    source, (xs, _) = _model(), _data()
    source(xs[0])
    model = _model()
    if _world()[0] == 0:
        model.load_state_dict(source.state_dict())
    run = nn.parallel.DistributedDataParallel(model)
    before = _alphas(model)
    run(xs[1]).sum().backward()
    return before, _alphas(model), [q.initialised for q in quantizers(model).values()]


def test_a_checkpoint_that_rank_0_alone_loads(two_ranks):
    (before, after, initialised), other = (rank["rank 0 alone"] for rank in two_ranks)
    assert all(initialised) and torch.equal(before, after) and torch.equal(after, other[1])


def _looked_at_shards():
    """Figures and convergences of a sharded model and of the same in one piece."""
    found = []
    for shard in (False, True):
        model, (xs, _) = _model(), _data()
        model(xs[0])
        control = qbr.AlphaControl(
            freeze_weights=qbr.Freeze(tolerance=1e-3, window=1),
            freeze_acts=qbr.Freeze(epoch=1, release_tolerance=0.1),
        ).attach(model)
        if shard:
            _shard(model)
        for epoch in (1, 2):
            control.begin_epoch(epoch)
        monitor = qbr.Monitor(model)
        model(xs[0])
        found.append((control.state_dict(), monitor.read(), str(qbr.summary(model))))
    return found


def test_sharded_models_are_looked_at_as_whole_ones(two_ranks):
    for whole, sharded in (rank["looked at"] for rank in two_ranks):
        assert whole == sharded
        assert whole[0]["convergence"]["weights"]["frozen_at"] == 2


def test_what_was_frozen_before_there_was_a_group_keeps_its_requires_grad(monkeypatch):
    """DistributedDataParallel does not wait for it, so that a gradient of it would be one rank's."""
    quantizer = qbr.LSQ_WeightQuantizer(2)
    quantizer.freeze()
    monkeypatch.setattr("qbr.distributed.is_initialised", lambda: True)
    monkeypatch.setattr("qbr.distributed.ranks", lambda: 2)
    quantizer.freeze()
    assert not quantizer.alpha.requires_grad
    with pytest.raises(RuntimeError, match="attach the AlphaControl after init_process_group"):
        quantizer.freeze(False)
    later = qbr.LSQ_WeightQuantizer(2)
    later.freeze()
    assert later.alpha.requires_grad


def test_a_held_alpha_has_a_gradient_of_zero():
    """What DistributedDataParallel waits for: alpha_grad=0.0 gives a gradient, and it is 0."""
    x, alpha = torch.randn(50, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    spec = qbr.QuantSpec(bits=2)
    one = both = None
    for factor in (1.0, 0.5, 0.0):
        alpha.grad = None
        functional.fake_quantize(x, alpha, spec, alpha_grad=factor).square().sum().backward()
        one = alpha.grad if factor == 1.0 else one
        assert torch.equal(alpha.grad, factor * one) and one != 0
        alpha.grad = None
        (made,) = functional.foreach_fake_quantize_with_bin_loss(
            [x], [alpha], spec, backprop_to_alpha="scaled", alpha_grad=factor
        )
        (made.xhat.square().sum() + made.loss).backward()
        both = alpha.grad if factor == 1.0 else both
        torch.testing.assert_close(alpha.grad, factor * both)


def test_one_process_needs_no_group():
    model, (xs, _) = _model(), _data()
    model(xs[0])
    model(xs[0])
    expected = qbr.bin_loss(model)
    model(xs[0])
    got = qbr.bin_loss(model, global_bins=True)
    assert torch.equal(got.activations, expected.activations)
    assert metrics.read([got.layers["1"].bins]) == metrics.read([expected.layers["1"].bins])
