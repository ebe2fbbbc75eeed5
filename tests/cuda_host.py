"""csrc/cuda.cu without a GPU: its host code runs as it is, on a stand-in for the CUDA runtime that hands every launch
to ptxrun, which executes the kernel's PTX on the CPU.

``Emulator`` has the raw ops of qbr/ops.py and their list forms as methods, on CPU tensors; ``launches`` holds the
reports of the last call, whose ``buffers`` are named as kernels.h's Item names them, with the place in a list behind.
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
typedef int (*OnLaunch)(const char* name, const unsigned* grid, const unsigned* block, size_t shared, size_t limit,
                        void** args);
static OnLaunch on_launch;
static std::map<const void*, std::string>& names() { static std::map<const void*, std::string> n; return n; }
static struct { Dim3 grid, block; size_t shared; void* stream; } pending;
static int failure, sms = 132, sm_shared;
static int shared_limit;  // what was asked for; 0: the next launch has a block's 48 KB in all
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
  if (!g[0] || !g[1] || !g[2]) return failure = 9;
  const size_t limit = shared_limit;
  shared_limit = 0;
  return failure = on_launch(names()[kernel].c_str(), g, b, shared, limit, args);
}
int cudaFuncSetAttribute(const void*, int, int value) { shared_limit = value; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int* value, int which, int) {
  *value = which == 81 ? sm_shared : sms;  // cudaDevAttrMaxSharedMemoryPerMultiprocessor
  return 0;
}
int cudaGetLastError() { const int code = failure; failure = 0; return code; }
const char* cudaGetErrorString(int) { return "an error"; }

void test_start(OnLaunch f, int count, int shared) { on_launch = f, sms = count, sm_shared = shared; }
using namespace qbr;
int64_t test_walk(Layout t, int size, cuda::Walk* out) {
  *out = cuda::walk_of(t, size, 0, 0, 0, true);
  return out->tiles;
}
int test_range(Quant q, cuda::Range* out) { *out = cuda::Range(q); return sizeof(*out); }
int test_walk_size() { return sizeof(cuda::Walk); }
int test_call(int op, const Item* first, int count, void* (*scratch)(size_t)) {
  const Items items(first, first + count);
  switch (op) {
    case 0: return cuda::lsq_fwd(items, nullptr);
    case 1: return cuda::lsq_bwd(items, scratch, nullptr);
    case 2: return cuda::bin_fwd(items, scratch, nullptr);
    default: return cuda::bin_bwd(items, scratch, nullptr);
  }
}
int test_item_size() { return sizeof(Item); }
int test_jobs() { return cuda::kJobs; }
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


class Item(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("alpha", ctypes.c_void_p),
        ("layout", Layout),
        ("quant", Quant),
        ("xhat", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("bins", ctypes.c_void_p),
        ("dloss_dalpha", ctypes.c_void_p),
        ("grad_xhat", ctypes.c_void_p),
        ("grad_loss", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("dalpha", ctypes.c_void_p),
        ("grad_scale", ctypes.c_float),
    ]


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LSQ_FWD, LSQ_BWD, BIN_FWD, BIN_BWD = range(4)
# Addresses: a tag that no size or float in a kernel's parameter has, a buffer, and the byte within it.
TAG, BUFFER_BITS, BYTE_BITS = 0x7FB1, 12, 36
SCRATCH = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
OPEN_SHARED = 48 * 1024  # a block's shared memory, static and dynamic, for which a kernel need not ask


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
        command += ["-Xlinker", "-Bsymbolic"]  # not the runtime that torch may have loaded
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

    def static_shared(self, name: str) -> int:
        """Bytes of shared memory that the kernel has of itself."""
        sizes = re.findall(r"^\s*\.shared\s[^;]*?\.b8 \w+\[(\d+)\];", self._texts[name] + self._head, flags=re.M)
        return sum(map(int, sizes))

    def __getitem__(self, name: str):
        import ptxrun

        if name not in self._modules:
            self._modules[name] = ptxrun.Module(self._head + self._texts[name])
        return self._modules[name]


class Emulator:
    """A device with so many multiprocessors and ``shared`` bytes of shared memory in each (an H100's 228 KiB); the host
    code asks for these once, so each device has a library copy."""

    def __init__(self, cache: Path, nvcc: str, multiprocessors: int, arch: str = "90", shared: int = 228 * 1024):
        library, ptx = build(cache, nvcc, arch)
        mine = library.with_name(f"host{multiprocessors}-{shared}.so")
        if not mine.exists():
            shutil.copy(library, mine)
        self.kernels = Kernels(ptx.read_text())
        self.library = ctypes.CDLL(str(mine))
        assert self.library.test_item_size() == ctypes.sizeof(Item)
        self.capacity = self.library.test_jobs()  # of one launch
        self.options = {}  # of every launch: seed, check
        self.launches = []
        self._on_launch, self._scratch = ON_LAUNCH(self._launch), SCRATCH(self._workspace)
        self._buffers = []  # name, array
        self._error = None
        self.library.test_start(self._on_launch, multiprocessors, shared)

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
        size = self.library.test_range(quant, out)
        return out.raw[:size]

    # -- the device ------------------------------------------------------------------------------------
    def _launch(self, name, grid, block, shared, limit, args) -> int:
        try:
            name = name.decode()
            if shared > (limit or OPEN_SHARED - self.kernels.static_shared(name)):
                return 1  # cudaErrorInvalidValue
            module = self.kernels[name]
            (param,) = module.kernels[name].params  # Jobs
            words = np.frombuffer(ctypes.string_at(args[0], param.size), np.uint64).copy()
            kept = set(module._kept)  # ptxrun maps a pointer for all later launches: here, for this one
            for i in np.flatnonzero(words >> np.uint64(BUFFER_BITS + BYTE_BITS) == TAG):
                address = int(words[i])
                buffer, array = self._buffers[address >> BYTE_BITS & (1 << BUFFER_BITS) - 1]
                words[i] = module.pointer(array, address & (1 << BYTE_BITS) - 1, buffer)
            grid, block = tuple(grid.contents), tuple(block.contents)
            self.launches.append(module.launch(name, grid, block, [words.tobytes()], shared=shared, **self.options))
            module._kept = kept
            return 0
        except BaseException as error:  # must not cross the C frames in between
            self._error = self._error or error
            return 1

    def _address(self, name, array, offset=0) -> int:
        self._buffers.append((name, array))
        assert len(self._buffers) <= 1 << BUFFER_BITS
        return ((TAG << BUFFER_BITS) + len(self._buffers) - 1 << BYTE_BITS) + offset

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

    def _workspace(self, size) -> int:
        import ptxrun

        return self._address("workspace", ptxrun.uninit(size, np.uint8))

    def _call(self, op: int, items: list[dict], likes: list[dict]) -> list[list[torch.Tensor]]:
        """The outputs of an op, a list for each name in `likes`; a field that is None or absent is null."""
        names = [str(i) if len(items) > 1 else "" for i in range(len(items))]
        outputs, raw = [], (Item * len(items))()
        for name, item, like, to in zip(names, items, likes, raw, strict=True):
            x, (qn, qp, binary, axis, relu, clip) = item["x"], item["plain"]
            inner = 1 if axis < 0 else x.stride(axis)
            to.dtype, to.layout = DTYPES[x.dtype], Layout(x.numel(), item["alpha"].numel(), inner)
            to.quant, to.grad_scale = Quant(qn, qp, binary, relu, clip), item.get("grad_scale", 0.0)
            for field in ("x", "alpha", "grad_xhat", "grad_loss", "bins"):
                if field in item:
                    setattr(to, field, self._input(field + name, item[field]))
            outputs.append({field: self._output(field + name, t) for field, t in like.items()})
            for field, (_, address) in outputs[-1].items():
                setattr(to, field, address)
        self.launches, self._error = [], None
        code = self.library.test_call(op, raw, len(items), self._scratch)
        self._buffers = []
        if self._error is not None:
            raise self._error
        assert code == 0, f"op {op} returned the error {code}"
        pairs = list(zip(outputs, likes, strict=True))
        return [[self._result(made[field][0], like[field]) for made, like in pairs] for field in likes[0]]

    # -- the raw ops over lists ------------------------------------------------------------------------
    @staticmethod
    def _items(xs, alphas, ranges, relu, clip, **more) -> list[dict]:
        columns = [dict(zip(more, each, strict=True)) for each in zip(*more.values(), strict=True)] or [{}] * len(xs)
        plains = [(*ranges[i : i + 4], relu, clip) for i in range(0, len(ranges), 4)]
        return [dict(x=x, alpha=a, plain=p, **c) for x, a, p, c in zip(xs, alphas, plains, columns, strict=True)]

    def foreach_lsq_fwd(self, xs, alphas, *plain):
        return self._call(LSQ_FWD, self._items(xs, alphas, *plain), [dict(xhat=x) for x in xs])[0]

    def foreach_lsq_bwd(self, grad_xhats, xs, alphas, *plain):
        *plain, scales = plain
        items = self._items(xs, alphas, *plain, grad_xhat=grad_xhats, grad_scale=scales)
        return tuple(self._call(LSQ_BWD, items, [dict(dx=x, dalpha=a) for x, a in zip(xs, alphas, strict=True)]))

    def _foreach_bin_fwd(self, xs, alphas, plain, with_xhat):
        *plain, backprop_to_alpha = plain
        items, likes = self._items(xs, alphas, *plain), []
        for item in items:
            qn, qp = item["plain"][:2]
            bins = torch.empty(3 * (qp - qn + 1) + 2, dtype=torch.float64)
            like = dict(loss=item["alpha"].new_empty(()), bins=bins)
            like["dloss_dalpha"] = item["alpha"] if backprop_to_alpha else None
            likes.append(dict(xhat=item["x"], **like) if with_xhat else like)
        *results, dloss_dalphas = self._call(BIN_FWD, items, likes)
        return *results, dloss_dalphas if backprop_to_alpha else [alpha.new_empty(0) for alpha in alphas]

    def foreach_bin_loss_fwd(self, xs, alphas, *plain):
        return self._foreach_bin_fwd(xs, alphas, plain, False)

    def foreach_lsq_bin_fwd(self, xs, alphas, *plain):
        return self._foreach_bin_fwd(xs, alphas, plain, True)

    def foreach_bin_loss_bwd(self, grad_losses, xs, alphas, bins, *plain):
        items = self._items(xs, alphas, *plain, grad_loss=grad_losses, bins=bins)
        return self._call(BIN_BWD, items, [dict(dx=x) for x in xs])[0]

    def foreach_lsq_bin_bwd(self, grad_xhats, grad_losses, xs, alphas, bins, *plain):
        *plain, scales = plain
        lists = dict(grad_xhat=grad_xhats, grad_loss=grad_losses, bins=bins, grad_scale=scales)
        items = self._items(xs, alphas, *plain, **lists)
        return tuple(self._call(BIN_BWD, items, [dict(dx=x, dalpha=a) for x, a in zip(xs, alphas, strict=True)]))

    # -- the raw ops: lists of one, as in csrc/bindings.cpp --------------------------------------------
    def lsq_fwd(self, x, alpha, *plain):
        return self.foreach_lsq_fwd([x], [alpha], plain[:4], *plain[4:])[0]

    def lsq_bwd(self, grad_xhat, x, alpha, *plain):
        *plain, scale = plain
        return _first(self.foreach_lsq_bwd([grad_xhat], [x], [alpha], plain[:4], *plain[4:], [scale]))

    def bin_loss_fwd(self, x, alpha, *plain):
        return _first(self.foreach_bin_loss_fwd([x], [alpha], plain[:4], *plain[4:]))

    def lsq_bin_fwd(self, x, alpha, *plain):
        return _first(self.foreach_lsq_bin_fwd([x], [alpha], plain[:4], *plain[4:]))

    def bin_loss_bwd(self, grad_loss, x, alpha, bins, *plain):
        return self.foreach_bin_loss_bwd([grad_loss], [x], [alpha], [bins], plain[:4], *plain[4:])[0]

    def lsq_bin_bwd(self, grad_xhat, grad_loss, x, alpha, bins, *plain):
        *plain, scale = plain
        lists = [grad_xhat], [grad_loss], [x], [alpha], [bins]
        return _first(self.foreach_lsq_bin_bwd(*lists, plain[:4], *plain[4:], [scale]))


def _first(results):
    return tuple(each[0] for each in results)
