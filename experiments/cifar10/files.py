"""Files written whole or not at all, and the one exception that the scripts turn into a message and exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can put right; the text names the argument or file, its value and the remedy."""


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """A file object whose contents appear at ``path`` all at once when the block ends, or not at all.

    A reader, or a run killed at any moment, sees the old file or the new one, never a part.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """JSON by atomic_write; NaN and infinity become null, which every JSON reader accepts."""
    with atomic_write(path, "w") as file:
        json.dump(_finite(value), file, indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def check_writable(folder: Path) -> None:
    """Raise UserError unless ``folder`` can be made and written; touches nothing."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--output-dir {folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {folder}: {there} cannot be written; name a folder that you may write to")
