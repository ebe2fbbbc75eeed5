"""How everything here is timed and recorded: side by side in one process, alternating, medians."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import qbr
from qbr.whole import write_whole

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from experiments.cifar10 import sources  # noqa: E402

BUSY_CYCLES = 4_000_000  # 2 ms at 2 GHz
COLD_BYTES = 256 << 20  # read before each timed call: more than the level-2 cache of any GPU


class Seconds(float):
    """Of one call. host_late: whether the device was done with waiting before the host had launched the call, so that
    its seconds are the host's, too."""

    host_late = False


def time_once(run: Callable[[], object], device: str, device_only: bool = False) -> Seconds:
    """Seconds of one call; on CUDA between two events.

    Args:
        device_only: keep the device busy until the host has launched the call, so that its own time does not count;
            unless it takes longer than BUSY_CYCLES, which host_late tells. Its level-2 cache holds none of the call's
            data then, as in a training step. Otherwise the device is idle at first, and waits for its host.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if device_only:
            _cold().sum()  # not written: what waits to be written back would be part of the call
            torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        run()
        late = device_only and start.query()
        end.record()
        end.synchronize()
        seconds = Seconds(start.elapsed_time(end) / 1e3)
        seconds.host_late = late
        return seconds
    start = time.perf_counter()
    run()
    return Seconds(time.perf_counter() - start)


@functools.cache
def _cold() -> torch.Tensor:
    return torch.zeros(COLD_BYTES // 4, device="cuda")


def alternate(
    runs: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    warm_up: int = 2,
    block: int = 1,
    device_only: bool = False,
    timer: Callable[..., Seconds] | None = None,
) -> dict[str, dict]:
    """Time every run in turn, `repeats` rounds: {name: {median_s, low_s, high_s (quartiles), repeats, ratio}}.

    ratio: the median over the rounds of this run's time to the first run's in the same round; a machine that slows
    down for a while slows both.

    block: time so many calls of a run in a row, after as many untimed ones. torch.compile's kernels have a thread pool
    of their own on the CPU; its threads disturb whatever comes directly after them.

    device_only: as in time_once; where calls had the host's time in them, host_late is their share.

    timer: in the place of time_once.
    """
    timer = timer or time_once
    for run in runs.values():
        for _ in range(warm_up):
            run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if block > 1:
                for _ in range(block):
                    run()
            times[name].extend(timer(run, device, device_only) for _ in range(block))
    summary = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        ratio = statistics.median(value / first for value, first in zip(values, next(iter(times.values()))))
        summary[name] = {"median_s": median, "low_s": low, "high_s": high, "repeats": len(values), "ratio": ratio}
        late = sum(value.host_late for value in values)
        summary[name] |= {"host_late": late / len(values)} if late else {}
    return summary


def alternate_apart(
    runs: dict[str, Callable[[], object]], slow: str, device: str, repeats: int, **options
) -> dict[str, dict]:
    """alternate(), with the run named `slow` in a fifth of as many rounds, of its own, beside the first run alone.

    For one that takes so long, and frees so much, that what comes after it would be another measurement. `beside`
    holds what the first run took in those rounds, to which slow's ratio is.
    """
    first = next(iter(runs))
    result = alternate({name: run for name, run in runs.items() if name != slow}, device, repeats, **options)
    pair = {first: runs[first], slow: runs[slow]}
    apart = alternate(pair, device, max(3, repeats // 5), **options)
    return {**result, slow: {**apart[slow], "beside": apart[first]}}


def each(
    part: str, device: str, cases: Iterable[tuple], measured: Callable[..., dict], kept: Iterable[dict] = ()
) -> Iterator[dict]:
    """A row of every case, from ``kept`` where it is there; of one that fails, why, so that the others are not lost."""
    kept = {row["case"]: row for row in kept if row["part"] == part}
    named = {" ".join(str(getattr(word, "name", word)) for word in case): case for case in cases}
    for name, case in named.items():
        if name in kept:
            yield kept[name]
            continue
        start = {"part": part, "device": device, "case": name}
        try:
            yield {**start, **measured(*case)}
        except Exception as error:
            traceback.print_exc()
            yield {**start, "failed": f"{type(error).__name__}: {error}", "times": {}}


def still_true(before: dict | None, device: str, repeats: int) -> list[dict]:
    """The rows of an earlier {environment, rows} that did not fail; none unless all but command and day is the same."""
    now = environment(device, repeats=repeats)
    if before is None or now["commit"] == "unknown" or now["commit"].endswith("+changes"):
        return []
    same = {**before["environment"], "command": now["command"], "date": now["date"]} == now
    return [row for row in before["rows"] if same and "failed" not in row and "case" in row]


def with_kept(rows: list[dict], kept: list[dict]) -> list[dict]:
    """rows, and those of ``kept`` that have not come yet: whatever ends this, what was measured stays."""
    return rows + [row for row in kept if row not in rows]


def failures(rows: list[dict]) -> list[str]:
    return [f"{row['part']} {row['case']}: {row['failed']}" for row in rows if "failed" in row]


def exit_if(failed: list[str]) -> None:
    """End the script with what failed, if anything did."""
    if failed:
        sys.exit("these cases failed:\n" + "\n".join(failed))


def environment(device: str, **facts) -> dict:
    """What a figure means nothing without: command, versions, hardware, threads, commit; and ``facts``."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        model = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
        hardware = model[0].split(":", 1)[1].strip() if model else platform.processor()
    commit = sources.commit() or "unknown"
    malloc = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return {
        "command": " ".join([*malloc, "python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit
        + ("+changes" if _git("status", "--porcelain", "--", "qbr", "csrc", "benchmarks/*.py") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **(_versions_for_cuda() if device == "cuda" else {}),
        "qbr": qbr.__version__,
        **facts,
    }


@functools.cache
def _versions_for_cuda() -> dict[str, str | None]:
    """None for what is not there."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return {"cuda": torch.version.cuda, "triton": triton, "driver": driver.strip() or None}


def save(path: Path, device: str, rows: list[dict], **facts) -> None:
    """Write {environment, rows} as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps({"environment": environment(device, **facts), "rows": rows}, indent=1) + "\n")
    print(f"wrote {os.path.relpath(path)}")


def write(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
