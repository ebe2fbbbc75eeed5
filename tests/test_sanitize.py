"""csrc's CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the quick form of benchmarks/sanitize.py.

Hostile steps (0, negative, NaN, infinite, subnormal), NaN and infinities in x, tables of bins that no forward has made,
misaligned tensors and every tail: no access out of bounds, no undefined behaviour, and what scalar formulas give.
More than 2^31 elements: tests/test_large.py. All instruction sets and the guided fuzzer: --asan there.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from qbr.kernels import build

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sanitize(tmp_path_factory):
    """The command's module; skips where it cannot build."""
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "benchmarks" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    try:
        plan = build.plan(device=False)
    except build.CannotBuild as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = [*plan.compiler, *module.SANITIZERS, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    if build._run(probe).returncode or build._run([str(folder / "probe")]).returncode:
        pytest.skip("the compiler has no sanitizers here")
    return module


def test_quick_form(sanitize):
    lines = []
    sanitize.quick(lines.append)
    assert len(lines) == 2 and "matrix: 4" in lines[0] and "200 executions" in lines[1]


# What the driver has to find: accesses beyond a table, a tensor and scratch memory, an overflow, a wrong code.
PLANTED = {
    "table": ("cpu.cpp", "float entry[kMaxLevels] = {};", "float entry[kMaxLevels / 2] = {};", "overflow|of bounds"),
    "tail": ("cpu_loops.cpp", "store_first(xhat + i, bs, left);", "store(xhat + i, bs);", "AddressSanitizer"),
    "rows": ("cpu.cpp", "rows_.reset(new double[rows_length_]);", "rows_.reset(new double[1]);", "AddressSanitizer"),
    "bound": ("cpu.cpp", "int(q.qp - q.qn) + 1}", "int(q.qp * 1024) / 1024 - int(q.qn) + 1}", "outside the range"),
    "code": ("cpu_loops.cpp", "(code.c + 12582912.f)", "(code.c + 12582911.f)", "FAILED"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(sanitize, name, tmp_path):
    file, old, new, report = PLANTED[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / file
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))
    program = sanitize.build_driver(tmp_path, sanitize.instruction_sets()[-1], sources=tmp_path / "csrc")
    with pytest.raises(RuntimeError, match=report):
        sanitize.run_driver(program, "matrix", 23)
