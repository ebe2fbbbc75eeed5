"""The output folder of a run: what in it can be gone on from, one run in it at a time, and what killed runs left."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from qbr.whole import TEMPORARY

from . import checkpoints
from .files import UserError

CHECKPOINTS, PLOTS = "checkpoints", "plots"
_RESUMABLE = {"epoch", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "rng", "history", "args"}
# What a run from the beginning removes; last.pth before best.pth: left alone, it would be resumed, and lack its best.
_REPLACED = ("report.html", "results.json", "histograms.json", *(
    f"{CHECKPOINTS}/{name}.pth" for name in ("last", "best", "warmup")
))  # fmt: skip


def state_to_resume(folder: Path, script: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint that the run in ``folder`` goes on from; None for a run from the beginning.

    Raises:
        UserError: where ``folder`` holds something that neither --resume nor --overwrite gives leave to touch.
    """
    last = folder / CHECKPOINTS / "last.pth"
    if options.overwrite:
        return None
    if not last.exists():
        kept = _left_behind(folder, options.resume)
        if kept:
            raise UserError(
                f"--output-dir {folder} holds {kept} of a run, and no last.pth to go on from: --overwrite replaces "
                "it, or name another folder"
            )
        if options.resume:
            print(f"{last} is not there yet: starting from the beginning")
        return None
    if not options.resume:
        raise UserError(
            f"--output-dir {folder} holds a run: --resume continues it, --overwrite replaces it, or name another folder"
        )
    state = checkpoints.load(last, "--resume")
    if not _RESUMABLE <= set(state) or state.get("script") != script:
        raise UserError(f"--resume {last}: not a checkpoint of {script}.py; name its --output-dir")
    return state


def _left_behind(folder: Path, resume: bool) -> str | None:
    """What of a run a new one would replace; a kill leaves best.pth alone, which --resume may replace."""
    if not resume and (folder / CHECKPOINTS / "best.pth").exists():
        return "best.pth"
    results = folder / "results.json"
    try:
        return results.name if results.exists() and json.loads(results.read_text()).get("epochs") else None
    except (OSError, ValueError, AttributeError):
        return results.name  # somebody else's


def take(folder: Path, fresh: bool, lock: contextlib.ExitStack) -> None:
    """Make ``folder``, keep other runs out until ``lock`` is closed, and remove what killed writes left in it.

    With ``fresh``, for a run from the beginning, also what state_to_resume gave leave to replace.

    Raises:
        UserError: for a folder that cannot be made, or that another run is writing to.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be made ({error}); name another folder") from error
    lock.enter_context(_only_run_in(folder))
    for each in (folder, folder / CHECKPOINTS, folder / PLOTS):
        for path in each.glob(TEMPORARY):
            path.unlink(missing_ok=True)
    if fresh:  # now: or a killed run could be resumed into the old one
        for name in _REPLACED:
            (folder / name).unlink(missing_ok=True)


def mend_best(path: Path, state: dict[str, Any]) -> None:
    """Write best.pth from ``state``, last.pth's, whose epoch is the best, if a kill between the two left it out."""
    if not path.exists() or checkpoints.load(path, "--resume").get("epoch") != state["epoch"]:
        checkpoints.save(state, path)


@contextlib.contextmanager
def _only_run_in(folder: Path):
    """Inside, no other process gets in: two runs would mix their files. The lock ends with the process, however.

    Where there is no such lock (Windows, some network file systems) the block just runs.

    Raises:
        UserError: while another run writes to ``folder``.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"--output-dir {folder}: another run is writing there; wait for it or stop it") from error
    except OSError:
        pass  # the file system has no locks
    try:
        yield
    finally:
        os.close(handle)
