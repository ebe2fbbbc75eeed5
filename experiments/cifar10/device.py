"""Where a run trains, and what the process is set to for it."""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

from . import processes
from .files import UserError


def pick_device(gpu: int) -> torch.device:
    """CUDA device ``gpu``, or the CPU where there is no CUDA, with a note; under torchrun a device for each process."""
    if gpu >= 0 and processes.world() > 1:
        gpu = processes.local_rank()
    if gpu < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print(f"--gpu {gpu}: torch sees no CUDA device; training on the CPU")
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise UserError(f"--gpu {gpu}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", gpu)


def keep_freed_memory() -> None:
    """Let glibc keep what was freed instead of returning it: or every step faults its activations in page by page."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
