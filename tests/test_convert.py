"""convert(): plain modules, the same outputs to the bit, and what is saved of them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.fx
import tv
from torch import nn
from torch.nn.utils import prune

import qbr
from qbr import QATConfig, calibrate, convert, prepare
from qbr.convert import FakeQuantize


def x_(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.body, self.relu6, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6(), nn.Linear(4 * 36, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu6(self.relu(self.body(x) + x) - 0.1).relu()
        return self.fc(x.flatten(1))


def make(dtype=torch.float32, **config) -> nn.Module:
    torch.manual_seed(0)
    model = prepare(Net().to(dtype), QATConfig(**config))
    model(x_(4, 3, 8, 8).to(dtype))
    return model


CONFIGS = [
    {}, {"weight_bits": 1, "act_bits": 1}, {"weight_bits": 8, "act_bits": 8, "weight_per_channel": True},
    {"weight_bits": 3, "act_bits": 3, "quantize_inputs": True, "clip": 2.7}, {"weight_bits": None, "act_bits": 4},
    {"act_bits": None}, {"weight_bits": 1, "act_bits": 1, "quantize_inputs": True, "skip": ["body"]},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_outputs_to_the_bit_without_quantizers(config, dtype):
    model = make(dtype, **config).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = convert(model)
    for seed in range(3):
        x = (3 * x_(4, 3, 8, 8, seed=seed)).to(dtype)
        assert torch.equal(plain(x), model(x))
    assert not [m for m in plain.modules() if isinstance(m, (qbr.LSQQuantizer, qbr.QuantizedClippedReLU))]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())  # a copy was converted
    quantized_inputs = config.get("quantize_inputs", False)
    kinds = {name: type(m) for name, m in plain.named_modules()}
    assert kinds["body"] is nn.Conv2d and kinds["fc"] is nn.Linear
    assert kinds["stem"] is (qbr.QuantizedConv2d if quantized_inputs else nn.Conv2d)
    assert plain.fc.weight.dtype == dtype and plain.fc.weight.requires_grad
    bits = config.get("weight_bits", 2)
    if bits is not None and "weight_per_channel" not in config:
        assert len(plain.fc.weight.unique()) <= 2**bits


def test_hooks_of_qbr_go_and_those_of_the_user_stay():
    model = make(step_per_call=False)
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append("fc"))
    model.register_forward_pre_hook(lambda *_: calls.append("root"))
    plain = convert(model)
    plain(x_(1, 3, 8, 8))
    assert calls == ["root", "fc"]
    assert len(plain._forward_pre_hooks) == 1 and not plain._forward_hooks and not plain._load_state_dict_pre_hooks
    assert plain.training and plain.relu.calls == 1


def test_several_steps_of_one_relu_stay_several():
    plain = convert(make().eval())
    assert type(plain.relu) is FakeQuantize and plain.relu.alpha.shape == (2,)
    assert plain.relu._places == {} and "codes 0..3, relu" in str(plain.relu)
    assert type(plain.functional_relu_1) is FakeQuantize
    again = copy.deepcopy(plain)
    assert torch.equal(again(x_(2, 3, 8, 8)), plain(x_(2, 3, 8, 8)))


def test_in_place():
    model = make().eval()
    expected = model(x_(2, 3, 8, 8))
    assert convert(model, inplace=True) is model and torch.equal(model(x_(2, 3, 8, 8)), expected)
    with pytest.raises(ValueError, match="has no quantizers"):
        convert(model)


def test_saved_whole_and_as_a_state_dict():
    plain = convert(make(quantize_inputs=True).eval())
    expected = plain(x_(2, 3, 8, 8))
    whole, state = io.BytesIO(), io.BytesIO()
    torch.save(plain, whole), torch.save(plain.state_dict(), state)
    whole.seek(0), state.seek(0)
    assert torch.equal(torch.load(whole, weights_only=False)(x_(2, 3, 8, 8)), expected)
    other = convert(make(quantize_inputs=True, clip=None).eval())
    other.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(other(x_(2, 3, 8, 8)), expected)
    names = {key for key in plain.state_dict() if "alpha" in key}
    assert names == {f"{name}.alpha" for name in (
        "relu", "relu6", "functional_relu_1", "stem.input_quantizer")}  # fmt: skip


class ByName(nn.Module):
    """Calls torch.nn's modules by the name that their forward's parameter has there."""

    def __init__(self):
        super().__init__()
        self.words, self.up, self.relu = nn.Embedding(9, 4), nn.ConvTranspose2d(4, 4, 2), nn.ReLU()
        self.conv, self.fc = nn.Conv2d(4, 3, 3), nn.Linear(108, 5)

    def forward(self, x):
        x = self.words(input=x).movedim(-1, 1)
        return self.fc(input=self.conv(input=self.relu(input=self.up(input=x))).flatten(1))


@pytest.mark.parametrize("quantize_inputs", [False, True])
def test_layers_are_called_by_torch_s_names(quantize_inputs):
    model, x = ByName(), torch.arange(49).reshape(1, 7, 7) % 9
    assert model(x).shape == prepare(model, QATConfig(quantize_inputs=quantize_inputs))(x).shape == (1, 5)
    with torch.no_grad():
        assert torch.equal(convert(model.eval())(x), model(x))


@pytest.mark.parametrize("before", [True, False])
def test_a_weight_that_a_hook_computes_stays_quantized(before):
    def hook(model):
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.random_unstructured(model[2], "weight", 0.5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(6, 5))
    for change in (hook, prepare) if before else (prepare, hook):
        change(model)
    calibrate(model.eval(), [x_(4, 3, 8, 8)])
    with torch.no_grad():
        expected = model(x_(2, 3, 8, 8))
        plain = convert(model)
        assert torch.equal(plain(x_(2, 3, 8, 8)), expected) and type(plain[0].weight_quantizer) is FakeQuantize
        prune.remove(model[0], "weight"), prune.remove(model[2], "weight")
        folded = convert(model)
    assert torch.equal(folded(x_(2, 3, 8, 8)), expected) and type(folded[0]) is nn.Conv2d


def test_a_float_model_takes_the_weights():
    model = make(act_bits=None).eval()
    plain, net = convert(model), Net().eval()
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net(x_(2, 3, 8, 8)), model(x_(2, 3, 8, 8)))


def test_casts_keep_the_steps():
    plain = convert(make().eval())
    alpha = plain.relu.alpha.clone()
    assert torch.equal(plain.bfloat16().relu.alpha, alpha) and plain.fc.weight.dtype == torch.bfloat16


def test_compiled_and_with_torch_s_operations_alone():
    torch._dynamo.reset()
    plain = convert(make(weight_bits=1, act_bits=2, quantize_inputs=True).eval())
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x_(2, 3, 8, 8)), plain(x_(2, 3, 8, 8)))
    assert len(graphs) == 1 and "qbr" not in graphs[0]


def test_unusual_values():
    quantizer = qbr.LSQ_ActivationQuantizer(2)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e30])
    for signed, relu, clip in ((False, True, None), (False, True, 1.5), (True, False, None)):
        quantizer = qbr.LSQ_ActivationQuantizer(1 if signed else 2, signed=signed).eval()
        expected = quantizer(x, relu=relu, clip=clip) if relu else quantizer(x)
        assert torch.equal(FakeQuantize([quantizer], relu, clip)(x).nan_to_num(7), expected.nan_to_num(7))


def test_steps_without_data_are_named():
    model = prepare(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), QATConfig()).eval()
    with pytest.warns(UserWarning, match=r"\['0.weight_quantizer', '1.quantizer'\] were never set from data"):
        plain = convert(model)
    assert torch.equal(plain(x_(2, 3)), model(x_(2, 3)))


@pytest.mark.filterwarnings("error:.*were never set")
def test_steps_that_an_average_has_from_its_model_are_no_steps_without_data():
    model = prepare(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(x_(2, 3)), average.update_parameters(model)
    convert(average.module.eval())


@pytest.mark.parametrize("name", ["googlenet", "densenet121", "shufflenet_v2_x0_5", "squeezenet1_0", "mnasnet0_5"])
def test_other_models_of_torchvision(name):
    tv.load()
    from torchvision import models

    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = prepare(getattr(models, name)(num_classes=10, **options), QATConfig(4, 4, quantize_inputs=True))
    calibrate(model, [x_(2, 3, 32, 32)])
    model(x_(2, 3, 32, 32)).sum().backward()
    br = qbr.bin_loss(model)
    assert len(br.layers) == sum(isinstance(m, qbr.LSQQuantizer) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(convert(model.eval())(x_(2, 3, 32, 32)), model(x_(2, 3, 32, 32)))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_model_whose_hooks_keep_tensors_of_a_graph():
    """The older weight_norm leaves the last forward's weight as an attribute, which deepcopy refuses."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    qbr.calibrate(qbr.prepare(model, qbr.QATConfig()), [x])
    model(x).sum().backward()
    kept = model[0].__dict__["weight"]
    converted = qbr.convert(model)
    assert model[0].__dict__["weight"] is kept and kept.grad_fn is not None
    assert torch.equal(converted.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_symbolic_trace_follows_a_converted_model(dtype):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 5)
    model = nn.Sequential(*layers)
    prepare(model.to(dtype), QATConfig(weight_bits=4, act_bits=4, quantize_inputs=True))
    x = x_(2, 3, 8, 8).to(dtype)
    plain = convert(calibrate(model, [x]).eval())
    assert torch.equal(torch.fx.symbolic_trace(plain)(x), plain(x))


@pytest.mark.slow  # inductor compiles C++
def test_aotinductor_takes_a_converted_model(tmp_path):
    plain = convert(make(weight_bits=2, act_bits=2, quantize_inputs=True).eval())
    x = x_(4, 3, 8, 8)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    run = torch._inductor.aoti_load_package(package)
    assert torch.equal(run(x), plain(x)) and torch.equal(run(x[:3]), plain(x[:3]))
