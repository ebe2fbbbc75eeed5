"""qbr's benchmarks: kernels against the bytes and against peers, lists of tensors, a training step, its memory.

    python benchmarks/run.py [--device cpu|cuda] [--part kernels compiled peers foreach step memory] [--quick]

Everything is checked before it is timed; runs alternate within one process; medians and quartiles. Rows go to
benchmarks/results/run-DEVICE.json and .csv, one file for all parts: a part that is run again replaces its own rows.
--quick: a look in under two minutes, into run-DEVICE-quick.*. --resume: go on where an earlier call was stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("benchmarks", "experiments")]
import foreach  # noqa: E402
import measure  # noqa: E402
import registry  # noqa: E402
import steps  # noqa: E402

import qbr  # noqa: E402
from qbr import kernels  # noqa: E402


def kernel_cases(device: str, quick: bool, repeats: int, only: int | None = None) -> steps.Cases:
    """Every backend's kernels in units of the limit."""
    sizes = [16, 22] if quick else [16, 18, 20, 22, 24, 26]
    cases = [
        registry.Case(device, dtype, bits, size)
        for dtype in registry.DTYPES
        for size in sizes
        for bits in ((2, 4) if quick else (2, 4, 8))
    ]
    for ways in ({"per_channel": True}, {"relu": True}):
        middle = [22] if quick else [22, 24]
        cases += [registry.Case(device, dtype, 2, size, **ways) for dtype in registry.DTYPES for size in middle]

    def measured(backend: str, case: registry.Case) -> dict:
        runs = registry.kernel_runs(case, backend)
        times = repeats if case.log2_size < 26 else max(3, repeats // 3)
        row = kernel_row(case, backend, measure.alternate(runs, device, times, device_only=True))
        print_kernel_row(row)
        return row

    wanted = [case for case in cases if only in (None, case.log2_size)]
    return itertools.product(backends(device), wanted), measured


def sizes_and_bits(quick: bool, only: int | None) -> Iterable[tuple[int, int]]:
    sizes = [only] if only is not None else [16] if quick else [16, 20, 24]
    return itertools.product(sizes, (2,) if quick else (2, 4, 8))


def compiled_cases(device: str, quick: bool, repeats: int, only: int | None = None) -> steps.Cases:
    """The kernels that "auto" takes against the same formulas under torch.compile."""

    def measured(size: int, bits: int) -> dict:
        case = registry.Case(device, "float32", bits, size)
        backend = kernels.resolve("auto", device, torch.float32)
        own = {name: run for name, run in registry.kernel_runs(case, backend).items() if "lsq_bin" in name}
        runs = {**own, **registry.compiled_runs(case)}
        result = measure.alternate(runs, device, max(3, repeats // 3), block=5, device_only=True)
        s = {name: r["median_s"] for name, r in result.items()}
        own = s["lsq_bin fwd"] + s["lsq_bin bwd"]
        kinds = [kind for kind in ("compiled", "compiled reference") if f"{kind} fwd" in s]
        ratios = {f"times_{kind.replace(' ', '_')}": (s[f"{kind} fwd"] + s[f"{kind} bwd"]) / own for kind in kinds}
        taken = ", ".join(f"{kind} {ratio:.1f}x" for kind, ratio in zip(kinds, ratios.values()))
        print(f"{case.name}: as long as qbr: {taken}", flush=True)
        facts = {"backend": backend, "dtype": case.dtype, "bits": bits, "log2_size": size}
        return {"part": "compiled", "device": device, **facts, **ratios, "times": result}

    return sizes_and_bits(quick, only), measured


def kernel_row(case: registry.Case, backend: str, result: dict) -> dict:
    s = {name: r["median_s"] for name, r in result.items()}
    n_bytes = (1 << case.log2_size) * registry.DTYPES[case.dtype].itemsize
    limit, both = s["limit fwd"] + s["limit bwd"], s["lsq_bin fwd"] + s["lsq_bin bwd"]
    return {
        "part": "kernels", "device": case.device, "backend": backend, "dtype": case.dtype, "bits": case.bits,
        "log2_size": case.log2_size, "per_channel": case.per_channel, "relu": case.relu,
        "ratio_fwd": s["lsq_bin fwd"] / s["limit fwd"], "ratio_bwd": s["lsq_bin bwd"] / s["limit bwd"],
        "ratio": both / limit, "lsq_ratio": (s["lsq fwd"] + s["lsq bwd"]) / limit,
        "gb_per_s": 5 * n_bytes / both / 1e9, "limit_gb_per_s": 5 * n_bytes / limit / 1e9, "times": result,
    }  # fmt: skip


def print_kernel_row(row: dict) -> None:
    ways = (" per channel" if row["per_channel"] else "") + (" ReLU" if row["relu"] else "")
    us = {name: r["median_s"] * 1e6 for name, r in row["times"].items()}
    print(
        f"{row['backend']:6} {row['dtype']:8} {row['bits']} bits 2^{row['log2_size']}{ways}:",
        f"fwd {us['lsq_bin fwd']:.0f} us ({row['ratio_fwd']:.2f}x), bwd {us['lsq_bin bwd']:.0f} us",
        f"({row['ratio_bwd']:.2f}x), both {row['ratio']:.2f}x,",
        f"{row['gb_per_s']:.1f} of {row['limit_gb_per_s']:.1f} GB/s",
        flush=True,
    )


def peer_cases(device: str, quick: bool, repeats: int, only: int | None = None) -> steps.Cases:
    """Forward and backward through autograd: qbr, the predecessor's formulas, and libraries that do LSQ alone."""

    def measured(size: int, bits: int) -> dict:
        case = registry.Case(device, "float32", bits, size)
        runs, missing = registry.autograd_runs(case)
        result = measure.alternate(runs, device, repeats if size < 24 else max(3, repeats // 2))
        row = {"part": "peers", "device": device, "dtype": case.dtype, "bits": bits, "log2_size": size}
        for name, r in result.items():
            own = result["qbr lsq_bin" if name.endswith("lsq_bin") else "qbr lsq"]["median_s"]
            row[f"times {name}"] = r["median_s"] / own
        print(f"{case.name}: " + ", ".join(f"{n} {r['median_s'] * 1e6:.0f} us" for n, r in result.items()), missing)
        return {**row, "missing": missing, "versions": registry.versions(), "times": result}

    return sizes_and_bits(quick, only), measured


def backends(device: str) -> list[str]:
    found = []
    for name in ("native", "triton"):
        try:
            kernels.module(name).load(device)
            found.append(name)
        except qbr.BackendUnavailable as error:
            print(f"{name} left out: {error}")
    return found


PARTS = {
    "kernels": kernel_cases,
    "compiled": compiled_cases,
    "peers": peer_cases,
    "foreach": foreach.cases,
    "step": steps.cases,
    "memory": steps.memory_cases,
}


def save(path: Path, device: str, part: str, rows: list[dict], repeats: int) -> None:
    """Replace one part of the JSON file, and write its flat figures as CSV beside it."""
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = {"environment": measure.environment(device, repeats=repeats), "rows": rows}
    measure.write(path, json.dumps(parts, indent=1) + "\n")
    flat = [
        {**_plain(row), "run": name, **_plain(r)}
        for each in parts.values()
        for row in each["rows"]
        for name, r in row["times"].items()
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def _plain(row: dict) -> dict:
    return {name: value for name, value in row.items() if not isinstance(value, dict)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--log2-size", type=int, default=None, help="this size of kernels, compiled, peers")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="few sizes, few repeats: under two minutes")
    parser.add_argument("--resume", action="store_true", help="keep what the same commit measured here, do the rest")
    parser.add_argument("--output", type=Path, default=None, help="a .json file; default: benchmarks/results/")
    args = parser.parse_args()
    name = f"run-{args.device}{'-quick' if args.quick else ''}.json"
    path = args.output or measure.ROOT / "benchmarks/results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, repeats = [], 5 if args.quick else args.repeats
    for part in args.part:
        print(f"# {part}", flush=True)
        only = (args.log2_size,) if part in ("kernels", "compiled", "peers") else ()
        before = json.loads(path.read_text()).get(part) if args.resume and path.exists() else None
        rows, kept = [], measure.still_true(before, args.device, repeats)
        cases = PARTS[part](args.device, args.quick, repeats, *only)
        for row in measure.each(part, args.device, *cases, kept):
            rows.append(row)
            save(path, args.device, part, measure.with_kept(rows, kept), repeats)
        failures += measure.failures(rows)
    measure.exit_if(failures)


if __name__ == "__main__":
    main()
