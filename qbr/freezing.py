"""Freeze: when the alphas of one side of a model are held fixed and released; and the record that convergence needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbr import grouping
from qbr.arguments import check_count
from qbr.spec import is_number

_MOMENTS = ("epoch", "step", "tolerance")


@dataclass(frozen=True)
class Freeze:
    """When alphas are held fixed, and when they are released. ``Freeze()``: from the end of warm-up on, for good.

    At most one of epoch, step and tolerance, and at most one of the release arguments:

        Freeze(epoch=40, release_epoch=80)
        Freeze(step=12_000)
        Freeze(tolerance=1e-3, window=3, release_tolerance=1e-2)

    Args:
        epoch, release_epoch: from this epoch on, counted from 1; in warm-up, too.
        step, release_step: from this step on, counted from 1 over all epochs; needs AlphaControl.begin_step.
        tolerance: at the first epoch after warm-up before which no alpha of the side has changed, over ``window``
            epochs, by more than this fraction of itself.
        release_tolerance: at the first epoch before which, the alphas frozen all along, the mean distance of the
            model's quantized weights to their levels, in units of alpha, has changed over ``window`` epochs by no more
            than this fraction: the weights have settled.
        window: how many epochs a convergence looks back, 1 or more.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    epoch: int | None = None
    step: int | None = None
    tolerance: float | None = None
    release_epoch: int | None = None
    release_step: int | None = None
    release_tolerance: float | None = None
    window: int = 1

    def __post_init__(self) -> None:
        for prefix in ("", "release_"):
            named = [prefix + name for name in _MOMENTS if getattr(self, prefix + name) is not None]
            if len(named) > 1:
                given = ", ".join(f"{name}={getattr(self, name)}" for name in named)
                raise ValueError(f"{given}: name one of {', '.join(prefix + name for name in _MOMENTS)}")
            for name in (prefix + "epoch", prefix + "step"):
                if getattr(self, name) is not None:
                    check_count(getattr(self, name), name, least=1)
            tolerance = _tolerance(getattr(self, prefix + "tolerance"), prefix + "tolerance")
            object.__setattr__(self, prefix + "tolerance", tolerance)
        check_count(self.window, "window", least=1)
        for name in ("epoch", "step"):
            begin, end = getattr(self, name), getattr(self, f"release_{name}")
            if begin is not None and end is not None and end <= begin:
                raise ValueError(f"release_{name}={end}: expected more than {name}={begin}")

    @property
    def by_step(self) -> bool:
        """Whether it needs to know the step."""
        return self.step is not None or self.release_step is not None

    @property
    def by_epoch(self) -> bool:
        """Whether it needs to know the epoch, be it to look at the model when one begins."""
        moments = (self.epoch, self.tolerance, self.release_epoch, self.release_tolerance)
        return any(moment is not None for moment in moments)


torch.serialization.add_safe_globals([Freeze])  # plain values: checkpoints that keep their arguments load


class Record:
    """What one side of a model has to remember to decide whether its alphas are frozen.

    ``look`` is the only place that reads the device, where a tolerance asks for it: once an epoch.

    Args:
        plan: None to never freeze.
    """

    def __init__(self, plan: Freeze | None) -> None:
        self.plan = plan
        self.frozen_at: int | None = None  # the epochs that a tolerance has decided on
        self.released_at: int | None = None
        self._alphas: dict[int, Tensor] = {}  # as they were when an epoch began
        self._distances: dict[int, Tensor] = {}

    def frozen(self, epoch: int, step: int, after_warmup: bool) -> bool:
        """Whether the alphas are frozen in this epoch and step."""
        plan = self.plan
        if plan is None:
            return False
        begun = _reached(plan.epoch, plan.step, plan.tolerance, self.frozen_at, epoch, step)
        over = _reached(plan.release_epoch, plan.release_step, plan.release_tolerance, self.released_at, epoch, step)
        return (after_warmup if begun is None else begun) and not over

    def look(self, epoch: int, step: int, after_warmup: bool, alphas: Callable, distance: Callable) -> None:
        """Note what a tolerance compares, as this epoch begins, and decide by it.

        Args:
            epoch, step, after_warmup: as in frozen().
            alphas: gives the side's alphas as one tensor.
            distance: gives the mean distance of the weights to their levels, a scalar tensor.
        """
        plan = self.plan
        if plan is None:
            return
        self._go_back_to(epoch)
        if plan.tolerance is not None and self.frozen_at is None:
            self._alphas.setdefault(epoch, alphas())
            if after_warmup and self._settled(self._alphas, epoch, plan.tolerance):
                self.frozen_at, self._alphas = epoch, {}
        if plan.release_tolerance is not None and self.released_at is None:
            if not self.frozen(epoch, step, after_warmup):
                self._distances = {}
                return
            self._distances.setdefault(epoch, distance())
            if self._settled(self._distances, epoch, plan.release_tolerance):
                self.released_at, self._distances = epoch, {}

    def _settled(self, history: dict[int, Tensor], epoch: int, tolerance: float) -> bool:
        """Whether nothing has changed by more than tolerance since the epoch that is ``window`` ago; one read."""
        for old in [e for e in history if e < epoch - self.plan.window]:
            del history[old]
        then, now = history.get(epoch - self.plan.window), history[epoch]
        if then is None or then.shape != now.shape:  # of the quantizers that there were then
            return False
        return bool(((now - then.to(now.device)).abs() <= tolerance * then.to(now.device)).all())

    def forget_alphas(self) -> None:
        """Begin anew to compare alphas: there are others now."""
        self._alphas = {}

    def _go_back_to(self, epoch: int) -> None:
        """Forget what later epochs left: they are to come again."""
        for history in (self._alphas, self._distances):
            for later in [e for e in history if e > epoch]:
                del history[later]
        if self.frozen_at is not None and epoch < self.frozen_at:
            self.frozen_at = None
        if self.released_at is not None and epoch < self.released_at:
            self.released_at = None

    def state_dict(self) -> dict:
        """Plain values; reads the device where a tolerance keeps tensors."""
        return {
            "frozen_at": self.frozen_at,
            "released_at": self.released_at,
            "alphas": {epoch: tensor.tolist() for epoch, tensor in self._alphas.items()},
            "distances": {epoch: tensor.tolist() for epoch, tensor in self._distances.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        self.frozen_at, self.released_at = state["frozen_at"], state["released_at"]
        self._alphas = {int(epoch): torch.tensor(values) for epoch, values in state["alphas"].items()}
        self._distances = {int(epoch): torch.tensor(value) for epoch, value in state["distances"].items()}


@torch.no_grad()
def mean_distance(model: nn.Module) -> Tensor:
    """Mean |w - b * alpha| / alpha over all quantized weights of model: a scalar tensor, from one pass over them. Of a
    layer with a step per channel the mean distance in units of its steps' mean."""
    found = list(grouping.weight_bins(model).values())
    distances = [(bins.table[-2] / bins.alpha.mean()).to(found[0].alpha.device) for bins in found]
    return (torch.stack(distances).sum() / max(sum(bins.numel for bins in found), 1)).to(torch.float32)


def _reached(at_epoch, at_step, tolerance, decided, epoch: int, step: int) -> bool | None:
    """Whether a moment has come; None if none is named."""
    if at_epoch is not None:
        return epoch >= at_epoch
    if at_step is not None:
        return step >= at_step
    if tolerance is not None:
        return decided is not None and epoch >= decided
    return None


def _tolerance(value: float | None, name: str) -> float | None:
    """value as a plain number, or None."""
    if value is None:
        return None
    if not is_number(value):
        raise TypeError(f"{name}={value!r}: expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value}: expected a positive, finite number")
    return float(value)
