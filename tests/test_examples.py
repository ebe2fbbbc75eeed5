"""Every example runs to its end, as its head says: once to train and save, once more in a fresh process to restore."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tv

ROOT = Path(__file__).resolve().parents[1]
LARGE = ("vgg11_bn", "vit_b_16")  # 90 to 130 million weights
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
SMALL = [pytest.param(n, marks=[pytest.mark.slow] * (n == "mobilenet_v2")) for n in NAMES if n not in LARGE]


def check(name: str, path: Path, monkeypatch, capsys, compile) -> None:
    """Run an example here, with ``compile`` for torch.compile, and a second time, with --restore, in a new process."""
    if name != "transformer":
        tv.load()
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(sys, "argv", [name, str(path)])
    file = str(ROOT / f"examples/{name}.py")
    runpy.run_path(file, run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("name ") and "warning" not in printed
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        + ("import tv; tv.load()\n" if name != "transformer" else "")
        + f"sys.argv = [{name!r}, {str(path)!r}, '--restore']; runpy.run_path({file!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    path.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "restored and converted: the same outputs\n"


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs_uncompiled(name, tmp_path, monkeypatch, capsys):
    check(name, tmp_path / "saved.pt", monkeypatch, capsys, lambda model, fullgraph: model)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_compiled(name, tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()
    check(name, tmp_path / "saved.pt", monkeypatch, capsys, torch.compile)


def test_examples_are_short():
    assert set(LARGE) < set(NAMES)
    for name in NAMES:
        assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) <= 60, name
