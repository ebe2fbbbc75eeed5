"""The cache of built libraries: one directory of this user alone, one build at a time, found again by its sources.

Environment:
    XDG_CACHE_HOME   where the cache lies: in its folder qbr; ~/.cache where it is not set
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qbr.kernels import build
from qbr.kernels.build import Built, CannotBuild, Torch


class UnsafeDirectory(RuntimeError):
    """Somebody else may write where libraries are loaded from; the message says where, and how to mend it."""


def _check_ours(path: Path, kind: Callable[[int], bool]) -> None:
    """Raise UnsafeDirectory unless ``path``, itself and no link to it, is this user's; of a directory, his alone."""
    status = path.lstat()
    if not kind(status.st_mode):
        problem = "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not what qbr made"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}, not to {os.getuid()}"
    elif stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022:
        problem = f"can be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
    else:
        return
    raise UnsafeDirectory(f"{path} {problem}, and what lies there would be loaded as part of this process: remove it, "
                          "or set XDG_CACHE_HOME to a directory of your own")  # fmt: skip


def _private(directory: Path) -> Path | None:
    """The directory, made if need be; None where it cannot be made or written to.

    Raises:
        UnsafeDirectory: if it is there and somebody else can write to it.
    """
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _check_ours(directory, stat.S_ISDIR)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError:
        return None


def _places() -> list[Path]:
    """Where a cache may lie, the best first: under the home, and under the temporary directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base and os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    places = [home / "qbr"] if home.is_absolute() else []  # "~" stays for a user without a home
    with contextlib.suppress(FileNotFoundError):  # no temporary directory can be written to
        places.append(Path(tempfile.gettempdir()) / f"qbr-{os.getuid()}")
    return places


def cache_dir() -> Path:
    """A directory of this user alone: under the home, else under the temporary directory, else one for this process.

    Raises:
        UnsafeDirectory: as ``_private``. CannotBuild: where nothing can be written to.
    """
    for place in _places():
        if (directory := _private(place)) is not None:
            return directory
    try:
        return Path(tempfile.mkdtemp(prefix="qbr-"))
    except OSError as error:
        raise CannotBuild(f"no directory for what is built ({error}): set XDG_CACHE_HOME to one of yours") from error


def _key(sources: Path, torch: Torch | None, cuda: bool) -> str:
    """Sources, torch's release, and whether a CUDA part was tried: not the compilers, which may be gone by now."""
    release = "none" if torch is None else "{}.{}".format(*torch.release)
    return f"{build.sources_hash(sources, cuda)}-torch{release}-{'cuda' if cuda else 'cpu'}-{platform.machine()}"


def _read_cached(target: Path) -> Built | None:
    built = Built.read(target)
    if built is not None:
        _check_ours(target, stat.S_ISDIR)
        _check_ours(built.path, stat.S_ISREG)
    return None if built and not built.cuda and os.environ.get("QBR_CUDA") == "1" else built


def find_cached(sources: Path, cache: Path, device: bool = True) -> Built | None:
    """What was built before, if it is of these sources; UnsafeDirectory if somebody else may have put it there.

    Raises:
        BuildFailed: QBR_CUDA=1, nothing that was built has a CUDA part, and there is no nvcc.
    """
    torch = build.find_torch()
    if build.why_no_cuda(torch, sources, device) is None:
        built = _read_cached(cache / _key(sources, torch, True))
        if built is not None:  # whether or not nvcc is still there
            return built
    nvcc, why = build.cuda_plan(torch, sources, device)
    built = None if nvcc else _read_cached(cache / _key(sources, torch, False))
    return replace(built, why_no_cuda=why) if built else None  # when it was built that may have been another


def find_built(sources: Path, device: bool = True) -> Built | None:
    """find_cached() in whichever cache is there, also one that cannot be written to; makes no directory.

    Not in those that come after one that can be written to: nothing is built there, and others may have made them.
    """
    for place in _places():
        if os.path.lexists(place):
            _check_ours(place, stat.S_ISDIR)
            if (built := find_cached(sources, place, device)) is not None:
                return built
        there = next(each for each in (place, *place.parents) if each.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            break
    return None


def build_cached(sources: Path | None = None, cache: Path | None = None, device: bool = True) -> Built:
    """Build into the cache, once, whoever else is at it: the others wait, then find it there.

    Without a ``device`` the CUDA part, which takes nvcc far longer than all else, is left out.

    Raises:
        CannotBuild, BuildFailed: as ``plan`` and ``build`` do.
    """
    p = build.plan(sources, device)
    cache = cache or cache_dir()
    target = cache / _key(p.sources, p.torch, p.nvcc is not None)
    with _locked(cache / f"{target.name}.lock"):
        found = _read_cached(target)
        if found is not None:
            return found
        for left in cache.glob(f"{target.name}.*/"):  # of a build that was killed: nobody else is at this one
            shutil.rmtree(left, ignore_errors=True)
        _say(f"building the native extension, once, in {target} ...")
        start = time.perf_counter()
        staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache))
        try:
            built = build.build(p, staging)
            shutil.rmtree(target, ignore_errors=True)  # half a directory from an older failure, or none
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    why = "with CUDA" if built.cuda else f"without CUDA: {(built.why_no_cuda or '').splitlines()[0]}"
    _say(f"built in {time.perf_counter() - start:.0f} s ({why})")
    return _read_cached(target)


@contextlib.contextmanager
def _locked(path: Path):
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing is not enough: a process that was forked meanwhile has the file open, too
            fcntl.flock(file, fcntl.LOCK_UN)


def _say(message: str) -> None:
    print(f"qbr: {message}", file=sys.stderr, flush=True)
