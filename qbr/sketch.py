"""What calibration keeps of the tensors it has seen, and the step sizes that follow: sums that add up over batches and
over ranks, on the device.

A Sketch is a histogram with 512 bins for each octave of |x| between 2^-32 and 2^32: no range is needed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qbr.spec import QuantSpec

_PER_OCTAVE, _OCTAVES = 512, 64  # a bin is a third of a step wide at the largest of 256 levels
_BINS = _PER_OCTAVE * _OCTAVES
# Of the step that reaches the largest |x|, and around the best of those.
_COARSE = 2.0 ** torch.linspace(-12, 0.25, 99, dtype=torch.float64, device="cpu")
_FINE = 2.0 ** torch.linspace(-0.125, 0.125, 33, dtype=torch.float64, device="cpu")


class Mean:
    """Sum of |x| and count for each step of a quantizer.

    Attributes:
        total, count: [C] float64.
    """

    def __init__(self, alpha: Tensor, axis: int | None) -> None:
        self.axis = axis
        self.total = torch.zeros(alpha.shape, dtype=torch.float64, device=alpha.device)
        self.count = torch.zeros_like(self.total)

    def add(self, x: Tensor) -> None:
        count = x.numel() // self.total.numel()
        if count == 0:
            return
        self.total += mean_per_step(x.abs(), self.axis).double() * count
        self.count += count

    def reduce(self, sum_) -> None:
        self.total, self.count = sum_(self.total), sum_(self.count)


class Histogram(NamedTuple):
    """Count, sum and sum of squares of the values in each of n bins, for C tensors: [C, n] float64."""

    count: Tensor
    total: Tensor
    square: Tensor


def elements(rows: Tensor) -> Histogram:
    """A tensor [C, n] that is at hand, every element a bin of its own; what is not finite counts nowhere."""
    usable = torch.isfinite(rows)
    total = torch.where(usable, rows, 0).double()
    return Histogram(usable.double(), total, total.square())


class Sketch:
    """A histogram of all values of a tensor: positive ones by size, negative ones by size, and zeros.

    Attributes:
        table: [3, 2 * bins + 1] float64: count, sum and sum of squares.
    """

    def __init__(self, device) -> None:
        self.table = torch.zeros(3, 2 * _BINS + 1, dtype=torch.float64, device=device)

    @property
    def count(self) -> Tensor:
        return self.table[0]

    def add(self, x: Tensor) -> None:
        """x may have any shape; what is not finite counts nowhere."""
        for part in x.reshape(-1).split(1 << 20):  # what stays in cache, and bounds the memory
            self._add(part.float())

    def _add(self, x: Tensor) -> None:
        usable = torch.isfinite(x)
        octave = (torch.log2(x.abs()) + _OCTAVES / 2).nan_to_num(0, 0, 0)
        index = (octave * _PER_OCTAVE).long().clamp_(0, _BINS - 1) + _BINS * (x < 0)
        index = torch.where(usable & (x != 0), index, 2 * _BINS)
        value = torch.where(usable, x, 0).double()
        for row, values in zip(self.table, (usable.double(), value, value.square())):
            if x.is_cuda:  # index_add_ adds there in an order of its own each time
                row.index_put_((index,), values, accumulate=True)
            else:
                row.index_add_(0, index, values)

    def reduce(self, sum_) -> None:
        self.table = sum_(self.table)

    def bins(self, merged: int = 1) -> Histogram:
        """The bins that have values, [1, n], ``merged`` neighbours (1, 2, 4, ... 512) as one."""
        table = torch.cat([self.table[:, :-1].reshape(3, -1, merged).sum(2), self.table[:, -1:]], 1)
        return Histogram(*table[:, table[0] > 0][:, None])


def mean_per_step(x: Tensor, axis: int | None) -> Tensor:
    """The mean of the elements that share a step, [1] or [C] float32; x has one element at least."""
    if axis is not None and x.dim() == 1:
        return x.to(torch.float32)  # mean() over no dimension would be that over all
    others = None if axis is None else [i for i in range(x.dim()) if i != axis % x.dim()]
    return x.mean(others, dtype=torch.float32).reshape(-1)


def lsq_step(mean: Tensor, spec: QuantSpec) -> Tensor:
    """LSQ's first step (section 2.1), 2 * mean|x| / sqrt(max(qp, 1)); binary: mean|x|, its least-squares step."""
    return mean if spec.binary else mean * (2.0 / math.sqrt(max(spec.qp, 1)))


def mean_step(statistics: Mean, spec: QuantSpec) -> Tensor:
    """lsq_step() of all that was seen, [C]; NaN where that is nothing."""
    return lsq_step((statistics.total / statistics.count).float(), spec)


def mse_step(bins: Histogram, spec: QuantSpec) -> Tensor:
    """The step with the least sum of (x - xhat)^2, [C], within 0.6 %. NaN where all is 0 or nothing was seen."""
    if not bins.count.numel():
        return bins.count.new_full(bins.count.shape[:1], math.nan)
    value = bins.total / bins.count.clamp(min=1)

    def error(alpha: Tensor) -> Tensor:  # all of a bin take the code of the bin's mean
        level = (value / alpha).round_().clamp_(spec.qn, spec.qp) * alpha
        return (bins.square - 2 * level * bins.total + level.square() * bins.count).sum(1)

    return _search(value.abs().amax(1), spec, error)


def mse_step_of(rows: Tensor, spec: QuantSpec) -> Tensor:
    """mse_step of a tensor [C, n] that is at hand: of its elements, in float32; what is not finite counts nowhere."""
    x = torch.where(torch.isfinite(rows), rows, 0).float()
    largest = x.abs().amax(1) if x.numel() else x.new_zeros(len(x))
    x = x / torch.where(largest > 0, largest, 1)[:, None]  # so that no square is too small for float32

    def error(alpha: Tensor) -> Tensor:
        return (x / alpha).round_().clamp_(spec.qn, spec.qp).mul_(alpha).sub_(x).square_().sum(1)

    return _search((largest > 0).float(), spec, error) * largest


def _search(largest: Tensor, spec: QuantSpec, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The step with the least error, [C]; NaN where the largest |x| is 0."""
    best = largest / max(spec.qp, 1)  # beyond it, no code but the outermost gets closer
    for factors in (_COARSE, _FINE):
        candidates = best[:, None] * factors.to(best)
        errors = torch.stack([error(alpha[:, None]) for alpha in candidates.unbind(1)], 1)
        best = candidates.gather(1, errors.argmin(1, keepdim=True))[:, 0]
    return torch.where(largest > 0, best, math.nan)


def quantile_step(bins: Histogram, spec: QuantSpec, quantile: float) -> Tensor:
    """The step that puts the quantile of |x| on the outermost level, [C]. NaN where nothing was seen."""
    if not bins.count.numel():
        return bins.count.new_full(bins.count.shape[:1], math.nan)
    size, order = (bins.total / bins.count.clamp(min=1)).abs().sort(1)
    share = bins.count.gather(1, order).cumsum(1)
    first = (share >= quantile * share[:, -1:]).double().argmax(1, keepdim=True)
    return size.gather(1, first)[:, 0] / max(spec.qp, -spec.qn)
