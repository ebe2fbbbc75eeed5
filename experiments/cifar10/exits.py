"""How every script ends: what stopped it as one message, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from . import files, processes, signals
from .engine import TrainingDiverged
from .files import UserError


def exit_code(work: Callable[[], int | None], again: str = "the same command") -> int:
    """Do ``work`` until it ends or a signal ends it; ``again`` says what goes on after that.

    Returns:
        What ``work`` returns, or 0; 1 if training diverged, 2 for input that cannot be used (nothing was written), 3
        for a file that could not be written, 130 by Ctrl-C, 143 by SIGTERM. After 1, 3, 130 and 143 the checkpoint of
        the last whole epoch is there.
    """
    try:
        with signals.stopping():
            return work() or 0
    except files.CannotWrite as error:
        message, code = _cannot_write(error, again), 3
    except UserError as error:
        message, code = f"error: {error}", 2
    except OSError as error:  # of logs, plots, the terminal
        if error.errno not in files.NOT_WRITABLE:
            raise
        message, code = _cannot_write(files.cannot_write(error), again), 3
    except TrainingDiverged as error:
        message, code = f"error: {error}", 1
    except KeyboardInterrupt as stop:
        message, code = signals.message(stop, again)
        print(file=sys.stderr)  # below what the terminal shows of Ctrl-C, or a progress bar
    print(f"{processes.label()}{message}", file=sys.stderr)
    return code


def _cannot_write(error: files.CannotWrite, again: str) -> str:
    return f"error: {error}, then {again} goes on after the last whole epoch"
