"""Runs an experiment script to which something happens at a chosen moment: a kill, a signal, a disk that is full.

    python tests/mishaps.py '{"event": "half last.pth", "count": 2, "then": "SIGKILL"}' cifar10_qat_br --quick ...

Moments are events that the run passes: ``step`` (before an optimizer step), and for every file that is written whole
``make NAME``, ``made NAME`` (it is there, empty), ``write NAME`` (before a piece), ``half NAME`` (half of
the piece is in the file), ``fsync NAME``, ``replace NAME`` and ``replaced NAME``. A plan may also have ``limit`` (bytes
that a file may have), ``disk`` (mount a disk of so many bytes at the folder ``at``, and copy what is on it to ``copy``
in the end), ``unprivileged`` (root without its right to pass over permission bits), ``cpu`` (SIGKILL after so many
seconds of processor time) and ``small`` (a smaller network). ``Server`` forks such runs from one process that has
imported everything; each is a process of its own, and ends as one.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_ALLOWED = 77  # the exit code where this machine does not let us mount a disk


class Mishap:
    """Counts events; at the count-th of the plan's kind sends the signal, or raises the error, ``then``."""

    def __init__(self, plan: dict) -> None:
        self.event, self.count, self.then = plan.get("event"), plan.get("count", 1), plan.get("then", "SIGKILL")
        self.folder = plan.get("at")
        self.seen: dict[str, int] = {}

    def reach(self, event: str) -> None:
        self.seen[event] = self.seen.get(event, 0) + 1
        if event != self.event or self.seen[event] < self.count:
            return
        if self.then == "read-only":
            os.chmod(self.folder, 0o555)
        elif self.then.startswith("SIG"):
            if self.seen[event] == self.count:
                os.kill(os.getpid(), getattr(signal, self.then))
        else:  # from now on, as on a disk that stays full
            number = getattr(errno, self.then)
            raise OSError(number, os.strerror(number))

    def install(self) -> None:
        engine = importlib.import_module("cifar10.engine")
        make, fsync, replace = Path.open, os.fsync, os.replace
        names: dict[int, str] = {}

        def opened(path, mode="r", *args, **kwargs):
            name = _written(path)
            if name is None or mode == "rb+":  # to have it on the disk
                file = make(path, mode, *args, **kwargs)
                if name:
                    names[file.fileno()] = name
                return file
            self.reach(f"make {name}")
            file = make(path, mode, *args, **kwargs)
            self.reach(f"made {name}")
            return _Watched(file, name, self)

        def synced(handle):
            if handle in names:
                self.reach(f"fsync {names.pop(handle)}")
            fsync(handle)

        def replaced(old, new):
            name = _written(Path(old))
            if name:
                self.reach(f"replace {name}")
            replace(old, new)
            if name:
                self.reach(f"replaced {name}")

        Path.open, os.fsync, os.replace = opened, synced, replaced
        update = engine.Trainer._update

        def step(*args):
            self.reach("step")
            return update(*args)

        engine.Trainer._update = step


def _written(path: Path) -> str | None:
    """The file that ``path`` is a temporary file of."""
    match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
    return match[1] if match else None


class _Watched:
    """A file whose writes are events."""

    def __init__(self, file, name: str, mishap: Mishap) -> None:
        self.file, self.name, self.mishap = file, name, mishap

    def write(self, piece):
        self.mishap.reach(f"write {self.name}")
        half = len(piece) // 2
        self.file.write(piece[:half])
        if self.mishap.event == f"half {self.name}":
            self.file.flush()
        self.mishap.reach(f"half {self.name}")
        self.file.write(piece[half:])
        return len(piece)

    def __enter__(self):
        return self

    def __exit__(self, *about):
        return self.file.__exit__(*about)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def run(plan: dict, script: str, flags: list[str]) -> int:
    """Run the script in this process; its exit code. plan["events"] is a file for how often each event came."""
    mishap = Mishap(plan)
    mishap.install()
    if "limit" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], plan["limit"]))
    if plan.get("unprivileged"):
        _obey_permission_bits()
    if "disk" in plan and not _mount_disk(plan["at"], plan["disk"]):
        return NOT_ALLOWED
    if plan.get("small"):  # and no report, whose plots take longer than the rest
        models = importlib.import_module("cifar10.models")
        models.MODELS["resnet20"] = lambda classes: models.ResNet((8, 16), 1, False, classes)
        importlib.import_module("cifar10.runs").report.write = lambda folder: folder / "report.html"
    try:
        return importlib.import_module(script).main(flags)
    finally:
        if "events" in plan:
            Path(plan["events"]).write_text(json.dumps(mishap.seen))
        if "disk" in plan:
            shutil.copytree(plan["at"], plan["copy"])


def _obey_permission_bits() -> None:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root writes to what is read-only (capabilities(7))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the upper halves
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    for index in range(3):
        sets[index] &= ~0b110
    assert libc.capset(header, sets) == 0


def _mount_disk(folder: str, size: int) -> bool:
    """A disk in memory that this process alone sees."""
    new_namespace, recursive, private = 0x20000, 0x4000, 1 << 18  # CLONE_NEWNS; MS_REC, MS_PRIVATE
    libc = ctypes.CDLL(None)
    return (
        libc.unshare(new_namespace) == 0
        and libc.mount(b"none", b"/", None, recursive | private, None) == 0
        and libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
    )


def wait(pid: int, cpu: float | None) -> tuple[int, float]:
    """The return code (-9 for a kill) and the processor time of a child; killed after ``cpu`` seconds of it."""
    while cpu is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        if sum(map(int, used)) / os.sysconf("SC_CLK_TCK") >= cpu:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


class Server:
    """with Server() as server: server.run(log, plan, script, flags)."""

    def __enter__(self):
        command = [sys.executable, __file__, "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(300)

    def run(self, log: Path, plan: dict, script: str, flags: list[str]) -> tuple[int, float]:
        """The return code as subprocess gives it (-9 for a kill), and the processor time; output goes to ``log``."""
        self.process.stdin.write(json.dumps([str(log), plan, script, flags]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


def _serve() -> None:
    import torch

    from qbr import kernels

    torch.set_num_threads(1)
    for module in ("cifar10_qat_br", "PIL.Image", "torch._dynamo"):  # what a run would import
        importlib.import_module(module)
    kernels.resolve("auto", "cpu", torch.float32)
    for line in sys.stdin:
        log, plan, script, flags = json.loads(line)
        child = os.fork()
        if child == 0:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, 1), os.dup2(handle, 2)
            code = 1
            try:
                code = run(plan, script, flags)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        print(json.dumps(wait(child, plan.get("cpu"))), flush=True)
    os._exit(0)  # without the seconds that taking down what it imported would cost


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
    if sys.argv[1] == "--serve":
        _serve()
    else:
        sys.exit(run(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]))
