#!/usr/bin/env python3
"""The study of who may move alpha: rows of alpha controls over seeds, from one float baseline, to one report.

    alpha_study.py --scale cpu --data DIR --output runs/alpha-study-cpu --jobs 2
    alpha_study.py --report experiments/results/alpha-study-cpu         # the report again, from results.json alone

Every run is one of cifar10_baseline.py or cifar10_qat_br.py in a folder of its own. The same command goes on where it
was stopped or killed: finished runs are kept, others continue after their last whole epoch. Rows of one seed share
their warm-up, which is the same in all of them to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cifar10 import exits, folders, study, study_report, warmup
from cifar10.files import UserError, check_writable, write_json
from cifar10.options import parse, qat_parser
from tqdm import tqdm

SCRIPTS = Path(__file__).resolve().parent
POLL_SECONDS = 0.5


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.report is not None:
        return exits.exit_code(lambda: print(f"report: {study_report.write(options.report)}"))
    return exits.exit_code(lambda: _Study(options).go())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=sorted(study.SCALES), default="cpu", help="how much is trained")
    add("--output", type=Path, metavar="DIR", help="default: runs/alpha-study-SCALE")
    add("--data", type=Path, metavar="DIR", help="as for cifar10_qat_br.py; default: the packed subset")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="default: 0, 1, 2")
    add("--rows", nargs="+", choices=list(study.ROWS), metavar="ROW", help=f"default: all of {', '.join(study.ROWS)}")
    add("--jobs", type=int, default=1, help="runs at a time; on a CPU as many as cores is fastest")
    add("--gpu", type=int, default=0, help="as for cifar10_qat_br.py")
    add("--report", type=Path, metavar="DIR", help="train nothing: write the report of the study in DIR again")
    add("extra", nargs="*", metavar="-- FLAGS", help="more flags for cifar10_qat_br.py, in every row")
    return parser


class _Study:
    """Runs in order: the baseline, each seed's reference row up to the end of warm-up, then everything else."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.scale = options, study.SCALES[options.scale]
        self.folder = options.output or Path("runs") / f"alpha-study-{options.scale}"
        self.seeds = options.seeds or list(range(self.scale.seeds))
        self.rows = [study.REFERENCE, *(row for row in study.ROWS if row in (options.rows or study.ROWS))]
        self.rows = list(dict.fromkeys(self.rows))
        if options.jobs < 1:
            raise UserError(f"--jobs {options.jobs}: expected 1 or more")
        if options.data is not None and not options.data.is_dir():
            raise UserError(f"--data {options.data}: no such folder; name CIFAR-10's, or leave it out")
        check_writable(self.folder, flag="--output")
        for row in self.rows:  # a wrong flag is found here, and not after the baseline
            parse(qat_parser(), self._command(self._at(self.seeds[0], row))[1:])
        self.about = study.manifest(options.scale, options.data, options.extra)
        self.running: dict[Path, subprocess.Popen] = {}

    def go(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._same_study()
            try:
                failed = self._run_all()
            except BaseException:
                for process in self.running.values():
                    process.terminate()
                for process in self.running.values():
                    process.wait()
                raise
        if not study.trained(self.folder / "baseline"):
            log = self.folder / "baseline" / "log.txt"
            raise UserError(f"the baseline has failed: see {log}, and give the same command again")
        results = self._collect()
        print(f"report: {study_report.write(self.folder)}")
        diverged = [f"{run['row']} (seed {run['seed']})" for run in results["runs"] if run["status"] == "diverged"]
        if diverged:
            print(f"diverged, and left out of the means: {', '.join(diverged)}")
        for folder in failed:
            print(f"error: {folder}: the run failed; see its log.txt, and give the same command again", file=sys.stderr)
        return 1 if failed else 0

    @contextlib.contextmanager
    def _alone(self):
        """A lock that the runs inherit: it lasts until the last has ended, even if this process was killed."""
        with (self.folder / ".lock").open("w") as self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"--output {self.folder}: a study, or a run of one that was killed, is at work there; "
                                "wait for it, or stop it") from error  # fmt: skip
            yield

    def _same_study(self) -> None:
        path = self.folder / "study.json"
        if path.exists() and study.read(path) != self.about:
            raise UserError(f"--output {self.folder}: holds another study ({path.name} differs from these flags); name "
                            "another folder, or give the flags it was begun with")  # fmt: skip
        write_json(path, self.about)

    def _run_all(self) -> list[Path]:
        """Train what is missing, ``jobs`` at a time; the folders of runs that failed."""
        baseline = self.folder / "baseline"
        others = [(seed, row) for seed in self.seeds for row in self.rows if row != study.REFERENCE]
        waiting = {baseline: None, **{self._at(seed, study.REFERENCE): None for seed in self.seeds}}
        waiting |= {self._at(seed, row): None for seed, row in others}
        waiting = [folder for folder in waiting if not study.finished(folder)]
        failed: list[Path] = []
        total = 1 + len(self.seeds) * len(self.rows)
        with tqdm(total=total, initial=total - len(waiting), unit="run", desc="study", disable=None) as bar:
            while waiting or self.running:
                for folder, process in list(self.running.items()):
                    if process.poll() is None:
                        continue
                    del self.running[folder]
                    bar.update()
                    if not study.finished(folder):
                        failed.append(folder)
                    tqdm.write(f"{folder.relative_to(self.folder)}: {_outcome(folder)}")
                    if folder != baseline:
                        self._collect()
                ready = [folder for folder in waiting if self._ready(folder)]
                for folder in ready[: self.options.jobs - len(self.running)]:
                    waiting.remove(folder)
                    self.running[folder] = self._start(folder)
                if waiting and not self.running:  # what they wait for has failed
                    return failed + [folder for folder in waiting if folder not in failed]
                time.sleep(POLL_SECONDS)
        return failed

    def _at(self, seed: int, row: str) -> Path:
        return self.folder / f"seed{seed}" / row

    def _ready(self, folder: Path) -> bool:
        baseline = self.folder / "baseline"
        if folder == baseline:
            return True
        if not study.trained(baseline):
            return False
        return folder.name == study.REFERENCE or warmup.is_kept(folder.with_name(study.REFERENCE))

    def _command(self, folder: Path) -> list[str]:
        """The script and the flags of the run in ``folder``."""
        data = [] if self.options.data is None else ["--data", str(self.options.data)]
        common = [*data, "--gpu", str(self.options.gpu), "--output-dir", str(folder), "--resume"]
        if folder.name == "baseline":
            return ["cifar10_baseline.py", *self.scale.baseline, *common]
        best = self.folder / "baseline" / folders.CHECKPOINTS / "best.pth"
        reference = folder.name == study.REFERENCE
        command = ["cifar10_qat_br.py", *self.scale.flags(folder.name, self.options.extra)]
        command += ["--seed", folder.parent.name.removeprefix("seed"), "--pretrained-baseline", str(best)]
        shared = ["--warmup-from", str(folder.with_name(study.REFERENCE))]
        return [*command, *(["--keep-warmup"] if reference else shared), "--monitor", *common]

    def _start(self, folder: Path) -> subprocess.Popen:
        """One run in a process of its own; its output goes to log.txt in its folder."""
        command = self._command(folder)
        environment = dict(os.environ)
        beside = 1 if folder.name == "baseline" else self.options.jobs  # nothing else can run before the baseline has
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // beside)))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(SCRIPTS / command[0]), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(self.lock.fileno(),),
            )

    def _collect(self) -> dict[str, Any]:
        return study.collect(self.folder, self.about)


def _outcome(folder: Path) -> str:
    """One line about a run that has ended."""
    if not study.finished(folder):
        return f"failed; see {folder / 'log.txt'}"
    results = study.read(folder / "results.json")
    if results["status"] == "diverged":
        return results["error"]
    final = results["final"]
    return f"test {final['last']['test_acc']:.2f} % after the last epoch, {final['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
