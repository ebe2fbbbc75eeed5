"""Time on the device, kernel by kernel, of one fused forward and backward per backend.

python benchmarks/profile_kernels.py --output FILE [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import qbr


def table(run, device: str) -> str:
    for _ in range(3):
        run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiled:
        for _ in range(5):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    return profiled.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    parts = []
    for backend, reason in ((name, row[args.device]) for name, row in qbr.backends().items()):
        if reason is not None:
            parts.append(f"{backend}: {reason}")
            continue
        for bits in (2, 8):
            x = torch.randn(1 << (26 if args.device == "cuda" else 20), device=args.device, requires_grad=True)
            alpha = torch.tensor([0.5 if bits == 2 else 0.02], device=args.device, requires_grad=True)
            grad = torch.randn_like(x)
            spec = qbr.QuantSpec(bits=bits)

            def run():
                r = qbr.functional.fake_quantize_with_bin_loss(x, alpha, spec, backend=backend)
                torch.autograd.grad([r.xhat, r.loss], (x, alpha), [grad, torch.ones_like(r.loss)])

            parts.append(f"{backend}, {bits} bits, {x.numel()} float32\n{table(run, args.device)}")
    args.output.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
