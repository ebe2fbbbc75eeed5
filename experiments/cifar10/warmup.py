"""Warm-ups that several runs share: kept by one run, taken over by others that differ from it only in what comes after.

In warm-up neither BR's strength nor who may move alpha has any effect, so that a run which takes its warm-up from
another one ends in the same state as if it had trained it itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from . import checkpoints
from .files import UserError, atomic_write
from .folders import CHECKPOINTS
from .options import FREE_ON_RESUME, flag, plain, qat_parser

# What plays no part before the first epoch of BR.
AFTERWARDS = {
    "lambda_br", "lambda_br_act", "freeze_alpha", "freeze_weight_alpha", "freeze_act_alpha", "br_backprop_to_alpha",
    "br_backprop_to_alpha_act", "br_bins", "br_first_last", "regularizer", "lambda_br_schedule",
    "monitor",
}  # fmt: skip


def _file(folder: Path) -> Path:
    return folder / CHECKPOINTS / "warmup.pth"


def keep(folder: Path) -> None:
    """Keep the last checkpoint of the run in ``folder`` as that of its warm-up, which has just ended."""
    with (folder / CHECKPOINTS / "last.pth").open("rb") as last, atomic_write(_file(folder)) as file:
        shutil.copyfileobj(last, file)


def is_kept(folder: Path) -> bool:
    return _file(folder).is_file()


def state(options: Any) -> dict[str, Any]:
    """The state at the end of the warm-up of the run ``options.warmup_from``.

    Raises:
        UserError: where none was kept there, or where that run's options are not these up to then.
    """
    folder = options.warmup_from
    if not is_kept(folder):
        raise UserError(f"--warmup-from {folder}: holds no warm-up; name a run that was trained with --keep-warmup")
    found = checkpoints.load(_file(folder), "--warmup-from")
    if found.get("epoch") != options.warmup_epochs:
        raise UserError(
            f"--warmup-from {folder}: its warm-up has {found.get('epoch')} epochs, this run's {options.warmup_epochs}: "
            "set --warmup-epochs, or leave --warmup-from out"
        )
    now = plain(options)
    ignored = AFTERWARDS | FREE_ON_RESUME
    default = qat_parser().get_default  # of a flag that an older run did not have
    there = {name: found["args"].get(name, default(name)) for name in now}
    differing = sorted(name for name in now if name not in ignored and now[name] != there[name])
    if differing:
        listed = ", ".join(f"{flag(name)} {now[name]} (there {there[name]})" for name in differing)
        raise UserError(f"--warmup-from {folder}: another run up to the end of warm-up: {listed}; set these alike")
    return found


def with_control(found: dict[str, Any], control: Any) -> dict[str, Any]:
    """That state under this run's control of alpha: its settings, at the epoch and step of the warm-up's end."""
    there = found["control_state_dict"]
    return {**found, "control_state_dict": {**control.state_dict(), "epoch": there["epoch"], "step": there["step"]}}
