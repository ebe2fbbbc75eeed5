"""Files that the library writes are whole or are not there: killed within a write, on a full disk, beside leftovers."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

import qbr
from qbr import whole
from qbr.export import convert_checkpoint, save_packed, to_onnx
from qbr.writers import CSVWriter

ROOT = Path(__file__).resolve().parents[1]
Row = namedtuple("Row", "loss")
KILLED = """
    import os, signal, sys
    sys.modules["torch"] = None  # a leaf, which needs nothing
    sys.path.insert(0, {qbr!r})
    import whole
    real = os.{call}
    def die(*args):
        {after}
        os.kill(os.getpid(), signal.SIGKILL)
    os.{call} = die
    whole.write_whole({path!r}, lambda temporary: temporary.write_bytes(b"new" * 1000))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills")
@pytest.mark.parametrize("call, after, expected", [
    ("fsync", "pass", b"old"), ("replace", "pass", b"old"), ("replace", "real(*args)", b"new" * 1000),
])  # fmt: skip
def test_killed_within_a_write(call, after, expected, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    code = textwrap.dedent(KILLED).format(qbr=str(ROOT / "qbr"), call=call, after=after, path=str(path))
    assert subprocess.run([sys.executable, "-S", "-c", code]).returncode == -signal.SIGKILL
    assert path.read_bytes() == expected
    assert len(list(tmp_path.iterdir())) == (1 if expected != b"old" else 2)
    others = [
        tmp_path / name for name in (f".m.safetensors.{os.getppid()}.tmp", ".m.safetensors.notes.tmp", ".m.1.tmp")
    ]
    for other in others:  # of a process that is running, and of somebody else
        other.touch()
    whole.write_whole(path, lambda temporary: temporary.write_bytes(b"newer"))
    assert path.read_bytes() == b"newer" and set(tmp_path.iterdir()) == {path, *others}


def _model() -> nn.Module:
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), qbr.QATConfig())
    qbr.calibrate(model, [torch.randn(8, 4)])
    return model.eval()


def _packed(model: nn.Module, path: Path) -> None:
    pytest.importorskip("safetensors")
    save_packed(model, path.with_suffix(".safetensors"))


def _onnx(model: nn.Module, path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    to_onnx(model, torch.randn(2, 4), path.with_suffix(".onnx"))


def _checkpoint(model: nn.Module, path: Path) -> None:
    torch.save({"model_state_dict": model.state_dict(), "args": {"num_bits": 2}}, path.with_suffix(".old"))
    convert_checkpoint(path.with_suffix(".old"), path.with_suffix(".pth"))


@pytest.mark.parametrize("write", [_packed, _onnx, _checkpoint])
def test_a_failed_write_changes_nothing(write, tmp_path, monkeypatch):
    """On a disk that is full when the file is to be kept, and in a write that is interrupted."""
    write(_model(), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".old"}
    assert len(before) == 1
    for call, error in (("fsync", OSError(errno.ENOSPC, "No space left on device")), ("replace", KeyboardInterrupt())):

        def fail(*_args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(whole.os, call, fail)
            with pytest.raises(type(error)):
                write(_model(), tmp_path / "m")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".old"} == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of a file")
def test_a_row_that_does_not_fit_is_taken_back(tmp_path):
    """A limit on the file's size, as a full disk, lets the first bytes of a row in."""
    path = tmp_path / "layers.csv"
    code = f"""
        import os, resource, sys, types
        from collections import namedtuple
        sys.modules["qbr"] = types.ModuleType("qbr")  # a test of the writer, without torch
        sys.modules["qbr"].__path__ = [{str(ROOT / "qbr")!r}]
        from qbr.writers import CSVWriter
        Row, writer = namedtuple("Row", "loss"), CSVWriter({str(path)!r})
        writer.write(1, {{"a": Row(0.5)}})
        size = os.stat({str(path)!r}).st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, -1))
        for _ in range(2):
            try:
                writer.write(2, {{"a": Row(0.25)}})
            except OSError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        writer.write(3, {{"a": Row(0.125)}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"[Errno {errno.ENOSPC}] No space left on device: '{path}'"] * 2
    with path.open(newline="") as file:
        assert [(row["step"], row["a.loss"]) for row in csv.DictReader(file)] == [("1", "0.5"), ("3", "0.125")]


def test_a_purge_that_fails_keeps_every_row(tmp_path, monkeypatch):
    path = tmp_path / "layers.csv"
    writer = CSVWriter(path)
    for step in (1, 2):
        writer.write(step, {"a": Row(0.5)})
    before = path.read_bytes()

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        CSVWriter(path, purge_step=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
