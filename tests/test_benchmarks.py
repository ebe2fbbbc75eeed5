"""benchmarks/run.py: a case that fails is told, and costs no other case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    import run

    def measured(bits):
        if bits == 4:
            raise AssertionError("not what the reference gives")
        return {"part": "kernels", "bits": bits, "times": {"fwd": {"median_s": 1.0}}}

    path = tmp_path / "run.json"
    cases = [(2,), (4,), (8,)]
    monkeypatch.setitem(run.PARTS, "kernels", lambda device, *_: run.each("kernels", device, cases, measured))
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--part", "kernels", "--output", str(path)])
    with pytest.raises(SystemExit, match="kernels 4: AssertionError: not what the reference gives"):
        run.main()
    rows = json.loads(path.read_text())["kernels"]["rows"]
    assert [row.get("bits") for row in rows] == [2, None, 8] and rows[1]["failed"].startswith("AssertionError")
