"""What a search draws from: ranges and lists of values for flags, read from text, drawn at random or as a grid."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from .files import UserError
from .options import flag

# Where --space is not given: decades around the defaults of cifar10_qat_br.py (lr for a batch of 128).
DEFAULT = (
    "lr=log:0.003:0.1:3",
    "lambda_br=log:0.1:100:4",
    "lambda_br_act=log:0.001:1:4",
    "weight_decay=log:0.00005:0.001:3",
    "warmup_share=lin:0.1:0.5:3",
)
WARMUP_SHARE = "warmup_share"  # of --qat-epochs: --warmup-epochs
NAMES = (
    "lr", "lr_alpha", "lr_alpha_act", "lr_alpha_first_last", "lr_warmup", "lambda_br", "lambda_br_act", "weight_decay",
    "momentum", "label_smoothing", "clip_value", WARMUP_SHARE,
)  # fmt: skip
FORM = (
    "NAME=V1,V2,... or NAME=lin:LOW:HIGH[:POINTS] or NAME=log:LOW:HIGH[:POINTS] (POINTS for a grid), NAME one of "
    + ", ".join(NAMES)
)


@dataclass(frozen=True)
class Axis:
    """One hyper-parameter: a list of values, or a range that is drawn from evenly ("lin") or evenly in its logarithm.

    Args:
        name: of NAMES.
        values: the list, or (low, high) of a range.
        scale: "list", "lin" or "log".
        points: of a range, how many a grid takes; 0 for a range that only random draws can use.
    """

    name: str
    values: tuple[float, ...]
    scale: str = "list"
    points: int = 0

    @classmethod
    def read(cls, text: str) -> Axis:
        """An axis from what --space was given.

        Raises:
            UserError: for a text of another form, an unknown name, or an empty range.
        """
        name, _, rest = text.partition("=")
        name, parts = name.strip().replace("-", "_"), rest.split(":")
        try:
            if name not in NAMES or not rest:
                raise ValueError
            if parts[0] in ("lin", "log"):
                scale, low, high, *points = parts
                axis = cls(name, (float(low), float(high)), scale, int(points[0]) if points else 0)
                ordered = axis.values[0] < axis.values[1] and (scale == "lin" or axis.values[0] > 0)
                if len(points) > 1 or not ordered or axis.points < 0 or axis.points == 1:
                    raise ValueError
            else:
                axis = cls(name, tuple(float(value) for value in rest.split(",")))
            if not all(map(math.isfinite, axis.values)):
                raise ValueError
        except ValueError as error:
            raise UserError(f"--space {text}: expected {FORM}") from error
        return axis

    def draw(self, source: random.Random) -> float:
        """One value at random."""
        if self.scale == "list":
            return source.choice(self.values)
        return self._at(source.random())

    def grid(self) -> list[float]:
        """The values that a grid takes.

        Raises:
            UserError: for a range without points.
        """
        if self.scale == "list":
            return list(self.values)
        if not self.points:
            raise UserError(f"--space {self.name}: a grid needs :POINTS at the end of a range, 2 or more")
        return [self._at(i / (self.points - 1)) for i in range(self.points)]

    def _at(self, share: float) -> float:
        low, high = self.values
        if self.scale == "log":
            value = low * (high / low) ** share
        else:
            value = low + (high - low) * share
        return float(f"{value:.4g}")  # so that the value in the table is the one that was trained with


def read(texts: list[str] | None) -> list[Axis]:
    """The axes of a search, each name once.

    Raises:
        UserError: as Axis.read, and for a name that comes twice.
    """
    axes = [Axis.read(text) for text in texts or DEFAULT]
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--space {name}: given {names.count(name)} times; name every flag once")
    return axes


def trials(axes: list[Axis], method: str, count: int, seed: int) -> list[dict[str, float]]:
    """The hyper-parameters of every trial.

    At random, trial i depends on the axes, seed and i alone, so that a search can be made longer later.

    Args:
        method: "random" for ``count`` draws, "grid" for every combination (``count`` is not read).
    """
    if method == "grid":
        return [dict(zip([a.name for a in axes], values)) for values in itertools.product(*(a.grid() for a in axes))]
    return [{axis.name: axis.draw(random.Random(f"{seed}/{i}/{axis.name}")) for axis in axes} for i in range(count)]


def flags(params: dict[str, float], epochs: int) -> list[str]:
    """What a trial adds to the flags of cifar10_qat_br.py, whose --qat-epochs is ``epochs``."""
    made: list[str] = []
    for name, value in params.items():
        if name == WARMUP_SHARE:
            made += ["--warmup-epochs", str(round(value * epochs))]
        else:
            made += [flag(name), repr(value)]
    return made


def plain(axes: list[Axis]) -> list[dict[str, Any]]:
    """The axes as they stand in search.json."""
    return [{"name": a.name, "values": list(a.values), "scale": a.scale, "points": a.points} for a in axes]
