"""Whether a step size counts as set: through unusable data, checkpoints, averages, other bits and functional_call."""

from __future__ import annotations

import copy
import gc
import math
import warnings

import pytest
import torch
from guards import no_host_reads
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import qbr
from qbr.quantizers import quantizers


def _float() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _model(bits: int = 2) -> nn.Module:
    return qbr.prepare(_float(), qbr.QATConfig(weight_bits=bits, act_bits=bits))


def _x() -> torch.Tensor:
    return torch.rand(16, 6, generator=torch.Generator().manual_seed(1))


def _alphas(model: nn.Module) -> list[float]:
    return [quantizer.alpha.item() for quantizer in quantizers(model).values()]


def _from_data() -> list[float]:
    model = _model()
    model(_x())
    return _alphas(model)


def _silent(model, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model(*inputs)


def _step(model: nn.Module, optimizer, x: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0], ids=["nan", "inf", "zero after ReLU"])
def test_a_first_batch_that_sets_nothing_leaves_it_to_the_next(bad, steps):
    model = _model()
    with torch.no_grad():
        model[0].bias.fill_(-10 if bad == -1.0 else 0)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.0, weight_decay=0.0))
    relu = model[1].quantizer
    x = torch.full((4, 6), bad) if bad != -1.0 else _x()
    model(x)
    assert relu.init_state.item() == 0 and model[0].weight_quantizer.init_state.item() == 1
    with pytest.warns(UserWarning, match=r"step sizes of \['1.quantizer'\] were never set"):
        qbr.convert(model)
    with torch.no_grad():
        model[0].bias.copy_(_float()[0].bias)
    if steps:
        for parameter in model.parameters():
            parameter.grad = None
        optimizer.step()
        assert not relu.initialised
    model(_x())
    assert relu.init_state.item() == 1 and _alphas(model) == pytest.approx(_from_data())
    optimizer.step()
    model(10 * _x())
    assert _alphas(model) == pytest.approx(_from_data())


def test_after_three_steps_a_placeholder_counts_as_set_and_says_so():
    model = _model()
    with torch.no_grad():
        model[0].bias.fill_(-10)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=0.0))
    placeholder = model[1].quantizer.alpha.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _step(model, optimizer, _x())
    with pytest.warns(UserWarning, match="no usable data .* before its first optimizer steps"):
        _step(model, optimizer, _x())
    assert model[1].quantizer.init_state.item() == 1 and model[1].quantizer.alpha.item() == placeholder
    _silent(qbr.convert, model)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("saved_after", [1, 2, 5])
def test_weights_that_begin_at_0_resume_as_they_were_left(kind, saved_after, tmp_path):
    """A zeroed head, LoRA's B: the first step has no data for their alpha, and what it learns later is not set anew."""
    def made():
        model = _model()
        with torch.no_grad():
            model[2].weight.zero_()
        return model, kind(qbr.parameter_groups(model, lr=0.05, weight_decay=0.0))

    model, optimizer = made()
    losses = []
    for step in range(8):
        losses.append(_step(model, optimizer, _x()))
        if step + 1 == saved_after:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    resumed, optimizer = made()
    state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert [_step(resumed, optimizer, _x()) for _ in range(8 - saved_after)] == losses[saved_after:]
    assert _alphas(resumed) == _alphas(model)
    _silent(qbr.convert, model)


def test_an_optimizer_looks_once():
    model = _model()
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=0.0))
    for step in range(3):
        model(_x()).sum().backward()
        with no_host_reads(count=step == 0) as guard:
            optimizer.step()
        assert len(guard.reads) == (1 if step == 0 else 0)


def test_first_data_without_use_is_noticed_where_no_optimizer_has_the_step():
    """Frozen, and left out of the optimizer, as requires_grad asks many to: the next forward tries again."""
    model = _model()
    qbr.AlphaControl(freeze_acts=True, freeze_weights=True).attach(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for x in (torch.zeros(16, 6), _x()):
        with torch.no_grad():
            model[0].bias.fill_(0.0)
        model(x).sum().backward()
        optimizer.step()
    assert _alphas(model) == _from_data_without_bias()


def _from_data_without_bias() -> list[float]:
    model = _model()
    with torch.no_grad():
        model[0].bias.fill_(0.0)
    model(_x())
    return _alphas(model)


def test_memory_that_to_empty_gives_is_no_step_size():
    with torch.device("meta"):
        model = _model()
    model.to_empty(device="cpu")
    for quantizer in quantizers(model).values():
        assert quantizer.alpha.item() == pytest.approx(quantizer.initial_alpha) and quantizer.init_state.item() == 0
    model.load_state_dict(_float().state_dict(), strict=False)
    model(_x())
    assert _alphas(model) == _from_data()


def test_starting_over_counts_anew():
    quantizer = quantizers(_model())["0.weight_quantizer"]
    quantizer._tries = 3
    quantizer.reset_parameters()
    assert quantizer._tries == 0


def test_calibration_without_usable_data_leaves_it_to_training():
    model = _model()
    with torch.no_grad():
        model[0].bias.fill_(-10)
    with pytest.warns(UserWarning, match=r"the data of \['1.quantizer'\] is all 0"):
        qbr.calibrate(model, [_x()])
    assert not model[1].quantizer.initialised and model[0].weight_quantizer.initialised
    with torch.no_grad():
        model[0].bias.copy_(_float()[0].bias)
    model(_x())
    assert _alphas(model) == pytest.approx(_from_data())


def test_a_step_that_was_set_stays_through_a_calibration_without_usable_data():
    model = _model()
    model(_x())
    before = _alphas(model)
    with torch.no_grad():
        model[0].bias.fill_(-10)
    with pytest.warns(UserWarning, match="all 0"):
        qbr.calibrate(model, [_x()])
    assert model[1].quantizer.initialised and _alphas(model) == pytest.approx(before)


def test_a_state_dict_without_its_alpha_leaves_that_to_data():
    trained = _model()
    trained(_x())
    state = trained.state_dict()
    state["1.quantizer.alpha"] = torch.tensor([math.nan])
    with pytest.raises(ValueError, match="delete it and 1.quantizer.init_state and load with strict=False to set it"):
        _model().load_state_dict(state)
    del state["1.quantizer.alpha"], state["1.quantizer.init_state"]
    model = _model()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert "1.quantizer.alpha" in missing and not model[1].quantizer.initialised
    model(_x())
    assert _alphas(model) == pytest.approx(_from_data())


def test_steps_of_other_bits_are_told(tmp_path):
    wide = _model(8)
    wide(_x())
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    narrow, again = _model(2), _model(8)
    state = torch.load(tmp_path / "wide.pt", weights_only=True)
    with pytest.warns(UserWarning, match=r"step sizes of 8 bits \(codes -128..127\) were loaded for 2 bits"):
        narrow.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(state)
        again.load_state_dict(dict(state))  # which has no metadata
    assert list(state) == list(copy.deepcopy(wide).state_dict())
    qbr.calibrate(narrow, [_x()])
    assert _alphas(narrow) == pytest.approx(_from_data(), rel=0.3)


def test_an_average_that_was_made_before_is_no_placeholder_afterwards():
    model = _model()
    average = AveragedModel(model, use_buffers=True)
    with pytest.warns(UserWarning, match="with a placeholder for it"):
        average.eval()(_x())
    model(_x())
    average.update_parameters(model)
    _silent(average.eval(), _x())
    assert _alphas(average) == _alphas(model)


def test_an_average_of_state_dicts_from_before_is_told():
    model = _model()
    before = copy.deepcopy(model.state_dict())
    model(_x())
    averaged = {key: 0.9 * value + 0.1 * model.state_dict()[key] for key, value in before.items()}
    with pytest.warns(UserWarning, match="init_state lies between 0 and 1"):
        _model().load_state_dict(averaged)


def test_a_functional_call_sets_what_it_is_given_and_says_that_the_module_is_not():
    model = _model()
    given = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    with pytest.warns(UserWarning, match="that tensor is set from data in every such call, the module's own never"):
        functional_call(model, given, (_x(),))
    assert [value.item() for name, value in given.items() if name.endswith("alpha")] == pytest.approx(_from_data())
    assert not any(q.initialised or q.init_state.item() for q in quantizers(model).values())
    model(_x())
    assert _alphas(model) == pytest.approx(_from_data())
    _silent(lambda: functional_call(model, given, (_x(),)))


def test_a_forward_on_meta_sets_nothing():
    model = _model().to("meta")
    model(torch.empty(4, 6, device="meta"))
    assert not any(quantizer.initialised for quantizer in quantizers(model).values())


@pytest.mark.parametrize("first", ["alpha", "init_state"])
def test_a_state_dict_may_come_in_parts(first):
    trained = _model()
    trained(_x())
    state = {name: 2 * value if name.endswith("alpha") else value for name, value in trained.state_dict().items()}
    model = _model()
    for part in (first, ""):
        part = {name: value for name, value in state.items() if name.endswith(first) == bool(part)}
        model.load_state_dict(part, strict=False)
    model(_x())
    assert _alphas(model) == pytest.approx([2 * alpha for alpha in _from_data()])


def test_a_step_on_fake_tensors_reads_none():
    with FakeTensorMode():
        model = _model()
        optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0))
        model(torch.rand(4, 6)).sum().backward()
        optimizer.step()


def test_a_compiled_step_is_compiled_once_whatever_other_quantizers_do():
    others = [_model() for _ in range(3)]
    model = _model()
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0))
    graphs = CompileCounter()
    step = torch.compile(optimizer.step, backend=graphs)
    for _ in range(3):
        model(_x()).sum().backward()
        step()
        assert all(quantizer.initialised for quantizer in quantizers(model).values())
        others.pop()
        gc.collect()
    assert graphs.frame_count == 1
    torch._dynamo.reset()


def test_a_copy_on_meta_is_not_looked_at():
    model = _model()
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0))
    model(_x()).sum().backward()
    skeleton = copy.deepcopy(model).to("meta")
    optimizer.step()
    assert all(quantizer.initialised for quantizer in quantizers(model).values())
    assert next(iter(quantizers(skeleton).values())).alpha.is_meta


@pytest.mark.parametrize("calibrated", [False, True])
def test_memory_that_from_pretrained_leaves_as_it_was(calibrated):
    """It makes the model on meta, and puts there what the checkpoint lacks by setattr."""
    with torch.device("meta"):
        model = _model()
    torch.manual_seed(0)
    for owner, name, value in [(m, n, t) for m in model.modules() for n, t in {**m._parameters, **m._buffers}.items()]:
        made = torch.rand(value.shape) if "alpha" not in name and name != "init_state" else torch.full((1,), 3e9)
        setattr(owner, name, nn.Parameter(made) if isinstance(value, nn.Parameter) else made)
    expected = qbr.prepare(_float(), qbr.QATConfig(weight_bits=2, act_bits=2))
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k}, strict=False)
    for each in (model, expected):
        qbr.calibrate(each, [_x()]) if calibrated else each(_x())
    assert _alphas(model) == _alphas(expected)
    assert all(quantizer.init_state.item() == 1 for quantizer in quantizers(model).values())


def _from_meta() -> nn.Module:
    with torch.device("meta"):
        return _model()


def test_what_was_made_on_meta_is_looked_at_no_more_once_it_is_there():
    model = _from_meta().to_empty(device="cpu")
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)(_x()).sum().backward()
    alphas = {name: torch.full_like(t, 0.07) for name, t in model.state_dict().items() if name.endswith("alpha")}
    model.load_state_dict(alphas, strict=False)
    model.eval()(_x())
    assert _alphas(model) == pytest.approx([0.07] * 3)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [qbr.LSQ_WeightQuantizer, qbr.LSQ_ActivationQuantizer])
@pytest.mark.parametrize("grad", [False, True])
def test_first_data_that_are_unusable_are_forgotten_where_no_optimizer_steps(kind, grad):
    quantizer = kind(2)
    placeholder = quantizer.alpha.item()
    with torch.set_grad_enabled(grad):
        quantizer(torch.zeros(8))
        with pytest.warns(UserWarning, match="nothing has set"):
            quantizer.eval()(_x())
        quantizer.train()(_x())
    expected = kind(2)
    expected(_x())
    assert quantizer.alpha.item() == expected.alpha.item() != placeholder and quantizer.init_state.item() == 1
    with no_host_reads():
        quantizer._unconfirmed = False  # as after an optimizer's step, or the next forward
        quantizer(_x())


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 1e-46), ("alpha", 1e300), ("init_state", math.nan), ("init_state", 2.0)]
)
def test_a_state_that_float32_does_not_have_is_refused(name, value):
    model = qbr.calibrate(_model(), [_x()])
    state = {**model.state_dict(), f"0.weight_quantizer.{name}": torch.tensor([value], dtype=torch.float64)}
    before = _alphas(model)
    with pytest.raises(ValueError, match=rf"0\.weight_quantizer\.{name}=\[.*strict=False"):
        model.load_state_dict(state)
    assert _alphas(model) == before


def test_a_calibration_that_fails_leaves_what_was_made_on_meta_to_the_next_forward():
    model = _from_meta()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # as from_pretrained leaves missing keys
        owner, _, last = name.rpartition(".")
        memory = torch.full(tensor.shape, 5.0)
        setattr(model.get_submodule(owner), last, nn.Parameter(memory) if isinstance(tensor, nn.Parameter) else memory)
    with pytest.raises(TypeError):
        qbr.calibrate(model, [_x(), 3])
    model(_x())
    assert all(quantizer.init_state.item() == 1 for quantizer in quantizers(model).values())
    assert 5.0 not in _alphas(model)


def test_a_skeleton_on_meta_takes_what_functional_call_gives_it():
    model, skeleton = qbr.calibrate(_model(), [_x()]).eval(), _from_meta().eval()
    state = model.state_dict()
    for given in (state, dict(model.named_parameters()), {**state, "1.quantizer.init_state": torch.zeros(1)}):
        before = {name: value.clone() for name, value in given.items()}
        assert torch.equal(functional_call(skeleton, given, (_x(),)), model(_x()))
        assert all(torch.equal(before[name], value) for name, value in given.items())
    skeleton = _from_meta().eval()
    skeleton.load_state_dict({k: v for k, v in state.items() if "init_state" not in k}, strict=False, assign=True)
    assert torch.equal(skeleton(_x()), model(_x()))


def test_a_state_dict_starts_the_tries_over():
    model = _model()
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.1, weight_decay=0.0))
    before = copy.deepcopy(model.state_dict())
    for tries in range(2):
        if tries:
            model.load_state_dict(before)
        for _ in range(2):
            _step(model, optimizer, torch.full((4, 6), math.nan))
    quantizer = model[1].quantizer
    assert not quantizer.initialised


def test_swapped_parameters_are_known_by_their_place(monkeypatch):
    """torch.utils.swap_tensors refuses tensors with weak references."""
    model = _model()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model.double()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "alpha" not in n], lr=0.1)
    model(_x().double()).sum().backward()
    with pytest.raises(RuntimeError, match="step sizes .alpha. are in no optimizer"):
        optimizer.step()


def test_parameters_alone_bring_steps_that_stay():
    """An average of parameters, a checkpoint of what was trained: alpha without init_state."""
    model, other = _model(), _model()
    qbr.calibrate(model, [_x()])
    for quantizer in quantizers(model).values():
        quantizer.set_alpha(quantizer.alpha.detach() * 3)
    other.load_state_dict(dict(model.named_parameters()), strict=False)
    with no_host_reads():
        other(_x())
    assert _alphas(other) == _alphas(model)
    assert all(quantizer.initialised and quantizer.init_state == 1 for quantizer in quantizers(other).values())
    other = _model()
    other.load_state_dict(dict(_model().named_parameters()), strict=False)  # placeholders, which data replace
    assert not any(quantizer.initialised for quantizer in quantizers(other).values())
    state = model.state_dict()
    for name in [name for name in state if name.endswith("init_state")]:
        del state[name]
    with pytest.warns(UserWarning, match="step sizes of 2 bits .* were loaded for 4 bits"):
        _model(4).load_state_dict(state, strict=False)
