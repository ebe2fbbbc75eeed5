"""Small calls of every op for a memory checker: odd sizes, misaligned offsets, NaN, hostile steps.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py --device cuda --backends native

Results are compared with the reference, as in tests/test_parity.py, whose cases these are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cases import SHAPES, SPECS  # noqa: E402
from test_parity import compare, inputs, run  # noqa: E402

from qbr import kernels  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backends", nargs="+", default=["native", "triton"])
    args = parser.parse_args()
    calls = 0
    for backend in args.backends:
        try:
            kernels.module(backend).load(args.device)
        except kernels.BackendUnavailable as error:
            sys.exit(f"{backend}: {error}" if args.device == "cuda" else 0)
        for case in SPECS:
            for shape in (s for s in SHAPES if s.name != "100003" and case.fits(s.size)):
                for dtype in (torch.float32, torch.bfloat16):
                    x, alpha, grad = inputs(case, shape, dtype)
                    expected = run("reference", "cpu", case, x, alpha, grad)
                    compare(run(backend, args.device, case, x, alpha, grad), expected, x, alpha, grad, case)
                    calls += 1
            x, alpha, grad = case.inputs((6, 8, 5, 5))
            x.view(-1)[[7, 70, 300]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
            for step in (None, 0.0, -0.3, float("nan"), float("inf")):
                run(backend, args.device, case, x, alpha if step is None else torch.full_like(alpha, step), grad)
                calls += 1
    print(f"{calls} calls of {', '.join(args.backends)} on {args.device}: results as the reference's")


if __name__ == "__main__":
    main()
