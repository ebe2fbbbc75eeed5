"""Fixtures and path set-up for all tests; the Triton interpreter is switched on by TRITON_INTERPRET=1 alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# ptxrun executes compiled GPU kernels on the CPU; tests that need it skip where it is not there.
_PTXRUN = Path(os.environ.get("PTXRUN_HOME", Path(__file__).resolve().parents[2] / "shared" / "ptxrun"))
if _PTXRUN.is_dir():
    sys.path.insert(0, str(_PTXRUN))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fresh floating-point memory from torch.empty is NaN, so an element that nobody wrote shows."""

    def poison(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
