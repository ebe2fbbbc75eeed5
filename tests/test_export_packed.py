"""Packed weights: the same outputs to the bit, sizes, and what damaged, foreign and hostile files get."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import qbr
from qbr import QATConfig
from qbr.export import load_packed, read_checkpoint, save_packed
from qbr.export.packed import read_packed
from qbr.quantizers import quantizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
resnet18 = importlib.import_module("cifar10.models").resnet18


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU6(),
        nn.Flatten(), nn.Linear(4 * 49, 7), nn.ReLU(), nn.Linear(7, 7),
    )  # fmt: skip


class _Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, max_norm=1.0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.relu = nn.ReLU()
        self.out = nn.Linear(8, 11, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.relu(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(self.relu(x))


class _Tied(_Words):
    def __init__(self):
        super().__init__()
        self.out.weight = self.embedding.weight
        self.embedding.max_norm = None


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(10).reshape(2, 5)


def _trained(make=_net, x=IMAGES, seed=0, **config):
    torch.manual_seed(seed)
    model = qbr.prepare(make(), QATConfig(**config))
    for _ in range(2):
        model(x)
    return model.eval()


def test_packing_leaves_the_model_as_it_is(tmp_path):
    """An Embedding's rows beyond max_norm are brought within it in the file alone."""
    model = _trained(_Words, TOKENS)
    model.embedding.weight.data *= 3
    before = copy.deepcopy(model.state_dict())
    save_packed(model, tmp_path / "m.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per_channel", [False, True])
def test_round_trip_at_every_width(bits, per_channel, tmp_path):
    model = _trained(weight_bits=bits, act_bits=9 - bits, weight_per_channel=per_channel)
    before = copy.deepcopy(model.state_dict())
    path = save_packed(model, tmp_path / "m.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stored = load_file(path)
    assert stored["0.weight"].dtype == torch.uint8 and len(stored["0.weight"]) == (6 * 3 * 9 * bits + 7) // 8
    loaded = load_packed(_net, path)  # a function that makes a float model
    assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))
    given = qbr.prepare(_net(), QATConfig(weight_bits=bits, act_bits=9 - bits, weight_per_channel=per_channel)).eval()
    assert load_packed(given, path) is given
    assert torch.equal(given(IMAGES), model(IMAGES))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


class _Versioned(nn.Sequential):
    """Loads a state_dict of its own version only, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__(*_net())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version={local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_classes_that_ask_for_their_version(prefix, tmp_path):
    model = _trained(_Versioned, IMAGES, weight_bits=4, act_bits=4)
    save_packed(model, tmp_path / "m.safetensors")
    assert torch.equal(load_packed(_Versioned().eval(), tmp_path / "m.safetensors")(IMAGES), model(IMAGES))
    state = (nn.DataParallel(model) if prefix else model).state_dict()
    assert all(name.startswith(prefix) for name in state)
    torch.save({"model_state_dict": state, "config": model.qat_config.to_json()}, tmp_path / "m.pth")
    fresh = qbr.prepare(_Versioned(), model.qat_config)
    fresh.load_state_dict(read_checkpoint(tmp_path / "m.pth").state)
    assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))
    del state._metadata
    torch.save({"model_state_dict": state, "config": model.qat_config.to_json()}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="version=None"):
        fresh.load_state_dict(read_checkpoint(tmp_path / "plain.pth").state)


@pytest.mark.parametrize("make", [_Words, _Tied])
def test_embeddings_attention_and_ties(make, tmp_path):
    model = _trained(make, TOKENS, weight_bits=3, act_bits=4, quantize_inputs=True)
    expected = model(TOKENS)
    path = save_packed(model, tmp_path / "m.safetensors")
    loaded = load_packed(make().eval(), path)
    assert torch.equal(loaded(TOKENS), expected)
    if make is _Tied:
        assert loaded.out.weight is loaded.embedding.weight
        assert len([name for name in load_file(path) if name in ("out.weight", "embedding.weight")]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    torch.manual_seed(0)
    model = qbr.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), QATConfig(4, 4)).to(dtype)
    x = torch.randn(5, 8).to(dtype)
    with qbr.use_backend("reference"):
        model(x)
        path = save_packed(model.eval(), tmp_path / "m.safetensors")
        loaded = load_packed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval(), path)
        assert torch.equal(loaded(x), model(x))


def test_a_2_bit_resnet18_takes_under_3_2_mb(tmp_path):
    torch.manual_seed(0)
    model = qbr.prepare(resnet18(), QATConfig(weight_bits=2, act_bits=2)).eval()
    with pytest.warns(UserWarning, match="never set from data"):
        save_packed(model, tmp_path / "m.safetensors")
    for quantizer in quantizers(model).values():
        quantizer.set_alpha(quantizer.alpha)
    floats = sum(p.numel() * 4 for p in resnet18().parameters())
    assert floats > 44.6e6
    size = save_packed(model, tmp_path / "m.safetensors").stat().st_size
    assert size < 3.2e6
    half = save_packed(model, tmp_path / "half.safetensors", float_dtype=torch.float16).stat().st_size
    assert half < size - 30_000


def test_float16_for_the_rest(tmp_path):
    model = _trained(weight_bits=4, act_bits=8)
    path = save_packed(model, tmp_path / "m.safetensors", float_dtype=torch.float16)
    stored = load_file(path)
    assert stored["1.running_mean"].dtype == torch.float16
    assert stored["0.weight_quantizer.alpha"].dtype == torch.float32
    loaded = load_packed(_net().eval(), path)
    assert loaded[1].running_mean.dtype == torch.float32
    difference = (loaded(IMAGES) - model(IMAGES)).abs().max()
    assert 0 < difference < 0.1
    model[1].running_var.fill_(1e6)
    with pytest.raises(ValueError, match="1.running_var has values beyond"):
        save_packed(model, tmp_path / "m.safetensors", float_dtype=torch.float16)
    with pytest.raises(ValueError, match="float_dtype=torch.int8"):
        save_packed(model, tmp_path / "m.safetensors", float_dtype=torch.int8)


def test_refused_on_saving(tmp_path):
    with pytest.raises(ValueError, match="no quantizers"):
        save_packed(_net(), tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_packed(_trained(), tmp_path / "absent" / "m.safetensors")
    model = _trained()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="0.weight has values that are not finite"):
        save_packed(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        model[2].quantizer.alpha.zero_()
        model[0].weight[0, 0, 0, 0] = 0.0
    with pytest.raises(ValueError, match="2.quantizer.alpha has a step size of 0.0"):
        save_packed(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_left_as_it_was(tmp_path):
    path = save_packed(_trained(), tmp_path / "m.safetensors")
    wider = _net()
    wider[8] = nn.Linear(7, 9)
    before = [type(module) for module in wider.modules()]
    with pytest.raises(ValueError, match=r"of another model: 8.weight is \(7, 7\) in the file and \(9, 7\)"):
        load_packed(wider, path)
    assert [type(module) for module in wider.modules()] == before
    other = _trained(weight_bits=3, seed=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="quantized otherwise: 0.weight_quantizer"):
        load_packed(other, path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_without_a_config(tmp_path):
    model = _trained()
    del model.qat_config
    path = save_packed(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="has no config"):
        load_packed(_net(), path)
    path = save_packed(model, path, config=QATConfig())
    assert torch.equal(load_packed(_net().eval(), path)(IMAGES), model(IMAGES))


# Files from anywhere


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def _edited(tmp_path, change):
    """A packed file whose metadata or tensors ``change(about, tensors)`` has edited."""
    path = save_packed(_trained(), tmp_path / "m.safetensors")
    tensors = load_file(path)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["qbr"])
    change(about, tensors)
    save_file(tensors, path, {"qbr": json.dumps(about)})
    return path


def _refused(path, message):
    model = _net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_packed(model, path)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pickles_and_archives(tmp_path):
    path, marker = tmp_path / "m.safetensors", tmp_path / "ran"
    path.write_bytes(pickle.dumps(_Bomb(marker)))
    _refused(path, "a Python pickle, not safetensors; nothing in it was run")
    torch.save({"state_dict": _Bomb(marker)}, path)
    _refused(path, "a checkpoint of torch.save, not safetensors; nothing in it was run; python -m qbr convert")
    path.write_bytes(b"")
    _refused(path, "empty")
    path.write_bytes(b"hello, world, this is text")
    _refused(path, "of no kind that is known here")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_packed(_net(), tmp_path / "absent.safetensors")
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Bomb(marker)))
    assert marker.exists()  # it would have


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated(share, tmp_path):
    path = save_packed(_trained(), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    _refused(path, "damaged|truncated")


def test_two_gigabytes_in_a_kilobyte(tmp_path):
    path = tmp_path / "m.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 29], "data_offsets": [0, 1 << 31]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1024 - 8 - len(header)))
    _refused(path, "damaged or truncated")

    def claim(about, tensors):
        about["weights"]["0.weight"]["shape"] = [1 << 16, 1 << 15]

    _refused(_edited(tmp_path, claim), r"0.weight \[65536, 32768\].*2147483648 values of 2 bits")


@pytest.mark.parametrize("step", [0.0, -0.5, float("nan"), float("inf")])
def test_bad_steps(step, tmp_path):
    def change(about, tensors):
        tensors["2.quantizer.alpha"].fill_(step)

    _refused(_edited(tmp_path, change), "2.quantizer.alpha has a step size of")


def _set(*keys, to):
    def change(about, tensors):
        for key in keys[:-1]:
            about = about[key]
        about[keys[-1]] = to

    return change


def _no_alpha(about, tensors):
    del tensors["0.weight_quantizer.alpha"]


def _two_steps(about, tensors):
    tensors["0.weight_quantizer.alpha"] = torch.ones(2)


@pytest.mark.parametrize(
    "change, message",
    [
        (_set("format", to=2), "format 2: this version of qbr reads 1"),
        (_set("weights", "0.weight", "shape", to=[6, 3, 3, 4]), "0.weight"),
        (_set("weights", "0.weight", "shape", to=[-6, -3, 3, 3]), "has the shape"),
        (_set("weights", "0.weight", "shape", to="6333"), "has the shape"),
        (_set("weights", "0.weight", "quantizer", to="nobody"), "nobody"),
        (_set("weights", "0.weight", "dtype", to="object"), "object"),
        (_set("quantizers", "0.weight_quantizer", "bits", to=99), "bits=99"),
        (_set("weights", "0.weight", "quantizer", to="2.quantizer"), "said to be quantized by '2.quantizer'"),
        (_set("quantizers", "0.weight_quantizer", "qp", to=1 << 40), "levels"),
        (_set("quantizers", "0.weight_quantizer", to={"bits": 2, "qn": 1 << 17, "qp": 3 + (1 << 17)}), "within -32768"),
        (_set("config", to={"weight_bits": "2; import os"}), "weight_bits"),
        (_set("config", to={"colour": 1}), "colour"),
        (_set("aliases", to={"8.weight": "0.weight"}), "8.weight is said to be 0.weight"),
        (_set("weights", to=[]), "contradicts itself"),
        (_no_alpha, "0.weight_quantizer.alpha"),
        (_two_steps, "0.weight_quantizer.alpha is"),
    ],
)
def test_metadata_that_lies(change, message, tmp_path):
    _refused(_edited(tmp_path, change), message)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(3)}, path)
    _refused(path, "not from qbr.export.save_packed")
    packed = read_packed(save_packed(_trained(), path))
    assert packed.config == QATConfig() and set(packed.weights) == {"0.weight", "3.weight", "6.weight", "8.weight"}


def test_a_weight_that_is_computed_is_refused(tmp_path):
    model = qbr.prepare(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), QATConfig(weight_bits=2, act_bits=None))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    model(torch.rand(4, 6))
    with pytest.raises(ValueError, match="1.weight is computed by a hook or a parametrization: .*prune.remove"):
        save_packed(model, tmp_path / "model.safetensors")
    prune.remove(model[1], "weight")
    assert read_packed(save_packed(model, tmp_path / "model.safetensors")).weights.keys() == {"0.weight", "1.weight"}


def test_an_average_of_the_model_is_packed_as_the_model(tmp_path):
    model = qbr.prepare(_net(), QATConfig(2, 4))
    x = torch.randn(4, 3, 8, 8)
    qbr.calibrate(model, [x])
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    save_packed(average, tmp_path / "average.safetensors")
    again = load_packed(_net, tmp_path / "average.safetensors").eval()
    assert torch.equal(again(x), average.eval()(x))


def test_a_model_that_was_prepared_in_parts_says_so_when_it_is_written(tmp_path):
    def make():
        return nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 3)))

    def in_parts():
        model = make()
        for part, width in zip(model, (4, 2)):
            qbr.prepare(part, QATConfig(weight_bits=width, act_bits=None))
        return model

    model, x = in_parts(), torch.rand(4, 6)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"has no config: the model was prepared in parts \(0, 1\)"):
        path = save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_packed(in_parts, path)(x), expected)
    with pytest.raises(ValueError, match="has no config, and model has no quantizers"):
        load_packed(make, path)
