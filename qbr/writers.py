"""Writers of per-layer figures, a Monitor's or qbr.bin_loss(model).metrics(): to a CSV file, to TensorBoard."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from qbr.arguments import check_count
from qbr.whole import write_whole


def scalars(figures: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """{layer: {figure: number or None}}: what of {layer: NamedTuple} is one number."""
    return {
        layer: {name: v for name, v in row._asdict().items() if v is None or isinstance(v, Real)}
        for layer, row in figures.items()
    }


class TensorBoardWriter:
    """Writes each figure as a scalar: ``quantization_mse/layer1.0.conv1`` and so on.

        writer = qbr.TensorBoardWriter(SummaryWriter("runs/one"))    # torch.utils.tensorboard, yours to close
        writer.write(epoch, monitor.read(reset=True))

    Args:
        board: anything with ``add_scalar(tag, value, step)``.
        prefix: goes before every tag.
    """

    def __init__(self, board: Any, prefix: str = "") -> None:
        if not callable(getattr(board, "add_scalar", None)):
            raise TypeError(f"board={board!r}: expected a torch.utils.tensorboard.SummaryWriter, or its add_scalar")
        self.board: Any = board
        self.prefix = prefix

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """One point of every figure that has a value, at this epoch or step."""
        for layer, row in scalars(figures).items():
            for name, value in row.items():
                if value is not None:
                    self.board.add_scalar(f"{self.prefix}{name}/{layer}", value, step)


class CSVWriter:
    """Writes one row for each call: ``step``, then ``layer.figure`` for every layer and figure.

    A row reaches the file in one piece, so a run that is killed leaves whole rows, and so does a full disk: the row
    that does not fit is taken back. Should the last row be torn after all (a crash of the machine), it is cut off when
    the file is opened again. An existing file is appended to.

        writer = qbr.CSVWriter("runs/one/layers.csv", purge_step=first_epoch)
        writer.write(epoch, monitor.read(reset=True))

    Args:
        path: the file; its folder must be there.
        purge_step: drop the rows of this step and later ones, which a resumed run is to write again; None keeps all.

    Raises:
        ValueError: for a file that is no such CSV. FileNotFoundError: where its folder is not there.
    """

    def __init__(self, path: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        if purge_step is not None:
            check_count(purge_step, "purge_step", least=0)
        self.path: Path = Path(path)
        self._header: list[str] | None = None
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: its folder is not there; make it first")
        if self.path.exists():
            self._take_up(purge_step)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append one row; a figure without a value is an empty cell. Figures without a layer, as ``bin_loss(model)``
        has them in warm-up, are no row.

        Args:
            step: an int, 0 or more: an epoch or a step, which a resumed run purges by.

        Raises:
            TypeError, ValueError: for another step; for other layers or figures than the file's first row has.
            OSError: where the row does not fit on the disk; the file is as it was before.
        """
        if isinstance(step, Integral) and not isinstance(step, bool):
            step = int(step)  # numpy's too
        check_count(step, "step", least=0)
        cells = {f"{layer}.{name}": v for layer, row in scalars(figures).items() for name, v in row.items()}
        if not cells:
            return
        header = ["step", *cells]
        if self._header is not None and header != self._header:
            differing = sorted(set(header) ^ set(self._header)) or ["their order"]
            raise ValueError(f"{self.path} has other columns than these figures ({len(differing)} differ, "
                             f"{differing[0]!r} for one): write to another file")  # fmt: skip
        text = "" if self._header is not None else _line(header)
        text += _line([step, *("" if value is None else value for value in cells.values())])
        row = text.encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(row) < len(row):  # a disk that is full takes what fits, without an error
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except BaseException:
                file.truncate(end)
                raise
        self._header = header

    def _take_up(self, purge_step: int | None) -> None:
        """Read the header of a file that is there; cut off a torn row and those from purge_step on."""
        no_such = f"{self.path} is not a CSVWriter's file (rows that begin with 'step' or a number): name another"
        try:
            text = self.path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(no_such) from error
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.reader(io.StringIO(whole)))
        if not rows:
            if not text.startswith("step,"[: len(text)]):  # else a header that was cut short
                raise ValueError(no_such)
            kept = ""
        else:
            if rows[0][:1] != ["step"] or not all(row[:1] and row[0].isdigit() for row in rows[1:]):
                raise ValueError(no_such)
            self._header = rows[0]
            kept = "".join(_line(row) for row in rows[1:] if purge_step is None or int(row[0]) < purge_step)
            kept = _line(rows[0]) + kept
        if kept != text:
            write_whole(self.path, lambda temporary: temporary.write_bytes(kept.encode()))


def _line(cells) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
