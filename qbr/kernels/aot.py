"""Compile the Triton kernels ahead of time, with no GPU: exactly the variants that a call would launch.

``intercept`` hands every launch of the Triton backend to a function of yours, with the tensors of the call (on the
CPU), and ``compile`` compiles a launch for an architecture: tests inspect and execute the result, tools measure it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qbr.kernels import triton_backend

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
            torch.int64: "*i64"}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


class Launch(NamedTuple):
    """One launch of one kernel: run-time arguments by name, and everything fixed at compile time."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # what a compiled kernel still takes
    types: dict[str, Any]  # of a tuple of pointers: a tuple
    constants: dict[str, Any]
    aligned: tuple  # names, or (name, index) in a tuple: multiples of 16, which is what makes loads 16 bytes wide
    options: dict[str, Any]


def _is_aligned(x: torch.Tensor) -> bool:
    """A fresh allocation on a GPU is aligned, whatever the CPU's is: only the offset tells."""
    return x.storage_offset() * x.element_size() % 16 == 0


def _launch(kernel, grid, args, kwargs) -> Launch:
    """Specialise as Triton's own launcher does: on None, on a 1, on types and on divisibility by 16."""
    values = dict(zip((p.name for p in kernel.params), args)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    arguments, types, constants, aligned = {}, {}, {}, []
    for p in kernel.params:
        value = values[p.name]
        if isinstance(value, tuple):
            arguments[p.name], types[p.name] = value, tuple(POINTERS[each.dtype] for each in value)
            aligned += [(p.name, i) for i, each in enumerate(value) if _is_aligned(each)]
            continue
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if p.is_constexpr or value is None or (is_int and value == 1 and not p.do_not_specialize):
            types[p.name], constants[p.name] = "constexpr", value
            continue
        arguments[p.name] = value
        if isinstance(value, torch.Tensor):
            types[p.name] = POINTERS[value.dtype]
            divisible = _is_aligned(value)
        elif is_int:
            types[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not p.do_not_specialize
        else:
            types[p.name], divisible = "fp32", False
        if divisible:
            aligned.append(p.name)
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    return Launch(kernel, tuple(grid), arguments, types, constants, tuple(aligned), options)


@contextmanager
def intercept(run: Callable[[Launch], None], multiprocessors: int = 132):
    """Inside, the backend's functions take CPU tensors, plan for a GPU, and call run(launch) in place of launching."""

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: run(_launch(self.kernel, grid, args, kwargs))

    real = triton_backend._kernels()
    if real.interpreted:
        raise RuntimeError("TRITON_INTERPRET is set: kernels under the interpreter cannot be compiled")
    stand_ins = triton_backend._Kernels(*(Kernel(k) for k in real[:-1]), interpreted=False)
    saved = triton_backend._kernels, triton_backend._multiprocessors
    triton_backend._plan.cache_clear()
    try:
        triton_backend._kernels = lambda: stand_ins
        triton_backend._multiprocessors = lambda device: multiprocessors
        yield
    finally:
        triton_backend._kernels, triton_backend._multiprocessors = saved
        triton_backend._plan.cache_clear()


def compile(launch: Launch, arch: int = 90):
    """Triton's compiled kernel of a launch for sm_<arch>."""
    index = {p.name: p.num for p in launch.kernel.params}
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.types,
        constexprs={(index[name],): value for name, value in launch.constants.items()},
        attrs={
            (index[name], *rest): [["tt.divisibility", 16]]
            for name, *rest in ((each,) if isinstance(each, str) else each for each in launch.aligned)
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


class Resources(NamedTuple):
    """What one thread of a compiled kernel takes."""

    registers: int  # of 32 bits
    stack_bytes: int  # local memory of a thread; 0 without arrays and spills


def resources(compiled) -> Resources:
    """What the machine code of triton.compile()'s result takes, by the cuobjdump that Triton brings.

    Raises:
        RuntimeError: where Triton finds no cuobjdump. subprocess.CalledProcessError: where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"])
