"""Every backend's kernels against the bytes that they must move: a clone for forward, an out-of-place add for backward.

    python benchmarks/kernels.py [--device cpu|cuda] [--log2-sizes 22 24] [--bits 2 4 8] [--quick]

Results are compared with the reference before they are timed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure  # noqa: E402

import qbr  # noqa: E402
from qbr import kernels, ops  # noqa: E402


def rows_of(device: str, backend: str, dtype: torch.dtype, bits: int, log2_size: int, repeats: int) -> dict:
    spec = qbr.QuantSpec(bits=bits)
    x = torch.randn(1 << log2_size, device=device).to(dtype)
    grad = torch.randn_like(x)
    alpha = torch.tensor([2 * 0.8 / max(spec.qp, 1) ** 0.5], device=device)
    x, alpha, plain = ops.check(x, alpha, spec, False, None)
    namespace = getattr(torch.ops, f"qbr_{backend}")
    one = torch.ones((), device=device)
    xhat, loss, bins, _ = namespace.lsq_bin_fwd(x, alpha, *plain, False)
    part = slice(0, 1 << 16)
    expected = torch.ops.qbr_reference.lsq_fwd(x[part].cpu(), alpha.cpu(), *plain)
    assert torch.equal(xhat[part].cpu(), expected), f"{backend}: codes differ from the reference"
    assert bins[: spec.num_slots].sum() == x.numel() and math.isfinite(loss.item())
    runs = {
        "limit_fwd": lambda: torch.clone(x),
        "limit_bwd": lambda: torch.add(x, grad),
        "lsq_fwd": lambda: namespace.lsq_fwd(x, alpha, *plain),
        "lsq_bwd": lambda: namespace.lsq_bwd(grad, x, alpha, *plain, 0.01),
        "bin_loss_fwd": lambda: namespace.bin_loss_fwd(x, alpha, *plain, False),
        "lsq_bin_fwd": lambda: namespace.lsq_bin_fwd(x, alpha, *plain, False),
        "lsq_bin_fwd+alpha": lambda: namespace.lsq_bin_fwd(x, alpha, *plain, True),
        "lsq_bin_bwd": lambda: namespace.lsq_bin_bwd(grad, one, x, alpha, bins, *plain, 0.01),
    }
    result = measure.alternate(runs, device, repeats)
    ratio = {
        name: round(r["median_s"] / result["limit_bwd" if "bwd" in name else "limit_fwd"]["median_s"], 3)
        for name, r in result.items()
    }
    print(
        f"{backend:9} {str(dtype)[6:]:9} {bits} bits 2^{log2_size}: "
        + ", ".join(f"{k} {v}x" for k, v in ratio.items()),
        flush=True,
    )
    facts = {"backend": backend, "dtype": str(dtype)[6:], "bits": bits, "log2_size": log2_size, "device": device}
    return {**facts, "ratio_to_limit": ratio, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--log2-sizes", type=int, nargs="+", default=None, help="default: 22 24, on CUDA 22 26")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="one small size, few repeats")
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/kernels-DEVICE.json")
    args = parser.parse_args()
    sizes = args.log2_sizes or ([18] if args.quick else [22, 26] if args.device == "cuda" else [22, 24])
    rows = []
    for backend in ("native", "triton"):
        try:
            kernels.module(backend).load(args.device)
            ops.implement(backend)
        except qbr.BackendUnavailable as error:
            print(f"{backend}: {error}")
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for size in sizes:
                for bits in args.bits:
                    rows.append(rows_of(args.device, backend, dtype, bits, size, 3 if args.quick else args.repeats))
    measure.save(args.output or measure.ROOT / f"benchmarks/results/kernels-{args.device}.json", args.device, rows)


if __name__ == "__main__":
    main()
