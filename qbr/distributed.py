"""Several processes: how many share a batch, sharded parameters, and activations' bins summed over all ranks.

Communication is torch.distributed's, gradients are averaged by DistributedDataParallel or fully_shard: nothing here
replaces them. docs/distributed.md is the page for users.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qbr.functional import BinLoss, Bins
from qbr.kernels import reference

_AVAILABLE = dist.is_available()


def ranks() -> int:
    """How many processes share each batch: torch.distributed's world size, 1 without it."""
    return dist.get_world_size() if is_initialised() else 1


def is_initialised() -> bool:
    return _AVAILABLE and dist.is_initialized()


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, the same bits on each; every rank has to come here. values may be written to."""
    if ranks() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks, of which every one has to take part; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for a model in which a wrapper has taken up its parameters, and would not know new ones."""
    wrapped = (m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel) or is_sharded([m]))
    found = next(wrapped, None)
    if found is not None:
        raise ValueError(f"model is in a {type(found).__name__}, which would not synchronise the step sizes: call "
                         "prepare() first, then wrap or shard")  # fmt: skip
    parts = next((name for name, parameter in model.named_parameters() if local(parameter) is not parameter), None)
    if parts is not None:
        raise ValueError(f"{parts} is a DTensor: tensor parallelism is not supported; shards come after prepare()")


def running_ddp() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def check_known(parameters: Sequence[Tensor], ddp: nn.parallel.DistributedDataParallel) -> None:
    """Raise ValueError where ddp does not know one of its model's step sizes: each rank would train its own."""
    known = {id(parameter) for parameter in getattr(ddp, "_module_parameters", ())}
    lost = {id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore} - known
    if not known or len(lost) == sum(1 for _ in ddp.module.parameters()):  # functional_call: others in their places
        return
    if any(id(parameter) in lost for parameter in parameters if parameter.requires_grad):
        raise ValueError("DistributedDataParallel was made before prepare(), and would not synchronise the step sizes: "
                         "call prepare() first, then DistributedDataParallel")  # fmt: skip


def may_reclaim_parameters() -> bool:
    """Whether a parameter's memory may be taken back once its layer has run (FSDP), from what refers to it later."""
    return torch.compiler.is_compiling() or (is_initialised() and running_ddp() is None)


def is_sharded(modules: Sequence[nn.Module]) -> bool:
    """Whether FSDP holds the parameters of one of these modules, and gives them back only while it runs."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it nothing can be sharded
    return fsdp is not None and any(isinstance(m, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for m in modules)


def with_global_bins(
    entries: Sequence[BinLoss], alphas: Sequence[Tensor], to_alpha: Sequence[float], dampened: Sequence[bool]
) -> list[BinLoss]:
    """Bin losses of the whole batch, all ranks' shares of it together: one all-reduce for all tensors.

    n_k, S_k and Q_k are summed over the ranks, and L_BR = sum_k Q_k / n_k taken of the sums, the same on every rank.
    Backward multiplies by the number of ranks, so that the gradients, once averaged over the ranks, are those of one
    process with the whole batch: 2 d / n_k with the global n_k.

    Args:
        entries: what lsq_bin gave for each tensor; their tables get the sums, which their backward reads. Every
            rank needs the same tensors in the same order.
        alphas: the step of each, [1]; [C] only where to_alpha is 0.
        to_alpha: what multiplies BR's gradient of each alpha, 0 for none.
        dampened: which are dampening's sum of Q_k; the ranks' shares of its gradients add up to the whole's.

    Returns:
        The entries with their global losses, in the graph.
    """
    if not entries:  # warm-up, on every rank
        return []
    with torch.no_grad():
        tables = [entry.bins.table for entry in entries]
        own = [
            _dloss_dalpha(entry.bins) if factor and not sums_squares else None
            for entry, factor, sums_squares in zip(entries, to_alpha, dampened)
        ]
        sums = torch.cat(tables)
        dist.all_reduce(sums)
        # Backward reads n_k from these very tables: they were saved to be written here.
        with torch.autograd._unsafe_preserve_version_counter(tuple(tables)):
            torch._foreach_copy_(tables, sums.split([table.numel() for table in tables]))
        losses = [
            entry.bins.squares.sum().to(entry.loss.dtype)
            if sums_squares
            else reference.loss_of(entry.bins.table, entry.bins.spec.num_slots, entry.loss.dtype)
            for entry, sums_squares in zip(entries, dampened)
        ]
        corrections = [
            # The op's backward adds ranks * (the share's gradient): this makes it the whole batch's.
            None if part is None else (factor * (_dloss_dalpha(entry.bins) - ranks() * part)).to(alpha.dtype)
            for entry, part, factor, alpha in zip(entries, own, to_alpha, alphas)
        ]
    losses = _Global.apply(ranks(), losses, corrections, *(entry.loss for entry in entries), *alphas)
    return [entry._replace(loss=loss) for entry, loss in zip(entries, losses)]


class _Global(torch.autograd.Function):
    """Each rank's losses give way to the global ones."""

    @staticmethod
    def forward(ctx, ranks, losses, corrections, *own_and_alphas):
        ctx.ranks, ctx.corrections = ranks, corrections
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    def backward(ctx, *grads):
        own = [None if g is None else g * ctx.ranks for g in grads]
        alphas = [None if g is None or c is None else c * g for g, c in zip(grads, ctx.corrections)]
        return None, None, None, *own, *alphas


def _dloss_dalpha(bins: Bins) -> Tensor:
    """[1] float64; for one step per tensor."""
    spec = bins.spec
    return reference.dloss_dalpha_of(bins.table, bins.sums[:, None], bins.alpha.double(), spec.qn, spec.qp)
