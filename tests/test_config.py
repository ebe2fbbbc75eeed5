"""QATConfig by name, first and last layers, JSON; and plan(): the table, and what is refused beforehand."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import qbr
from qbr import QATConfig, plan, prepare
from qbr.config import OVERRIDABLE


def make() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU6()),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


FULL = QATConfig(
    weight_bits=3, act_bits=4, clip=2.5, skip=["1.1"], weight_per_channel=True, collect_bin_loss=False, first_layer=8,
    last_layer=32, quantize_inputs=True, input_signed=True, step_per_call=False,
    act_regularizer="dampening",
    overrides={"0": {"weight_bits": 5, "clip": None}, "0.1": {"act_bits": 32}, "1.*": {"weight_per_channel": False}},
)  # fmt: skip


@pytest.mark.parametrize("config", [QATConfig(), FULL])
def test_json_gives_the_same_config_back(config):
    text = config.to_json()
    assert QATConfig.from_json(text) == config
    assert set(json.loads(text)) == set(QATConfig.__dataclass_fields__)
    assert hash(QATConfig.from_json(text)) == hash(config)


@pytest.mark.parametrize("value", [FULL, qbr.Freeze(epoch=3)], ids=str)
def test_checkpoints_that_hold_it_load_safely(value, tmp_path):
    torch.save({"hyper_parameters": {"config": value}}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["config"] == value


def test_numbers_of_other_types_are_kept_as_python_s():
    config = QATConfig(clip=np.float32(6), overrides={"a": {"clip": Fraction(5, 2)}})
    assert type(config.clip) is float
    assert config.to_json() == QATConfig(clip=6.0, overrides={"a": {"clip": 2.5}}).to_json()


def test_json_may_name_some_fields_and_no_others():
    assert QATConfig.from_json('{"act_bits": 32}') == QATConfig(act_bits=None)
    with pytest.raises(ValueError, match="'bits'"):
        QATConfig.from_json('{"bits": 3}')
    with pytest.raises(TypeError, match="list"):
        QATConfig.from_json("[]")


def test_overrides_the_later_pattern_wins_field_by_field():
    config = QATConfig(
        overrides={"a*": {"weight_bits": 4, "act_bits": 5}, "a.b": {"weight_bits": 32}, "*": {"clip": 3.0}}
    )
    assert (config.layer("a.x").weight_bits, config.layer("a.x").act_bits) == (4, 5)
    assert (config.layer("a.b.c").weight_bits, config.layer("a.b.c").act_bits) == (None, 5)
    assert config.layer("c").weight_bits == 2 and config.layer("c").clip == 3.0
    assert QATConfig(skip=["a"], overrides={"a": {"weight_bits": 4}}).layer("a").weight_bits is None


def test_each_field_reaches_its_module():
    model = prepare(make(), QATConfig(
        weight_bits=3, act_bits=4,
        overrides={"1": {"weight_bits": 6, "weight_per_channel": True}, "0.1": {"act_bits": 7, "clip": 1.5}},
    ))  # fmt: skip
    assert [model[i][0].weight_quantizer.num_bits for i in (0, 1)] == [3, 6]
    assert [model[i][0].weight_quantizer.alpha.numel() for i in (0, 1)] == [1, 4]
    assert [(model[i][1].num_bits, model[i][1].clip_value) for i in (0, 1)] == [(7, 1.5), (4, 6.0)]


@pytest.mark.parametrize(
    "first, last, overrides, expected",
    [
        (8, 8, {}, [8, 2, 8]),
        (32, None, {}, [None, 2, 2]),
        (8, 32, {"3": {"weight_bits": 5}}, [8, 2, 5]),
        (None, None, {}, [2, 2, 2]),
    ],
)
def test_first_and_last_layer(first, last, overrides, expected):
    model = prepare(make(), QATConfig(first_layer=first, last_layer=last, overrides=overrides))
    layers = [model[0][0], model[1][0], model[3]]
    assert [getattr(m, "weight_quantizer", None) and m.weight_quantizer.num_bits for m in layers] == expected
    assert [type(m) for m in layers if not hasattr(m, "weight_quantizer")] == [nn.Conv2d] * expected.count(None)


class _CalledBackwards(nn.Module):
    """Its last registered layer is called first."""

    def __init__(self):
        super().__init__()
        self.head, self.relu, self.stem = nn.Linear(4, 2), nn.ReLU(), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.relu(self.stem(x)))


def test_first_and_last_are_those_of_the_calls():
    model = prepare(_CalledBackwards(), QATConfig(first_layer=8, last_layer=6))
    assert (model.stem.weight_quantizer.num_bits, model.head.weight_quantizer.num_bits) == (8, 6)
    with pytest.raises(ValueError, match="first_layer=8 and last_layer=4"):
        prepare(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), QATConfig(first_layer=8, last_layer=4))


def test_an_override_of_what_nothing_of_that_name_has_is_refused():
    refused = {
        "3": {"act_bits": 8},
        "0.1": {"weight_bits": 4},
        "*.0": {"clip": 6.0},
        "?.1": {"quantize_inputs": True},
    }
    for pattern, fields in refused.items():
        model, (name,) = make(), fields
        before = str(model)
        with pytest.raises(ValueError, match=re.escape(f"overrides[{pattern!r}][{name!r}]: nothing of that name")):
            prepare(model, QATConfig(overrides={"[03]": {"act_bits": 3}, pattern: fields}))
        assert str(model) == before
    all_fields = {"weight_bits": 3, "act_bits": 3, "clip": 3.0, "weight_per_channel": True, "input_signed": True}
    plan(make(), QATConfig(overrides={"0": all_fields}))
    plan(make(), QATConfig(quantize_inputs=True, overrides={"3": {"act_bits": 8}}))
    plan(make(), QATConfig(overrides={"3": {"act_bits": 8, "quantize_inputs": True}}))
    with pytest.raises(ValueError, match="input that is quantized"):
        prepare(nn.Embedding(4, 2), QATConfig(act_bits=None, quantize_inputs=True, overrides={"*": {"act_bits": 8}}))


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"overrides": [("a", {})]}, TypeError, "overrides="),
        ({"overrides": {"a": 3}}, TypeError, r"overrides\['a'\]=3"),
        ({"overrides": {"a": {"bits": 3}}}, ValueError, r"overrides\['a'\] has \['bits'\]"),
        ({"overrides": {"a": {"weight_bits": 9}}}, ValueError, r"overrides\['a'\]\['weight_bits'\]=9"),
        ({"overrides": {"a": {"clip": -1}}}, ValueError, r"overrides\['a'\]\['clip'\]=-1"),
        ({"overrides": {"a": {"quantize_inputs": 1}}}, TypeError, r"\['quantize_inputs'\]=1"),
        ({"first_layer": 16}, ValueError, "first_layer=16"),
        ({"clip": "6"}, TypeError, "clip='6'"),
        ({"clip": True}, TypeError, "clip=True"),
        ({"clip": 1e300}, ValueError, r"clip=1e\+300: expected a positive number within float32's"),
        ({"overrides": {"a": {"clip": [6]}}}, TypeError, r"overrides\['a'\]\['clip'\]=\[6\]"),
        ({"overrides": {"a": {1: 2, "b": 3}}}, ValueError, r"overrides\['a'\] has \[1, 'b'\]"),
        ({"skip": (1,)}, TypeError, r"skip=\(1,\)"),
        ({"skip": 3}, TypeError, "skip=3"),
        ({"skip": {"a": 1}}, TypeError, r"skip=\{'a': 1\}"),
        ({"weight_bits": "3"}, TypeError, "weight_bits='3'"),
        ({"act_bits": [4]}, TypeError, r"act_bits=\[4\]"),
        ({"regularizer": ["br"]}, ValueError, r"regularizer=\['br'\]"),
        ({"collect_bin_loss": None}, TypeError, "collect_bin_loss=None"),
        ({"act_regularizer": "l2"}, ValueError, "act_regularizer='l2'"),
        ({"last_layer": "8"}, TypeError, "last_layer='8'"),
        ({"quantize_inputs": "yes"}, TypeError, "quantize_inputs='yes'"),
        ({"input_signed": 0}, TypeError, "input_signed=0"),
        ({"input_signed": False}, ValueError, "input_signed=False without quantize_inputs=True"),
        ({"act_bits": None, "quantize_inputs": True}, ValueError, "quantize_inputs=True with act_bits=None"),
        ({"weight_per_channel": None}, TypeError, "weight_per_channel=None"),
    ],
)
def test_bad_fields(values, error, message):
    with pytest.raises(error, match=message):
        QATConfig(**values)
    text = json.dumps(values)
    if json.loads(text) == values:
        with pytest.raises(error, match=message):
            QATConfig.from_json(text)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"overrides=\['layer9'\]"):
        plan(make(), QATConfig(overrides={"layer9": {"weight_bits": 4}}))
    with pytest.raises(ValueError, match=r"skip=\['2'\]"):  # a Flatten: nothing to skip
        plan(make(), QATConfig(skip=["2"]))
    assert set(OVERRIDABLE) < set(QATConfig.__dataclass_fields__)


def test_the_plan_shows_everything_and_changes_nothing():
    model = make()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    table = str(plan(model, QATConfig(act_bits=4, skip=["1.0"], quantize_inputs=True, first_layer=8)))
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["name", "type", "weight", "activation", "note"]
    assert rows[1] == ["0.0", "Conv2d", "8", "bits", "input", "8", "bits", "signed"]
    assert rows[2] == ["0.1", "ReLU", "4", "bits"]
    assert rows[3] == ["1.0", "Conv2d", "float", "(skip)"]
    assert rows[4] == ["1.1", "ReLU6", "4", "bits,", "clip", "6"]
    assert rows[5] == ["3", "Linear", "2", "bits"] and len(rows) == 6


def test_a_prepared_model_has_the_plan():
    config = QATConfig(weight_bits=3, act_bits=4, quantize_inputs=True)
    planned, model = plan(make(), config), prepare(make(), config)
    names = [f"{each.name}.weight_quantizer" for each in planned.weights]
    names += [f"{each.name}.quantizer" for each in planned.relus]
    names += [f"{each.name}.{each.attribute}" for each in planned.inputs]
    assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, qbr.LSQQuantizer))
    with pytest.raises(ValueError, match="quantizers already"):
        plan(model, config)


def test_restored_from_json_in_the_same_shape(tmp_path):
    torch.manual_seed(0)
    model = prepare(make(), FULL)
    model(torch.randn(2, 3, 8, 8))
    torch.save({"config": FULL.to_json(), "model": model.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = prepare(make(), QATConfig.from_json(saved["config"]))
    other.load_state_dict(saved["model"])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))


def test_flags_are_true_or_false_and_nothing_is_done_by_their_truth():
    model = qbr.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)), qbr.QATConfig(act_bits=None))
    qbr.calibrate(model, None)
    quantizer = model[0].weight_quantizer
    for name, call in {
        "inplace": lambda: qbr.convert(model, inplace="no"),
        "global_bins": lambda: qbr.bin_loss(model, global_bins="no"),
        "oscillations": lambda: qbr.Monitor(model, oscillations="no"),
        "frozen": lambda: quantizer.freeze("no"),
        "exclude_first_last": lambda: qbr.ActivationHookManager(model, exclude_first_last="no"),
    }.items():
        with pytest.raises(TypeError, match=f"{name}='no': expected True or False"):
            call()
    assert model[0].weight_quantizer is quantizer and not quantizer.frozen and quantizer.observer is None
    with pytest.raises(TypeError, match="frequency='0.01'"):
        qbr.Monitor(model, frequency="0.01")
    with pytest.raises(TypeError, match=r"skip=\[1\]"):
        qbr.bin_loss(model, skip=[1])
