"""The native backend: finds the compiled extension, or builds it once, and loads it.

The library registers its kernels with the ops of namespace ``qbr_native`` itself, so nothing is forwarded here.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import torch

from qbr.kernels import BackendUnavailable, build, library_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_lock = threading.Lock()
_loaded: build.Built | None = None
_broken: RuntimeError | None = None


def _after_fork() -> None:
    """In the child there is no thread that could release the parent's lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
            built = _find() or _build()
            try:
                torch.ops.load_library(str(built.path))
            except OSError as error:
                message = f"{built.path} cannot be loaded ({error}): delete it, and it is built anew"
                raise RuntimeError(message) from error
        except BackendUnavailable:
            raise
        except RuntimeError as error:
            _broken = error
            raise
        _loaded = built
        return built


def _find() -> build.Built | None:
    """The library in the package, else in the cache, if it is of these sources."""
    sources = build.source_dir()
    packaged = build.Built.read(Path(__file__).resolve().parent)
    if sources is None:
        return packaged
    fits = packaged is not None and packaged.sources == build.sources_hash(sources, packaged.cuda)
    if fits and packaged.cuda:
        return packaged
    torch_, device = build.find_torch(), _device()
    why_no_cuda = build.why_no_cuda(torch_, sources, device)
    if fits and why_no_cuda is not None:
        return replace(packaged, why_no_cuda=why_no_cuda)
    # Installed beside a CPU-only torch and used beside a CUDA build: the cache, or a new build, has more to offer.
    cached = library_cache.find_built(sources, device)
    if cached is not None or not fits:
        return cached
    nvcc, why_no_cuda = build.cuda_plan(torch_, sources, device)
    return None if nvcc else replace(packaged, why_no_cuda=why_no_cuda)


def _build() -> build.Built:
    if os.environ.get("QBR_BUILD") == "0":
        raise BackendUnavailable("the native extension is not built, and QBR_BUILD=0 forbids it: unset QBR_BUILD")
    try:
        return library_cache.build_cached(device=_device())
    except build.CannotBuild as error:
        raise BackendUnavailable(str(error)) from error


def _device() -> bool:
    return torch.cuda.is_available()
