"""The ops over lists of tensors: their schemas, and their meaning as loops over the ops of one tensor.

The loops are the fakes of these ops and their kernels in every backend that has none of its own; a backend that has
(the native one: all tensors in one parallel region on the CPU, in one launch and one for their sums on CUDA) gives the
same results to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

_QUANT = "int[] ranges, bool relu, float clip"  # ranges: qn, qp, binary and channel_axis of each tensor in turn
SCHEMAS = {
    "foreach_lsq_fwd": f"(Tensor[] xs, Tensor[] alphas, {_QUANT}) -> Tensor[]",
    "foreach_lsq_bwd": f"(Tensor[] grad_xhats, Tensor[] xs, Tensor[] alphas, {_QUANT}, float[] grad_scales) "
    "-> (Tensor[], Tensor[])",
    "foreach_bin_loss_fwd": f"(Tensor[] xs, Tensor[] alphas, {_QUANT}, bool backprop_to_alpha) "
    "-> (Tensor[], Tensor[], Tensor[])",
    "foreach_bin_loss_bwd": f"(Tensor[] grad_losses, Tensor[] xs, Tensor[] alphas, Tensor[] bins, {_QUANT}) "
    "-> Tensor[]",
    "foreach_lsq_bin_fwd": f"(Tensor[] xs, Tensor[] alphas, {_QUANT}, bool backprop_to_alpha) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[])",
    "foreach_lsq_bin_bwd": "(Tensor[] grad_xhats, Tensor[] grad_losses, Tensor[] xs, Tensor[] alphas, Tensor[] bins, "
    f"{_QUANT}, float[] grad_scales) -> (Tensor[], Tensor[])",
}


def loops(one: Mapping[str, Callable]) -> dict[str, Callable]:
    """The list ops over the functions of one tensor, ``{"lsq_fwd": ...}``."""

    def lsq_fwd(xs, alphas, ranges, relu, clip):
        return [one["lsq_fwd"](*each, *quant, relu, clip) for *each, quant in zip(xs, alphas, _quants(ranges))]

    def lsq_bwd(grad_xhats, xs, alphas, ranges, relu, clip, grad_scales):
        lists = zip(grad_xhats, xs, alphas, _quants(ranges), grad_scales)
        return _transposed([one["lsq_bwd"](*each, *quant, relu, clip, s) for *each, quant, s in lists], 2)

    def bin_loss_fwd(xs, alphas, ranges, relu, clip, to_alpha):
        lists = zip(xs, alphas, _quants(ranges))
        return _transposed([one["bin_loss_fwd"](*each, *quant, relu, clip, to_alpha) for *each, quant in lists], 3)

    def bin_loss_bwd(grad_losses, xs, alphas, bins, ranges, relu, clip):
        lists = zip(grad_losses, xs, alphas, bins, _quants(ranges))
        return [one["bin_loss_bwd"](*each, *quant, relu, clip) for *each, quant in lists]

    def lsq_bin_fwd(xs, alphas, ranges, relu, clip, to_alpha):
        lists = zip(xs, alphas, _quants(ranges))
        return _transposed([one["lsq_bin_fwd"](*each, *quant, relu, clip, to_alpha) for *each, quant in lists], 4)

    def lsq_bin_bwd(grad_xhats, grad_losses, xs, alphas, bins, ranges, relu, clip, grad_scales):
        lists = zip(grad_xhats, grad_losses, xs, alphas, bins, _quants(ranges), grad_scales)
        return _transposed([one["lsq_bin_bwd"](*each, *quant, relu, clip, s) for *each, quant, s in lists], 2)

    functions = lsq_fwd, lsq_bwd, bin_loss_fwd, bin_loss_bwd, lsq_bin_fwd, lsq_bin_bwd
    return {f"foreach_{function.__name__}": function for function in functions}


def _quants(ranges):
    """(qn, qp, binary, channel_axis) of each tensor."""
    for qn, qp, binary, channel_axis in zip(*[iter(ranges)] * 4):
        yield qn, qp, bool(binary), channel_axis


def _transposed(results, width: int) -> tuple[list, ...]:
    """A list of results, each a tuple of `width`, as `width` lists."""
    return tuple([list(column) for column in zip(*results)] or [[] for _ in range(width)])
