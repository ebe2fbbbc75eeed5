"""The experiments' flags, against the predecessor's, and their models."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
models, options = (importlib.import_module(f"cifar10.{name}") for name in ("models", "options"))


def test_flags_and_defaults_are_the_predecessor_s():
    shared = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "gpu": 0, "seed": 42}
    float_run, _ = options.parse(options.baseline_parser(), ["--output-dir", "x"])
    assert vars(float_run).items() >= {**shared, "epochs": 200, "lr": 0.1}.items()
    qat_run, _ = options.parse(options.qat_parser(), ["--output-dir", "x"])
    expected = {
        **shared, "pretrained_baseline": None, "num_bits": None, "num_bits_weight": 2, "num_bits_act": 2,
        "clip_value": None, "lambda_br": 1.0, "lambda_br_act": 1.0, "warmup_epochs": 30, "qat_epochs": 100,
        "freeze_alpha": False, "freeze_weight_alpha": False, "freeze_act_alpha": False, "br_backprop_to_alpha": False,
        "br_backprop_to_alpha_act": False, "lr": 0.01, "tensorboard": False, "model": "resnet18",
    }  # fmt: skip
    assert vars(qat_run).items() >= expected.items()
    flags = ["--output-dir", "x", "--num-bits", "4", "--num-bits-act", "8", "--clip-value", "None"]
    flags += ["--br-backprop-to-alpha", "--br-backprop-to-alpha-act", "scaled"]
    both, _ = options.parse(options.qat_parser(), flags)
    assert (both.num_bits_weight, both.num_bits_act, both.clip_value) == (4, 4, None)
    assert (both.br_backprop_to_alpha, both.br_backprop_to_alpha_act) == (True, "scaled")
    half, _ = options.parse(options.qat_parser(), ["--output-dir", "x", "--br-backprop-to-alpha", "0.5"])
    assert half.br_backprop_to_alpha == 0.5
    for bad in ("some", "1.5", "nan"):
        with pytest.raises(SystemExit):
            options.parse(options.qat_parser(), ["--output-dir", "x", "--br-backprop-to-alpha", bad])


def test_quick_changes_defaults_and_yields_to_flags():
    quick, _ = options.parse(options.qat_parser(), ["--quick", "--qat-epochs", "7"])
    assert (quick.model, quick.qat_epochs, str(quick.output_dir)) == ("resnet20", 7, "runs/quick")


@pytest.mark.parametrize(("name", "parameters", "layers"), [("resnet18", 11_173_962, 21), ("resnet20", 269_722, 20)])
def test_models_have_their_published_size(name, parameters, layers):
    model = models.MODELS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == layers
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_resnet18_has_torchvision_s_names():
    try:
        from torchvision.models import resnet18
    except Exception as error:  # not installed, or built for another torch
        pytest.skip(f"torchvision cannot be imported: {error}")
    theirs, ours = resnet18(num_classes=10).state_dict(), models.resnet18().state_dict()
    assert list(theirs) == list(ours)
    assert [n for n in ours if theirs[n].shape != ours[n].shape] == ["conv1.weight"]
