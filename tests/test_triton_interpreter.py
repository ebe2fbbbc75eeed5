"""The parity matrix of Triton's kernels, executed on the CPU by Triton's interpreter in a process of its own.

The interpreter must be chosen before Triton is imported, and ahead-of-time compilation needs it off: hence a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent


@pytest.mark.parametrize("part", ["f32", "bf16", "f16", "not test_parity"])
def test_parity_in_the_interpreter(part):
    select = f"triton-cpu and ({part})" if part.startswith("not") else f"test_parity and triton-cpu and {part}-"
    if part == "f16":
        select += " and not bf16"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(TESTS / "test_parity.py"),
        "-k",
        select,
    ]
    child = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    closing = child.stdout.strip().splitlines()[-1] if child.stdout.strip() else child.stderr[-2000:]
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", closing).group(1))
    assert passed >= 100 or part.startswith("not") and passed >= 40, f"too few tests ran: {closing}"
