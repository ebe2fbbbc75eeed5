"""Figures from bin sums: the formulas of qbr/kernels/README.md, read from the device once for many tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qbr.functional import Bins
from qbr.spec import QuantSpec


class BinMetrics(NamedTuple):
    """The figures of one tensor, plain numbers.

    Attributes:
        loss, mse, var: L_BR and its two parts, mse + var = loss to rounding, in units of x squared; also where
            dampening is what is trained.
        quantization_mse: mean of d^2 over all elements, d the distance to an element's level.
        mean_distance: mean |d|.
        effectiveness: 100 * (1 - mean |d| / (alpha / 2)), between 0 and 100; a uniform spread reads 50.
            With a step per channel, alpha is their mean.
        pct_near_levels: percentage of elements with |d| < 0.01 * alpha.
        bins_used: how many codes occur.
        levels, counts, means, stds: one entry per code, ascending; means and stds are of x itself (levels: code times
            alpha), stds unbiased, 0.0 for fewer than two elements; the mean of an empty bin is 0.0. They come of S_k
            and Q_k: of a bin narrower than a thousandth of its distance from the level, var and stds are rounding.
        numel: elements of the tensor.
    """

    loss: float
    mse: float
    var: float
    quantization_mse: float
    mean_distance: float
    effectiveness: float
    pct_near_levels: float
    bins_used: int
    levels: list[float]
    counts: list[int]
    means: list[float]
    stds: list[float]
    numel: int


def mse_and_var(bins: Bins) -> tuple[Tensor, Tensor]:
    """(sum of mse_k, sum of var_k) over the occupied bins: scalar float32 tensors on the device, detached."""
    n = bins.counts.clamp(min=1)
    mse = (bins.sums / n).square()  # an empty bin's sums are 0, and so are both of its terms
    var = torch.where(n == 1, 0.0, bins.squares / n - mse).clamp(min=0)
    return mse.sum().to(torch.float32), var.sum().to(torch.float32)


def read(tables: Sequence[Bins]) -> list[BinMetrics]:
    """The metrics of many tensors, in one transfer from the device (one more for each further device)."""
    values = iter(to_host([t for bins in tables for t in (bins.table, bins.alpha)]))
    return [from_values(next(values), next(values), bins.spec) for bins in tables]


def to_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of many tensors, each flat, in one transfer from the device (one more for each further device)."""
    if not tensors:
        return []
    device = tensors[0].device
    wait = device.type == "cpu"  # else the copy may be read before it is there
    rows = [t.detach().reshape(-1).to(device, torch.float64, non_blocking=not wait) for t in tensors]
    flat = torch.cat(rows).tolist()
    ends = list(itertools.accumulate(t.numel() for t in tensors))
    return [flat[end - t.numel() : end] for t, end in zip(tensors, ends)]


def from_values(table: list[float], alphas: list[float], spec: QuantSpec) -> BinMetrics:
    """The figures of a bin table [3 * L + 2] and its steps, [1] or [C], both on the host. The table may be the sum of
    several of one quantizer; ``numel`` and all means are then over all that went into them."""
    slots = spec.num_slots
    numel = int(sum(table[:slots]))
    alpha = sum(alphas) / len(alphas)
    loss = mse = var = squares = 0.0
    bins_used = 0
    levels, counts, means, stds = [], [], [], []
    for code in spec.codes:
        slot = code - spec.qn
        n, s, q = table[slot], table[slots + slot], table[2 * slots + slot]
        level = code * alpha
        levels.append(level)
        counts.append(int(n))
        means.append(level + s / n if n else 0.0)
        stds.append(math.sqrt(_at_least_0((q - s * s / n) / (n - 1))) if n > 1 else 0.0)
        if n:
            bins_used += 1
            mse_k = (s / n) ** 2
            mse += mse_k
            var += _at_least_0(q / n - mse_k) if n > 1 else 0.0
            loss += q / n
            squares += q
    distance, near = table[-2] / max(numel, 1), table[-1]
    effectiveness = 100.0 * (1.0 - distance / (alpha / 2)) if numel else 0.0
    return BinMetrics(
        loss=loss,
        mse=mse,
        var=var,
        quantization_mse=squares / max(numel, 1),
        mean_distance=distance,
        effectiveness=effectiveness if math.isnan(effectiveness) else min(max(effectiveness, 0.0), 100.0),
        pct_near_levels=100.0 * near / max(numel, 1),
        bins_used=bins_used,
        levels=levels,
        counts=counts,
        means=means,
        stds=stds,
        numel=numel,
    )


def _at_least_0(value: float) -> float:
    """value without the small negative that rounding leaves; a NaN stays one."""
    return 0.0 if value < 0 else value


class LazyInfo(dict):
    """A dict whose keys are known and whose values are computed, all at once, when the first one is read.

    Keys, length and ``in`` cost nothing; any value costs the one read of ``load``. From then on it is a plain dict.
    """

    def __init__(self, keys: Sequence[str], load: Callable[[], dict]) -> None:
        super().__init__(dict.fromkeys(keys))
        self._load: Callable[[], dict] | None = load

    def _read(self) -> None:
        if self._load is not None:
            super().update(self._load())
            self._load = None

    def __getitem__(self, key):
        self._read()
        return super().__getitem__(key)

    def __ior__(self, other):
        self._read()
        return super().__ior__(other)

    def __setitem__(self, key, value):
        self._read()
        super().__setitem__(key, value)

    def __delitem__(self, key):
        self._read()
        super().__delitem__(key)

    def __iter__(self):  # its own, so that dict(info) and {**info} go through keys() and []
        return super().__iter__()

    def __eq__(self, other):
        self._read()
        return super().__eq__(other)

    def __ne__(self, other):
        return not self == other

    def __or__(self, other):
        return dict(self) | other

    def __ror__(self, other):
        return other | dict(self)

    def __repr__(self) -> str:
        self._read()
        return super().__repr__()

    def __reduce__(self):
        return dict, (dict(self),)

    def get(self, key, default=None):
        self._read()
        return super().get(key, default)

    def items(self):
        self._read()
        return super().items()

    def values(self):
        self._read()
        return super().values()

    def copy(self):
        return dict(self)

    def pop(self, *args):
        self._read()
        return super().pop(*args)

    def popitem(self):
        self._read()
        return super().popitem()

    def setdefault(self, *args):
        self._read()
        return super().setdefault(*args)

    def update(self, *args, **kwargs):
        self._read()
        super().update(*args, **kwargs)
