"""Long use leaves nothing behind: memory stays flat, no step's graph outlives it, no cache grows; forked workers work.

Some hundreds of steps; 10,000 of them, and processes and threads that build at once, are in the slow form:

    python -m pytest -q tests/test_long_use.py -m slow
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from test_build import needs_compiler
from test_parity import load
from torch import nn

import qbr
from qbr.kernels import build, library_cache

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")
# The allocator keeps pages for later, and so moves by some of them. 10,000 steps that each left one tensor of 800 bytes
# behind, the least activation here, would be at twice that.
FLAT = 4 * 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def alive() -> dict[str, int]:
    """How many tensors and contexts of autograd functions Python knows of, by type."""
    found: dict[str, int] = {}
    for kind in map(type, gc.get_objects()):
        if issubclass(kind, torch.Tensor) or kind.__name__.endswith("Backward"):
            found[kind.__name__] = found.get(kind.__name__, 0) + 1
    return found


def containers() -> dict[str, int]:
    """The sizes of everything that qbr's modules keep at their top level, and of functions' caches."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "qbr":
            continue
        for name, value in vars(module).items():
            if hasattr(value, "cache_info"):
                found[f"{module_name}.{name}"] = value.cache_info().currsize
            elif hasattr(type(value), "__len__") and not name.startswith("__"):
                found[f"{module_name}.{name}"] = len(value)
    return found


class Course:
    """A training of a small prepared model, with a Monitor, an AlphaControl and metrics."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = qbr.prepare(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(),
                          nn.Flatten(), nn.Linear(128, 10)),
            qbr.QATConfig(weight_bits=3, act_bits=4, overrides={"3": {"weight_per_channel": True}}),
        )  # fmt: skip
        self.saved: list[weakref.ref] = []  # what backward needs of each forward's first activation
        self.model[2].register_forward_pre_hook(lambda _, x: self.saved.append(weakref.ref(x[0].untyped_storage())))
        self.control = qbr.AlphaControl(freeze_acts=qbr.Freeze(step=100, release_step=150)).attach(self.model)
        self.control.begin_epoch(1)
        self.monitor = qbr.Monitor(self.model, frequency=0.01)
        groups = qbr.parameter_groups(self.model, lr=0.01, weight_decay=1e-4)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.images, self.labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))

    def train(self, steps: int) -> None:
        for i in range(steps):
            self._step(with_figures=i % 50 == 0)
            assert all(ref() is None for ref in self.saved), f"the graph of step {i} outlives it"
            self.saved.clear()

    def _step(self, with_figures: bool) -> None:
        self.control.begin_step()
        self.optimizer.zero_grad()
        out = self.model(self.images)
        br = qbr.bin_loss(self.model)
        (nn.functional.cross_entropy(out, self.labels) + 0.1 * br.weights + 0.1 * br.activations).backward()
        self.optimizer.step()
        if with_figures:  # as an epoch's end does
            assert len(br.metrics()) == len(self.monitor.read(reset=True)) == 5
            self.model.eval()
            with torch.no_grad():
                self.model(self.images)
            self.model.train()


def check_flat(monkeypatch, warm_up: int, steps: int) -> None:
    """With the garbage collector off: what a step makes has to go with the step, not when a cycle is found."""
    load("native", "cpu")
    course = Course()
    course.train(warm_up)
    for function in ("build_cached", "find_built", "cache_dir"):  # a step has no business with what is built
        monkeypatch.setattr(library_cache, function, None)
    gc.collect()
    gc.disable()
    try:
        before = alive(), containers()
        memory = resident()
        course.train(steps)
        grown = resident() - memory
        assert (alive(), containers()) == before
        print(f"{steps} steps: {grown / 1024:.0f} KiB more in memory")
        assert grown < FLAT, f"{grown / 2**20:.1f} MiB more after {steps} steps"
    finally:
        gc.enable()


@linux
def test_hundreds_of_steps_leave_nothing(monkeypatch):
    check_flat(monkeypatch, warm_up=200, steps=300)


@linux
@pytest.mark.slow
def test_ten_thousand_steps_leave_nothing(monkeypatch):
    check_flat(monkeypatch, warm_up=1000, steps=10_000)


def test_models_that_are_gone_leave_nothing():
    """Prepared, trained, converted, dropped: no registry, hook or cache of qbr holds on to a model."""
    Course().train(2)
    gc.collect()
    before = {**alive(), **containers()}
    for _ in range(3):
        course = Course()
        course.train(2)
        plain = qbr.convert(course.model.eval())
        gone = [weakref.ref(each) for each in (course.model, plain, course.control, course.monitor)]
        del course, plain
        gc.collect()
        assert [ref() for ref in gone] == [None] * 4
    after = {**alive(), **containers()}  # what other tests' graphs held may have gone
    assert {name: count for name, count in after.items() if count > before.get(name, 0)} == {}


# ---- fork ----------------------------------------------------------------------------------------------------------

FORKED = """
import torch, qbr
from qbr import functional as F

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        x = torch.randn(300, 700, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            loss, bins = F.bin_loss(x, 0.3, qbr.QuantSpec(4), backend="native")
            return F.fake_quantize(x, 0.3, qbr.QuantSpec(4), backend="native"), loss, bins.table

def in_workers():
    loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    return [[t.clone() for t in each] for each in loader]

torch.set_num_threads(2)
first = in_workers()                          # they load the library themselves
here = [Data()[i] for i in range(8)]          # the parent's pool of threads is up from here on
F.fake_quantize(torch.randn(300, 700, requires_grad=True), 0.3, qbr.QuantSpec(4)).sum().backward()
for there in (first, in_workers(), in_workers()):
    assert len(there) == 8
    assert all(torch.equal(a, b) for one, other in zip(here, there) for a, b in zip(one, other))
print("equal")
"""


@linux
def test_forked_workers_use_the_ops():
    """DataLoader's workers, forked before and after the parent has used its threads, give the parent's bits."""
    load("native", "cpu")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", FORKED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["equal"], done.stderr[-2000:]


@linux
def test_a_child_forked_during_a_build_holds_up_nobody(tmp_path):
    """It has copies of the lock's file and of everything else; when the build ends, others must get the lock."""
    import fcntl

    ready, wait = os.pipe(), os.pipe()
    with library_cache._locked(tmp_path / "a.lock"):
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(wait[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with (tmp_path / "a.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.write(wait[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *wait):
            os.close(end)


# ---- building at once ----------------------------------------------------------------------------------------------

BUILDING = """
import json, sys, threading
import torch, qbr
from qbr.kernels import native

native.__file__ = "/nowhere/native.py"        # a library that lies in the package is not looked at
found, x = [], torch.linspace(-1, 1, 100)
def use():
    found.append(qbr.functional.fake_quantize(x, 0.3, qbr.QuantSpec(2), backend="native"))
threads = [threading.Thread(target=use) for _ in range(2)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(found) == 2 and torch.equal(*found)
print(json.dumps([str(native.status().path), found[0].tolist()]))
"""


@linux
@pytest.mark.slow
@needs_compiler
def test_processes_and_threads_build_the_real_library_once(tmp_path):
    """Two processes of two threads each into one empty cache: one builds, three wait; at no time does the library's
    name hold anything but the whole library."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "QBR_CUDA": "0", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env.pop("QBR_BUILD", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", BUILDING], env=env, **pipes) for _ in range(2)]
    sizes = set()
    while any(process.poll() is None for process in both):
        for library in tmp_path.glob("qbr/*/" + build.LIBRARY):
            if library.parent.name.endswith(("x86_64", "aarch64")):  # not one of the builder's own folders
                sizes.add(library.stat().st_size)
                assert (library.parent / build.RECORD).exists()
        time.sleep(0.01)
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    library = Path(json.loads(results[0][0])[0])
    assert library.parent.parent == tmp_path / "qbr" and sizes == {library.stat().st_size}
    assert sum("building" in err for _, err in results) == 1
    assert sum(p.is_dir() for p in (tmp_path / "qbr").iterdir()) == 1
