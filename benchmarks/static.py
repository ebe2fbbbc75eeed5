"""What the compilers made of every GPU kernel, with no GPU: registers, occupancy, access widths, predicted time.

    python benchmarks/static.py [--arch 80 90 100] [--backend triton cuda]

Needs Triton, and nvcc for the CUDA kernels. Writes benchmarks/results/gpu-static.json and .md. The times are
predictions (benchmarks/sass.py says from what), not measurements.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import measure  # noqa: E402
import sass  # noqa: E402

from qbr import QuantSpec  # noqa: E402
from qbr.kernels import aot, build, triton_backend  # noqa: E402

NUMEL = 1 << 26
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPS = ("lsq_fwd", "lsq_bwd", "lsq_bin_fwd", "lsq_bin_bwd")
STREAMS = {"lsq_fwd": (1, 1), "lsq_bwd": (2, 1), "lsq_bin_fwd": (1, 1), "lsq_bin_bwd": (2, 1)}  # tensors read, written
CUDA_TYPES = {"float32": "float", "bfloat16": "__nv_bfloat16"}
CUDA_BLOCKS, CUDA_WIDE = 4, 3  # kBlocks and kBlocksWide of csrc/cuda_plan.h
CUDA_KERNELS = {
    "lsq_fwd": "lsq_fwd_kernel<{type}, 1>",
    "lsq_bwd": "bwd_kernel<{type}, (qbr::cuda::Grad)0, 1>",
    "lsq_bin_fwd": "bin_fwd_kernel<{type}, (qbr::cuda::Method){method}, 1>",
    "lsq_bin_bwd": "bwd_kernel<{type}, (qbr::cuda::Grad)2, 1>",
}


def triton_launch(op: str, dtype: str, bits: int, multiprocessors: int) -> aot.Launch:
    """The launch that passes over the tensor, of one call with one step per tensor."""
    spec = QuantSpec(bits)
    x = torch.empty(NUMEL, dtype=DTYPES[dtype])
    alpha, grad_loss = torch.ones(1), torch.tensor(1.0)
    bins = torch.zeros(3 * spec.num_slots + 2, dtype=torch.float64)
    q = spec.qn, spec.qp, spec.binary, -1, False, math.inf
    arguments = {
        "lsq_fwd": (x, alpha, *q),
        "lsq_bwd": (x, x, alpha, *q, 1.0),
        "lsq_bin_fwd": (x, alpha, *q, False),
        "lsq_bin_bwd": (x, grad_loss, x, alpha, bins, *q, 1.0),
    }
    found = []
    with aot.intercept(found.append, multiprocessors):
        getattr(triton_backend, op)(*arguments[op])
    return next(launch for launch in found if "x" in launch.arguments)


def triton_rows(arch: int, bits: list[int]) -> list[dict]:
    rows = []
    for op in OPS:
        for dtype in DTYPES:
            for b in bits:
                multiprocessors = sass.HARDWARE[arch].multiprocessors
                launch = triton_launch(op, dtype, b, multiprocessors)
                compiled = aot.compile(launch, arch)
                with tempfile.TemporaryDirectory() as folder:
                    cubin = Path(folder) / "kernel.cubin"
                    cubin.write_bytes(compiled.asm["cubin"])
                    (function,) = sass.functions(cubin).values()
                threads = 32 * launch.options["num_warps"]
                shared = compiled.metadata.shared + function.shared_bytes
                # Its programs have one tile each: most of what they execute stands around the loop.
                one_tile = op == "lsq_fwd"
                # Those of 8 bits stand in blocks of their own, which the shortest cycle goes around.
                atomics = op == "lsq_bin_fwd" and 2**b > triton_backend.CELL_LEVELS
                launched = math.ceil(launch.grid[0] / multiprocessors)
                whole_loop = not (one_tile or atomics)
                rows.append(row("triton", op, dtype, b, arch, function, threads, shared, launched, whole_loop))
    return rows


def cuda_rows(arch: int, bits: list[int]) -> list[dict]:
    source = measure.ROOT / "csrc" / "cuda.cu"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        kept = [flag for flag in build._NVCC_FLAGS if flag.startswith(("-O", "-std", "-fmad"))]
        options = ["-cubin", *kept, f"-arch=sm_{arch}"]
        subprocess.run(["nvcc", *options, "-o", str(cubin), str(source)], check=True)
        found = sass.functions(cubin)
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    plain = dict(zip(names.split("\n"), found.values()))
    rows = []
    for op in OPS:
        for dtype, type_name in CUDA_TYPES.items():
            for b in bits:
                method = 2 if b > 4 else 1
                mark = CUDA_KERNELS[op].format(type=type_name, method=method)
                (function,) = (each for name, each in plain.items() if mark in name)
                dynamic = 3 * 2**b * (256 * 4 + 8 * 8) if method == 1 else (18 * 2**b + 1) * 4
                shared = function.shared_bytes + (dynamic if op == "lsq_bin_fwd" else 0)
                atomics = op == "lsq_bin_fwd" and method == 2  # in a branch that the shortest cycle goes around
                launched = CUDA_WIDE if op.endswith("bwd") or atomics else CUDA_BLOCKS
                rows.append(row("cuda", op, dtype, b, arch, function, 256, shared, launched, whole_loop=not atomics))
    return rows


def row(backend, op, dtype, bits, arch, function, threads, shared, launched, whole_loop=True) -> dict:
    """One row of the table; without ``whole_loop``, where the cycle misses a branch that counts, with no prediction.

    launched: how many blocks the grid has for each multiprocessor.
    """
    read, written = STREAMS[op]
    cycle = sass.hottest_cycle(function.code, arch)
    itemsize = DTYPES[dtype].itemsize
    hardware = sass.HARDWARE[arch]
    blocks = min(sass.blocks_per_multiprocessor(function.registers, shared, threads, arch), launched)
    result = {
        "backend": backend, "op": op, "dtype": dtype, "bits": bits, "arch": f"sm_{arch}",
        "registers": function.registers, "local_bytes": function.local_bytes, "shared_bytes": shared,
        "occupancy_percent": round(100 * blocks * threads / 2048),
    }  # fmt: skip
    bytes_us = NUMEL * itemsize * (read + written) / hardware.copy_tb / 1e6
    result["bytes_us"] = round(bytes_us, 1)
    if cycle is None:
        return {**result, "load_bytes": None}
    result |= {"load_bytes": _widths(cycle.loads), "store_bytes": _widths(cycle.stores)}
    if not whole_loop:
        return result
    elements = cycle.loads[16] * 16 / itemsize / read
    compute_us = NUMEL * cycle.clocks / elements / hardware.multiprocessors / hardware.ghz / 1e3
    return {
        **result,
        "instructions": round(cycle.instructions / elements, 1),
        "busiest": cycle.unit,
        "compute_us": round(compute_us, 1),
        "predicted_us": round(max(bytes_us, compute_us), 1),
        "predicted_of_limit": round(max(1.0, compute_us / bytes_us), 2),
    }


def _widths(accesses: dict[int, int]) -> str:
    """The bytes of the loop's accesses: 16 for the tensors; 4 beside it is a look into a table of factors."""
    return " + ".join(str(width) for width in sorted(accesses, reverse=True))


COLUMNS = (
    *("backend", "op", "dtype", "bits", "registers", "local_bytes", "shared_bytes", "occupancy_percent", "load_bytes"),
    *("store_bytes", "instructions", "busiest", "bytes_us", "compute_us", "predicted_of_limit"),
)


def markdown(rows: list[dict], command: str) -> str:
    lines = [
        "# What the compilers made of the GPU kernels",
        "",
        f"Written by `{command}` on a machine without a GPU, with Triton {triton.__version__}.",
        "One step per tensor, 2^26 elements. Instructions are an element's, from the machine code of the main loop",
        "(empty where that is not what a thread mostly executes). Times are predictions in microseconds: `bytes_us`",
        "of the bytes at a copy's bandwidth, `compute_us` of the busiest unit at full rate (latency, bank conflicts,",
        "reductions not counted); the last column: the larger of the two over the first.",
    ]
    for arch in dict.fromkeys(each["arch"] for each in rows):
        hardware = sass.HARDWARE[int(arch[3:])]
        about = f"{hardware.multiprocessors} multiprocessors at {hardware.ghz} GHz, copy {hardware.copy_tb} TB/s"
        lines += ["", f"## {arch} ({hardware.name}: {about})", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for each in rows:
            if each["arch"] == arch:
                lines.append("| " + " | ".join(str(each.get(column, "")) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(sass.HARDWARE))
    parser.add_argument("--backend", nargs="+", default=["triton", "cuda"], choices=["triton", "cuda"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--output", type=Path, default=measure.ROOT / "benchmarks" / "results" / "gpu-static.json")
    args = parser.parse_args()
    make = {"triton": triton_rows, "cuda": cuda_rows}
    rows = [row for backend in args.backend for arch in args.arch for row in make[backend](arch, args.bits)]
    measure.save(args.output, "cpu", rows)
    page = markdown(rows, measure.environment("cpu")["command"])
    measure.write(args.output.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
