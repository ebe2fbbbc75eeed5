"""py.typed: a user's program passes a type checker, wrong ones do not, and what it says is what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent


def test_a_users_program_is_typed(tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path)]
    environment = {**os.environ, "MYPYPATH": str(TESTS.parent)}
    run = subprocess.run(
        [*command, str(TESTS / "typed_program.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_it_runs(capsys):
    import typed_program

    torch.manual_seed(0)
    assert typed_program.train(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) != 0
    assert typed_program.tensors(torch.randn(4, 6), torch.full((4,), 0.5)) == 3 + 4
    assert "conv" in capsys.readouterr().out
