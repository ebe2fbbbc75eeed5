"""Files from anywhere: what kind they are by their first bytes, and writing them whole."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

ONNX, PACKED, CHECKPOINT = "ONNX", "safetensors", "a checkpoint of torch.save"


def kind_of(path: str | os.PathLike) -> str | None:
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


def described(path: str | os.PathLike) -> str:
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
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from error
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError(f"{path}: its entries claim more than the {size} bytes of the file; not from torch.save")
    return size


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Call write(a path beside ``path``), then move what it wrote to ``path`` in one step."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
