"""The parity matrix of Triton's kernels, executed on the CPU by Triton's interpreter in a process of its own.

The interpreter must be chosen before Triton is imported, and ahead-of-time compilation needs it off: hence a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.5.0":
    pytest.skip("the interpreter of Triton 3.6 does not work with numpy 2.5", allow_module_level=True)
TESTS = Path(__file__).parent


MATRIX = "test_parity.py::test_parity"
PARTS = {
    "f32": ([MATRIX, "-k", "triton-cpu-f32"], 100),
    "bf16": ([MATRIX, "-k", "triton-cpu-bf16"], 100),
    "lists": (["test_foreach.py", "-k", "triton-cpu and test_lists_are_loops and relu and f32"], 1),
    "awkward values": (["test_parity.py", "--deselect", f"tests/{MATRIX}", "-k", "triton-cpu"], 45),
    "padding": (["test_padding.py", "-k", "triton-cpu"], 4),
    "dampening": (["test_dampening.py", "-k", "triton-cpu and f32 and (w2 or w4-channel1 or u4-relu)"], 4),
}


FLOAT16 = [MATRIX, "-k", "triton-cpu-f16"], 100
PROPERTIES = ["test_properties.py", "test_properties_equal.py", "-k", "triton-cpu"], 14  # a few examples of each


def run(arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("part", PARTS)
def test_parity_in_the_interpreter(part):
    arguments, least = PARTS[part]
    check(run(arguments), least)


@pytest.mark.slow
def test_float16_in_the_interpreter():
    arguments, least = FLOAT16
    check(run(arguments), least)


@pytest.mark.slow
def test_properties_in_the_interpreter():
    arguments, least = PROPERTIES
    check(run(arguments), least)


def check(child, least: int) -> None:
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    closing = child.stdout.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", closing).group(1)) >= least, f"too few tests ran: {closing}"
