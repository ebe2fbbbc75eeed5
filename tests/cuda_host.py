"""csrc/cuda.cu without a GPU: its host code runs as it is, on a stand-in for the CUDA runtime that hands every launch
to ptxrun, which executes the kernel's PTX on the CPU.

``Emulator`` has the raw ops of qbr/ops.py as methods, on CPU tensors; ``launches`` holds the reports of the last call,
whose ``buffers`` are named as the arguments here.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = ["cuda.cu", *sorted(p.name for p in CSRC.glob("cuda_*")), "kernels.h"]

# What nvcc's host code calls, recording launches, and plain C names for the functions of kernels.h.
RUNTIME = r"""
#include "cuda_plan.h"
#include <map>
#include <string>
struct Dim3 { unsigned x, y, z; };
typedef int (*OnLaunch)(const char* name, const unsigned* grid, const unsigned* block, size_t shared, void** args);
static OnLaunch on_launch;
static std::map<const void*, std::string>& names() { static std::map<const void*, std::string> n; return n; }
static struct { Dim3 grid, block; size_t shared; void* stream; } pending;
static int failure, shared_limit = 48 * 1024, sms = 132;
static void* handle;
extern "C" {
void** __cudaRegisterFatBinary(void*) { return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}
int __cudaGetKernel(const void** kernel, const void* host) { *kernel = host; return 0; }
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid, *block = pending.block, *shared = pending.shared, *static_cast<void**>(stream) = pending.stream;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared, void*) {
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  if (shared > size_t(shared_limit) || !g[0] || !g[1] || !g[2]) return failure = 9;
  shared_limit = 48 * 1024;
  return failure = on_launch(names()[kernel].c_str(), g, b, shared, args);
}
int cudaFuncSetAttribute(const void*, int, int value) { shared_limit = value; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int* value, int, int) { *value = sms; return 0; }
int cudaGetLastError() { const int code = failure; failure = 0; return code; }
const char* cudaGetErrorString(int) { return "an error"; }

void test_start(OnLaunch f, int multiprocessors) { on_launch = f; sms = multiprocessors; }
using namespace qbr;
int64_t test_walk(Layout t, int size, cuda::Walk* out) {
  *out = cuda::walk_of(t, size, 0, 0, 0, true);
  return out->tiles;
}
int test_range(Quant q, cuda::Range* out) { *out = cuda::Range(q); return sizeof(*out); }
int test_walk_size() { return sizeof(cuda::Walk); }
size_t test_workspace_bytes(int kernel, Layout t, Quant q, bool alpha_gradient) {
  return cuda::workspace_bytes(cuda::Kernel(kernel), t, q, alpha_gradient);
}
int test_lsq_fwd(int d, void* x, void* alpha, void* xhat, Layout t, Quant q) {
  return cuda::lsq_fwd(DType(d), x, (float*)alpha, xhat, t, q, nullptr);
}
int test_lsq_bwd(int d, void* g, void* x, void* alpha, void* dx, void* dalpha, Layout t, Quant q, float s, void* work) {
  return cuda::lsq_bwd(DType(d), g, x, (float*)alpha, dx, (float*)dalpha, t, q, s, work, nullptr);
}
int test_bin_fwd(int d, void* x, void* alpha, void* xhat, void* loss, void* bins, void* dloss, Layout t, Quant q,
                 void* work) {
  return cuda::bin_fwd(DType(d), x, (float*)alpha, xhat, (float*)loss, (double*)bins, (float*)dloss, t, q, work,
                       nullptr);
}
int test_bin_bwd(int d, void* g, void* grad_loss, void* x, void* alpha, void* bins, void* dx, void* dalpha, Layout t,
                 Quant q, float s, void* work) {
  return cuda::bin_bwd(DType(d), g, (float*)grad_loss, x, (float*)alpha, (double*)bins, dx, (float*)dalpha, t, q, s,
                       work, nullptr);
}
}
"""


class Layout(ctypes.Structure):
    _fields_ = [("numel", ctypes.c_int64), ("channels", ctypes.c_int64), ("inner", ctypes.c_int64)]


class Quant(ctypes.Structure):
    _fields_ = [
        ("qn", ctypes.c_float),
        ("qp", ctypes.c_float),
        ("binary", ctypes.c_bool),
        ("relu", ctypes.c_bool),
        ("clip", ctypes.c_float),
    ]


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LSQ_BWD, BIN_FWD, BIN_BWD = range(3)
ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


def build(cache: Path, nvcc: str, arch: str) -> tuple[Path, Path]:
    """The shared library of host code, and the PTX, of csrc/cuda.cu; compiled once per state of the sources."""
    digest = hashlib.sha256(RUNTIME.encode() + arch.encode())
    for name in SOURCES:
        digest.update((CSRC / name).read_bytes())
    folder = cache / digest.hexdigest()[:16]
    library, ptx = folder / "host.so", folder / "cuda.ptx"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runtime.cpp").write_text(RUNTIME)
        command = [nvcc, "-shared", "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-cudart", "none", "--keep"]
        command += ["--keep-dir", str(folder), f"-gencode=arch=compute_{arch},code=compute_{arch}", "-I", str(CSRC)]
        command += [str(CSRC / "cuda.cu"), str(folder / "runtime.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}{done.stdout}")
    return library, ptx


class Kernels:
    """The kernels of a PTX file, each read when it is first launched: most tests need few of them."""

    def __init__(self, text: str):
        head, *entries = re.split(r"(?=^\.visible \.entry )", text, flags=re.M)
        self._head = head
        self._texts = {re.match(r"\.visible \.entry (\w+)", e).group(1): e for e in entries}
        self._modules = {}

    def __getitem__(self, name: str):
        import ptxrun

        if name not in self._modules:
            self._modules[name] = ptxrun.Module(self._head + self._texts[name])
        return self._modules[name]


class Emulator:
    """A device with so many multiprocessors; the host code asks for their number once, so each has a library copy."""

    def __init__(self, cache: Path, nvcc: str, multiprocessors: int, arch: str = "90"):
        library, ptx = build(cache, nvcc, arch)
        mine = library.with_name(f"host{multiprocessors}.so")
        if not mine.exists():
            shutil.copy(library, mine)
        self.kernels = Kernels(ptx.read_text())
        self.library = ctypes.CDLL(str(mine))
        self.library.test_workspace_bytes.restype = ctypes.c_size_t
        self.options = {}  # of every launch: seed, check
        self.launches = []
        self._on_launch = ON_LAUNCH(self._launch)
        self._buffers = {}  # slice of the address space -> name, array
        self._error = None
        self.library.test_start(self._on_launch, multiprocessors)

    def walk(self, numel: int, channels: int, inner: int, element_size: int) -> tuple[bytes, int]:
        """csrc/cuda_plan.h's Walk of an aligned tensor, and its tiles."""
        out = ctypes.create_string_buffer(self.library.test_walk_size())
        self.library.test_walk.restype = ctypes.c_int64
        tiles = self.library.test_walk(Layout(numel, channels, inner), element_size, out)
        return out.raw, tiles

    def range(self, spec) -> bytes:
        """csrc/cuda_plan.h's Range of a QuantSpec."""
        out = ctypes.create_string_buffer(256)
        quant = Quant(spec.qn, spec.qp, spec.binary, False, float("inf"))
        return out.raw[: self.library.test_range(quant, out)]

    # -- the device ------------------------------------------------------------------------------------
    def _launch(self, name, grid, block, shared, args) -> int:
        import ptxrun

        try:
            name = name.decode()
            module = self.kernels[name]
            values = []
            for i, param in enumerate(module.kernels[name].params):
                value = ctypes.string_at(args[i], param.size)
                if param.size == 8 and param.type in ("u64", "b64"):
                    address = int.from_bytes(value, "little")
                    if address >> 36 in self._buffers:
                        buffer, array = self._buffers[address >> 36]
                        value = ptxrun.Buffer(array, address & ((1 << 36) - 1), buffer)
                values.append(value)
            grid, block = tuple(grid.contents), tuple(block.contents)
            self.launches.append(module.launch(name, grid, block, values, shared=shared, **self.options))
            return 0
        except BaseException as error:  # must not cross the C frames in between
            self._error = self._error or error
            return 1

    def _address(self, name, array, offset=0) -> int:
        key = 1 + len(self._buffers)
        self._buffers[key] = name, array
        return (key << 36) + offset

    def _input(self, name: str, t: torch.Tensor | None) -> int | None:
        """A tensor's elements in storage order, as far from a 16-byte boundary as in its own storage."""
        if t is None:
            return None
        flat = torch.as_strided(t, (t.numel(),), (1,)) if t.numel() else t.reshape(-1)
        array = flat.detach().contiguous().view(torch.uint8).numpy()
        offset = t.storage_offset() * t.element_size() % 16
        padded = np.zeros(offset + array.nbytes, np.uint8)
        padded[offset:] = array
        padded.flags.writeable = False
        return self._address(name, padded, offset)

    def _output(self, name: str, like: torch.Tensor | None):
        import ptxrun

        if like is None:
            return None, None
        array = ptxrun.uninit(max(like.numel() * like.element_size(), 1), np.uint8)
        return array, self._address(name, array)

    @staticmethod
    def _result(array, like: torch.Tensor) -> torch.Tensor:
        """In like's shape and strides; every byte must have been written."""
        if like is None or not like.numel():
            return like
        assert array.unwritten() == 0, "a kernel left part of its output unwritten"
        flat = torch.from_numpy(np.asarray(array).copy()).view(like.dtype)
        return torch.as_strided(flat, like.size(), like.stride())

    def _call(self, function, *args) -> None:
        self.launches, self._error = [], None
        code = getattr(self.library, function)(*[ctypes.c_void_p(a) if isinstance(a, int | None) else a for a in args])
        if self._error is not None:
            raise self._error
        assert code == 0, f"{function} returned the error {code}"

    def _workspace(self, kernel, layout, quant, alpha_gradient) -> int:
        import ptxrun

        size = self.library.test_workspace_bytes(kernel, layout, quant, alpha_gradient)
        return self._address("workspace", ptxrun.uninit(size, np.uint8))

    @staticmethod
    def _describe(x, alpha, qn, qp, binary, axis, relu, clip):
        inner = 1 if axis < 0 else x.stride(axis)
        return ctypes.c_int(DTYPES[x.dtype]), Layout(x.numel(), alpha.numel(), inner), Quant(qn, qp, binary, relu, clip)

    # -- the raw ops -----------------------------------------------------------------------------------
    def lsq_fwd(self, x, alpha, *plain):
        self._buffers.clear()
        dtype, layout, quant = self._describe(x, alpha, *plain)
        xhat, p_xhat = self._output("xhat", x)
        inputs = self._input("x", x), self._input("alpha", alpha)
        self._call("test_lsq_fwd", dtype, *inputs, p_xhat, layout, quant)
        return self._result(xhat, x)

    def lsq_bwd(self, grad_xhat, x, alpha, *plain):
        *plain, scale = plain
        self._buffers.clear()
        dtype, layout, quant = self._describe(x, alpha, *plain)
        (dx, p_dx), (dalpha, p_dalpha) = self._output("dx", x), self._output("dalpha", alpha)
        inputs = self._input("g", grad_xhat), self._input("x", x), self._input("alpha", alpha)
        work = self._workspace(LSQ_BWD, layout, quant, True)
        self._call("test_lsq_bwd", dtype, *inputs, p_dx, p_dalpha, layout, quant, ctypes.c_float(scale), work)
        return self._result(dx, x), self._result(dalpha, alpha)

    def _bin_fwd(self, x, alpha, plain, with_xhat, backprop_to_alpha):
        self._buffers.clear()
        dtype, layout, quant = self._describe(x, alpha, *plain)
        likes = {
            "xhat": x if with_xhat else None,
            "loss": alpha.new_empty(()),
            "bins": torch.empty(3 * int(quant.qp - quant.qn + 1) + 2, dtype=torch.float64),
            "dloss_dalpha": alpha if backprop_to_alpha else None,
        }
        arrays, pointers = zip(*[self._output(name, like) for name, like in likes.items()], strict=True)
        inputs = self._input("x", x), self._input("alpha", alpha)
        work = self._workspace(BIN_FWD, layout, quant, backprop_to_alpha)
        self._call("test_bin_fwd", dtype, *inputs, *pointers, layout, quant, work)
        xhat, loss, bins, dloss = [self._result(a, like) for a, like in zip(arrays, likes.values(), strict=True)]
        results = loss, bins, alpha.new_empty(0) if dloss is None else dloss
        return (xhat, *results) if with_xhat else results

    def bin_loss_fwd(self, x, alpha, *plain):
        return self._bin_fwd(x, alpha, plain[:-1], False, plain[-1])

    def lsq_bin_fwd(self, x, alpha, *plain):
        return self._bin_fwd(x, alpha, plain[:-1], True, plain[-1])

    def _bin_bwd(self, grad_xhat, grad_loss, x, alpha, bins, plain, scale):
        self._buffers.clear()
        dtype, layout, quant = self._describe(x, alpha, *plain)
        with_lsq = grad_xhat is not None
        (dx, p_dx), (dalpha, p_dalpha) = self._output("dx", x), self._output("dalpha", alpha if with_lsq else None)
        tensors = {"g": grad_xhat, "grad_loss": grad_loss, "x": x, "alpha": alpha, "bins": bins}
        inputs = [self._input(name, t) for name, t in tensors.items()]
        work = self._workspace(BIN_BWD, layout, quant, with_lsq)
        self._call("test_bin_bwd", dtype, *inputs, p_dx, p_dalpha, layout, quant, ctypes.c_float(scale), work)
        return self._result(dx, x), self._result(dalpha, alpha if with_lsq else None)

    def bin_loss_bwd(self, grad_loss, x, alpha, bins, *plain):
        return self._bin_bwd(None, grad_loss, x, alpha, bins, plain, 0.0)[0]

    def lsq_bin_bwd(self, grad_xhat, grad_loss, x, alpha, bins, *plain):
        return self._bin_bwd(grad_xhat, grad_loss, x, alpha, bins, plain[:-1], plain[-1])
