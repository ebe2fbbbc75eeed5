"""The CSV and TensorBoard writers of per-layer figures: what they write, resumption, and files that are not theirs."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import qbr
from qbr import CSVWriter, TensorBoardWriter

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    kind: str
    bits: int
    loss: float | None
    levels: list


def _figures(loss, layers=("a", "b,c")):
    return {name: Row("weight", 2, loss, [1.0]) for name in layers}


def _read(path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="")))


def test_csv_rows_and_resumption(tmp_path):
    path = tmp_path / "layers.csv"
    writer = CSVWriter(path)
    for step, loss in ((1, 0.1), (2, None), (3, 0.1 + 0.2)):
        writer.write(step, _figures(loss))
    rows = _read(path)
    assert list(rows[0]) == ["step", "a.bits", "a.loss", "b,c.bits", "b,c.loss"]
    assert [row["step"] for row in rows] == ["1", "2", "3"] and [row["a.loss"] for row in rows][:2] == ["0.1", ""]
    assert float(rows[2]["b,c.loss"]) == 0.1 + 0.2 and rows[0]["a.bits"] == "2"

    before = path.read_bytes()
    CSVWriter(path).write(4, _figures(1.0))  # a resumed run appends, and no row before it changes
    assert path.read_bytes().startswith(before) and len(_read(path)) == 4
    CSVWriter(path, purge_step=3).write(3, _figures(7.0))
    assert [(row["step"], row["a.loss"]) for row in _read(path)] == [("1", "0.1"), ("2", ""), ("3", "7.0")]
    assert [p.name for p in tmp_path.iterdir()] == ["layers.csv"]

    with pytest.raises(ValueError, match=r"layers.csv has other columns .*\(2 differ, 'd.bits' for one\)"):
        CSVWriter(path).write(4, _figures(1.0, layers=("a", "b,c", "d")))
    with pytest.raises(ValueError, match="their order"):
        CSVWriter(path).write(4, _figures(1.0, layers=("b,c", "a")))
    assert len(_read(path)) == 3


def test_csv_in_warm_up(tmp_path):
    writer = CSVWriter(tmp_path / "warm.csv")
    for step, figures in enumerate(({}, {}, _figures(0.5), {}, _figures(0.25)), start=1):
        writer.write(step, figures)
    assert [row["step"] for row in _read(writer.path)] == ["3", "5"]


def test_csv_cuts_off_a_torn_row(tmp_path):
    path = tmp_path / "layers.csv"
    writer = CSVWriter(path)
    writer.write(1, _figures(0.5))
    whole = path.read_bytes()
    writer.write(2, _figures(0.25))
    for cut in range(len(whole) + 1, path.stat().st_size):
        torn = tmp_path / f"{cut}.csv"
        torn.write_bytes(path.read_bytes()[:cut])
        CSVWriter(torn).write(2, _figures(0.25))
        assert torn.read_bytes() == path.read_bytes()
    for nothing in (b"", b"st"):
        torn.write_bytes(nothing)
        CSVWriter(torn).write(1, _figures(0.5))
        assert torn.read_bytes() == whole


def test_csv_survives_being_killed(tmp_path):
    path = tmp_path / "layers.csv"
    code = f"""
        import os, signal
        from qbr import CSVWriter
        from collections import namedtuple
        writer = CSVWriter({str(path)!r})
        for step in range(5):
            writer.write(step, {{"a": namedtuple("Row", "loss")(step / 3)}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=dict(os.environ))
    assert result.returncode == -signal.SIGKILL
    assert [float(row["a.loss"]) for row in _read(path)] == [step / 3 for step in range(5)]


def test_other_files_are_not_touched(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("name,value\nx,1\n")
    for content in (b"a line of notes without an end", b"steps to take", b"\xff\xfe\x00\n", b"step,a.loss\none,2.0\n"):
        other = tmp_path / "other.csv"
        other.write_bytes(content)
        with pytest.raises(ValueError, match="other.csv is not a CSVWriter's file"):
            CSVWriter(other, purge_step=3)
        assert other.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="its folder is not there"):
        CSVWriter(tmp_path / "absent" / "layers.csv")
    with pytest.raises(ValueError, match="notes.csv is not a CSVWriter's file"):
        CSVWriter(path)
    assert path.read_text() == "name,value\nx,1\n"


def test_numbers_of_numpy_are_steps(tmp_path):
    CSVWriter(tmp_path / "layers.csv").write(np.int64(3), {"a": Row("weight", 2, 0.5, [])})
    assert _read(tmp_path / "layers.csv")[0]["step"] == "3"


@pytest.mark.parametrize("step", [1.5, "x", None, -1, True])
def test_a_step_that_could_not_be_read_again_is_refused(step, tmp_path):
    path = tmp_path / "layers.csv"
    with pytest.raises((TypeError, ValueError), match="^step="):
        CSVWriter(path).write(step, {"a": Row("weight", 2, 0.5, [])})
    assert not path.exists()
    if step is not None:
        with pytest.raises((TypeError, ValueError), match="^purge_step="):
            CSVWriter(path, purge_step=step)


def test_tensorboard(tmp_path):
    board = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path))
    writer = TensorBoardWriter(board, prefix="layers/")
    for step in (1, 2):
        writer.write(step, _figures(0.5 * step if step == 2 else None))
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"layers/{n}/{layer}" for n in ("bits", "loss") for layer in ("a", "b,c")}
    assert [(e.step, e.value) for e in events.Scalars("layers/loss/a")] == [(2, 1.0)]
    assert [e.step for e in events.Scalars("layers/bits/a")] == [1, 2]
    with pytest.raises(TypeError, match="board='runs': expected a torch.utils.tensorboard.SummaryWriter"):
        TensorBoardWriter("runs")


def test_what_they_are_for(tmp_path):
    torch.manual_seed(0)
    model = qbr.prepare(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), qbr.QATConfig())
    monitor = qbr.Monitor(model)
    path = tmp_path / "layers.csv"
    CSVWriter(path).write(0, monitor.read())  # before any data: the same columns, empty cells
    model(torch.randn(8, 4))
    CSVWriter(path).write(1, monitor.read())
    CSVWriter(tmp_path / "losses.csv").write(1, qbr.bin_loss(model).metrics())
    rows = _read(path)
    assert rows[0]["0.loss"] == "" and float(rows[1]["0.loss"]) > 0 and rows[1]["1.steps"] == ""
    assert float(_read(tmp_path / "losses.csv")[0]["1.mean_distance"]) > 0
