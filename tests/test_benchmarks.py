"""The benchmarks: a case that fails is told, and costs no other; what they compare with runs where the model is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    import run

    def measured(bits):
        if bits == 4:
            raise AssertionError("not what the reference gives")
        return {"part": "kernels", "bits": bits, "times": {"fwd": {"median_s": 1.0}}}

    path = tmp_path / "run.json"
    cases = [(2,), (4,), (8,)]
    monkeypatch.setitem(run.PARTS, "kernels", lambda *_: (cases, measured))
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--part", "kernels", "--output", str(path)])
    with pytest.raises(SystemExit, match="kernels 4: AssertionError: not what the reference gives"):
        run.main()
    rows = json.loads(path.read_text())["kernels"]["rows"]
    assert [row.get("bits") for row in rows] == [2, None, 8] and rows[1]["failed"].startswith("AssertionError")

def test_calls_that_the_host_was_late_for_are_told(monkeypatch):
    import measure

    def time_once(run, device, device_only):
        seconds = measure.Seconds(1.0)
        seconds.host_late = device_only and run() == "slow"
        return seconds

    monkeypatch.setattr(measure, "time_once", time_once)
    runs = {"fast": lambda: "fast", "slow": lambda: "slow"}
    result = measure.alternate(runs, "cuda", 4, device_only=True)
    assert "host_late" not in result["fast"] and result["slow"]["host_late"] == 1.0
    assert "host_late" not in measure.alternate(runs, "cuda", 4)["slow"]


def test_a_run_of_rounds_of_its_own_tells_what_it_is_compared_with(monkeypatch):
    import measure

    seconds = iter([1.0, 2.0] * 5 + [3.0, 12.0, 4.0, 12.0, 2.0, 12.0])
    monkeypatch.setattr(measure, "time_once", lambda *_: measure.Seconds(next(seconds)))
    runs = dict.fromkeys(["limit", "fused", "eager"], lambda: None)
    result = measure.alternate_apart(runs, "eager", "cpu", 5)
    assert list(result) == ["limit", "fused", "eager"] and result["limit"]["median_s"] == 1
    assert result["eager"]["beside"]["median_s"] == 3 and result["eager"]["ratio"] == 4


def test_a_peer_that_does_not_import_is_told(monkeypatch):
    import registry

    def broken(case, alpha):
        raise ModuleNotFoundError("No module named 'requests'")

    def other(case, alpha):
        return lambda x: 0 * x, []

    monkeypatch.setattr(registry, "LSQ_PEERS", {"broken": broken, "other": other, "torch": registry._torch_learnable})
    runs, missing = registry.autograd_runs(registry.Case("cpu", "float32", 8, 8))
    assert list(runs) == ["qbr lsq_bin", "qbr lsq", "torch lsq"]
    assert "'requests'" in missing["broken"] and "not the same operation" in missing["other"]


@pytest.mark.parametrize("commit", ["abc", "another", "unknown"])
def test_a_part_that_was_stopped_goes_on_where_it_stopped(tmp_path, monkeypatch, commit):
    import measure
    import run

    seen = []

    def measured(bits):
        seen.append(bits)
        if len(seen) == 3 and bits == 8:
            raise KeyboardInterrupt
        return {"bits": bits, "times": {"fwd": {"median_s": float(len(seen))}}}

    path = tmp_path / "run.json"
    arguments = ["run.py", "--device", "cpu", "--part", "kernels", "--resume", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(measure, "_git", lambda *_: "")
    cases = [(2,), (4,), (8,)]
    monkeypatch.setitem(run.PARTS, "kernels", lambda *_: (cases, measured))
    monkeypatch.setattr(measure.sources, "commit", lambda: "abc")
    with pytest.raises(KeyboardInterrupt):
        run.main()
    monkeypatch.setattr(measure.sources, "commit", lambda: None if commit == "unknown" else commit)
    cases.append((16,))
    run.main()
    rows = json.loads(path.read_text())["kernels"]["rows"]
    assert [row["bits"] for row in rows] == [2, 4, 8, 16]
    assert seen[3:] == ([8, 16] if commit == "abc" else [2, 4, 8, 16])
    assert (rows[0]["times"]["fwd"]["median_s"] == 1) == (commit == "abc")


def test_a_drop_in_that_is_stopped_again_loses_nothing_and_mixes_nothing(tmp_path, monkeypatch):
    import drop_in
    import measure
    import steps

    def tensor_row(device, size, bits, repeats):
        if bits in failing:
            raise failing[bits]
        return {"bits": bits, "times": {}, "n": repeats}

    failing = {4: RuntimeError("now and then")}
    monkeypatch.setattr(measure, "_git", lambda *_: "")
    monkeypatch.setattr(measure.sources, "commit", lambda: "abc")
    monkeypatch.setattr(steps, "row", lambda device, batch, repeats, kinds: {"times": {}, "n": repeats})
    monkeypatch.setattr(drop_in, "tensor_row", tensor_row)
    path = tmp_path / "drop_in.json"
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--device", "cpu", "--resume", "--output", str(path)])
    with pytest.raises(SystemExit, match="now and then"):
        drop_in.main()
    failing = {4: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        drop_in.main()
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["24 2", "32"]
    failing = {}
    drop_in.main()
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["24 2", "24 4", "32"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--repeats", "5"])
    drop_in.main()
    assert {row["n"] for row in json.loads(path.read_text())["rows"]} == {5}


def test_a_step_that_fails_costs_the_drop_in_no_tensor(tmp_path, monkeypatch):
    import drop_in
    import steps

    def fails(*_):
        raise RuntimeError("two devices")

    monkeypatch.setattr(steps, "row", fails)
    monkeypatch.setattr(drop_in, "tensor_row", lambda device, size, bits, repeats: {"bits": bits, "times": {}})
    path = tmp_path / "drop_in.json"
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--device", "cpu", "--output", str(path)])
    with pytest.raises(SystemExit, match="step 32: RuntimeError: two devices"):
        drop_in.main()
    assert [row.get("bits") for row in json.loads(path.read_text())["rows"]] == [2, 4, None]


def test_the_predecessor_s_steps_are_where_its_model_is():
    import predecessor

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).to("meta")
    predecessor.prepare(model, 2, 2)
    placed = {name: t.device.type for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert len(placed) == 10 and set(placed.values()) == {"meta"}
