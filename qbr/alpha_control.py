"""AlphaControl: which losses may move the step sizes, and when."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from qbr import distributed, grouping
from qbr.arguments import check_count
from qbr.freezing import Freeze, Record, mean_distance
from qbr.quantizers import LSQQuantizer, quantizers, require_quantizers
from qbr.regularizer import watch
from qbr.spec import ToAlpha, check_to_alpha

_SETTINGS = ("freeze_weights", "freeze_acts", "br_to_alpha_weights", "br_to_alpha_acts", "warmup_epochs")
_SIDES = {"weight": ("weights", "freeze_weights", "br_to_alpha_weights"),
          "activation": ("activations", "freeze_acts", "br_to_alpha_acts")}  # fmt: skip
STRATEGIES = {"S1": True, "S2": False}  # whether alphas are frozen once the bin loss is there


class AlphaControl:
    """Warm-up, freezing and the bin loss's gradient of alpha, for weights and for activations separately.

    In warm-up (epochs 1 to warmup_epochs) every alpha learns from the task loss and no bin loss is collected. Then
    the bin loss is collected in the fused pass, and an alpha is moved by the task loss unless it is frozen, and by
    the bin loss where that is asked for and it is not frozen: freezing wins.

        control = AlphaControl(freeze_weights=True, warmup_epochs=30).attach(model)
        print(control.describe())
        for epoch in range(1, epochs + 1):
            control.begin_epoch(epoch)
            ...

    Args:
        freeze_weights, freeze_acts: hold the alphas of that side fixed: False (never), True (once warm-up ends) or a
            qbr.Freeze, which names an epoch, a step or a convergence, and a release.
        br_to_alpha_weights, br_to_alpha_acts: how much of the bin loss's gradient moves the alphas of that side:
            False (none), True (all, unscaled, as the predecessor did), a fraction from 0 to 1, "scaled" (all, times
            LSQ's gradient scale, as the task loss's gradient is) or (fraction, "scaled").
        warmup_epochs: how many epochs come before the bin loss, 0 or more.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        freeze_weights: bool | Freeze = False,
        freeze_acts: bool | Freeze = False,
        br_to_alpha_weights: ToAlpha = False,
        br_to_alpha_acts: ToAlpha = False,
        warmup_epochs: int = 0,
    ) -> None:
        self._model: nn.Module | None = None
        self._quantizers: list[LSQQuantizer] = []
        self._epoch, self._step, self._begun = 1, 0, False
        self._set(
            freeze_weights=freeze_weights,
            freeze_acts=freeze_acts,
            br_to_alpha_weights=br_to_alpha_weights,
            br_to_alpha_acts=br_to_alpha_acts,
            warmup_epochs=warmup_epochs,
        )

    @classmethod
    def strategy(cls, name: str, **settings: Any) -> AlphaControl:
        """A strategy of the BR paper by its name.

            "S1": LSQ alone finds the steps in warm-up; then they are frozen on both sides, and weights and activations
                  learn from the task loss and the bin loss.
            "S2": the steps go on learning from the task loss beside the bin loss.

        The paper's bin loss is of weights: leave bin_loss(model).activations, the predecessor's addition, out of the
        loss to have its own.

        Args:
            name: "S1" or "S2".
            settings: warmup_epochs, br_to_alpha_weights and br_to_alpha_acts, as in AlphaControl().

        Raises:
            TypeError, ValueError: naming the argument.

        Source: Han et al., Improving Low-Precision Network Quantization via Bin Regularization, ICCV 2021.
        """
        if name not in STRATEGIES:
            raise ValueError(f"name={name!r}: expected one of {', '.join(map(repr, STRATEGIES))}")
        decided = sorted({"freeze_weights", "freeze_acts"} & settings.keys())
        if decided:
            raise TypeError(f"{decided[0]}={settings[decided[0]]!r}: {name} decides that; call AlphaControl() instead")
        return cls(freeze_weights=STRATEGIES[name], freeze_acts=STRATEGIES[name], **settings)

    def _set(self, **settings) -> None:
        for name in ("freeze_weights", "freeze_acts"):
            if not isinstance(settings[name], (bool, Freeze)):
                raise TypeError(f"{name}={settings[name]!r}: expected True, False or a qbr.Freeze")
        for name in ("br_to_alpha_weights", "br_to_alpha_acts"):
            check_to_alpha(settings[name], name)
        check_count(settings["warmup_epochs"], "warmup_epochs", least=0)
        for name in ("freeze_weights", "freeze_acts"):
            _check_release(name, settings[name], settings["warmup_epochs"] + 1)
        for name in _SETTINGS:
            setattr(self, name, settings[name])
        self._records = {kind: Record(self._plan(kind)) for kind in _SIDES}

    def _plan(self, kind: str) -> Freeze | None:
        freeze = getattr(self, _SIDES[kind][1])
        return freeze if isinstance(freeze, Freeze) else Freeze() if freeze else None

    def attach(self, model: nn.Module) -> AlphaControl:
        """Take over the quantizers of model, in the state of epoch 1 (or the one that was loaded).

        An alpha whose requires_grad you have set to False stays fixed throughout.

        Raises:
            ValueError: for a model without quantizers, or without quantized weights where a release waits for them.
            RuntimeError: for another model than the one it is attached to, or one around that; for alphas that were
                frozen before torch.distributed was initialised, and would be released. Nothing has changed then.
        """
        found = require_quantizers(model)
        if self._model is not None and not {*found.values()} >= {*quantizers(self._model).values()}:
            raise RuntimeError(f"attach: this AlphaControl has a {type(self._model).__name__} already, which would be "
                               "left as it is: make another one for this model")  # fmt: skip
        if any(self._plan(kind) and self._plan(kind).release_tolerance is not None for kind in _SIDES):
            if not grouping.weights(model):
                raise ValueError("release_tolerance: the model has no quantized weights whose distance could settle; "
                                 "use release_epoch or release_step")  # fmt: skip
        self._check_releases(found.values())
        watch(model)
        self._model, self._quantizers = model, list(found.values())
        self._apply()
        return self

    def begin_epoch(self, epoch: int) -> None:
        """Set every quantizer to what holds in this epoch, counted from 1; in any order, as often as you like.

        A Freeze with a tolerance looks at the model here, and reads the device once for each side.

        Raises:
            TypeError, ValueError: for an epoch that is none.
            RuntimeError: before attach; or in a later epoch than one begun before, if a Freeze counts steps and none
                has begun.
        """
        check_count(epoch, "epoch", least=1)
        if self._model is None:
            raise RuntimeError(f"begin_epoch({epoch}) before attach: call control.attach(model) first")
        by_step = any(record.plan is not None and record.plan.by_step for record in self._records.values())
        if by_step and self._step == 0 and self._begun and epoch > self._epoch:
            raise RuntimeError(f"begin_epoch({epoch}): a Freeze counts steps, and no step has begun: call "
                               "control.begin_step() before every training step")  # fmt: skip
        self._epoch, self._begun = epoch, True
        self._look_for_new_ones()
        for kind, record in self._records.items():
            members = [q for q in self._quantizers if q.kind == kind]
            if members:
                record.look(epoch, self._step, self.br_active, lambda: _alphas(members), self._mean_distance)
        self._apply()

    def _look_for_new_ones(self) -> None:
        """Take over quantizers that came into the model after attach, a new head's."""
        found = list(quantizers(self._model).values())
        if found and {*found} != {*self._quantizers}:
            watch(self._model)
            self._quantizers = found
            for record in self._records.values():
                record.forget_alphas()

    def begin_step(self, step: int | None = None) -> None:
        """Say that a training step begins; needed where a Freeze counts steps. Host arithmetic only.

        Args:
            step: counted from 1 over all epochs; None for the one after the last.

        Raises:
            TypeError, ValueError: for a step that is none. RuntimeError: before attach.
        """
        step = self._step + 1 if step is None else step
        check_count(step, "step", least=1)
        if self._model is None:
            raise RuntimeError(f"begin_step({step}) before attach: call control.attach(model) first")
        before = self._frozen()
        self._step = step
        if self._frozen() != before:
            self._apply()

    def _frozen(self) -> dict[str, bool]:
        """{kind: whether its alphas are frozen now}"""
        return {kind: r.frozen(self._epoch, self._step, self.br_active) for kind, r in self._records.items()}

    def _mean_distance(self):
        return mean_distance(self._model)

    @property
    def br_active(self) -> bool:
        """Whether the current epoch comes after warm-up, so that the bin loss is collected."""
        return self._epoch > self.warmup_epochs

    def _check_releases(self, found: Iterable[LSQQuantizer]) -> None:
        frozen = self._frozen()
        for quantizer in found:
            if not frozen[quantizer.kind]:
                quantizer.check_release()

    def _apply(self) -> None:
        self._check_releases(self._quantizers)  # before any of them has changed
        frozen = self._frozen()
        plans = [record.plan for record in self._records.values() if record.plan is not None]
        awaits_epoch = not self._begun and (self.warmup_epochs > 0 or any(plan.by_epoch for plan in plans))
        for quantizer in self._quantizers:
            quantizer.awaits_epoch = awaits_epoch
            quantizer.collecting = self.br_active
            quantizer.br_to_alpha = getattr(self, _SIDES[quantizer.kind][2])
            quantizer.freeze(frozen[quantizer.kind])
            if not self.br_active:
                quantizer.take_retained()

    def describe(self) -> str:
        """A table of which losses move the alphas of weights and of activations in each phase.

        Of an attached model, only the sides that are quantized.
        """
        kinds = {q.kind for q in self._quantizers} or set(_SIDES)
        rows = [row for kind in _SIDES if kind in kinds for row in self._phases(kind)]
        rows.sort(key=lambda row: row[0])
        rows = [("phase", "alphas of", "CE -> alpha", "BR -> alpha", "BR loss"), *[cells for _, cells in rows]]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    def _phases(self, kind: str):
        """(first epoch, the cells of a row) for each phase of one side; what no epoch decides comes last."""
        plan = self._plan(kind)
        record = Record(plan)  # without what a tolerance has decided so far
        named = {1, self.warmup_epochs + 1}
        if plan is not None:
            named |= {plan.epoch} - {None}
            if plan.step is None and plan.tolerance is None:  # else it ends the row of that event
                named |= {plan.release_epoch} - {None}
        starts = sorted(named)
        for start, end in zip(starts, [*starts[1:], None]):
            after = start > self.warmup_epochs
            if end is None:
                when = f"from epoch {start}"
            else:
                when = f"epoch {start}" if end == start + 1 else f"epochs {start} to {end - 1}"
            cells = self._moves(kind, record.frozen(start, 0, after), after)
            yield start, (f"{'BR' if after else 'warm-up'}, {when}", *cells)
        for frozen, when in _events(plan):
            *cells, _ = self._moves(kind, frozen, True)
            yield math.inf, (when, *cells, "after warm-up" if self.warmup_epochs else "yes")

    def _moves(self, kind: str, frozen: bool, after_warmup: bool) -> tuple[str, str, str, str]:
        """(alphas of, CE -> alpha, BR -> alpha, BR loss)"""
        side, _, to_alpha = _SIDES[kind]
        fraction, scaled = check_to_alpha(getattr(self, to_alpha), to_alpha)
        amount = "yes" if fraction == 1 else f"{fraction:g}"
        moved = "no" if fraction == 0 else ("scaled" if fraction == 1 else f"{amount}, scaled") if scaled else amount
        if not after_warmup:
            moved = "no"
        if frozen:
            moved = "no" if moved == "no" else "no (freeze wins)"
        return side, "no (frozen)" if frozen else "yes", moved, "yes" if after_warmup else "no"

    def state_dict(self) -> dict[str, Any]:
        """The settings, the epoch, the step, and what convergences remember; plain values, also for JSON. A Freeze is a
        dict in it."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings = {name: asdict(value) if isinstance(value, Freeze) else value for name, value in settings.items()}
        records = {_SIDES[kind][0]: record.state_dict() for kind, record in self._records.items()}
        return {**settings, "epoch": self._epoch, "step": self._step, "convergence": records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict() gave, settings included, and apply it if a model is attached. The state of a
        version without steps and convergences loads, too.

        Warns:
            UserWarning: where this control has settings that are not the defaults, and the state's are others.

        Raises:
            ValueError, TypeError: for a state that is not AlphaControl's; nothing has changed then.
        """
        expected = {*_SETTINGS, "epoch"}
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}: expected what AlphaControl.state_dict() gives")
        if not expected <= set(state) <= expected | {"step", "convergence"}:
            raise ValueError(f"state has the keys {sorted(state)}: expected {sorted(expected)}, step and convergence")
        check_count(state["epoch"], "epoch", least=1)
        check_count(state.get("step", 0), "step", least=0)
        records = state.get("convergence", {side: Record(None).state_dict() for side, *_ in _SIDES.values()})
        for side, *_ in _SIDES.values():
            if set(records.get(side, ())) != set(Record(None).state_dict()):
                raise ValueError(f"state['convergence'] has no whole record of {side}: it is not AlphaControl's")
            try:
                Record(None).load_state_dict(records[side])
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"state['convergence'] has a damaged record of {side}: {error}") from error
        settings = {name: state[name] for name in _SETTINGS}
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}  # JSON has no tuples
        for name in ("freeze_weights", "freeze_acts"):
            if isinstance(settings[name], dict):
                settings[name] = Freeze(**settings[name])
        given = {name: getattr(self, name) for name in _SETTINGS}
        before, unset = self._meant(), AlphaControl()._meant()
        self._set(**settings)
        self._epoch, self._step, self._begun = state["epoch"], state.get("step", 0), True
        for kind, record in self._records.items():
            record.load_state_dict(records[_SIDES[kind][0]])
        self._apply()
        now = self._meant()
        others = [name for name in _SETTINGS if before[name] != now[name]]
        if others and before != unset:
            changed = ", ".join(f"{name}={settings[name]!r} instead of {given[name]!r}" for name in others)
            warnings.warn(f"this AlphaControl has the settings of the state that was loaded: {changed}. For its own, "
                          "load no control's state, and call begin_epoch", stacklevel=2)  # fmt: skip

    def _meant(self) -> dict:
        """The settings, each in one of the ways in which it can be said."""
        plans = {_SIDES[kind][1]: self._plan(kind) for kind in _SIDES}
        ways = {name: check_to_alpha(getattr(self, name), name) for _, _, name in _SIDES.values()}
        return {**plans, **ways, "warmup_epochs": self.warmup_epochs}


def _events(plan: Freeze | None):
    """(whether alphas are frozen then, when) for what a step or a convergence decides."""
    if plan is None:
        return
    until = f", until epoch {plan.release_epoch}" if plan.release_epoch is not None else ""
    settles = f"moves <= {{:g}} of itself in {plan.window} epoch{'s' if plan.window > 1 else ''}"
    if plan.step is not None:
        yield True, f"from step {plan.step}{until}"
    if plan.tolerance is not None:
        yield True, f"once alpha {settles.format(plan.tolerance)}{until}"
    if plan.release_step is not None:
        yield False, f"from step {plan.release_step}"
    if plan.release_tolerance is not None:
        yield False, f"once the distance {settles.format(plan.release_tolerance)}"


def _check_release(name: str, plan: bool | Freeze, begin: int) -> None:
    """Refuse a Freeze that starts at epoch ``begin``, where warm-up has ended, and is over by then."""
    if isinstance(plan, Freeze) and (plan.epoch, plan.step, plan.tolerance) == (None, None, None):
        if plan.release_epoch is not None and plan.release_epoch <= begin:
            raise ValueError(f"{name}: release_epoch={plan.release_epoch}: expected more than {begin}, the epoch after "
                             "warm-up, with which it freezes; or name its epoch")  # fmt: skip


def _alphas(quantizers: list[LSQQuantizer]) -> torch.Tensor:
    """A copy of their alphas, in one tensor on the first one's device."""
    device = quantizers[0].alpha.device
    return torch.cat([distributed.whole(quantizer.alpha.detach()).to(device) for quantizer in quantizers])
