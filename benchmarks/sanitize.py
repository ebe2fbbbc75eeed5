"""Small calls of every op for a memory checker: odd sizes, misaligned offsets, NaN, hostile steps.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py --device cuda --backends native
    python benchmarks/sanitize.py --device cpu --asan

--asan builds the CPU part of csrc with AddressSanitizer and UndefinedBehaviorSanitizer (about three minutes, GCC or
Clang on Linux) and makes the calls on every instruction set that the machine has. Results are compared with the
reference, as in tests/test_parity.py, whose cases these are.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cases import SHAPES, SPECS  # noqa: E402
from test_parity import compare, inputs, run  # noqa: E402

from qbr import kernels  # noqa: E402
from qbr.kernels import build, native  # noqa: E402

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def under_sanitizers() -> None:
    """Build the CPU part with sanitizers and make the calls in a child for each instruction set."""
    plan = build.plan(device=False)
    compiler = plan.compiler[:1]
    plan = dataclasses.replace(plan, compiler=[*plan.compiler, *SANITIZERS], nvcc=None, why_no_cuda="sanitizers")
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    flags = Path("/proc/cpuinfo").read_text()
    sets = ["baseline", *(["avx2"] if " avx2" in flags else []), *(["avx512"] if " avx512vl" in flags else [])]
    with tempfile.TemporaryDirectory() as folder:
        print("building with sanitizers", flush=True)
        library = build.build(plan, Path(folder)).path
        for isa in sets:
            preload = {"LD_PRELOAD": " ".join(each.strip() for each in libraries), "ASAN_OPTIONS": "detect_leaks=0"}
            command = [sys.executable, __file__, "--device", "cpu", "--backends", "native", "--library", str(library)]
            print(f"{isa}: ", end="", flush=True)
            subprocess.run(command, env={**os.environ, **preload, "QBR_CPU_ISA": isa}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backends", nargs="+", default=["native", "triton"])
    parser.add_argument("--asan", action="store_true", help="build csrc's CPU part with sanitizers and check that")
    parser.add_argument("--library", type=Path, help="a build of the extension to take in place of the usual one")
    args = parser.parse_args()
    if args.asan:
        under_sanitizers()
        return
    if args.library:
        torch.ops.load_library(str(args.library))
        native._loaded = build.Built(args.library, "", False, "sanitizers")
    calls = 0
    for backend in args.backends:
        try:
            kernels.module(backend).load(args.device)
        except kernels.BackendUnavailable as error:
            sys.exit(f"{backend}: {error}" if args.device == "cuda" else 0)
        for case in SPECS:
            for shape in (s for s in SHAPES if s.name != "100003" and case.fits(s.size)):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    x, alpha, grad = inputs(case, shape, dtype)
                    expected = run("reference", "cpu", case, x, alpha, grad)
                    compare(run(backend, args.device, case, x, alpha, grad), expected, x, alpha, grad, case)
                    calls += 1
            x, alpha, grad = case.inputs((6, 8, 5, 5))
            x.view(-1)[[7, 70, 300]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
            for step in (None, 0.0, -0.3, 1e-42, float("nan"), float("inf")):
                run(backend, args.device, case, x, alpha if step is None else torch.full_like(alpha, step), grad)
                calls += 1
    print(f"{calls} calls of {', '.join(args.backends)} on {args.device}: results as the reference's")


if __name__ == "__main__":
    main()
