"""csrc under memory checkers: odd sizes, misaligned offsets, NaN, hostile steps, and what a fuzzer makes of them.

    python benchmarks/sanitize.py --quick                      half a minute; what tests/test_sanitize.py runs
    python benchmarks/sanitize.py --device cpu --asan          all of it; results/sanitize-cpu.txt is its output
    python benchmarks/sanitize.py --fuzz 1000000 --seed 2      the fuzzer alone
    compute-sanitizer --tool memcheck python benchmarks/sanitize.py --device cuda --backends native

On the CPU the checkers are AddressSanitizer and UndefinedBehaviorSanitizer (GCC or Clang on Linux). The first three
build csrc's kernels with tests/native_fuzz.cpp, which needs no torch and holds every result against scalar formulas;
--asan does so for each instruction set that the machine has, compares their digests, and then builds the whole CPU
part, bindings too, for the parity tests' cases in Python.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qbr.kernels import build  # noqa: E402

SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined"]
SANITIZERS += ["-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
QUICK = {"every": 23, "executions": 200}  # of the matrix's calls, and of the fuzzer's


def instruction_sets() -> list[str]:
    """The ones of csrc that this machine has, the best last."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().split())
        return [isa for isa in build._LOOPS if build.needs(isa) <= flags]
    return ["baseline"]


def build_driver(
    folder: Path, isa: str, level: str = "-O0", coverage: bool = False, sources: Path | None = None
) -> Path:
    """tests/native_fuzz.cpp with the kernels of one instruction set, all under sanitizers.

    Args:
        folder: for the objects and the program; an object that is there is taken as it is.
        sources: csrc/ or a changed copy of it.
    """
    plan = build.plan(device=False)
    sources = sources or plan.sources
    cxx = [*plan.compiler, "-std=c++20", level, "-Wno-psabi", build._PREFIX_FLAG.format(sources)]
    checked = [*cxx, *SANITIZERS, *(["-fsanitize-coverage=trace-pc"] if coverage else [])]
    loops = [*build._LOOP_FLAGS, *build._LOOPS[isa], "-DQBR_ISA=loops_baseline"]  # the only ones in this program
    commands = {
        "loops": [*checked, *loops, str(sources / "cpu_loops.cpp")],
        "cpu": [*checked, build._TARGET, "-isystem", str(plan.torch.root / "include"), str(sources / "cpu.cpp")],
        "fuzz": [*cxx, "-ffp-contract=off", str(ROOT / "tests" / "native_fuzz.cpp")],
    }
    objects = {name: folder / f"{name}.o" for name in commands}
    missing = {n: [*c, "-c", "-o", str(objects[n])] for n, c in commands.items() if not objects[n].exists()}
    for done in build._run_each(missing).values():
        if done.returncode:
            raise build.BuildFailed(done.log)
    program = folder / "native_fuzz"
    linked = build._run([*plan.compiler, *SANITIZERS, *map(str, objects.values()), "-o", str(program)])
    if linked.returncode:
        raise build.BuildFailed(linked.log)
    return program


def run_driver(program: Path, *words: object) -> str:
    """What it prints; raises RuntimeError with its report if a checker or a formula finds something."""
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"native_fuzz {' '.join(map(str, words))} failed\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def instrumented_blocks(program: Path) -> str:
    """How many there are, for the fuzzer's report; nothing where binutils are missing."""
    if shutil.which("objdump") is None:
        return ""
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(program)], capture_output=True, text=True).stdout
    return f" of {len(re.findall('call.*<__sanitizer_cov_trace_pc', code))}"


def fuzz(isa: str, seed: int, executions: int, say) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = build_driver(Path(folder), isa, "-O1", coverage=True)
        line = run_driver(program, "fuzz", seed, executions)
        say(f"{isa}: {line.replace(' blocks', f'{instrumented_blocks(program)} blocks')}")


def quick(say) -> None:
    """One instruction set, a part of the matrix, and the fuzzer without a guide."""
    isa = instruction_sets()[-1]
    with tempfile.TemporaryDirectory() as folder:
        program = build_driver(Path(folder), isa)
        say(f"{isa}: {run_driver(program, 'matrix', QUICK['every'])}")
        line = run_driver(program, "fuzz", 1, QUICK["executions"])
        say(f"{isa}: {line.partition(',')[0]}, {QUICK['executions']} executions")


def full(say, seed: int, executions: int) -> None:
    """Everything on the CPU: the matrix and the fuzzer for each instruction set, then the bindings from Python."""
    digests = set()
    for isa in instruction_sets():
        with tempfile.TemporaryDirectory() as folder:
            line = run_driver(build_driver(Path(folder), isa), "matrix", 1)
        say(f"{isa}: {line}")
        digests.add(line.split()[-1])
    if len(digests) != 1:
        raise RuntimeError(f"the instruction sets' results differ: {digests}")
    for isa in instruction_sets():
        fuzz(isa, seed, executions // len(instruction_sets()), say)
    from_python(say)


def from_python(say) -> None:
    """The CPU part of the extension with sanitizers, called through torch in a child for each instruction set."""
    plan = build.plan(device=False)
    compiler = plan.compiler[:1]
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    plan = dataclasses.replace(plan, compiler=[*plan.compiler, *SANITIZERS], nvcc=None, why_no_cuda="sanitizers")
    build._CXX_FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in build._CXX_FLAGS)
    with tempfile.TemporaryDirectory() as folder:
        library = build.build(plan, Path(folder)).path
        for isa in instruction_sets():
            preload = {"LD_PRELOAD": " ".join(each.strip() for each in libraries), "ASAN_OPTIONS": "detect_leaks=0"}
            command = [sys.executable, __file__, "--device", "cpu", "--backends", "native", "--library", str(library)]
            environment = {**os.environ, **preload, "QBR_CPU_ISA": isa}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{isa}: {done.stdout}{done.stderr}")
            say(f"{isa}: {done.stdout.strip()}")


def calls_from_python(device: str, backends: list[str], library: Path | None, every: int = 1) -> str:
    """The parity tests' cases, or one of so many of them, through the ops."""
    if device == "cuda":  # a tensor shall end where its memory does, not somewhere in a block of torch's cache
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    import torch
    from cases import SHAPES, SPECS
    from test_parity import HOSTILE_STEPS, compare, inputs, run

    from qbr import kernels
    from qbr.kernels import native

    if library:
        torch.ops.load_library(str(library))
        native._loaded = build.Built(library, "", False, "sanitizers")
    calls = seen = 0
    for backend in backends:
        kernels.module(backend).load(device)
        for case in SPECS:
            for shape in (s for s in SHAPES if s.name != "100003" and case.fits(s.size)):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    seen += 1
                    if seen % every:
                        continue
                    x, alpha, grad = inputs(case, shape, dtype)
                    expected = run("reference", "cpu", case, x, alpha, grad)
                    compare(run(backend, device, case, x, alpha, grad), expected, x, alpha, grad, case)
                    calls += 1
            if every > 1:
                continue
            x, alpha, grad = case.inputs((6, 8, 5, 5))
            x.view(-1)[[7, 70, 300]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
            for step in (None, *HOSTILE_STEPS):
                run(backend, device, case, x, alpha if step is None else torch.full_like(alpha, step), grad)
                calls += 1
    return f"{calls} cases of every op through torch, {', '.join(backends)} on {device}: results as the reference's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backends", nargs="+", default=["native", "triton"])
    parser.add_argument("--asan", action="store_true", help="all of the CPU part under sanitizers")
    parser.add_argument("--quick", action="store_true", help="a part of that, on the best instruction set alone")
    parser.add_argument("--fuzz", type=int, metavar="EXECUTIONS", help="the guided fuzzer alone, so many times")
    parser.add_argument("--executions", type=int, default=300_000, help="of the fuzzer in --asan, over all sets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a file for the lines, too")
    parser.add_argument("--every", type=int, default=1, help="one of so many cases, no hostile values")
    parser.add_argument("--library", type=Path, help="a build of the extension to take in place of the usual one")
    args = parser.parse_args()
    lines = []
    start = time.perf_counter()

    def say(line: str) -> None:
        lines.append(f"{line}  [{time.perf_counter() - start:.0f} s]")
        print(lines[-1], flush=True)
        if args.output:
            args.output.write_text("\n".join(lines) + "\n")

    if args.quick:
        quick(say)
    elif args.fuzz:
        fuzz(instruction_sets()[-1], args.seed, args.fuzz, say)
    elif args.asan:
        full(say, args.seed, args.executions)
    else:
        print(calls_from_python(args.device, args.backends, args.library, args.every))


if __name__ == "__main__":
    main()
