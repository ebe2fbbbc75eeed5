"""Puts the faults of mutants.py into a copy of the tree, one at a time, and tells which the tests find.

    python tests/mutate.py --output benchmarks/results/mutants.json     all of them; goes on where it left off
    python tests/mutate.py --only 'cpu:|triton:' --output FILE          those whose name matches
    python tests/mutate.py --report benchmarks/results/mutants.json     the result as a table

The file is written after every fault; a fault whose text has not changed is not run again (--again runs it). A fault
is found if a test fails or takes too much of the processor's time; at the end every test that has found one runs
without a fault, and where it fails nothing is told of that fault. The native extension is built with -O1, and only
what has changed of it. PTXRUN_HOME, if it is set, is passed on to the tests that execute PTX. Nothing is written to
the working tree but the output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  here and not in each child
import pytest
import torch  # noqa: F401
from mutants import MUTANTS, SUITES, Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    *("qbr", "csrc", "tests", "benchmarks", "experiments", "examples"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md"),
)
WAIT = 20  # times the limit, by the clock
# The native extension of the copy: -O1, an object once for each state of what it is made from, and of the loops, whose
# three copies take longest, only this machine's own anew (the others are those without a fault).
BUILD = """
import hashlib, re, shutil, sys
from pathlib import Path
from qbr.kernels import build, library_cache
objects, others, compile_all = Path(sys.argv[1]), Path(sys.argv[2]), build._run_each

def state(path, seen):
    if path in seen:
        return b""
    seen.add(path)
    text = path.read_bytes()
    for name in re.findall(rb'#include "(.+)"', text):
        if (path.parent / name.decode()).exists():
            text += state(path.parent / name.decode(), seen)
    return text

def compile_new(commands):
    kept, missing, best = {}, {}, [name for name in commands if name in sys.argv[3:]][-1]
    for name, command in commands.items():
        command = ["-O1" if word == "-O3" else word for word in command]
        source = Path(command[command.index("-c") - 1])
        folder = others if name.startswith("loops") and name != best else source.parent
        flags = [word for word in command[:-4] if "=csrc" not in word]
        digest = hashlib.sha256(repr(flags).encode() + state(folder / source.name, set())).hexdigest()
        kept[name] = objects / f"{digest}.o"
        if not kept[name].exists():
            missing[name] = command
    done = compile_all(missing)
    for name, command in commands.items():
        if name not in missing:
            shutil.copy(kept[name], command[-1])
        elif done[name].returncode == 0:
            shutil.copy(command[-1], kept[name])
    return {name: done.get(name, build._Done([], 0, "")) for name in commands}

build._run_each = compile_new
library_cache.build_cached(device=False)
"""


class Copy:
    """The tree, to put faults into.

    Args:
        folder: where it lies.
        objects: where compiled objects are kept; made if need be.
    """

    def __init__(self, folder: Path, objects: Path) -> None:
        self.tree, self.objects = folder / "tree", objects.resolve()
        self.objects.mkdir(parents=True, exist_ok=True)
        self.tree.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "results")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.tree / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1", "QBR_CUDA": "0",
            "XDG_CACHE_HOME": str(folder / "cache"), "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        }  # fmt: skip
        for name in ("TRITON_INTERPRET", "QBR_CPU_ISA"):
            self.environment.pop(name, None)

    def put(self, mutant: Mutant | None) -> None:
        """This fault and no other."""
        for file in {each.file for each in MUTANTS}:
            text = (ROOT / file).read_text()
            if mutant is not None and mutant.file == file:
                assert text.count(mutant.old) == 1, f"{mutant.name}: its text is not in {file} exactly once"
                text = text.replace(mutant.old, mutant.new)
            if (self.tree / file).read_text() != text:
                (self.tree / file).write_text(text)

    def build(self) -> None:
        """The native extension of what stands in the copy. Raises CalledProcessError with the compiler's words."""
        flags = Path("/proc/cpuinfo").read_text()
        present = ["loops_baseline", *(f"loops_{isa}" for isa in ("avx2", "avx512") if f" {isa}" in flags)]
        command = [sys.executable, "-c", BUILD, str(self.objects), str(ROOT / "csrc"), *present]
        subprocess.run(command, cwd=self.tree, env=self.environment, check=True, capture_output=True, text=True)

    def test(self, words: list[str], limit: float) -> tuple[str, str]:
        """("passed", a count), ("failed", the first test that did), ("time limit", "") or ("no verdict", "").

        Raises:
            RuntimeError: where pytest cannot collect the tests.

        pytest runs in a fork of this process, which has torch at hand, so that a fault costs what its tests do. The
        limit is of the processor's time: a busy machine must not pass for a test that has found something.
        """
        words, environment = list(words), dict(self.environment)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        words = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *words]
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                os.setsid()
                assert "qbr" not in sys.modules, "the copy's is to be imported"
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
                resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
                os.chdir(self.tree / "tests")
                os.environ.clear(), os.environ.update(environment)
                sys.path[:] = [str(self.tree), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
                code = 99
                try:
                    code = int(pytest.main(words))
                finally:
                    sys.stdout.flush(), os._exit(code)
            end, status = time.monotonic() + WAIT * limit, None
            while status is None:
                ended, raw = os.waitpid(child, os.WNOHANG)
                if ended:
                    status = os.waitstatus_to_exitcode(raw)
                elif time.monotonic() > end:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return "no verdict", ""
                else:
                    time.sleep(0.05)
            output.seek(0)
            text = output.read()
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            return "time limit", ""
        if status == 0:
            return "passed", re.search(r"(\d+) passed", text)[0]
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        if found and "::" not in found[1]:  # a package is missing, or the fault is no Python: no test has run
            raise RuntimeError(f"{found[1]} cannot be collected:\n{text[-3000:]}")
        return "failed", found[1] if found else f"a child that ended with {status}"


def run(copy: Copy, mutant: Mutant, limit: float) -> dict | None:
    """What became of one fault; None where the machine was too busy to tell."""
    start = time.perf_counter()
    copy.put(mutant)
    try:
        if mutant.file.startswith("csrc/cpu") or mutant.file.startswith("csrc/bindings"):
            copy.build()
        outcome, detail = copy.test(shlex.split(SUITES[mutant.suite]), limit)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{mutant.name} does not compile:\n{error.stderr[-3000:]}") from error
    finally:
        copy.put(None)
    if outcome == "no verdict":
        return None
    result = {"killed": outcome != "passed", "by": detail if outcome == "failed" else outcome}
    return {**result, "seconds": round(time.perf_counter() - start)}


def report(results: dict) -> str:
    """A table by file."""
    lines = []
    for mutant in MUTANTS:
        found = results.get(mutant.name)
        if mutant.equivalent:
            what = f"equivalent: {mutant.equivalent}"
        elif found is None:
            what = "not run"
        else:
            what = f"killed by {found['by']}" if found["killed"] else "SURVIVED"
        lines.append(f"{mutant.name:<58} {what}")
    ran = [results[m.name] for m in MUTANTS if m.name in results]
    killed = sum(each["killed"] for each in ran)
    seconds = sum(each["seconds"] for each in ran)
    lines.append(f"{len(MUTANTS)} faults, {len(ran)} run, {killed} killed, {len(ran) - killed} survived, {seconds} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON, read and written")
    parser.add_argument("--report", type=Path, help="print this file's result, and run nothing")
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--again", action="store_true", help="run faults that have a result, too")
    parser.add_argument("--objects", type=Path, help="a folder that keeps compiled objects for the next time")
    parser.add_argument("--limit", type=float, default=200, help="processor seconds for one run of a suite")
    args = parser.parse_args()
    path = args.report or args.output
    if path is None:
        parser.error("--output or --report is needed")
    kept = json.loads(path.read_text()) if path.exists() else {}
    known = {m.name: m for m in MUTANTS}
    texts = {name: [m.file, m.old, m.new, SUITES[m.suite]] for name, m in known.items()}
    results = {name: each for name, each in kept.items() if name in known and each["fault"] == texts[name]}
    if args.report:
        print(report(results))
        return
    chosen = [m for m in MUTANTS if re.search(args.only, m.name) and not m.equivalent]
    chosen = [m for m in chosen if args.again or m.name not in results]
    with tempfile.TemporaryDirectory(prefix="qbr-mutate-") as folder:
        copy = Copy(Path(folder), args.objects or Path(folder) / "objects")
        copy.build()
        ordered = dict(results)
        for i, mutant in enumerate(chosen, 1):
            found = run(copy, mutant, args.limit)
            if found is None:
                say(f"{i}/{len(chosen)} {mutant.name}: no verdict, the tests waited too long for a processor")
                continue
            results[mutant.name] = {**found, "fault": texts[mutant.name]}
            verdict = f"killed by {found['by']}" if found["killed"] else "SURVIVED"
            say(f"{i}/{len(chosen)} {mutant.name}: {verdict} ({found['seconds']} s)")
            ordered = {name: results[name] for name in known if name in results}
            path.write_text(json.dumps(ordered, indent=1) + "\n")
        unsound = killers_that_fail(copy, ordered, args.limit)
    if unsound:
        ordered = {name: each for name, each in ordered.items() if each["by"] not in unsound}
        path.write_text(json.dumps(ordered, indent=1) + "\n")
        sys.exit(f"these tests fail without any fault, so nothing is told of what they found: {', '.join(unsound)}")
    print(report(ordered).splitlines()[-1])


def killers_that_fail(copy: Copy, results: dict, limit: float) -> list[str]:
    """The tests that have found faults and fail without one."""
    copy.put(None)
    copy.build()
    by_environment: dict[tuple, set[str]] = {}
    for name, each in results.items():
        suite = shlex.split(SUITES[next(m.suite for m in MUTANTS if m.name == name)])
        if "::" in each["by"]:
            environment = tuple(word for word in suite if "=" in word)
            by_environment.setdefault(environment, set()).add(each["by"])
    failing = []
    for environment, tests in by_environment.items():
        left = sorted(tests)
        while left:
            outcome, detail = copy.test([*environment, *left], 10 * limit)
            say(f"without a fault: {len(left)} tests, {outcome} {detail}")
            if outcome == "passed":
                break
            failing.append(detail if outcome == "failed" else "all")
            left = [test for test in left if test != detail] if detail in left else []
    return failing


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
