"""Everything that only a GPU can settle, in one command: build, parity, memory checker, benchmarks, training.

    python benchmarks/gpu.py --output DIR [--data CIFAR_FOLDER] [--only STAGE ...] [--minutes 10]

Each stage writes its own log and result under DIR and a line in DIR/stages.json; run again, and what ended well at this
commit on this kind of device is skipped, training goes on from its last checkpoint (a run's results.json has the commit
that it began at). A command that does not fit into --minutes is stopped and left for the next run. --device cpu, with
another DIR, rehearses the whole on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from experiments.cifar10 import study  # noqa: E402
from experiments.cifar10.files import UserError, write_json  # noqa: E402
from experiments.cifar10.sources import commit  # noqa: E402

PY = sys.executable
CUDA = "/usr/local/cuda"  # where a toolkit lies that is not on the PATH
# Fails where a backend is missing: what follows would skip it, or train on the CPU.
BUILD = """
import importlib.util, sys, torch, qbr
print(torch.__version__)
wanted = ("tqdm", "PIL", "matplotlib", "hypothesis", "onnx", "onnxscript", "safetensors", "xdist")
print("not installed, and parity or training want it:", [n for n in wanted if importlib.util.find_spec(n) is None])
print(found := qbr.backends())
sys.exit(any(found[name][sys.argv[1]] for name in (("native", "triton") if sys.argv[1] == "cuda" else ("native",))))
"""
# The tests marked gpu in three commands: a part that ended well is not run again.
BACKENDS = {"native": "native", "triton": "triton", "others": "not native and not triton"}
# Triton compiles nearly every example of the property tests anew: minutes in one process with all of them.
FEW = {"triton": ["env", "QBR_PROPERTIES=few"]}
COMPILED = "resnet18-w2a2"  # the one pair of runs of a rehearsal on the CPU that is compiled, too
# What such a rehearsal adds to the flags of each script.
SMALL = {"cifar10_baseline": ["--epochs", "1"], "cifar10_qat_br": ["--warmup-epochs", "1", "--qat-epochs", "2"]}
# Epochs of each phase that tell how long a hundred take, from random weights.
PACE = ["--qat-epochs", "6", "--warmup-epochs", "3"]

# Seconds that a command may take, but for those that train, which go on in a later call.
LIMIT = 480


def gpu_files() -> list[str]:
    """The files that may have tests marked gpu: every worker collects what it is given."""
    marked = re.compile(r"mark\.gpu\b|TARGETS|BACKENDS")
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if marked.search(path.read_text())]


def stages(out: Path, device: str, data: Path | None) -> dict[str, list[list[str]]]:
    """{stage: commands}, most valuable first."""
    on_gpu = device == "cuda"
    bench = ["--device", device] + ([] if on_gpu else ["--quick"])
    # Most of the time is Triton compiling, a kernel at a time in a process: so in several, where pytest-xdist is there.
    xdist = on_gpu and importlib.util.find_spec("xdist")
    several = ["-n", str(min(16, os.cpu_count() or 8)), "--dist", "worksteal"] if xdist else []
    files = gpu_files() if on_gpu else ["tests"]
    # A file that needs a package which is not there is an error, and the other files run.
    parity = [PY, "-m", "pytest", "-q", "-rs", *several, "--continue-on-collection-errors", *files, "--junitxml"]
    marks = {"native": ["-k", "native-cpu and w2"]}
    if on_gpu:
        marks = {backend: ["-m", "gpu", "-k", which] for backend, which in BACKENDS.items()}
    trained = training(out, on_gpu, data)
    sanitizer = shutil.which("compute-sanitizer") or f"{CUDA}/bin/compute-sanitizer"
    checked = [PY, "benchmarks/sanitize.py", "--device", device]
    found = ["--error-exitcode", "7", "--report-api-errors", "no"]
    memory = [
        ([sanitizer, "--tool", tool, *found] if on_gpu else []) + checked + ["--backends", backend, "--every", every]
        for backend, every in (("native", "5"), ("triton", "23"))[: 2 if on_gpu else 1]
        for tool in (("memcheck", "racecheck", "initcheck") if on_gpu else ("none",))
    ]
    return {
        "build": [[PY, "-c", BUILD, device]],
        "parity": [
            [*FEW.get(backend, []), *parity, str(out / f"parity-{backend}.xml"), *mark]
            for backend, mark in marks.items()
        ],
        "benchmarks": [
            [PY, "benchmarks/run.py", *bench, "--resume", "--part", part, "--output", str(out / "run.json")]
            for part in ("kernels", "compiled", "peers", "foreach", "step", "memory")
        ],
        "drop_in": [
            [
                PY,
                "benchmarks/drop_in.py",
                *bench,
                "--resume",
                "--output",
                str(out / "drop_in.json"),
                "--batch",
                "128" if on_gpu else "2",
            ]
        ],
        "pace": trained.pop("pace"),
        "record": trained.pop("record"),
        "profile": [[PY, "benchmarks/profile_kernels.py", "--device", device, "--output", str(out / "profile.txt")]],
        "fast": trained.pop("fast"),
        "reach": trained.pop("reach"),
        "memory": memory,
        **trained,
    }


def training(out: Path, on_gpu: bool, data: Path | None) -> dict[str, list[list[str]]]:
    """The stages that train (docs/recipes.md), each ending in a table of its runs; on the CPU a small rehearsal."""
    common = ["--resume", *(["--data", str(data)] if data else [])]
    tiny = ["--model", "resnet20", "--limit", "16", "--batch-size", "16", "--gpu", "-1"]

    def train(script: str, name: str, *flags: str) -> list[str]:
        small = [] if on_gpu else [*tiny, *SMALL[script]]
        if small and not name.startswith(COMPILED):
            small += ["--compile", "none"]
        return [PY, f"experiments/{script}.py", *common, "--output-dir", str(out / name), *flags, *small]

    def qat(name: str, float_run: str, *flags: str) -> list[str]:
        start = ["--pretrained-baseline", str(out / float_run / "checkpoints" / "best.pth")]
        return train("cifar10_qat_br", name, *start, *flags)

    def table(*names: str) -> list[str]:
        return [PY, "experiments/compare.py", *(str(out / name) for name in names)]

    def pair(name: str, float_run: str, *flags: str) -> list[list[str]]:
        """LSQ alone, and from the end of its warm-up with what the recipe regularizes: what the regularizer gives."""
        alone = qat(f"{name}-lsq", float_run, *flags, "--keep-warmup", "--lambda-br", "0", "--lambda-br-act", "0")
        return [alone, qat(name, float_run, *flags, "--warmup-from", str(out / f"{name}-lsq"))]

    def seeded(seed: str) -> list[list[str]]:
        flags = [*record, "--seed", seed]
        start = f"record-float-{seed}"
        return [train("cifar10_baseline", start, *flags), *pair(f"record-w2a2-{seed}", start, *flags)]

    fast, record, small = ["--recipe", "fast"], ["--recipe", "record"], ["--recipe", "fast", "--model", "resnet20"]
    seeds = range(1, 6) if on_gpu else range(1, 3)
    scale = "gpu" if on_gpu else "smoke"
    rows = ["--scale", scale, "--output", str(out / "alpha-study")]
    rows += [*(["--data", str(data)] if data else []), *([] if on_gpu else ["--gpu", "-1"])]
    reach = study.own_flags("weights-rising", study.SCALES[scale].strengths)
    return {
        "pace": [
            *(
                train("cifar10_qat_br", f"pace-{mode}", *fast, *PACE, "--compile", mode)
                for mode in ("default", "none", "reduce-overhead")
            ),
            table("pace-default", "pace-none", "pace-reduce-overhead"),
        ],
        "fast": [
            train("cifar10_baseline", "resnet18-float", *fast),
            *pair("resnet18-w2a2", "resnet18-float", *fast),
            table("resnet18-float", "resnet18-w2a2-lsq", "resnet18-w2a2"),
        ],
        "reach": [
            qat(
                "resnet18-w2a2-reach", "resnet18-float", *fast, *reach, "--warmup-from", str(out / "resnet18-w2a2-lsq")
            ),
            table("resnet18-float", "resnet18-w2a2-lsq", "resnet18-w2a2", "resnet18-w2a2-reach"),
        ],
        "record": [*seeded("1"), table("record-float-1", "record-w2a2-1-lsq", "record-w2a2-1")],
        "record_seeds": [
            *(command for seed in seeds[1:] for command in seeded(str(seed))),
            qat("record-w2a2-graphs", "record-float-1", *record, "--seed", "1", "--compile", "reduce-overhead"),
            table(
                *(f"record-{name.format(seed)}" for name in ("float-{}", "w2a2-{}-lsq", "w2a2-{}") for seed in seeds),
                "record-w2a2-graphs",
            ),
        ],
        "accuracy": [
            qat("resnet18-w4a4", "resnet18-float", *fast, "--num-bits", "4", "--lambda-br-act", "0"),
            train("cifar10_baseline", "resnet20-float", *small, "--epochs", "200"),
            qat("resnet20-w2a2", "resnet20-float", *small, "--qat-epochs", "200", "--lambda-br-act", "0"),
            qat("resnet20-w4a4", "resnet20-float", *small, "--num-bits", "4", "--lambda-br-act", "0"),
            table("resnet18-float", "resnet18-w2a2", "resnet18-w4a4"),
            table("resnet20-float", "resnet20-w2a2", "resnet20-w4a4"),
        ],
        "alpha_study": [[PY, "experiments/alpha_study.py", *rows]],
    }


def run(command: list[str], log, deadline: float) -> int:
    """The exit status; 124 if the deadline came first. Output goes to the log."""
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if shutil.which("nvcc") is None and Path(CUDA, "bin", "nvcc").exists():
        environment.setdefault("CUDA_HOME", CUDA)
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(max(deadline - time.time(), 1))
    except subprocess.TimeoutExpired:
        return 124
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End what still runs of a command, the processes that it started (the study's runs) included."""
    # pytest tells what it has found after SIGINT alone; a child that ignores that gets the next.
    for sign, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(patience)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of run()'s finally, which ends what it started
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, default=None, help="an image folder or torchvision root; default: the bundled subset"
    )
    parser.add_argument("--only", nargs="+", default=None, metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop cleanly before this many minutes are over")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    out = args.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + args.minutes * 60
    plan = stages(out, args.device, args.data.resolve() if args.data else None)
    unknown = set(args.only or ()) - plan.keys()
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: expected some of {' '.join(plan)}")
    if args.data:  # looked at now, and not after what comes before the training
        from experiments.cifar10.data import recognise  # imports torch

        try:
            recognise(args.data)
        except UserError as error:
            parser.error(str(error))
    about = {"commit": commit() or "unknown", "device": args.device}
    if about["commit"] == "unknown":
        print("without git no result tells its commit: set QBR_COMMIT, to another after every change", flush=True)
    record = Record(out, about)
    names = args.only or list(plan)
    for again in (False, True):  # what has failed before waits for what has not been tried
        for stage in names:
            record.work(stage, plan[stage], again, deadline)
            if stage == "build" and record.stages.get("build", {}).get("status") != "ok":
                sys.exit("nothing else is run without what the build was to give")
    sys.exit(any(record.stages.get(stage, {}).get("status") != "ok" for stage in names))


class Record:
    """stages.json: what has run of every stage, at which commit and on which kind of device."""

    def __init__(self, out: Path, about: dict) -> None:
        self.out, self.about, self.path = out, about, out / "stages.json"
        self.stages = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.told: set[str] = set()

    def work(self, stage: str, commands: list[list[str]], again: bool, deadline: float) -> None:
        """Run the stage's commands that have not been tried; with ``again`` those that failed in an earlier call."""
        before = self.stages.get(stage, {})
        same = before if {key: before.get(key) for key in self.about} == self.about else {}
        done, failed = same.get("done", []), same.get("failed", {})
        tried = {**dict.fromkeys(done), **({} if stage == "build" else failed)}
        left = [c for c in commands if (shlex.join(c) in failed if again else shlex.join(c) not in tried)]
        if not left or stage in self.told:
            if not again and not failed:
                print(f"{stage:10} done before", flush=True)
            return
        if time.time() > deadline - 5:
            print(f"{stage:10} left for the next run", flush=True)
            return
        self.told.add(stage)  # what fails now is not tried again in this call
        start, spent = time.time(), same.get("seconds", 0)
        now = {"status": "not ended", **self.about, "seconds": spent, "done": done, "failed": failed}
        self.stages[stage] = now
        with open(self.out / f"{stage}.log", "a") as log:
            for command in left:
                trains = any(word.startswith("experiments/") for word in command)
                until = deadline if trains else min(deadline, time.time() + LIMIT)
                code = run(command, log, until)
                now["seconds"] = round(spent + time.time() - start, 1)
                stopped = code == 124 and until == deadline
                failed.pop(shlex.join(command), None)
                if code == 0:
                    done.append(shlex.join(command))
                elif not stopped:
                    failed[shlex.join(command)] = code
                write_json(self.path, self.stages)  # whoever kills this in the next command leaves what was done
                if stopped:  # what follows may build on it
                    break
        if len(done) == len(commands):
            now["status"] = "ok"
        else:
            now["status"] = f"failed: exit {list(failed.values())}" if failed else "stopped by the time limit"
        write_json(self.path, self.stages)
        tail = (self.out / f"{stage}.log").read_text().strip().splitlines()[-4:]
        print(f"{stage:10} {now['status']}, {now['seconds']} s", *tail, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
