"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Call write(a path beside ``path``), then move what it wrote to ``path`` in one step, once it is on the disk.

    A reader, and a process that is killed at any moment, finds the old file or the new one. What a killed process
    left beside it the next write of the same file removes.

    Raises:
        FileNotFoundError: where the folder is not there. What ``write`` and the file system raise; ``path`` is as it
            was then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    _remove_left(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _remove_left(path: Path) -> None:
    """Remove the temporary files of ``path`` whose processes have ended."""
    form = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.tmp")
    for each in path.parent.iterdir():
        match = form.fullmatch(each.name)
        if match and not _running(int(match[1])):
            with contextlib.suppress(OSError):
                each.unlink()


def _running(pid: int) -> bool:
    if os.name != "posix":  # elsewhere os.kill ends the process, whatever the signal
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
