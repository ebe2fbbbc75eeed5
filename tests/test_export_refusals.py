"""What export and the command line refuse before anything is written, and the state_dicts of wrapped models."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import qbr
from qbr import LSQQuantizer, QATConfig, QuantSpec
from qbr.__main__ import main
from qbr.export import compare, convert_checkpoint, load_packed, read_checkpoint, save_packed, to_onnx

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def wider():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


def net4():
    return qbr.prepare(net(), QATConfig(weight_bits=4, act_bits=4))


def _trained(make=net, x=X, **config):
    torch.manual_seed(0)
    model = qbr.prepare(make(), QATConfig(**config))
    model(x)
    return model.eval()


def _saved(path, model, config=None):
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": {"state": {}, "param_groups": []}}
    torch.save({**content, "config": vars(config or model.qat_config)}, path)
    return path


@pytest.fixture
def factories(monkeypatch):
    monkeypatch.setitem(sys.modules, "factories", sys.modules[__name__])


def test_a_checkpoint_is_not_written_over(tmp_path, factories, capsys):
    path = _saved(tmp_path / "best.pth", _trained())
    (tmp_path / "link.pth").symlink_to(path)
    before = path.read_bytes()
    model = ["--model", "factories:net"]
    itself = "is the checkpoint itself"
    for name, message in (("best.pth", itself), ("link.pth", itself), ("no/m.pth", "no folder"), ("m.bin", "ends in")):
        assert main(["convert", str(path), str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    for name, message in (("best.pth", "ends in .onnx"), ("m.bin", "ends in .onnx"), ("no/m.onnx", "no folder")):
        assert main(["export", str(path), str(tmp_path / name), *model, "--input", "3,8,8"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        convert_checkpoint(path, path)
    assert path.read_bytes() == before and {each.name for each in tmp_path.iterdir()} == {"best.pth", "link.pth"}


def test_a_prepared_model_with_other_bits_is_refused(tmp_path, factories, capsys):
    path = _saved(tmp_path / "best.pth", _trained())
    assert main(["convert", str(path), str(tmp_path / "m.safetensors"), "--model", "factories:net4"]) == 2
    assert "0.weight_quantizer has 2 bits in the checkpoint and 4 in the model" in capsys.readouterr().err
    for flags, message in (
        (["new.pth", "--model", "factories:net"], "--model factories:net is for packed weights"),
        (["m.safetensors", "--model", "factories:wider"], "more such lines"),
        (["m.safetensors", "--model", "factories:__name__"], "is a str: expected a function that makes the network"),
        (["m.safetensors", "--config", str(path)], f"--config {path}: "),
    ):
        assert main(["convert", str(path), str(tmp_path / flags[0]), *flags[1:]]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / flags[0]).exists()
    assert not (tmp_path / "m.safetensors").exists()


def test_images_that_do_not_fit_are_one_line(tmp_path, factories, capsys):
    path = _saved(tmp_path / "best.pth", _trained())
    command = ["export", str(path), str(tmp_path / "m.onnx"), "--model", "factories:net", "--input", "1,8,8"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: example, of the shapes [(2, 1, 8, 8)], does not go") and "RuntimeError" in error


def test_what_is_given_wins_over_what_is_recorded(tmp_path):
    path = _saved(tmp_path / "best.pth", _trained())
    config = read_checkpoint(path, weight_bits=4, clip=3.0).config
    assert (config.weight_bits, config.act_bits, config.clip) == (4, 2, 3.0)
    assert read_checkpoint(path, config=QATConfig(weight_bits=3), act_bits=5).config == QATConfig(3, 5)
    with pytest.raises(ValueError, match="weight_bits=0"):
        read_checkpoint(path, weight_bits=0)


def test_half_precision_steps(tmp_path):
    model = _trained(weight_bits=3)
    config = model.qat_config
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state, "config": vars(config)}, tmp_path / "half.pth")
    packed = convert_checkpoint(tmp_path / "half.pth", tmp_path / "half.safetensors")
    expected = qbr.prepare(net(), config).eval()
    expected.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(load_packed(net().eval(), packed).float()(X), expected(X), atol=1e-2)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_names(prefix, tmp_path):
    model = _trained()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state, "config": vars(model.qat_config)}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").state.keys() == model.state_dict().keys()


def test_a_module_called_module(tmp_path):
    state = {"module.weight": torch.ones(2, 2), "weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").state.keys() == state.keys()


def test_an_axis_that_the_shape_does_not_tell_is_not_guessed(tmp_path):
    def make():
        return nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.ReLU())

    model = _trained(make, torch.ones(1, 4, 4, 4), weight_per_channel=True)
    path = _saved(tmp_path / "m.pth", model)
    with pytest.raises(ValueError, match="do not tell the range of 0.weight_quantizer.*--model"):
        convert_checkpoint(path, tmp_path / "m.safetensors")


def test_another_config_is_not_packed(tmp_path):
    with pytest.raises(ValueError, match=r"config=QATConfig\(weight_bits=3.*leave config out"):
        save_packed(_trained(), tmp_path / "m.safetensors", config=QATConfig(weight_bits=3))
    assert list(tmp_path.iterdir()) == []


def _with_range(qn: int, qp: int, kind: str) -> nn.Module:
    model = _trained(weight_bits=8, act_bits=8)
    owner, name = (model[0], "weight_quantizer") if kind == "weight" else (model[1], "quantizer")
    quantizer = LSQQuantizer(QuantSpec(8, qn < 0, qn=qn, qp=qp), kind, initial_alpha=0.02)
    quantizer.set_alpha(torch.tensor([0.02]))
    setattr(owner, name, quantizer)
    return model.eval()


@pytest.mark.parametrize("qn, qp, kind", [(100, 355, "weight"), (300, 400, "activation"), (-300, -200, "weight")])
def test_codes_that_no_type_holds_are_refused(qn, qp, kind, tmp_path):
    with pytest.raises(ValueError, match=rf"quantizer: codes {qn}\.\.{qp}: no 8-bit type of ONNX holds them"):
        to_onnx(_with_range(qn, qp, kind), X, tmp_path / "m.onnx")


@pytest.mark.parametrize("qn, qp", [(-255, 0), (5, 200), (-3, 200)])
def test_codes_that_a_zero_point_moves(qn, qp, tmp_path):
    model = _with_range(qn, qp, "weight")
    assert compare(model, to_onnx(model, X, tmp_path / "m.onnx"), X).largest_difference < 1e-4


def test_bfloat16_is_refused(tmp_path):
    with pytest.raises(TypeError, match="0.weight is bfloat16.*export model.float"):
        to_onnx(_trained().bfloat16(), X.bfloat16(), tmp_path / "m.onnx")


class _Bias(nn.Module):
    """A parameter goes through an activation's quantizer."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-3, 9, 8))
        self.conv, self.relu, self.relu6 = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU6()

    def forward(self, x):
        return self.relu(self.conv(x)) + self.relu6(self.shift)


@pytest.mark.parametrize("weight_bits, act_bits", [(8, 8), (4, 2)])
def test_a_parameter_behind_a_relu(weight_bits, act_bits, tmp_path):
    model = _trained(_Bias, weight_bits=weight_bits, act_bits=act_bits)
    assert compare(model, to_onnx(model, X, tmp_path / "m.onnx"), X).largest_difference < 1e-5


class _TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.second = self.first

    def forward(self, x):
        return self.second(self.conv(self.first(x)))


@pytest.mark.usefixtures("int2_runtime")
def test_what_was_not_compared_is_told(tmp_path):
    model = _trained(_TwoNames)
    found = compare(model, to_onnx(model, X, tmp_path / "m.onnx"), X)
    calls = sum(isinstance(each, LSQQuantizer) and each.kind == "activation" for each in model.modules())
    assert len(found.codes) + len(found.missed) == calls == 2
    assert not found.missed or "not compared: " + ", ".join(found.missed) in str(found)
