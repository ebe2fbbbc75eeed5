"""The drop-in against the predecessor's eager formulas: one tensor, and a whole ResNet-18 training step.

    python benchmarks/drop_in.py [--device cpu|cuda] [--part tensor|step|all] [--quick]

Every result is checked against the reference formulas before it is timed. Rows go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("benchmarks", "experiments")]
import measure  # noqa: E402
import predecessor  # noqa: E402
import steps  # noqa: E402

import qbr  # noqa: E402


def tensor_row(device: str, log2_size: int, bits: int, repeats: int) -> dict:
    """LSQ + BR forward and backward of one float32 tensor, and the bytes-moved limit: one copy and one add."""
    spec = qbr.QuantSpec(bits=bits)
    x = torch.randn(1 << log2_size, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    alpha = torch.tensor([2 * 0.8 / spec.qp**0.5], device=device, requires_grad=True)

    def step(forward):
        x.grad = alpha.grad = None
        xhat, loss = forward()
        torch.autograd.backward([xhat, loss], [grad, torch.ones_like(loss)])

    def eager():
        xhat = predecessor.fake_quantize(x, alpha, spec.qn, spec.qp)
        return xhat, predecessor.bin_loss(x, alpha, spec.qn, spec.qp)[0]

    def drop_in():
        xhat = qbr.functional.fake_quantize(x, alpha, spec)
        return xhat, qbr.BinRegularizer(num_bits=bits).compute_bin_loss(x, alpha)[0]

    def fused():
        return qbr.functional.fake_quantize_with_bin_loss(x, alpha, spec)[:2]

    def limit():
        torch.clone(x.detach())
        torch.add(x.detach(), grad)

    check([eager, drop_in, fused], step, x, alpha)
    peers = {"fused": fused, "drop-in": drop_in, "predecessor": eager}
    runs = {"limit": limit, **{name: lambda f=f: step(f) for name, f in peers.items()}}
    result = measure.alternate_apart(runs, "predecessor", device, repeats, device_only=True)
    times = (f"{name} {r['median_s'] * 1e3:.1f} ms ({r['ratio']:.2f}x)" for name, r in result.items())
    print(f"2^{log2_size} float32, {bits} bits: {', '.join(times)}", flush=True)
    return {"part": "tensor", "log2_size": log2_size, "bits": bits, "device": device, "times": result}


def check(forwards, step, x, alpha) -> None:
    """All peers agree with the first on loss and gradients, or nothing is timed."""
    expected = None
    for forward in forwards:
        step(forward)
        got = forward()[1].item(), x.grad.clone(), alpha.grad.clone()
        if expected is None:
            expected = got
            continue
        torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(got[2], expected[2], rtol=1e-3, atol=1e-3)
        # The predecessor's re-scaled step moves a few elements across a tie or an end.
        wrong = ((got[1] - expected[1]).abs() > 1e-3 * expected[1].abs().max()).float().mean()
        assert wrong < 1e-5, f"{wrong:.2%} of the gradient differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--part", default="all", choices=["tensor", "step", "all"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="small tensors and few repeats")
    parser.add_argument("--resume", action="store_true", help="keep what the same commit measured here, do the rest")
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/drop_in-DEVICE.json")
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    path = args.output or measure.ROOT / f"benchmarks/results/drop_in-{args.device}.json"
    sizes = [(20 if args.quick else 24, bits) for bits in (2, 4)]
    kinds = "float", "drop-in", "fused", "predecessor"
    parts = {
        "tensor": (sizes, lambda size, bits: tensor_row(args.device, size, bits, repeats)),
        "step": ([(args.batch,)], lambda batch: steps.row(args.device, batch, repeats, kinds)),
    }
    before = json.loads(path.read_text()) if args.resume and path.exists() else None
    rows, kept = [], measure.still_true(before, args.device, repeats)
    for part in parts if args.part == "all" else [args.part]:
        for row in measure.each(part, args.device, *parts[part], kept):
            rows.append(row)
            measure.save(path, args.device, measure.with_kept(rows, kept), repeats=repeats)
    measure.exit_if(measure.failures(rows))


if __name__ == "__main__":
    main()
