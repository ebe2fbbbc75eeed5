#!/usr/bin/env python3
"""A Markdown table of several finished runs, from their results.json alone: compare.py RUN_FOLDER ..."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from cifar10.files import markdown_table


def row(folder: Path) -> list[str]:
    """One run's cells: name, test accuracies, BR per epoch of the BR phase, seconds per epoch, threads and device."""
    results = json.loads((folder / "results.json").read_text())
    status = results.get("status") if isinstance(results, dict) else None
    if status != "finished":
        what = "is none of a run" if status is None else f"says {status}: finish the run with --resume"
        raise ValueError(f"{folder}: its results.json {what}")
    epochs, final = results["epochs"], results["final"]

    def per_epoch(key: str, digits: int) -> str:
        return " → ".join(f"{e[key]:.{digits}f}" for e in epochs if key in e) or "–"

    accuracy = [f"{final[which]['test_acc']:.2f} (epoch {final[which]['epoch']})" for which in ("best", "last")]
    validation = " → ".join(f"{e['val_acc']:.2f}" for e in epochs if e["val_acc"] is not None) or "–"
    seconds = ", ".join(f"{e['seconds']:.{1 if e['seconds'] < 100 else 0}f}" for e in epochs)
    return [folder.name, *accuracy, validation, per_epoch("br_w", 4), per_epoch("br_a", 3), seconds, results["device"]]


def table(folders: list[Path]) -> str:
    head = ["run", "test %, best epoch", "test %, last", "validation % per epoch", "BR_W per epoch", "BR_A per epoch",
            "seconds per epoch", "device"]  # fmt: skip
    return markdown_table(head, [row(folder) for folder in folders])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    try:
        print(table(parser.parse_args().runs))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
