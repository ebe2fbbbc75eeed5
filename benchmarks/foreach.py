"""The weights of a ResNet-18: one call for all against a call for each, forward and backward."""

from __future__ import annotations

import itertools

import measure
import torch
from cifar10.models import MODELS

import qbr
from qbr import functional

SMALL = 1 << 17


class _Sink(torch.autograd.Function):
    """One root for a graph whose outputs have given gradients: what torch.autograd.backward does to check many roots
    takes longer than what is to be timed."""

    @staticmethod
    def forward(ctx, grads, *outputs):
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.grads


def cases(device: str, quick: bool, repeats: int):
    torch.manual_seed(0)
    weights = [p.detach().to(device) for p in MODELS["resnet18"](10).parameters() if p.dim() > 1]
    sets = {"all": weights, "small": [w for w in weights if w.numel() <= SMALL]}
    every = itertools.product((2,) if quick else (2, 4), sets)
    return every, lambda bits, name: _row(device, name, sets[name], qbr.QuantSpec(bits=bits), repeats)


def _row(device: str, name: str, weights: list, spec: qbr.QuantSpec, repeats: int) -> dict:
    xs = [w.clone().requires_grad_() for w in weights]
    alphas = [torch.tensor([2 * w.abs().mean().item() / spec.qp**0.5], device=device).requires_grad_() for w in weights]
    grads = [*(torch.randn_like(w) for w in weights), *(torch.ones((), device=device) for _ in weights)]

    def together():
        return functional.foreach_fake_quantize_with_bin_loss(xs, alphas, spec)

    def one_by_one():
        return [functional.fake_quantize_with_bin_loss(x, alpha, spec) for x, alpha in zip(xs, alphas)]

    def step(make):
        def run():
            for t in (*xs, *alphas):
                t.grad = None
            made = make()
            _Sink.apply(grads, *(each.xhat for each in made), *(each.loss for each in made)).backward()
            return [each.xhat.detach() for each in made], [t.grad for t in (*xs, *alphas)]

        return run

    runs = {"together": step(together), "one by one": step(one_by_one)}
    for a, b in zip(*(sum(run(), []) for run in runs.values())):
        assert torch.equal(a, b), "the list's results are not those of its tensors"
    runs["limit"] = lambda: [(x.detach().clone(), torch.add(x.detach(), x.detach())) for x in xs]
    result = measure.alternate(runs, device, 3 * repeats)
    ms = {key: r["median_s"] * 1e3 for key, r in result.items()}
    print(
        f"{len(xs)} weights ({name}), {spec.bits} bits: together {ms['together']:.2f} ms, one by one "
        f"{ms['one by one']:.2f} ms ({ms['one by one'] / ms['together']:.2f}x), limit {ms['limit']:.2f} ms",
        flush=True,
    )
    return {
        "part": "foreach", "device": device, "weights": name, "count": len(xs), "bits": spec.bits,
        "numel": sum(x.numel() for x in xs), "ratio": ms["one by one"] / ms["together"], "times": result,
    }  # fmt: skip
