"""A prepared model among PyTorch's own tools: compile, autocast, checkpointing, CUDA graphs, copies, EMA, BatchNorm."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from guards import no_host_reads
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import qbr
from qbr.quantizers import quantizers


class Net(nn.Module):
    """Convolutions, BatchNorm, a ReLU that is called twice, a residual, a linear layer."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
        self.reentrant = checkpointed  # of the block: None for no checkpointing

    def block(self, x):
        return self.relu(self.relu(self.bn(self.conv(x))) + x)

    def forward(self, x):
        x = self.stem(x)
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


def _model(seed: int = 0, step_per_call: bool = True, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = qbr.prepare(Net(**options), qbr.QATConfig(weight_bits=2, act_bits=3, step_per_call=step_per_call))
    with torch.no_grad():
        model(_images())  # sets the alphas
    return model


def _images(seed: int = 7, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _loss(model, out) -> torch.Tensor:
    br = qbr.bin_loss(model)
    return out.float().square().mean() + br.weights + 0.1 * br.activations


def _train(model, run=None, steps: int = 3) -> list[torch.Tensor]:
    """The losses of some steps, the outputs in eval and in training after them, and every parameter and buffer."""
    run = model if run is None else run
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=1e-3), momentum=0.9)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, run(_images(step)))
        loss.backward()
        optimizer.step()
        seen.append(loss.detach())
    model.eval()
    with torch.no_grad():
        seen.append(run(_images(50)))
    model.train()
    seen.append(run(_images(51)).detach())
    return seen + [t.detach().clone() for t in model.state_dict().values()]


def _same(got, expected, exact: bool = True) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


# torch.compile


@pytest.mark.parametrize("prepared", ["set", "fresh"])
def test_compiled_training_and_eval_equal_eager(prepared):
    """fullgraph, to the bit; two graphs (training, eval), and one more where the first forward sets the alphas."""

    def make():
        model = _model()
        if prepared == "fresh":
            for quantizer in quantizers(model).values():
                quantizer.reset_parameters()
        return model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make()
    _same(_train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 4), _train(make(), None, 4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if prepared == "set" else 3)


def test_each_phase_of_alpha_control_is_compiled_once():
    def run(compiled: bool) -> list:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = _model()
        control = qbr.AlphaControl(freeze_weights=True, br_to_alpha_acts="scaled", warmup_epochs=1).attach(model)
        seen = []
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=1e-3), momentum=0.9)
        for epoch in (1, 2, 3):
            control.begin_epoch(epoch)
            for step in range(2):
                optimizer.zero_grad()
                loss = _loss(model, call(_images(step)))
                loss.backward()
                optimizer.step()
                seen.append(loss.detach())
        return seen + [p.detach().clone() for p in model.parameters()]

    compiled = run(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    _same(compiled, run(False))


def test_evaluation_is_compiled_for_free_and_for_frozen_alphas():
    """Twice at most: torch.compile may tell parameters with and without requires_grad apart; BR plays no part."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = _model()
    qbr.calibrate(model, [_images()])
    freeze = qbr.Freeze(epoch=3)
    control = qbr.AlphaControl(freeze_weights=freeze, freeze_acts=freeze, warmup_epochs=1).attach(model)
    call = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for epoch in (1, 2, 3, 4):
            control.begin_epoch(epoch)
            call(_images())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_inductor_equals_eager():
    torch._dynamo.reset()
    model = _model()
    _same(_train(model, torch.compile(model, fullgraph=True)), _train(_model()), exact=False)


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_grad_scaler(dtype):
    """Ten steps with loss scaling come close to ten without, and alphas stay float32."""
    losses = []
    for enabled in (True, False):
        model = _model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.05, weight_decay=0.0))
        seen = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                out = model(_images())
            assert out.dtype == dtype
            loss = _loss(model, out)
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
            scaler.step(optimizer)
            scaler.update()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_autocast_s_loss_is_that_of_float32_to_the_precision_of_bfloat16():
    model = _model()
    expected = _loss(model, model(_images())).item()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(_images())
    assert _loss(model, out).item() == pytest.approx(expected, rel=0.05)


def test_a_step_that_overflows_is_skipped_alphas_included():
    model = _model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.05, weight_decay=0.0), momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        out = model(_images())
    scaler.scale(_loss(model, out) * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    _same([p.detach() for p in model.parameters()], before)
    assert scaler.get_scale() == 512.0
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        out = model(_images())
    assert len(qbr.bin_loss(model).layers) == 3 + 3  # what the skipped step left is gone


# Activation checkpointing


def test_checkpointing_gives_the_same_step_bin_loss_included():
    # What is checkpointed is a part of the ReLU's owner: its calls cannot be told apart there.
    checkpointed, plain = _model(step_per_call=False, checkpointed=False), _model(step_per_call=False)
    _same(_train(checkpointed)[:3], _train(plain)[:3])
    # Not the running statistics: the second forward of a checkpointed BatchNorm updates them again.
    _same(list(checkpointed.parameters()), list(plain.parameters()))


def test_the_reentrant_form_says_what_it_loses():
    model = _model(step_per_call=False, checkpointed=True)
    br_of_all = _model(step_per_call=False)
    br_of_all(_images())
    expected = qbr.bin_loss(br_of_all).layers
    out = model(_images())
    found = qbr.bin_loss(model).layers
    assert set(expected) - set(found) == {"conv", "relu", "relu@2"}
    with pytest.warns(UserWarning, match=r"not part of qbr.bin_loss\(model\).*use_reentrant=False"):
        out.sum().backward()
    assert not any(q._retained for q in quantizers(model).values())


# CUDA graphs


@pytest.fixture
def deterministic_cudnn():
    """AdamW makes a step of lr out of a gradient that is rounding alone, as those of biases before BatchNorm are."""
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic_cudnn")
@pytest.mark.parametrize("freeze", [False, True])
def test_a_captured_step_replayed_equals_eager(freeze):
    """Forward, bin loss, backward and optimizer in one CUDA graph: nothing in the step waits for the device."""
    device = torch.device("cuda")
    xs = [_images(seed).to(device) for seed in range(8)]

    def make():
        model = _model().to(device)
        control = qbr.AlphaControl(freeze_weights=freeze, br_to_alpha_acts="scaled").attach(model)
        control.begin_epoch(1)
        groups = qbr.parameter_groups(model, lr=1e-2, weight_decay=1e-3)
        return model, torch.optim.AdamW(groups, capturable=True)

    def step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(model, model(x))
        loss.backward()
        optimizer.step()
        return loss

    eager, optimizer = make()
    expected = [step(eager, optimizer, x).item() for x in [xs[0]] * 3 + xs]

    model, optimizer = make()
    static = xs[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [step(model, optimizer, static).item() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, static)
    for x in xs:
        static.copy_(x)
        graph.replay()
        got.append(loss.item())
    assert got == pytest.approx(expected, rel=1e-5)
    for a, b in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_whole_step_never_reads_the_device():
    """What capture needs, seen on the CPU: forward, bin loss, backward, clipping and step without a host read."""
    model = _model()
    control = qbr.AlphaControl(freeze_weights=True, br_to_alpha_acts="scaled").attach(model)
    control.begin_epoch(1)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=1e-3), momentum=0.9)
    for seed in range(3):  # the first step looks whether the first forward could set the alphas
        with no_host_reads(count=seed == 0):
            optimizer.zero_grad()
            _loss(model, model(_images(seed))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


# Memory formats


def test_channels_last_is_kept_and_gives_the_same_numbers():
    model = _model().to(memory_format=torch.channels_last)
    x = _images().to(memory_format=torch.channels_last)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, qbr.LSQQuantizer):
            module.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args[0], out)}))
    _loss(model, model(x)).backward()
    four = [pair for pair in seen.values() if pair[0].dim() == 4]
    assert len(four) == 5  # the group's weights too
    for each in four:
        for t in each:
            assert t.is_contiguous(memory_format=torch.channels_last)
    assert model.conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    _same(_train(_model().to(memory_format=torch.channels_last)), _train(_model()), exact=False)


# Copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_middle_of_training_goes_on_as_the_original(copied):
    model = _model()
    control = qbr.AlphaControl(freeze_acts=True).attach(model)
    control.begin_epoch(1)
    _loss(model, model(_images())).backward()
    model(_images())  # bin losses that nobody took
    other = copied(model)
    assert all(not q._retained for q in quantizers(other).values())
    assert [q.frozen for q in quantizers(other).values()] == [
        q.kind == "activation" for q in quantizers(model).values()
    ]
    _same(_train(other), _train(model))


def test_the_whole_model_through_torch_save():
    model, file = _model(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    _same(_train(torch.load(file, weights_only=False)), _train(model))


def test_ema_has_alphas_of_its_own_and_evaluates():
    model = _model()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0))
    expected = None
    for step in range(3):
        optimizer.zero_grad()
        _loss(model, model(_images(step))).backward()
        optimizer.step()
        ema.update_parameters(model)
        alpha = model.conv.weight_quantizer.alpha.detach()
        expected = alpha.clone() if expected is None else 0.9 * expected + 0.1 * alpha
    torch.testing.assert_close(ema.module.conv.weight_quantizer.alpha.detach(), expected)
    before = [p.clone() for p in ema.parameters()]
    update_bn([_images(1), _images(2)], ema)  # in training mode, without gradients
    _same(list(ema.parameters()), before)
    single = _model()
    single.load_state_dict(ema.module.state_dict())
    with torch.no_grad():
        assert torch.equal(ema.eval()(_images()), single.eval()(_images()))


def test_ema_made_before_the_first_forward_takes_the_alphas_over():
    torch.manual_seed(0)
    model = qbr.prepare(Net(), qbr.QATConfig(weight_bits=2, act_bits=2))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    _loss(model, model(_images())).backward()
    ema.update_parameters(model)
    update_bn([_images(3)], ema)  # a training forward: it must not set alphas again
    for mine, theirs in zip(quantizers(ema).values(), quantizers(model).values()):
        assert torch.equal(mine.alpha, theirs.alpha) and mine.init_state.item() == 1


# functional_call, accumulation, BatchNorm


def test_functional_call_uses_the_given_weights_and_steps():
    model, other = _model(), _model(seed=1)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    state = {**dict(other.named_parameters()), **{n: b.clone() for n, b in other.named_buffers()}}
    expected = other(_images())
    br_expected = qbr.bin_loss(other)
    got = torch.func.functional_call(model, state, (_images(),))
    br = qbr.bin_loss(model)
    assert torch.equal(got, expected)
    assert torch.equal(br.weights, br_expected.weights) and torch.equal(br.activations, br_expected.activations)
    (got.square().mean() + br.weights).backward()
    assert all(p.grad is None for p in model.parameters()) and other.conv.weight_quantizer.alpha.grad is not None


def test_torch_func_s_transforms_are_refused_by_pytorch_s_own_message():
    model = _model()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (_images(),)).sum())(
            {n: p.detach() for n, p in model.named_parameters()}
        )
    assert not any(q._retained or q._ready for q in quantizers(model).values())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """LSQ's part, in a model without BatchNorm. An activation's step has a gradient sqrt(k) times as large: its N
    counts the elements of a micro-batch."""

    def gradients(parts: int) -> dict:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        qbr.prepare(model, qbr.QATConfig(weight_bits=2, act_bits=3, collect_bin_loss=False))
        model(_images(count=8))
        for x in _images(count=8).chunk(parts):
            (model(x).square().mean() / parts).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    whole, parts = gradients(1), gradients(4)
    for name in whole:
        factor = 2.0 if name == "1.quantizer.alpha" else 1.0
        torch.testing.assert_close(parts[name], factor * whole[name], rtol=1e-4, atol=1e-6)


def test_batch_norm_is_re_estimated_before_evaluation():
    """torch.optim.swa_utils.update_bn: statistics of the quantized network; alphas, weights and losses untouched."""
    model = _model()
    _train(model)
    qbr.bin_loss(model)  # of the last forward there
    before = {n: p.clone() for n, p in model.named_parameters()}
    batches = [_images(seed, 16) for seed in (1, 2, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_bn(batches, model)
    inputs = []
    hook = model.stem[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for x in batches:
            model(x)
    hook.remove()
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    update_bn(batches, model)
    torch.testing.assert_close(model.stem[1].running_mean, expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(q._retained for q in quantizers(model).values())
