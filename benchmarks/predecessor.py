"""The predecessor's formulas in eager PyTorch, written anew: the peer that the drop-in is measured against.

One mask, gather and reduction per level, the straight-through round, and a host read of every figure, as a
pure-Python regularizer does it. Facts of its interface: docs/drop_in.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def _grad_scale(x: Tensor, scale: float) -> Tensor:
    return (x - x * scale).detach() + x * scale


def fake_quantize(x: Tensor, alpha: Tensor, qn: int, qp: int) -> Tensor:
    step = _grad_scale(alpha, 1.0 / math.sqrt(x.numel() * max(qp, 1)))
    return _round_pass((x / step).clamp(qn, qp)) * step


def bin_loss(x: Tensor, alpha: Tensor, qn: int, qp: int, backprop_to_alpha: bool = False):
    """(loss, info): mse and variance bin by bin, then every figure read on the host."""
    step = alpha if backprop_to_alpha else alpha.detach()
    codes = (x / step).clamp(qn, qp).round().detach()
    mse = x.new_zeros(())
    var = x.new_zeros(())
    used = 0
    for code in range(qn, qp + 1):
        mask = codes == code
        if mask.sum().item() == 0:
            continue
        values = x[mask]
        mse = mse + (values.mean() - code * step).square().sum()
        if values.numel() > 1:
            var = var + values.var(unbiased=False)
        used += 1
    with torch.no_grad():
        distance = (x - codes * step).abs()
        mean_distance = distance.mean().item()
        info = {
            "bins_used": used,
            "br_mse_loss": mse.item(),
            "br_var_loss": var.item(),
            "quantization_mse": distance.square().mean().item(),
            "mean_distance": mean_distance,
            "effectiveness": min(max(100 * (1 - mean_distance / (step.item() / 2)), 0.0), 100.0),
            "pct_near_levels": (distance < 0.01 * step).float().mean().item() * 100,
        }
    return mse + var, info


class Quantizer(nn.Module):
    def __init__(self, qn: int, qp: int, alpha: float):
        super().__init__()
        self.qn, self.qp = qn, qp
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.register_buffer("init_state", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.init_state == 0:
            self.alpha.data.fill_(2 * x.detach().abs().mean().item() / math.sqrt(max(self.qp, 1)))
            self.init_state.fill_(1)
        return fake_quantize(x, self.alpha, self.qn, self.qp)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


class ReLU(nn.Module):
    """ReLU, then quantization; keeps the activation of every call (the predecessor keeps the last one's)."""

    def __init__(self, qp: int):
        super().__init__()
        self.quantizer = Quantizer(0, qp, 4.0 / qp)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.training:
            self.kept.append(x)
        return self.quantizer(x)


def prepare(model: nn.Module, weight_bits: int, act_bits: int) -> nn.Module:
    """Replace convolutions, linear layers and ReLUs in place; steps are made where the weights are."""
    half = 1 << (weight_bits - 1)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                child.__class__ = Conv2d if isinstance(child, nn.Conv2d) else Linear
                child.weight_quantizer = Quantizer(-half, half - 1, 0.1 / half)
            elif isinstance(child, nn.ReLU):
                setattr(module, name, ReLU((1 << act_bits) - 1))
    return model.to(next(model.parameters()).device)


def model_bin_loss(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(weights, activations): the sum of bin losses over all quantized weights, and over all kept activations."""
    weights = activations = torch.zeros((), device=next(model.parameters()).device)
    for module in model.modules():
        if hasattr(module, "weight_quantizer"):
            q = module.weight_quantizer
            weights = weights + bin_loss(module.weight, q.alpha, q.qn, q.qp)[0]
        elif isinstance(module, ReLU):
            for kept in module.kept:
                activations = activations + bin_loss(kept, module.quantizer.alpha, 0, module.quantizer.qp)[0]
            module.kept.clear()
    return weights, activations
