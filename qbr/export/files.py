"""Files from anywhere: what kind they are by their first bytes, and whether they hold what they claim."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

ONNX, PACKED, CHECKPOINT = "ONNX", "safetensors", "a checkpoint of torch.save"


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """ONNX, PACKED, CHECKPOINT, or None for none of them; nothing of the file is run or trusted.

    Raises:
        FileNotFoundError: for no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04":
        return CHECKPOINT
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return PACKED
    if head[:1] == b"\x08" and path.suffix == ".onnx":  # field 1, ir_version
        return ONNX
    return None


def check_output(path: Path, source: Path, suffixes: tuple[str, ...]) -> None:
    """Raise, before anything is read or written, unless what ``source`` holds can be written to ``path``.

    Raises:
        ValueError: for another suffix, and for ``source`` itself. FileNotFoundError: for no folder.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(suffixes[:-1])}"
                         f"{' or ' if suffixes[1:] else ''}{suffixes[-1]}")  # fmt: skip
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"{path} is the checkpoint itself, whose float weights and optimizer would be lost: name "
                         "another file")  # fmt: skip


def described(path: str | os.PathLike[str]) -> str:
    """What a file that is not of the expected kind seems to be, for a message."""
    kind = kind_of(path)
    if kind is not None:
        return kind
    with Path(path).open("rb") as file:
        head = file.read(2)
    if not head:
        return "empty"
    if head[:1] == b"\x80":
        return "a Python pickle"
    return "of no kind that is known here, or damaged at its start"


def check_archive(path: Path) -> int:
    """The size of a torch.save file, whose entries must lie in it as they are: none larger than what is there.

    Raises:
        ValueError: for an archive that is damaged, or whose entries claim more than the file holds.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            whole = sum(e.file_size for e in entries) <= size and all(e.compress_type == 0 for e in entries)
            names = [e.filename for e in entries if e.filename.endswith("data.pkl")]
            pickles = [archive.read(name) for name in names] if whole else []
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from error
    if not whole:
        raise ValueError(f"{path}: its entries claim more than the {size} bytes of the file; not from torch.save")
    # Of what torch.load lets through with weights_only=True, the one call that takes memory out of a number.
    if any(b"bytearray" in each for each in pickles):
        raise ValueError(f"{path}: it makes a bytearray, which no checkpoint of a model has")
    return size
