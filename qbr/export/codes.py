"""The integers behind a quantized tensor: codes from weights and back, and the width that they need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbr.arguments import usable
from qbr.calls import joined
from qbr.layers import renormalised
from qbr.quantizers import LSQQuantizer
from qbr.spec import QuantSpec


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter and its quantizer, by their names in the state_dict (the first ones, where weights are tied)."""

    name: str
    quantizer_name: str
    module: nn.Module
    weight: Tensor
    quantizer: LSQQuantizer

    @property
    def codes(self) -> Tensor:
        """int16, the weight's shape. An Embedding's rows are within max_norm first, as its forward sees them.

        Raises:
            ValueError: for a weight or step that is not finite, or a step that is not positive.
        """
        weight = renormalised(self.module, self.weight.detach().cpu())
        return codes_of(self.name, weight, self.quantizer.alpha.detach().cpu(), self.quantizer.spec)


def stored_weights(model: nn.Module) -> list[QuantizedWeight]:
    """All that a state_dict of the model holds, each once; ``<parameter>_quantizer`` is that of ``<parameter>``.

    Raises:
        ValueError: for an Embedding with ``max_norm`` whose weight another layer uses, too: its rows are renormalised
            as they are looked up, so that what the other layer sees depends on the data before.
    """
    found: dict[tuple[int, int], QuantizedWeight] = {}
    for prefix, module in model.named_modules():
        for attribute, quantizer in module._modules.items():
            parameter = attribute.removesuffix("_quantizer")
            weight = module._parameters.get(parameter)
            if isinstance(quantizer, LSQQuantizer) and quantizer.kind == "weight" and weight is not None:
                stem = f"{prefix}." if prefix else ""
                each = QuantizedWeight(stem + parameter, stem + attribute, module, weight, quantizer)
                first = found.setdefault((id(weight), id(quantizer)), each)
                if first is not each and any(getattr(m, "max_norm", None) is not None for m in (first.module, module)):
                    raise ValueError(f"{first.name} is tied and has max_norm: what it holds depends on the data "
                                     "before; set the Embedding's max_norm to None")  # fmt: skip
    return list(found.values())


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError for a quantized weight that is no parameter: its codes would not be stored."""
    for prefix, module in model.named_modules():
        for attribute, quantizer in module._modules.items():
            name = attribute.removesuffix("_quantizer")
            if isinstance(quantizer, LSQQuantizer) and quantizer.kind == "weight" and name not in module._parameters:
                raise ValueError(f"{joined(prefix, name)} is computed by a hook or a parametrization: torch.nn.utils."
                                 "prune.remove, parametrize.remove_parametrizations and the like come first")


def check_steps(name: str, alpha: Tensor) -> None:
    """Raise ValueError unless all step sizes are positive and finite."""
    fine = usable(alpha)
    if not bool(fine.all()):
        raise ValueError(f"{name} has a step size of {alpha[~fine][0].item()}: expected positive, finite step sizes")


def check_range(name: str, spec: QuantSpec) -> None:
    """Raise ValueError unless the codes are int16, as they are kept here; those that ``bits`` gives always are."""
    if spec.qn < -(1 << 15) or spec.qp >= 1 << 15:
        raise ValueError(f"{name} has the codes {spec.qn}..{spec.qp}: expected them within -32768..32767")


def codes_of(name: str, weight: Tensor, alpha: Tensor, spec: QuantSpec) -> Tensor:
    """The integer codes of a weight, int16, to the bit those of qbr's kernels: round(clamp(x / alpha, qn, qp)).

    Raises:
        ValueError: naming the tensor, where it or its steps cannot be quantized.
    """
    check_steps(name, alpha)
    check_range(name, spec)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name} has values that are not finite: nothing to export")
    v = (weight if weight.dtype == torch.float64 else weight.float()) / alpha.reshape(spec.step_shape(weight.dim()))
    codes = torch.where(v >= 0, 1, -1) if spec.binary else v.clamp(spec.qn, spec.qp).round()
    return codes.to(torch.int16)


def values_of(codes: Tensor, alpha: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """codes * alpha in dtype, to the bit what the quantizer puts out (float32 arithmetic; float64 for float64)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(compute) * alpha.to(compute).reshape(spec.step_shape(codes.dim()))).to(dtype)


def width(spec: QuantSpec) -> int:
    """The bits that one of the range's codes needs: 2 for ternary, 3 for -4..3, 1 for binary."""
    return max(1, (len(spec.codes) - 1).bit_length())


def to_unsigned(codes: Tensor, spec: QuantSpec) -> Tensor:
    """uint8, from 0: code - qn; binary's -1 and 1 are 0 and 1."""
    return ((codes + 1) // 2 if spec.binary else codes - spec.qn).to(torch.uint8)


def from_unsigned(values: Tensor, spec: QuantSpec) -> Tensor:
    """The codes that ``to_unsigned`` was given.

    Raises:
        ValueError: for a value beyond the range.
    """
    if values.numel() and int(values.max()) >= len(spec.codes):
        raise ValueError(f"a code of {int(values.max()) + spec.qn}: beyond {spec.qn}..{spec.qp}")
    values = values.to(torch.int16)
    return values * 2 - 1 if spec.binary else values + spec.qn
