"""What a run prints of an epoch: one line of figures, and a warning where a step size has leapt."""

from __future__ import annotations

from typing import Any

from .study import sides

LEAP = 3  # times as large, or a third: what step sizes of 2 to 4 bits do not do in an epoch


def epoch_line(figures: dict[str, Any], epochs: int) -> str:
    """One line of one epoch's figures; BR_W and BR_A are 'off' in warm-up."""
    parts = [f"epoch {figures['epoch']:{len(str(epochs))}}/{epochs}"]
    if "phase" in figures:
        parts.append(f"{figures['phase']:<7}")
    parts += [f"loss {figures['loss']:.4f}", f"CE {figures['ce']:.4f}", f"acc {figures['train_acc']:.2f} %"]
    if figures["val_acc"] is not None:
        parts.append(f"val {figures['val_acc']:.2f} %")
    if "phase" in figures:
        for key in ("br_w", "br_a"):
            parts.append(f"BR_{key[-1].upper()} {figures[key]:.6f}" if key in figures else f"BR_{key[-1].upper()} off")
        for side, names in zip("WA", sides(figures["alphas"])):
            if names:
                parts.append(f"alpha_{side} {sum(figures['alphas'][name] for name in names) / len(names):.4f}")
    parts += [f"lr {figures['lr']:.4g}", f"{figures['images_per_second']:.0f} img/s", f"{figures['seconds']:.1f} s"]
    return "  ".join(parts)


def leaps(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """A warning if step sizes have changed by more than LEAP times in an epoch: the largest change, and how many.

    Args:
        before, after: {quantizer: alpha}.
    """
    changes = {name: max(after[name] / old, old / after[name]) for name, old in before.items() if name in after}
    leapt = sorted((name for name in changes if changes[name] > LEAP), key=changes.get, reverse=True)
    if not leapt:
        return []
    name, others = leapt[0], f", and {len(leapt) - 1} more leapt" if len(leapt) > 1 else ""
    return [
        f"warning: alpha of {name} went from {before[name]:.4g} to {after[name]:.4g} in this epoch{others}: too high "
        "an lr for it (--lr-alpha, --lr-alpha-act, --lr-alpha-first-last)"
    ]
