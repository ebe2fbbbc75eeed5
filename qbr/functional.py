"""The functions that people call: LSQ fake quantization and bin regularization of a tensor, or both in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from qbr import ops
from qbr.spec import QuantSpec, ToAlpha


class Bins(NamedTuple):
    """The bin sums of one tensor, on its device; reading a figure from them is what synchronises.

    Attributes:
        table: [3 * L + 2] float64: n_k, S_k = sum d, Q_k = sum d^2 for the L slots qn..qp, then sum |d| and the
            count of |d| < 0.01 * alpha (math: qbr/kernels/README.md).
        alpha: the steps that the distances d were taken to, detached: one, or C, in the caller's shape and memory, so
            read figures before an optimizer's step, or keep a clone; of a number, a new tensor [1].
        spec: the tensor's QuantSpec.
        numel: how many elements it has here (of global bins, the counts' sum is that of all ranks).
    """

    table: Tensor
    alpha: Tensor
    spec: QuantSpec
    numel: int

    @property
    def counts(self) -> Tensor:
        """n_k, [L]."""
        return self.table[: self.spec.num_slots]

    @property
    def sums(self) -> Tensor:
        """S_k, [L]."""
        return self.table[self.spec.num_slots : 2 * self.spec.num_slots]

    @property
    def squares(self) -> Tensor:
        """Q_k, [L]."""
        return self.table[2 * self.spec.num_slots : 3 * self.spec.num_slots]


class BinLoss(NamedTuple):
    """``loss``: a scalar in the graph, in float32 (float64 for an x of float64); ``bins``: the sums it came from."""

    loss: Tensor
    bins: Bins


class FakeQuantizedWithBinLoss(NamedTuple):
    """``xhat``: as fake_quantize returns it; ``loss`` and ``bins``: as BinLoss has them."""

    xhat: Tensor
    loss: Tensor
    bins: Bins


def fake_quantize(
    x: Tensor,
    alpha: Tensor | float,
    spec: QuantSpec,
    *,
    relu: bool = False,
    clip: float | None = None,
    backend: str = "auto",
    alpha_grad: float = 1.0,
) -> Tensor:
    """LSQ fake quantization: round(clamp(x / alpha, qn, qp)) * alpha, half to even, straight-through backward.

    Args:
        x: any shape and strides; float32, bfloat16, float16 (float64 in the reference backend).
        alpha: the step size, positive: one element, or [C] with ``spec.channel_axis``; a number for a fixed step. A
            tensor's values are not read, and no optimizer is watched: LSQQuantizer is a step that stays positive.
        spec: the integer range.
        relu: quantize min(max(x, 0), clip) instead of x, in the same pass; needs an unsigned range.
        clip: the upper bound of that ReLU.
        backend: "auto", "triton", "native" or "reference".
        alpha_grad: multiplies alpha's gradient, beside LSQ's gradient scale; with 0.0 it is 0, not absent.

    Returns:
        xhat, in x's shape and dtype.

    Raises:
        TypeError, ValueError: for a bad argument. BackendUnavailable: for a backend that is not there. RuntimeError:
        where a gradient of the gradient is asked for, which is that of steps and no use (so in all functions here).

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, equations 1 to 5.
    """
    return ops.lsq(x, alpha, spec, relu, clip, backend, alpha_grad)


def bin_loss(
    x: Tensor,
    alpha: Tensor | float,
    spec: QuantSpec,
    *,
    relu: bool = False,
    clip: float | None = None,
    backprop_to_alpha: ToAlpha = False,
    regularizer: str = "br",
    backend: str = "auto",
) -> BinLoss:
    """Bin regularization: sum over occupied codes k of (mean of the bin - level)^2 + variance of the bin.

    Args:
        backprop_to_alpha: how much of the loss's gradient reaches alpha: False (none), True (all of it, unscaled, as
            the predecessor), a fraction from 0 to 1, "scaled" (all, times LSQ's gradient scale), or
            (fraction, "scaled"). It changes neither the loss nor its gradient to x.
        regularizer: "br", or "dampening" for the sum of squared distances to the levels: an element weighs 1 there
            and not 1 / n_k (qbr/kernels/README.md, "Dampening").
        x, alpha, spec, relu, clip, backend: as in fake_quantize.

    Returns:
        A BinLoss.

    Raises:
        TypeError, ValueError, BackendUnavailable: as fake_quantize.

    Sources: Han et al., Improving Low-Precision Network Quantization via Bin Regularization, ICCV 2021; dampening:
    Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, section 4.2.
    """
    loss, table = ops.bin_loss(x, alpha, spec, relu, clip, backprop_to_alpha, regularizer, backend)
    return BinLoss(loss, _bins(table, x, alpha, spec))


def fake_quantize_with_bin_loss(
    x: Tensor,
    alpha: Tensor | float,
    spec: QuantSpec,
    *,
    relu: bool = False,
    clip: float | None = None,
    backprop_to_alpha: ToAlpha = False,
    regularizer: str = "br",
    backend: str = "auto",
    alpha_grad: float = 1.0,
) -> FakeQuantizedWithBinLoss:
    """fake_quantize and bin_loss in one pass over x; backward reads x and the incoming gradient once.

    Args: as of both; alpha_grad counts for the bin loss too where backprop_to_alpha is "scaled".

    Returns:
        (xhat, loss, bins), a FakeQuantizedWithBinLoss.

    Raises:
        TypeError, ValueError, BackendUnavailable: as fake_quantize.
    """
    xhat, loss, table = ops.lsq_bin(x, alpha, spec, relu, clip, backprop_to_alpha, regularizer, backend, alpha_grad)
    return FakeQuantizedWithBinLoss(xhat, loss, _bins(table, x, alpha, spec))


def foreach_fake_quantize(
    xs: Sequence[Tensor], alphas: Sequence[Tensor | float], specs: QuantSpec | Sequence[QuantSpec], *,
    relu: bool = False, clip: float | None = None,
    backend: str = "auto", alpha_grad: float | list[float] = 1.0,
) -> list[Tensor]:  # fmt: skip
    """fake_quantize over lists, in one call of the backend forward and one backward for all tensors of a device.

    Args:
        xs, alphas: as many of each; any mixture of shapes and dtypes.
        specs: one QuantSpec for all, or a list.
        relu, clip, backend: as in fake_quantize, for all.
        alpha_grad: one for all, or a list.

    Returns:
        A list of what fake_quantize returns, in xs' order.

    Raises:
        TypeError, ValueError, BackendUnavailable: as fake_quantize; ValueError for lists of different lengths.
    """
    xs, alphas, specs = _checked(xs, alphas, specs)
    return ops.foreach_lsq(xs, alphas, specs, relu, clip, backend, _for_each(xs, alpha_grad, "alpha_grad"))


def foreach_fake_quantize_with_bin_loss(
    xs: Sequence[Tensor], alphas: Sequence[Tensor | float], specs: QuantSpec | Sequence[QuantSpec], *,
    relu: bool = False, clip: float | None = None,
    backprop_to_alpha: ToAlpha | list[Any] = False, regularizer: str | list[str] = "br", backend: str = "auto",
    alpha_grad: float | list[float] = 1.0,
) -> list[FakeQuantizedWithBinLoss]:  # fmt: skip
    """fake_quantize_with_bin_loss over lists, as foreach_fake_quantize, which says what is returned and raised.

    backprop_to_alpha, regularizer and alpha_grad may be lists, too.
    """
    xs, alphas, specs = _checked(xs, alphas, specs)
    ways = _for_each(xs, backprop_to_alpha, "backprop_to_alpha"), _for_each(xs, regularizer, "regularizer")
    results = ops.foreach_lsq_bin(
        xs, alphas, specs, relu, clip, *ways, backend, _for_each(xs, alpha_grad, "alpha_grad")
    )
    return [
        FakeQuantizedWithBinLoss(xhat, loss, _bins(table, x, alpha, spec))
        for (xhat, loss, table), x, alpha, spec in zip(results, xs, alphas, specs)
    ]


def foreach_bin_loss(
    xs: Sequence[Tensor], alphas: Sequence[Tensor | float], specs: QuantSpec | Sequence[QuantSpec], *,
    relu: bool = False, clip: float | None = None,
    backprop_to_alpha: ToAlpha | list[Any] = False, regularizer: str | list[str] = "br", backend: str = "auto",
) -> list[BinLoss]:  # fmt: skip
    """bin_loss over lists, as foreach_fake_quantize, which says what is returned and raised.

    backprop_to_alpha and regularizer may be lists, too.
    """
    xs, alphas, specs = _checked(xs, alphas, specs)
    ways = _for_each(xs, backprop_to_alpha, "backprop_to_alpha"), _for_each(xs, regularizer, "regularizer")
    results = ops.foreach_bin_loss(xs, alphas, specs, relu, clip, *ways, backend)
    return [
        BinLoss(loss, _bins(table, x, alpha, spec)) for (loss, table), x, alpha, spec in zip(results, xs, alphas, specs)
    ]


def _for_each(xs: list, value, argument: str) -> list:
    """A list of one value for each tensor; value may be that list."""
    values = value if isinstance(value, list) else [value] * len(xs)
    if len(values) != len(xs):
        raise ValueError(f"{argument} has {len(values)} entries for {len(xs)} tensors: expected as many, or one value")
    return values


def _checked(xs, alphas, specs) -> tuple[list, list, list]:
    xs, alphas = list(xs), list(alphas)
    specs = [specs] * len(xs) if isinstance(specs, QuantSpec) else list(specs)
    if not len(xs) == len(alphas) == len(specs):
        raise ValueError(f"{len(xs)} tensors, {len(alphas)} alphas and {len(specs)} specs: expected as many of each")
    return xs, alphas, specs


def _bins(table: Tensor, x: Tensor, alpha, spec: QuantSpec) -> Bins:
    if isinstance(alpha, Tensor):
        alpha = alpha.detach()
    else:
        alpha = table.new_full((1,), alpha)
    return Bins(table, alpha, spec, x.numel())
