#!/usr/bin/env python3
"""What the module layer costs over the functional calls it makes, in microseconds a layer, on tensors so small that
nothing else counts.

usage: overhead.py [--device cpu|cuda] [--repeats 30] [--output FILE]

"module" is a layer's quantizer (or QuantizedClippedReLU) as a training step calls it, "raw" the call of qbr.functional
with the same tensors, step and backend. "model" is a whole forward of 16 linear layers and 16 ReLUs, root hooks and
grouped weights included, against the same calls written out; its figures are per quantized tensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure
import torch
from torch import nn
from torch.nn import functional as F

import qbr
from qbr import functional

CALLS = 200  # in a row for one timing
LAYERS = 16
SIDE = 4  # 16 elements


def _loop(run, calls: int):
    def loop():
        for _ in range(calls):
            run()

    return loop


def _backward(run):
    def step():
        loss = run()
        loss.sum().backward()

    return step


def _weight(device: str, collecting: bool) -> dict:
    layer = qbr.QuantizedConv2d(SIDE, SIDE, 1, bias=False, device=device)
    quantizer, weight = layer.weight_quantizer, layer.weight
    quantizer.collecting = collecting
    quantizer(weight)
    alpha, spec = quantizer.alpha, quantizer.spec
    raw = functional.fake_quantize_with_bin_loss if collecting else functional.fake_quantize
    return {"raw": lambda: raw(weight, alpha, spec), "module": lambda: quantizer(weight)}


def _relu(device: str, collecting: bool) -> dict:
    layer = qbr.QuantizedClippedReLU(1.0).to(device)
    layer.quantizer.collecting = collecting
    x = torch.rand(SIDE, SIDE, device=device, requires_grad=True)
    layer(x)
    alpha, spec = layer.quantizer.alpha, layer.quantizer.spec
    raw = functional.fake_quantize_with_bin_loss if collecting else functional.fake_quantize

    def module():
        y = layer(x)
        layer.quantizer._retained.clear()  # as the next forward of the model does
        return y

    return {"raw": lambda: raw(x, alpha, spec, relu=True, clip=1.0), "module": module}


def _model(device: str, collecting: bool) -> dict:
    layers = [each for _ in range(LAYERS) for each in (nn.Linear(SIDE, SIDE, bias=False), nn.ReLU())]
    model = qbr.prepare(nn.Sequential(*layers).to(device), qbr.QATConfig(collect_bin_loss=collecting))
    x = torch.rand(SIDE, SIDE, device=device)
    model(x)
    weights = [layer.weight for layer in model[::2]]
    alphas = [layer.weight_quantizer.alpha for layer in model[::2]]
    steps = [layer.quantizer.alpha for layer in model[1::2]]
    spec, unsigned = model[0].weight_quantizer.spec, model[1].quantizer.spec
    many = functional.foreach_fake_quantize_with_bin_loss if collecting else functional.foreach_fake_quantize
    one = functional.fake_quantize_with_bin_loss if collecting else functional.fake_quantize

    def raw():
        y = x
        for made, step in zip(many(weights, alphas, spec), steps):
            y = one(F.linear(y, made.xhat if collecting else made), step, unsigned, relu=True)
            y = y.xhat if collecting else y
        return y

    return {"raw": raw, "module": lambda: model(x)}


def rows(device: str, repeats: int) -> list[dict]:
    found = []
    for part, make, tensors in (("weight", _weight, 1), ("relu", _relu, 1), ("model", _model, 2 * LAYERS)):
        for collecting in (False, True):
            for backward in (False, True):
                runs = {
                    name: (lambda run=run: (lambda y: y if isinstance(y, torch.Tensor) else y.xhat)(run()))
                    for name, run in make(device, collecting).items()
                }
                assert torch.equal(runs["raw"](), runs["module"]()), f"{part}: the module's result is not the call's"
                runs = {name: _backward(run) if backward else run for name, run in runs.items()}
                calls = max(CALLS // tensors, 1)
                times = measure.alternate(
                    {name: _loop(run, calls) for name, run in runs.items()}, device, repeats, warm_up=2
                )
                us = {name: each["median_s"] / calls / tensors * 1e6 for name, each in times.items()}
                row = {
                    "part": part, "bin_loss": collecting, "backward": backward, "device": device,
                    "raw_us": us["raw"], "module_us": us["module"], "overhead_us": us["module"] - us["raw"],
                    "overhead_ratio": times["module"]["ratio"], "calls": calls, "tensors": tensors, "times": times,
                }  # fmt: skip
                found.append(row)
                what = f"{part}{', with bin loss' if collecting else ''}, forward{' + backward' if backward else ''}"
                print(f"{what}: raw {us['raw']:.1f} us, module {us['module']:.1f} us, "
                      f"overhead {row['overhead_us']:.1f} us a tensor", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/overhead-DEVICE.json")
    args = parser.parse_args()
    output = args.output or Path(__file__).parent / "results" / f"overhead-{args.device}.json"
    measure.save(output, args.device, rows(args.device, args.repeats))


if __name__ == "__main__":
    main()
