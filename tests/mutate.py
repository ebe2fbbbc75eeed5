"""Puts the faults of mutants.py into a copy of the tree, one at a time, and tells which the tests find.

    python tests/mutate.py --output benchmarks/results/mutants.json          all of them; goes on where it left off
    python tests/mutate.py --only 'cpu:|triton:' --output FILE                those whose name matches
    python tests/mutate.py --report benchmarks/results/mutants.json          the result as a table

The file is written after every fault; a fault whose text has not changed is not run again (--again runs it). First each
suite runs without a fault: where that fails, nothing is told of its faults. A fault is found if a test fails or the
time limit is over. The native extension is built with -O1, and only what has changed of it. PTXRUN_HOME, if it is
set, is passed on to the tests that execute PTX. Nothing is written to the working tree but the output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS, SUITES, Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("qbr", "csrc", "tests", "benchmarks", "examples", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md")
# Run in the copy by its own builder: -O1, and an object is made once for each state of what it is made from.
BUILD = """
import hashlib, json, re, shutil, sys
from pathlib import Path
from qbr.kernels import build
cache, compile_all = Path(sys.argv[1]), build._compile

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
    kept, missing = {}, {}
    for name, command in commands.items():
        command = ["-O1" if word == "-O3" else word for word in command]
        source = Path(command[command.index("-c") - 1])
        kept[name] = cache / (hashlib.sha256(repr(command[:-2]).encode() + state(source, set())).hexdigest() + ".o")
        if not kept[name].exists():
            missing[name] = command
    done = compile_all(missing)
    for name, command in commands.items():
        if name not in missing:
            shutil.copy(kept[name], command[-1])
        elif done[name].returncode == 0:
            shutil.copy(command[-1], kept[name])
    return {name: done.get(name, build._Done([], 0, "")) for name in commands}

build._compile = compile_new
build.build_cached(device=False)
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
        command = [sys.executable, "-c", BUILD, str(self.objects)]
        subprocess.run(command, cwd=self.tree, env=self.environment, check=True, capture_output=True, text=True)

    def test(self, suite: str, limit: float) -> tuple[str, str]:
        """("passed", a count), ("failed", the first test that did) or ("time limit", "")."""
        words = shlex.split(SUITES[suite])
        environment = dict(self.environment)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self.tree / "tests", env=environment, start_new_session=True, **pipes)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return "time limit", ""
        if process.returncode == 0:
            return "passed", re.search(r"(\d+) passed", output)[0]
        found = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - .*)?$", output, re.MULTILINE)
        return "failed", found[1] if found else f"pytest ended with {process.returncode}"


def run(copy: Copy, mutant: Mutant, limit: float) -> dict:
    """What became of one fault."""
    start = time.perf_counter()
    copy.put(mutant)
    try:
        if mutant.file.startswith("csrc/cpu") or mutant.file.startswith("csrc/bindings"):
            copy.build()
        outcome, detail = copy.test(mutant.suite, limit)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{mutant.name} does not compile:\n{error.stderr[-3000:]}") from error
    finally:
        copy.put(None)
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
    parser.add_argument("--limit", type=float, default=400, help="seconds for one run of a suite")
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
        sound: dict[str, bool] = {}
        for i, mutant in enumerate(chosen, 1):
            if mutant.suite not in sound:
                start = time.perf_counter()
                outcome, detail = copy.test(mutant.suite, args.limit)
                sound[mutant.suite] = outcome == "passed"
                say(f"suite {mutant.suite}: {outcome}, {detail}, {time.perf_counter() - start:.0f} s")
            if not sound[mutant.suite]:
                continue
            results[mutant.name] = {**run(copy, mutant, args.limit), "fault": texts[mutant.name]}
            found = results[mutant.name]
            verdict = f"killed by {found['by']}" if found["killed"] else "SURVIVED"
            say(f"{i}/{len(chosen)} {mutant.name}: {verdict} ({found['seconds']} s)")
            ordered = {name: results[name] for name in known if name in results}
            path.write_text(json.dumps(ordered, indent=1) + "\n")
    print(report(results).splitlines()[-1])
    unsound = sorted(suite for suite, passed in sound.items() if not passed)
    if unsound:
        sys.exit(f"these suites fail without any fault, and nothing is told of their faults: {', '.join(unsound)}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
