"""Where qbr has to run: without a compiler, with a home and a site-packages that cannot be written to, after a fork.

Children, because what is tested is what a new process does. A child of root gives up root's right to write everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import fresh_native, needs_compiler, stubs  # noqa: F401 (fixtures)
from test_parity import load

from qbr.kernels import BackendUnavailable, build, library_cache, native

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="permissions as on Linux")

USE = """
import sys, torch, qbr
from qbr import functional as F
from qbr.kernels import native
native.__file__ = "/nowhere/native.py"        # a library that lies in the package is not looked at
x, spec = torch.linspace(-1, 1, 1000), qbr.QuantSpec(3)
reference = F.fake_quantize(x, 0.1, spec, backend="reference")
assert torch.equal(F.fake_quantize(x, 0.1, spec), reference)
model = qbr.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), qbr.QATConfig())
(model(torch.randn(2, 4)).sum() + qbr.bin_loss(model).weights).backward()
"""


def child(
    code: str, *, writable_everywhere: bool = True, cwd: Path | None = None, **changes
) -> subprocess.CompletedProcess:
    """Run code in a new process; changes are of the environment, None for a variable to be unset."""
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **changes}
    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    before = None if writable_everywhere or os.geteuid() != 0 else _give_up_root_s_right_to_write
    how = dict(env=env, cwd=cwd, preexec_fn=before, capture_output=True, text=True, timeout=300)
    return subprocess.run([sys.executable, "-c", code], **how)


def _give_up_root_s_right_to_write() -> None:
    import ctypes

    drop_from_bounding_set, dac_override = 24, 1  # linux/prctl.h, linux/capability.h
    ctypes.CDLL(None, use_errno=True).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


def close(*directories: Path) -> None:
    for directory in directories:
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o500 if path.is_dir() else 0o400)


@pytest.fixture
def closed(tmp_path):
    """A folder for closed folders, which are opened again when the test is over; a skip where nothing can be closed."""
    folder = tmp_path / "closed"
    (folder / "probe").mkdir(parents=True)
    close(folder / "probe")
    probe = child(f"open({str(folder / 'probe/file')!r}, 'w')", writable_everywhere=False)
    if "PermissionError" not in probe.stderr:
        pytest.skip("this user can write to what is closed")
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o700)


def test_without_a_compiler_and_with_nothing_built(tmp_path):
    """By "auto" the reference backend runs, backends() says why, and the native backend by name says what to do."""
    code = f"""{USE}
try:
    F.fake_quantize(x, 0.1, spec, backend="native")
except qbr.BackendUnavailable as error:
    print(error)
print(qbr.backends()["native"]["cpu"])
"""
    places = dict(XDG_CACHE_HOME=str(tmp_path / "cache"), TMPDIR=str(tmp_path))
    done = child(code, PATH="/nowhere", CXX=None, QBR_BUILD=None, **places)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    expected = "no C++ compiler (none of c++, g++, clang++): install g++ 10 or clang++ 12 or later, or set CXX"
    assert first == expected and second == f"BackendUnavailable: {expected}"


def test_a_broken_triton_is_not_taken_for_none(tmp_path):
    """The first would make "auto" take another backend without a word."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('raise ImportError("libtriton.so: undefined symbol")')
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from qbr.kernels import BackendUnavailable, triton_backend
try:
    triton_backend.load("cuda")
except ImportError as error:
    print(error)
sys.modules["triton"] = None
try:
    triton_backend.load("cuda")
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    first, second = done.stdout.splitlines()
    assert first == "libtriton.so: undefined symbol" and second.startswith("Triton is not installed")


def test_with_everything_closed_what_was_built_is_used(closed, tmp_path):
    """A home that cannot be written to, with the library in its cache; a site-packages that cannot, either; and no
    compiler: the native backend runs, and nothing was written anywhere."""
    load("native", "cpu")
    key = library_cache._key(build.source_dir(), build.find_torch(), False)
    shutil.copytree(native.status().path.parent, closed / "home/.cache/qbr" / key)
    site = closed / "site"  # also where the child stands: python -c looks for modules there first
    for name in ("qbr", "csrc"):
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.json"))
    close(closed / "home", site)
    there = sorted(closed.rglob("*"))
    code = USE + "F.fake_quantize(x, 0.1, spec, backend='native'); print(native.status().path, qbr.__file__)"
    places = dict(HOME=str(closed / "home"), XDG_CACHE_HOME=None, TMPDIR=str(tmp_path), PYTHONPATH=str(site))
    done = child(code, writable_everywhere=False, cwd=site, PATH="/nowhere", CXX=None, QBR_CUDA="0", **places)
    assert done.returncode == 0, done.stderr[-2000:]
    library, package = closed / "home/.cache/qbr" / key / build.LIBRARY, site / "qbr/__init__.py"
    assert done.stdout.split() == [str(library), str(package)]
    assert sorted(closed.rglob("*")) == there
    assert not list(tmp_path.glob("qbr-*"))


def test_a_closed_home_s_cache_lies_under_the_temporary_directory(closed, tmp_path):
    (closed / "home").mkdir()
    close(closed / "home")
    places = dict(HOME=str(closed / "home"), XDG_CACHE_HOME=None, TMPDIR=str(tmp_path))
    code = "from qbr.kernels import library_cache; print(library_cache.cache_dir())"
    done = child(code, writable_everywhere=False, **places)
    assert done.stdout.strip() == str(tmp_path / f"qbr-{os.getuid()}"), done.stderr


@needs_compiler
def test_nowhere_to_write_is_no_error_but_a_reason(fresh_native, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(library_cache.tempfile, "tempdir", None)
    monkeypatch.setattr(library_cache.tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(BackendUnavailable, match="no directory for what is built .*: set XDG_CACHE_HOME"):
        fresh_native.load("cpu")


def test_a_user_without_a_home_gets_no_folder_named_tilde(monkeypatch, tmp_path):
    """As in a container that runs under a number that no passwd has."""
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(library_cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    assert library_cache.cache_dir() == tmp_path / "tmp" / f"qbr-{os.getuid()}"
    assert not (tmp_path / "~").exists()


def test_a_fork_while_another_thread_loads():
    """The thread that would release the lock is not there in the child."""
    load("native", "cpu")
    loaded = native._loaded
    native._lock.acquire()
    try:
        child_id = os.fork()
        if child_id == 0:
            import signal

            signal.alarm(20)
            native._loaded = None
            try:
                os._exit(0 if native._load() == loaded else 2)
            finally:
                os._exit(3)
        _, status = os.waitpid(child_id, 0)
    finally:
        native._lock.release()
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_first_calls_of_several_threads():
    """Each backend is registered once, as torch demands: DataParallel's threads all make the first call."""
    code = """
import threading, time, torch, warnings
from qbr import kernels, ops
warnings.simplefilter("error")
failed, barrier, ways = [], threading.Barrier(4), kernels.list_functions
kernels.list_functions = lambda backend: time.sleep(0.1) or ways(backend)
kernels.resolve = lambda requested, device_type, dtype: requested

def first_call():
    barrier.wait()
    try:
        ops._backend("triton", "cpu", torch.float32)
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=first_call) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert not failed, failed
"""
    pytest.importorskip("triton")
    done = child(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
