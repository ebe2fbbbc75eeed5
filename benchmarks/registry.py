"""What benchmarks/run.py times: one way to quantize a tensor, and the peers that do the same or a part of it.

A peer is made for one case, checked there against the reference, and gives a function that runs forward and backward
once. Peers that are not installed say so instead.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import predecessor
import torch
from torch import Tensor

import qbr
from qbr import functional, kernels, ops
from qbr.arguments import check
from qbr.kernels import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One tensor of 2^log2_size normal values, and how it is quantized."""

    device: str
    dtype: str
    bits: int
    log2_size: int
    per_channel: bool = False
    relu: bool = False

    @property
    def name(self) -> str:
        ways = (", per channel" if self.per_channel else "") + (", ReLU" if self.relu else "")
        return f"{self.dtype} {self.bits} bits 2^{self.log2_size}{ways}"

    @property
    def spec(self) -> qbr.QuantSpec:
        return qbr.QuantSpec(bits=self.bits, signed=not self.relu, channel_axis=0 if self.per_channel else None)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, alpha (LSQ's initialisation for it) and an incoming gradient. Per channel: 256 rows."""
        generator = torch.Generator().manual_seed(self.log2_size)
        shape = (256, -1) if self.per_channel else (-1,)
        x, grad = (
            torch.randn(1 << self.log2_size, generator=generator).to(self.device, DTYPES[self.dtype]).reshape(shape)
            for _ in range(2)
        )
        size = 0.4 if self.relu else 0.8  # mean |y|
        alpha = torch.full((self.spec.channels(x.shape),), 2 * size / max(self.spec.qp, 1) ** 0.5, device=self.device)
        return x, alpha, grad


def kernel_runs(case: Case, backend: str) -> dict[str, Callable]:
    """The raw kernels of a backend, forward and backward apart, and the bytes that they have to move."""
    ops.implement(kernels.resolve(backend, case.device, DTYPES[case.dtype]))
    namespace = getattr(torch.ops, f"qbr_{backend}")
    x, alpha, grad = case.tensors()
    x, alpha, plain = check(x, alpha, case.spec, case.relu, None)
    one = torch.ones((), device=case.device)
    bins = namespace.lsq_bin_fwd.default(x, alpha, *plain, False)[2]
    _check_kernels(namespace, case, x, alpha, grad, plain)
    return {
        "limit fwd": lambda: torch.clone(x),
        "limit bwd": lambda: torch.add(x, grad),
        "lsq fwd": lambda: namespace.lsq_fwd.default(x, alpha, *plain),
        "lsq bwd": lambda: namespace.lsq_bwd.default(grad, x, alpha, *plain, 0.01),
        "lsq_bin fwd": lambda: namespace.lsq_bin_fwd.default(x, alpha, *plain, False),
        "lsq_bin bwd": lambda: namespace.lsq_bin_bwd.default(grad, one, x, alpha, bins, *plain, 0.01),
    }


def compiled_runs(case: Case) -> dict[str, Callable]:
    """LSQ + BR under torch.compile, forward and backward, in the forms that suit it best: closed-form gradients,
    float32 sums, a mask for each level up to 16 of them and one scatter beyond. And the reference itself, with its
    float64 sums, as it stands."""
    x, alpha, grad = case.tensors()
    spec, one = case.spec, torch.ones((), device=case.device)
    scale = 0.01

    def forward(x, alpha):
        b = (x / alpha).clamp(spec.qn, spec.qp).round()
        xhat = b * alpha
        square = (x - xhat).square()
        if spec.num_slots <= 16:
            masks = [b == k for k in spec.codes]
            counts = torch.stack([mask.sum(dtype=torch.float32) for mask in masks])
            sums = torch.stack([torch.where(mask, square, 0.0).sum() for mask in masks])
        else:
            slot = (b - spec.qn).long()
            counts = x.new_zeros(spec.num_slots).index_add(0, slot, torch.ones_like(x))
            sums = x.new_zeros(spec.num_slots).index_add(0, slot, square)
        return xhat, (sums / counts.clamp(min=1)).sum(), counts

    def backward(grad, grad_loss, x, alpha, counts):
        v = x / alpha
        c = v.clamp(spec.qn, spec.qp)
        b, inside = c.round(), c == v
        pull = (2 * grad_loss / counts.clamp(min=1))[(b - spec.qn).long()] * (x - b * alpha)
        dalpha = scale * (grad * torch.where(inside, b - v, b)).sum()
        return torch.where(inside, grad, 0.0) + pull, dalpha.reshape(1)

    torch.compiler.reset()
    forward, backward = torch.compile(forward, dynamic=False), torch.compile(backward, dynamic=False)
    xhat, loss, counts = forward(x, alpha)
    dx, dalpha = backward(grad, one, x, alpha, counts)
    _, _, plain = check(x, alpha, spec, False, None)
    expected = reference.lsq_bin_fwd(x, alpha, *plain, False)
    expected_dx, expected_dalpha = reference.lsq_bin_bwd(grad, one, x, alpha, expected[2], *plain, scale)
    # On CUDA inductor divides approximately (div.full.f32), and a code beside a tie may be the next one.
    for other in (xhat != expected[0], ~torch.isclose(dx, expected_dx, rtol=1e-2, atol=1e-3)):
        few = max(1e-5, 2 / x.numel()) if x.is_cuda else 0
        assert other.float().mean() <= few, f"{case.name}: differs from the reference"
    for got, wanted in ((loss, expected[1]), (dalpha, expected_dalpha)):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3)
    runs = {
        "compiled fwd": lambda: forward(x, alpha),
        "compiled bwd": lambda: backward(grad, one, x, alpha, counts),
    }
    if x.is_cuda and spec.bits > 4:  # there the reference is three sums for each of 256 bins: minutes of compiling
        return runs
    reference_fwd = torch.compile(reference.lsq_bin_fwd, dynamic=False)
    reference_bwd = torch.compile(reference.lsq_bin_bwd, dynamic=False)
    bins = reference_fwd(x, alpha, *plain, False)[2]
    reference_bwd(grad, one, x, alpha, bins, *plain, scale)
    return {
        **runs,
        "compiled reference fwd": lambda: reference_fwd(x, alpha, *plain, False),
        "compiled reference bwd": lambda: reference_bwd(grad, one, x, alpha, bins, *plain, scale),
    }


def _check_kernels(namespace, case: Case, x, alpha, grad, plain) -> None:
    """Values of the whole tensor, all results of a part: as the reference's, or nothing is timed."""
    size = 1 << 16
    part = (slice(None), slice(0, size // 256)) if case.per_channel else slice(0, size)
    px, pgrad, palpha = x[part].cpu().contiguous(), grad[part].cpu().contiguous(), alpha.cpu()
    one = torch.ones(())
    expected = reference.lsq_bin_fwd(px, palpha, *plain, False)
    got = namespace.lsq_bin_fwd.default(px.to(x.device), alpha, *plain, False)
    levels = case.spec.num_slots
    assert torch.equal(got[0].cpu(), expected[0]), f"{case.name}: codes differ from the reference's"
    assert torch.equal(got[2][:levels].cpu(), expected[2][:levels]), f"{case.name}: counts differ"
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-4, atol=1e-7)
    dx, dalpha = namespace.lsq_bin_bwd.default(
        pgrad.to(x.device), one.to(x.device), px.to(x.device), alpha, got[2], *plain, 0.01
    )
    expected_dx, expected_dalpha = reference.lsq_bin_bwd(pgrad, one, px, palpha, expected[2], *plain, 0.01)
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(dx.cpu(), expected_dx, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dalpha.cpu(), expected_dalpha, rtol=1e-3, atol=1e-3)
    xhat = reference.lsq_fwd(x.cpu(), alpha.cpu(), *plain)
    whole = namespace.lsq_bin_fwd.default(x, alpha, *plain, False)
    assert torch.equal(namespace.lsq_fwd.default(x, alpha, *plain).cpu(), xhat), f"{case.name}: values differ"
    assert torch.equal(whole[0].cpu(), xhat), f"{case.name}: values of the pass with bins differ"
    assert whole[2][:levels].sum().item() == x.numel(), f"{case.name}: the counts do not add up"


# ---- peers that do LSQ alone, and the predecessor: forward and backward through autograd ---------------------------


class NotInstalled(Exception):
    """A peer cannot be had here; the message says why."""


def autograd_runs(case: Case) -> tuple[dict[str, Callable], dict[str, str]]:
    """({peer: run}, {peer that is missing: why}). qbr's own functions are among them."""
    x, alpha, grad = case.tensors()
    spec = case.spec
    x.requires_grad_()

    def both(forward, parameters):
        def run():
            x.grad = None
            for p in parameters:
                p.grad = None
            torch.autograd.backward(*forward())

        return run

    alpha.requires_grad_()
    one = torch.ones((), device=case.device)

    def qbr_lsq():
        return [functional.fake_quantize(x, alpha, spec)], [grad]

    def qbr_lsq_bin():
        made = functional.fake_quantize_with_bin_loss(x, alpha, spec)
        return [made.xhat, made.loss], [grad, one]

    def eager():
        loss, _ = predecessor.bin_loss(x, alpha, spec.qn, spec.qp)
        return [predecessor.fake_quantize(x, alpha, spec.qn, spec.qp), loss], [grad, one]

    runs = {"qbr lsq_bin": both(qbr_lsq_bin, [alpha]), "qbr lsq": both(qbr_lsq, [alpha])}
    if case.dtype == "float32" and case.bits <= 4 and case.log2_size <= 20:
        runs["predecessor lsq_bin"] = both(eager, [alpha])
    missing = {}
    expected = reference.lsq_fwd(x.detach(), alpha.detach(), *check(x, alpha, spec, False, None)[2])
    for name, make in LSQ_PEERS.items():
        try:
            forward, parameters = make(case, alpha.detach())
        except NotInstalled as error:
            missing[name] = str(error)
            continue
        except ImportError as error:  # of a package that is there, and lacks what it needs
            missing[name] = f"does not import: {error}"
            continue
        got = forward(x).detach()
        wrong = ((got - expected).abs() > 0.01 * alpha.detach()).float().mean().item()
        if wrong > 1e-4:  # their scales go through other roundings: a few ties
            missing[name] = f"quantizes {wrong:.2%} of the elements to another level: not the same operation"
            continue
        runs[f"{name} lsq"] = both(lambda forward=forward: ([forward(x)], [grad]), parameters)
    return runs, missing


def versions() -> dict[str, str]:
    """Of the packages whose quantizers are peers, those that are installed."""
    found = {}
    for package in LSQ_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _torch_learnable(case: Case, alpha: Tensor):
    spec = case.spec
    if case.dtype != "float32":
        raise NotInstalled("PyTorch's learnable fake quantization takes float32 only")
    scale = alpha.clone().requires_grad_()
    zero_point = torch.zeros(1, device=case.device)
    factor = spec.lsq_grad_scale(1 << case.log2_size)

    def forward(x):
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, spec.qn, spec.qp, factor)

    return forward, [scale]


def _brevitas(case: Case, alpha: Tensor):
    _installed("brevitas")
    from brevitas.nn import QuantIdentity
    from brevitas.quant import Int8ActPerTensorFloat

    class Learned(Int8ActPerTensorFloat):
        scaling_impl_type = "parameter"
        scaling_init = alpha.item() * 2 ** (case.bits - 1)
        bit_width = case.bits

    module = QuantIdentity(act_quant=Learned, return_quant_tensor=False).to(case.device, DTYPES[case.dtype])
    return module, list(module.parameters())


def _nncf(case: Case, alpha: Tensor):
    _installed("nncf")
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer

    if case.bits != 8:
        # Its scale is that of the upper end, and its signed range narrower the fewer bits there are.
        raise NotInstalled("NNCF's symmetric quantizer has LSQ's grid at 8 bits only")
    spec = PTQuantizerSpec(
        num_bits=case.bits, mode=QuantizationScheme.SYMMETRIC, signedness_to_force=True, narrow_range=False,
        half_range=False, scale_shape=(1,), logarithm_scale=False,
    )  # fmt: skip
    module = SymmetricQuantizer(spec).to(case.device)
    module.scale.data.fill_(alpha.item() * case.spec.qp)
    return module, [p for p in module.parameters() if p.requires_grad]


def _torchao(case: Case, alpha: Tensor):
    """Its learned ranges, symmetric: one scale for the one row that the tensor is seen as."""
    _installed("torchao")
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, initialize_fake_quantizers
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    integers = getattr(torch, f"int{case.bits}")
    config = IntxFakeQuantizeConfig(
        integers, granularity=PerAxis(0), is_symmetric=True, is_dynamic=False, range_learning=True
    )
    module = IntxFakeQuantizer(config)
    initialize_fake_quantizers(module, (torch.ones(1, 2, device=case.device),))  # makes the scale a parameter
    module.scale.data.fill_(alpha.item())
    return _as_one_row(module), [module.scale]


def _modelopt(case: Case, alpha: Tensor):
    """Its LSQ, which learns the upper end (amax): one scale for quantizing and for what comes of it, one block."""
    _installed("nvidia-modelopt")
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import StaticBlockScaleQuantizer, TensorQuantizer

    plain = TensorQuantizer(QuantizerAttributeConfig(num_bits=case.bits), amax=alpha * case.spec.qp)
    module = StaticBlockScaleQuantizer.from_tensor_quantizer(plain)
    module.enable_lsq(quantize_scales=False, learnable_amax=["pre", "post"], tied_amax=True)
    return _as_one_row(module), list(module.parameters())


def _as_one_row(module: Callable) -> Callable:
    return lambda x: module(x.view(1, -1)).view_as(x)


def _installed(package: str) -> None:
    if package not in versions():
        raise NotInstalled(f"{package} is not installed")


LSQ_PACKAGES = ["brevitas", "nncf", "torchao", "nvidia-modelopt"]
LSQ_PEERS: dict[str, Callable] = {
    "torch learnable": _torch_learnable,
    "brevitas": _brevitas,
    "nncf": _nncf,
    "torchao": _torchao,
    "modelopt": _modelopt,
}


