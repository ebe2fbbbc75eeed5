"""Checkpoints of torch.save: the predecessor's and others are read, converted and never run; the command line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import qbr
from qbr import QATConfig, prepare
from qbr.__main__ import main
from qbr.export import convert_checkpoint, inspect, load_packed, read_checkpoint, save_packed

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """One ReLU that serves twice, as in torchvision's ResNet."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3)
        self.relu, self.fc = nn.ReLU(), nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv2(self.relu(self.conv1(x)))).flatten(1))


def _old(path, args=True, **change):
    """(a checkpoint as the predecessor wrote it, the model that it is of)."""
    torch.manual_seed(0)
    model = qbr.prepare(Block(), QATConfig(weight_bits=2, act_bits=3, clip=2.0, step_per_call=False))
    model(X)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state |= {f"module.{name}": value for name, value in change.items()}
    values = {"num_bits": None, "num_bits_weight": 2, "num_bits_act": 3, "clip_value": 2.0, "output_dir": "x"}
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []},
               "test_acc": 91.5}  # fmt: skip
    torch.save({**content, "args": argparse.Namespace(**values)} if args else content, path)
    return path, model.eval()


def test_the_predecessors_checkpoint(tmp_path):
    path, model = _old(tmp_path / "best.pth")
    checkpoint = read_checkpoint(path)
    assert checkpoint.predecessor
    assert checkpoint.config == QATConfig(weight_bits=2, act_bits=3, clip=2.0, step_per_call=False)
    loaded = qbr.prepare(Block(), checkpoint.config).eval()
    loaded.load_state_dict(checkpoint.state)
    assert torch.equal(loaded(X), model(X))


def test_converted_to_packed_weights_and_to_a_checkpoint(tmp_path):
    path, model = _old(tmp_path / "best.pth")
    packed = convert_checkpoint(path, tmp_path / "new.safetensors")
    assert torch.equal(load_packed(Block, packed).eval()(X), model(X))
    steps_for_each_call = qbr.prepare(Block(), QATConfig(weight_bits=2, act_bits=3, clip=2.0)).eval()
    assert "relu.quantizer_2.alpha" in steps_for_each_call.state_dict()
    assert torch.equal(load_packed(steps_for_each_call, packed)(X), model(X))
    again = read_checkpoint(convert_checkpoint(path, tmp_path / "new.pth"))
    assert again.config == read_checkpoint(path).config and not again.predecessor
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state.items())
    torch.load(tmp_path / "new.pth")  # with weights_only=True, torch's default
    with pytest.raises(ValueError, match="ends in .safetensors, .pth or .pt"):
        convert_checkpoint(path, tmp_path / "new.bin")


def test_bits_by_hand_and_layers_in_float(tmp_path):
    path, model = _old(tmp_path / "best.pth", args=False)
    with pytest.raises(ValueError, match="does not tell its bits: name them, weight_bits="):
        read_checkpoint(path)
    checkpoint = read_checkpoint(path, weight_bits=2, act_bits=3, clip=2.0)
    assert not checkpoint.predecessor and checkpoint.config.act_bits == 3
    skipping = QATConfig(weight_bits=2, act_bits=3, skip=["fc"])
    other = qbr.prepare(Block(), skipping).eval()
    torch.save(other.state_dict(), path)
    checkpoint = read_checkpoint(path, weight_bits=2, act_bits=3)
    assert checkpoint.config.skip == ("fc",) and checkpoint.config.step_per_call
    packed = convert_checkpoint(path, tmp_path / "new.safetensors", weight_bits=2, act_bits=3)
    assert torch.equal(load_packed(Block, packed).eval()(X), other(X))
    torch.save(Block().state_dict(), path)
    assert read_checkpoint(path).config is None
    with pytest.raises(ValueError, match="is a float model"):
        convert_checkpoint(path, tmp_path / "new.pth")


def test_what_only_a_model_tells_is_not_guessed(tmp_path):
    config = QATConfig(weight_bits=2, act_bits=3, quantize_inputs=True)
    model = qbr.prepare(Block(), config).eval()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match="the range of .*input_quantizer.*save_packed"):
        convert_checkpoint(tmp_path / "m.pth", tmp_path / "m.safetensors", config=config)
    assert {row.bits for row in inspect(tmp_path / "m.pth", config=config).rows} == {2, 3, None}
    (tmp_path / "config.json").write_text(config.to_json())
    made = ["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors"), "--model", f"{__name__}:Block"]
    assert main([*made, "--config", str(tmp_path / "config.json")]) == 0
    assert torch.equal(load_packed(Block, tmp_path / "m.safetensors").eval()(X), model(X))


# Hostile files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bytes_that_changed_are_a_value_error_or_harmless(suffix, tmp_path):
    path, model = _old(tmp_path / "best.pth")
    whole = path.read_bytes() if suffix == ".pth" else save_packed(model, tmp_path / "m.safetensors").read_bytes()
    path, choose, refused = tmp_path / f"changed{suffix}", random.Random(0), 0
    for _ in range(60):
        changed = bytearray(whole)
        changed[choose.randrange(min(len(whole), 3000))] = choose.randrange(256)
        path.write_bytes(changed)
        try:
            str(inspect(path))
        except ValueError as error:
            refused += path.name in str(error)
    assert refused > 10


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_nothing_is_run(tmp_path, monkeypatch):
    path, marker = tmp_path / "best.pth", tmp_path / "ran"
    for content in ({"args": _Bomb(marker)}, {"model_state_dict": {"w": torch.ones(1)}, "x": [_Bomb(marker)]}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="more than tensors and plain values; it was not run"):
            read_checkpoint(path)
    path.write_bytes(pickle.dumps(_Bomb(marker)))
    with pytest.raises(ValueError, match="a Python pickle, not a checkpoint"):
        read_checkpoint(path)
    assert main(["inspect", str(path)]) == 2 and main(["convert", str(path), str(tmp_path / "new.pth")]) == 2
    assert not marker.exists()

    _old(path)
    monkeypatch.setattr(argparse.Namespace, "__setstate__", lambda self, state: marker.touch(), raising=False)
    assert read_checkpoint(path).config.act_bits == 3  # a Namespace's values, without its methods
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated(share, tmp_path):
    path, _ = _old(tmp_path / "best.pth")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_checkpoint(path)


def test_more_claimed_than_there_is(tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"w": torch.zeros(1).expand(1 << 29)}, path)  # 2 GB, by a stride of 0
    with pytest.raises(ValueError, match=f"w claims {1 << 31} bytes, in a file of"):
        read_checkpoint(path)
    torch.save({"w": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="its entries claim more than"):
        read_checkpoint(path)


class _Memory:
    def __reduce__(self):
        return bytearray, (1 << 40,)


def test_memory_out_of_a_number(tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"model_state_dict": {"w": torch.ones(1)}, "epoch": _Memory()}, path)
    with pytest.raises(ValueError, match="makes a bytearray"):
        read_checkpoint(path)


def test_the_checkpoints_of_the_pages(tmp_path):
    """docs/prepare.md and docs/control.md: ``model``, and the config as JSON."""
    model = prepare(Block(), QATConfig(3, 4, first_layer=8))
    path = tmp_path / "saved.pt"
    torch.save({"config": model.qat_config.to_json(), "model": model.state_dict()}, path)
    read = read_checkpoint(path)
    assert read.config == model.qat_config
    prepare(Block(), read.config).load_state_dict(read.state)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_a_dead_step(step, tmp_path):
    path, _ = _old(tmp_path / "best.pth", **{"relu.quantizer.alpha": torch.tensor([step])})
    with pytest.raises(ValueError, match=r"relu.quantizer.alpha is \[.*lets a step die"):
        read_checkpoint(path)


def test_one_bit_of_the_predecessor_is_refused(tmp_path):
    path, _ = _old(tmp_path / "best.pth")
    with pytest.raises(ValueError, match="levels -1, 0 and 1"):
        read_checkpoint(path, weight_bits=1)


def test_foreign_files(tmp_path):
    path = tmp_path / "best.pth"
    for content, message in (([1], "holds a list"), ({"epoch": 1}, "holds no model_state_dict"), ({}, "holds no")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="a folder"):
        read_checkpoint(tmp_path)


# The command line and inspect


def test_inspect_tables(tmp_path, capsys):
    path, model = _old(tmp_path / "best.pth")
    rows = {row.name: row for row in inspect(path).rows}
    assert rows["conv1.weight"].bytes == 4 * 3 * 9 * 4
    assert rows["relu.quantizer"].bits == 3 and rows["relu.quantizer"].bins is None
    packed = save_packed(model, tmp_path / "m.safetensors")
    table = inspect(packed)
    assert [row.name for row in table.rows] == ["conv1.weight", "conv2.weight", "relu.quantizer", "fc.weight"]
    row = table.rows[0]
    codes = torch.unique((model.conv1.quantized_weight() / model.conv1.weight_quantizer.alpha).round())
    assert (row.bits, row.shape, row.bins, row.bytes) == (2, (4, 3, 3, 3), (len(codes), 4), 27)
    assert torch.equal(row.steps, model.conv1.weight_quantizer.alpha)
    assert main(["inspect", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert "conv1.weight" in printed and "4x3x3x3" in printed and f"{packed.stat().st_size:,} bytes" in printed


def test_convert_by_command_line(tmp_path, capsys):
    path, model = _old(tmp_path / "best.pth")
    new = tmp_path / "m.safetensors"
    assert main(["convert", str(path), str(new)]) == 0
    assert torch.equal(load_packed(Block, new).eval()(X), model(X))
    path, model = _old(tmp_path / "bare.pth", args=False)
    assert main(["convert", str(path), str(new)]) == 2
    assert "--weight-bits" in capsys.readouterr().err
    assert main(["convert", str(path), str(new), "--weight-bits", "2", "--act-bits", "3", "--clip", "2"]) == 0
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"weight_bits": 2, "act_bits": 3, "clip": 2.0, "step_per_call": False}))
    assert main(["convert", str(path), str(new), "--config", str(config)]) == 0
    assert torch.equal(load_packed(Block, new).eval()(X), model(X))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["export", str(path), "out.onnx", "--model", "nowhere:at_all", "--input", "3,8,8"]) == 2
    assert "--model nowhere:at_all" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["export"], ["inspect"], ["convert"]])
def test_help(command):
    done = subprocess.run([sys.executable, "-m", "qbr", *command, "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "100"})  # fmt: skip
    assert done.returncode == 0 and "python -m qbr" in done.stdout
    for word in ["inspect", "convert", "export"] if not command else ["example:"]:
        assert word in done.stdout
