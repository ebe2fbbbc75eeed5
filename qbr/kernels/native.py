"""The native backend: finds the compiled extension, or builds it once, and loads it.

The library registers its kernels with the ops of namespace ``qbr_native`` itself, so nothing is forwarded here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from qbr.fork_lock import ForkLock
from qbr.kernels import BackendUnavailable, build, library_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_lock = ForkLock()
_loaded: build.Built | None = None
_broken: RuntimeError | OSError | None = None


def load(device_type: str) -> None:
    """Load the extension for this device; builds it where there is none yet.

    Raises:
        BackendUnavailable: naming what is missing (a compiler, the CUDA part) and how to get it.
        RuntimeError: if the compiler was there and failed, with the end of its output.
    """
    if device_type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"the native backend runs on cpu and cuda, not on {device_type!r}: use 'reference'")
    built = _loaded or _load()
    if device_type == "cuda" and not built.cuda:
        raise BackendUnavailable(f"the native backend has no CUDA part here: {built.why_no_cuda}")


def status() -> build.Built | None:
    """What is loaded: its path, whether it has a CUDA part, and why not; None if nothing is loaded yet."""
    return _loaded


def _load() -> build.Built:
    global _loaded, _broken
    with _lock:
        if _loaded is not None:
            return _loaded
        if _broken is not None:  # a build that broke will break again: do not wait for it twice
            raise _broken
        try:
            built = _find_or_build()
            try:
                torch.ops.load_library(str(built.path))
            except OSError as error:
                message = f"{built.path} cannot be loaded ({error}): delete it, and it is built anew"
                raise RuntimeError(message) from error
        except BackendUnavailable:
            raise
        except (RuntimeError, OSError) as error:  # OSError: a full disk, say
            _broken = error
            raise
        _loaded = built
        return built


def _packaged(sources: Path | None) -> build.Built | None:
    """The library in the package, if it is of these sources or there are none beside it."""
    found = build.Built.read(Path(__file__).resolve().parent)
    if found is None or sources is None or found.sources == build.sources_hash(sources, found.cuda):
        return found
    return None


def _find_or_build() -> build.Built:
    """The library in the package, else in the cache, else a new one.

    Raises:
        as load(), and library_cache.UnsafeDirectory.
    """
    sources, device = build.source_dir(), _device()
    packaged = _packaged(sources)
    if packaged is None:
        return (library_cache.find_built(sources, device) if sources else None) or _build(device)
    if packaged.cuda or sources is None:
        return packaged
    try:
        why_no_cuda = build.why_no_cuda(build.find_torch(), sources, device)
        if why_no_cuda is None:  # installed beside a CPU-only torch and used beside a CUDA build, or once without nvcc
            cached = library_cache.find_built(sources, device)
            why_no_cuda = None if cached else build.cuda_plan(build.find_torch(), sources, device)[1]
            if why_no_cuda is None:
                return cached or _build(device)
    except (BackendUnavailable, build.BuildFailed, library_cache.UnsafeDirectory) as error:
        if os.environ.get("QBR_CUDA") == "1":
            raise
        why_no_cuda = str(error)
    return replace(packaged, why_no_cuda=why_no_cuda)


def _build(device: bool) -> build.Built:
    if os.environ.get("QBR_BUILD") == "0":
        raise BackendUnavailable("the native extension is not built, and QBR_BUILD=0 forbids it: unset QBR_BUILD")
    try:
        return library_cache.build_cached(device=device)
    except build.CannotBuild as error:
        raise BackendUnavailable(str(error)) from error


def _device() -> bool:
    return torch.cuda.is_available()
