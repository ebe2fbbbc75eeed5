"""benchmarks/overhead.py: runs, compares what it times, and gives every figure."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch


def test_every_row_is_measured_and_its_results_compared(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    overhead = importlib.import_module("overhead")
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "LAYERS", 2)
    rows = overhead.rows("cpu", 2)
    assert [row["part"] for row in rows] == ["weight"] * 4 + ["relu"] * 4 + ["model"] * 4
    for row in rows:
        assert row["module_us"] > 0 and row["overhead_us"] == row["module_us"] - row["raw_us"]
    relu = overhead._relu
    monkeypatch.setattr(overhead, "_relu", lambda *how: {**relu(*how), "module": lambda: torch.zeros(4, 4)})
    with pytest.raises(AssertionError, match="relu"):
        overhead.rows("cpu", 2)
