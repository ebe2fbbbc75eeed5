"""AlphaControl: which losses may move the step sizes, and when; and the optimizer groups that alphas belong in."""

from __future__ import annotations

from torch import nn

from qbr.quantizers import LSQQuantizer, quantizers
from qbr.regularizer import watch

_SETTINGS = ("freeze_weights", "freeze_acts", "br_to_alpha_weights", "br_to_alpha_acts", "warmup_epochs")


class AlphaControl:
    """Warm-up, freezing and BR's gradient of alpha, for weights and for activations separately.

    In warm-up (epochs 1 to warmup_epochs) every alpha learns from the task loss and no bin loss is collected. Then
    the bin loss is collected in the fused pass, and an alpha is moved by the task loss unless it is frozen, and by
    the bin loss where that is asked for and it is not frozen: freezing wins. Freezing both sides is strategy S1 of
    the BR paper (Han et al., ICCV 2021); freezing neither is its S2.

        control = AlphaControl(freeze_weights=True, warmup_epochs=30).attach(model)
        print(control.describe())
        for epoch in range(1, epochs + 1):
            control.begin_epoch(epoch)
            ...

    Args:
        freeze_weights, freeze_acts: hold the alphas of that side fixed once warm-up ends.
        br_to_alpha_weights, br_to_alpha_acts: let the bin loss move the alphas of that side: False, True (unscaled,
            as the predecessor did) or "scaled" (by LSQ's gradient scale, as the task loss's gradient is).
        warmup_epochs: how many epochs come before the bin loss, 0 or more.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        freeze_weights: bool = False,
        freeze_acts: bool = False,
        br_to_alpha_weights: bool | str = False,
        br_to_alpha_acts: bool | str = False,
        warmup_epochs: int = 0,
    ) -> None:
        self._quantizers: list[LSQQuantizer] = []
        self._epoch = 1
        self._set(
            freeze_weights=freeze_weights,
            freeze_acts=freeze_acts,
            br_to_alpha_weights=br_to_alpha_weights,
            br_to_alpha_acts=br_to_alpha_acts,
            warmup_epochs=warmup_epochs,
        )

    def _set(self, **settings) -> None:
        for name in ("freeze_weights", "freeze_acts"):
            if not isinstance(settings[name], bool):
                raise TypeError(f"{name}={settings[name]!r}: expected True or False")
        for name in ("br_to_alpha_weights", "br_to_alpha_acts"):
            if not isinstance(settings[name], bool) and settings[name] != "scaled":
                raise ValueError(f"{name}={settings[name]!r}: expected False, True or 'scaled'")
        _check_epoch(settings["warmup_epochs"], "warmup_epochs", least=0)
        for name in _SETTINGS:
            setattr(self, name, settings[name])

    def attach(self, model: nn.Module) -> AlphaControl:
        """Take over the quantizers of model, in the state of epoch 1 (or the one that was loaded).

        Raises:
            ValueError: for a model without quantizers.
        """
        found = quantizers(model)
        if not found:
            raise ValueError(f"model ({type(model).__name__}) has no quantizers: call qbr.prepare(model, config) first")
        watch(model)
        self._quantizers = list(found.values())
        self._apply()
        return self

    def begin_epoch(self, epoch: int) -> None:
        """Set every quantizer to what holds in this epoch, counted from 1; in any order, as often as you like."""
        _check_epoch(epoch, "epoch", least=1)
        if not self._quantizers:
            raise RuntimeError(f"begin_epoch({epoch}) before attach: call control.attach(model) first")
        self._epoch = epoch
        self._apply()

    @property
    def br_active(self) -> bool:
        """Whether the current epoch comes after warm-up, so that the bin loss is collected."""
        return self._epoch > self.warmup_epochs

    def _apply(self) -> None:
        for quantizer in self._quantizers:
            weight = quantizer.kind == "weight"
            frozen = self.br_active and (self.freeze_weights if weight else self.freeze_acts)
            quantizer.collecting = self.br_active
            quantizer.br_to_alpha = self.br_to_alpha_weights if weight else self.br_to_alpha_acts
            quantizer.freeze(frozen)
            if not self.br_active:
                quantizer.take_retained()

    def describe(self) -> str:
        """A table of which losses move the alphas of weights and of activations in each phase."""
        rows = [("phase", "alphas of", "CE -> alpha", "BR -> alpha", "BR loss")]
        if self.warmup_epochs:
            phase = f"warm-up, epochs 1 to {self.warmup_epochs}"
            rows += [(phase, "weights", "yes", "no", "no"), (phase, "activations", "yes", "no", "no")]
        phase = f"BR, from epoch {self.warmup_epochs + 1}"
        for side, frozen, to_alpha in (
            ("weights", self.freeze_weights, self.br_to_alpha_weights),
            ("activations", self.freeze_acts, self.br_to_alpha_acts),
        ):
            moved = "scaled" if to_alpha == "scaled" else "yes" if to_alpha else "no"
            if frozen:
                moved = "no (freeze wins)" if to_alpha else "no"
            rows.append((phase, side, "no (frozen)" if frozen else "yes", moved, "yes"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    def state_dict(self) -> dict:
        """The settings and the epoch, plain values."""
        return {**{name: getattr(self, name) for name in _SETTINGS}, "epoch": self._epoch}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict() gave, and apply it if a model is attached.

        Raises:
            ValueError, TypeError: for a state that is not AlphaControl's; nothing has changed then.
        """
        expected = {*_SETTINGS, "epoch"}
        if set(state) != expected:
            raise ValueError(f"state has the keys {sorted(state)}: expected {sorted(expected)}")
        _check_epoch(state["epoch"], "epoch", least=1)
        self._set(**{name: state[name] for name in _SETTINGS})
        self._epoch = state["epoch"]
        self._apply()


def _check_epoch(value: int, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int")
    if value < least:
        raise ValueError(f"{name}={value}: expected {least} or more")


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, alpha_lr: float | None = None
) -> list[dict]:
    """Two groups for a torch.optim optimizer: everything else, and the alphas with no weight decay.

    Weight decay pulls a step size to 0, and Adam undoes LSQ's gradient scale, so that alpha wants a learning rate of
    its own there (qbr/kernels/README.md, "Strength").

    Args:
        model: a prepared model. Parameters that are frozen now are included: they may be released later.
        lr, weight_decay: of the other parameters.
        alpha_lr: of the alphas; None for lr.

    Raises:
        ValueError: for a model without quantizers (an optimizer made before prepare() would miss every alpha).
    """
    alphas = [quantizer.alpha for quantizer in quantizers(model).values()]
    if not alphas:
        raise ValueError(f"model ({type(model).__name__}) has no quantizers: call qbr.prepare(model, config) first")
    ids = {id(alpha) for alpha in alphas}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        {"name": "weights", "params": others, "lr": lr, "weight_decay": weight_decay},
        {"name": "alphas", "params": alphas, "lr": lr if alpha_lr is None else alpha_lr, "weight_decay": 0.0},
    ]
