"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPORARY = ".*.tmp"  # the names beside a file that a killed write leaves behind


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path``; what the block writes there becomes ``path`` in one step, once it is on the disk.

    A reader, and a process that is killed at any moment, finds the old file or the new one. What a killed process
    left beside it the next write of the same file removes. A block that raises leaves ``path`` as it was.

    Raises:
        FileNotFoundError: where the folder is not there. What the file system raises; ``path`` is as it was then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    _remove_left(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call write(a path beside ``path``), within ``replacing``."""
    with replacing(path) as temporary:
        write(temporary)
    return Path(path)


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
