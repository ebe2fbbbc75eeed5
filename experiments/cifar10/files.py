"""Files of a run, written whole or not at all, and errors that the scripts turn into a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from qbr.whole import replacing

# Errors that come of writing alone, and the remedy of each.
NOT_WRITABLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make its file system writable",
}


class UserError(Exception):
    """Something the user can put right; the text names the argument or file, its value and the remedy."""


class CannotWrite(UserError):
    """A file of the run could not be written; what was there before is there still."""


def cannot_write(error: OSError, path: Path | str | None = None) -> CannotWrite:
    """What to tell of an OSError from writing ``path``, by default the file that it names."""
    what = path or error.filename or "output"
    remedy = NOT_WRITABLE.get(error.errno, "make its folder writable")
    return CannotWrite(
        f"cannot write {what}: {error.strerror or error}; what was there before is kept: {remedy}"
    )


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """A file object whose contents appear at ``path`` all at once when the block ends, or not at all.

    Raises:
        CannotWrite: naming the file, what is wrong and the remedy.
    """
    try:
        with replacing(path) as temporary, temporary.open(mode) as file:
            yield file
    except OSError as error:
        raise cannot_write(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """JSON by atomic_write; NaN and infinity become null, which every JSON reader accepts."""
    with atomic_write(path, "w") as file:
        json.dump(_finite(value), file, indent=1)


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: naming the file and the remedy, where it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {remedy}") from error


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def check_writable(folder: Path, *inside: str, flag: str = "--output-dir") -> None:
    """Raise UserError, naming ``flag``, unless ``folder`` and those ``inside`` it can be made and written.

    Touches nothing.
    """
    for there in (folder.absolute(), *(folder.absolute() / name for name in inside)):
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise UserError(f"{flag} {folder}: {there} is a file; name a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {folder}: {there} cannot be written; name a folder that you may write to")
