"""Fixtures and path set-up for all tests; the Triton interpreter is switched on by TRITON_INTERPRET=1 alone."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# ptxrun executes compiled GPU kernels on the CPU; tests that need it skip where it is not there.
_PTXRUN = Path(os.environ.get("PTXRUN_HOME", Path(__file__).resolve().parents[2] / "shared" / "ptxrun"))
if _PTXRUN.is_dir():
    sys.path.insert(0, str(_PTXRUN))

# cuBLAS reads it at its first call in the process; without it torch's deterministic mode refuses matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell's job in the background ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The file that takes longest comes first: with several processes nobody waits for the last of it.
LONGEST = "test_triton_interpreter.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != LONGEST)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests in one process, as they share fixtures, but each child of the interpreter's by itself."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if LONGEST in nodeid else super()._split_scope(nodeid)

    if config.getvalue("dist") != "load":  # of -n; somebody who names another way gets it
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture
def int2_runtime():
    """Skips where onnxruntime cannot open files with 2-bit types, as under Python 3.10."""
    pytest.importorskip("onnxruntime", minversion="1.24", reason="2-bit types want onnxruntime 1.24, and Python 3.11")


@pytest.fixture(autouse=True)
def device_is_there(request):
    """An error on a device stays with its process, and would fail every test after the one that made it."""
    yield
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        lost = f"{request.node.nodeid} has lost the device: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(lost, returncode=1)
        print(lost, file=sys.__stderr__, flush=True)
        os._exit(1)  # pytest-xdist starts another


@pytest.fixture
def poisoned_empty():
    """Fresh memory from torch is NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
