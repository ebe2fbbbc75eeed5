"""The list of mutants.py does not rot: each fault's text stands in its file once, and the result on record is of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mutants import MUTANTS, SUITES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_fault_still_applies(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"expected once in {mutant.file}: {mutant.old!r}"
    assert mutant.new != mutant.old and mutant.suite in SUITES
    if mutant.file.endswith(".py"):
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")


def test_the_list_is_long_and_names_are_told_apart():
    assert len(MUTANTS) >= 40 and len({m.name for m in MUTANTS}) == len(MUTANTS)
    rooms = ["csrc/cpu", "csrc/bindings", "csrc/cuda", "qbr/kernels/triton", "qbr/kernels/reference", "qbr/export"]
    assert all(any(m.file.startswith(room) for m in MUTANTS) for room in rooms)


def test_every_suite_names_files_that_are_there():
    for words in SUITES.values():
        files = [word for word in words.split() if word.endswith(".py")]
        assert files and all((ROOT / "tests" / file).exists() for file in files)


def test_nothing_on_record_survived():
    """Every fault has a result, of the text that it has now: `python tests/mutate.py --output` runs what has none."""
    expected = {m.name: [m.file, m.old, m.new, SUITES[m.suite]] for m in MUTANTS if not m.equivalent}
    results = json.loads(RESULTS.read_text())
    assert {name: each["fault"] for name, each in results.items()} == expected
    assert not [name for name, each in results.items() if not each["killed"]]
