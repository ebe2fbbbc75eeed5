"""The LSQ quantizer module: its step size alpha, and alpha's initialisation from data."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from qbr import arguments, distributed, functional, grouping, quantizer_state, sketch, step_guard
from qbr.arguments import check_bits, check_clip, check_count, check_step
from qbr.functional import BinLoss, Bins
from qbr.spec import QuantSpec, ToAlpha, check_flag, is_number

KINDS = ("weight", "activation")
TRIES = 3  # training forwards, with an optimizer's step after each, that may fail to set a step size


_REENTRANT = (
    "the bin loss of layers inside torch.utils.checkpoint(use_reentrant=True) is not part of qbr.bin_loss(model), "
    "since their first forward has no graph: use use_reentrant=False"
)
_SET_OUTSIDE = (
    "a quantizer whose step size nothing has set was run with another tensor for it (torch.func.functional_call): that "
    "tensor is set from data in every such call, the module's own never: call qbr.calibrate(model, batches) first"
)
_UNUSABLE = (
    "a quantizer has met no usable data (all 0, or not finite) before its first optimizer steps: its step size stays "
    "what it was before data, and learns from there; qbr.calibrate(model, batches) or quantizer.set_alpha sets it"
)
_NEVER_SET = (
    "a quantizer whose step size nothing has set was run in eval mode, with a placeholder for it: call "
    "qbr.calibrate(model, batches) first, also for a frozen part that stays in eval mode while others train"
)


class LSQQuantizer(nn.Module):
    """Fake-quantizes a tensor with a learned step size, and collects its bin loss in the same pass when asked to.

    Esser et al., Learned Step Size Quantization, ICLR 2020: equations 1 and 2 forward, 3 and 5 backward, section
    2.1 for the initialisation. One alpha for the tensor, or one per channel.

    Args:
        spec: the integer range; ``spec.channel_axis`` for a step per channel.
        kind: "weight" or "activation": which of the model's two bin losses the tensor belongs to. A weight counts
            once a step however often its layer is called, an activation once a call.
        initial_alpha: the step before any data was seen, in units of x.
        channels: how many steps; 1 without ``spec.channel_axis``.
        device: where alpha is made.

    Attributes:
        alpha: Parameter [1] or [C], float32 whatever dtype the model is cast to. Positive: see qbr/step_guard.py.
        init_state: buffer [1], float32: 0 before alpha was set from data, then 1; still 0 where those data were all 0
            or not finite, which an optimizer's step notices: the next training forward then tries again.
        collecting: whether a training forward with gradients keeps its bin loss for ``qbr.bin_loss(model)``; None,
            which counts as no, until prepare() or an AlphaControl decides.
        awaits_epoch: whether an AlphaControl that goes by epochs has been told of none yet; bin_loss() warns of it.
        br_to_alpha: how much of that loss's gradient reaches alpha: False, True, a fraction from 0 to 1, "scaled" or
            (fraction, "scaled"), as in functional.bin_loss. A frozen alpha has none.
        regularizer: which loss that is: "br" or "dampening".
        observer: what a qbr.Monitor has put here to look at training forwards; None without one.
        frozen: whether alpha stays as it is: see ``freeze``.
        alone: whether a weight is quantized by its own layer only, and not with the model's other weights
            (qbr/grouping.py); set there where a forward turned out to need it.

    Raises:
        TypeError, ValueError: for a bad argument, or a state_dict whose alpha is not positive, not finite or of
            another shape.
    """

    init_state: Tensor
    awaits_epoch: bool = False

    def __init__(
        self, spec: QuantSpec, kind: str, *, initial_alpha: float, channels: int = 1, device: Device = None
    ) -> None:
        super().__init__()
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"spec={spec!r}: expected a qbr.QuantSpec")
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected 'weight' or 'activation'")
        self.initial_alpha: float = check_step(initial_alpha, "initial_alpha")
        check_count(channels, "channels", least=1)
        if channels > 1 and spec.channel_axis is None:
            raise ValueError(f"channels={channels} with spec.channel_axis={spec.channel_axis}: expected 1")
        self.spec: QuantSpec = spec
        self.kind = kind
        self.collecting: bool | None = None
        self.br_to_alpha: ToAlpha = False
        self.regularizer: str = "br"
        self.frozen: bool = False
        self._learns = True  # alpha's requires_grad when it is not frozen
        self._set_requires_grad = True  # what freeze() has made of it
        steps = torch.full((channels,), self.initial_alpha, dtype=torch.float32, device=device)
        self.alpha: nn.Parameter = nn.Parameter(steps)
        self.register_buffer("init_state", torch.zeros(1, dtype=torch.float32, device=device))
        self._made_on_meta = self.alpha.is_meta
        # init_state's value on the host: reading the buffer in forward would wait for the device.
        self._initialised = False
        self._unconfirmed = False  # whether a forward has tried to set alpha, and nobody has read whether it could
        self._tries = 0
        self._retained: list[BinLoss] = []
        self.observer: Any = None
        self.alone: bool = False
        self._ready: grouping.Ready | None = None
        self._ready_used = False
        self._saved_elsewhere = False
        self._alpha_in_graph: tuple[Tensor, ...] = ()  # where FSDP gathers alpha for a forward: that one
        step_guard.register(self)

    @property
    def initialised(self) -> bool:
        """Whether alpha has been set: from data, by set_alpha, or by a state_dict that says so. True also between a
        training forward that tried to set it and the optimizer's step, which reads whether it could (see confirm)."""
        return self._initialised

    @property
    def num_bits(self) -> int:
        return self.spec.bits

    @property
    def Qn(self) -> int:
        return self.spec.qn

    @property
    def Qp(self) -> int:
        return self.spec.qp

    def get_quantization_levels(self) -> Tensor:
        """The values that a code can stand for, ascending and detached: [L], or [C, L] with a step per channel."""
        codes = torch.tensor(self.spec.codes, dtype=torch.float32, device=self.alpha.device)
        levels = self.alpha.detach()[:, None] * codes
        return levels[0] if self.spec.channel_axis is None else levels

    def forward(self, x: Tensor, *, relu: bool = False, clip: float | None = None) -> Tensor:
        """xhat, in x's shape and dtype; of min(max(x, 0), clip) with ``relu``.

        Waits for the device only while nothing is known to have set alpha: in eval mode, under torch.distributed, once
        for a model that was made on meta, and once where no optimizer has stepped since data have set it.
        """
        if self._made_on_meta and not torch.compiler.is_compiling():
            quantizer_state.leave_meta(self)
        if not torch.compiler.is_compiling() and self._unconfirmed:
            step_guard.confirm()
        if not self._initialised and not self._was_sent():
            if self.training:
                arguments.check(x, self.alpha, self.spec, relu, clip)  # what is refused below sets no step
                self.initialise(x, relu=relu, clip=clip)
                if not torch.compiler.is_compiling() and not isinstance(self.alpha, nn.Parameter):
                    warnings.warn(_SET_OUTSIDE, stacklevel=2)
            elif not torch.compiler.is_compiling() and not self._was_set_outside():
                warnings.warn(_NEVER_SET, stacklevel=2)
        ready = grouping.take(self, x) if self._ready is not None else None
        if ready is not None:
            xhat, entry = ready.xhat, ready.entry
        elif self.makes_bins():
            xhat, loss, bins = functional.fake_quantize_with_bin_loss(
                x, self.alpha, self.spec, relu=relu, clip=clip, backprop_to_alpha=self.bin_loss_to_alpha(),
                regularizer=self.regularizer, alpha_grad=self.alpha_grad(),
            )  # fmt: skip
            entry = BinLoss(loss, bins)
        else:
            alpha_grad = self.alpha_grad() if torch.is_grad_enabled() else 1.0  # as in makes_bins
            xhat = functional.fake_quantize(x, self.alpha, self.spec, relu=relu, clip=clip, alpha_grad=alpha_grad)
            entry = None
        if entry is not None:
            if self.collecting:
                self._retain(entry)
            if self.observer is not None:
                self.observer.see(x, xhat, entry.bins)
        return xhat

    def _was_sent(self) -> bool:
        """Whether DistributedDataParallel has brought alpha and init_state from a rank 0 that alone has loaded them:
        it would not take part in setting them here."""
        return distributed.ranks() > 1 and not torch.compiler.is_compiling() and self._was_set_outside()

    def _was_set_outside(self) -> bool:
        """Whether init_state has become 1 without this module's doing, as AveragedModel writes to its buffers."""
        if type(self.init_state) is Tensor and not self.init_state.is_meta:
            if not torch._C._are_functorch_transforms_active():
                self._initialised = bool((self.init_state == 1).all())
        return self._initialised

    def confirm(self, init_state: float) -> None:
        """Take over what was read of init_state, 0 or 1, after a forward: one without usable data leaves alpha to the
        next, for TRIES of them in all."""
        self._unconfirmed = False
        if init_state == 0:
            self._tries += 1
            again = self._tries < TRIES and distributed.local(self.alpha) is self.alpha  # FSDP takes no step from data
            self._initialised = not again
            if not again:
                self.init_state.fill_(1)
                warnings.warn(_UNUSABLE, stacklevel=2)

    def alpha_grad(self) -> float:
        """What multiplies alpha's gradient beside LSQ's scale s = 1 / sqrt(N * qp).

        An activation's N counts the elements of the whole batch, of which each rank has a share. 0 while frozen.
        """
        if self.frozen:
            return 0.0
        return 1.0 if self.kind == "weight" else distributed.ranks() ** -0.5

    def bin_loss_to_alpha(self) -> ToAlpha:
        """br_to_alpha, unless alpha is frozen."""
        if not self.br_to_alpha or self.frozen:  # first: reading alpha of a module costs more than both
            return False
        return self.br_to_alpha if self.alpha.requires_grad else False

    def check_release(self) -> None:
        """Raise RuntimeError if freeze(False) would let ranks go apart."""
        mine = self.alpha.requires_grad == self._set_requires_grad  # else the user has set it since
        if self.frozen and mine and self._learns and not self.alpha.requires_grad and distributed.ranks() > 1:
            raise RuntimeError("an alpha that was frozen before torch.distributed was initialised is released: "
                               "DistributedDataParallel would not see its gradient, and ranks would differ; attach "
                               "the AlphaControl after init_process_group")  # fmt: skip

    def freeze(self, frozen: bool = True) -> None:
        """Hold alpha as it is, or release it: no gradient, no weight decay and no momentum of a torch.optim optimizer
        moves it. An alpha whose requires_grad is False without that stays so.

        Under torch.distributed alpha keeps requires_grad, and its gradient is 0: DistributedDataParallel waits in
        every step for the gradient of each parameter that it was made with, and for no other.
        """
        check_flag(frozen, "frozen")
        if not frozen:
            self.check_release()
        if not self.frozen or self.alpha.requires_grad != self._set_requires_grad:  # else it is what was set here
            self._learns = self.alpha.requires_grad
        if not self.frozen and not frozen:
            return
        watched = distributed.is_initialised() and (not self.frozen or self.alpha.requires_grad)
        self.frozen = frozen
        self.alpha.requires_grad_(self._learns and (not frozen or watched))
        self._set_requires_grad = self.alpha.requires_grad
        if frozen:
            self.alpha.grad = None
        else:
            step_guard.check_again()

    def makes_bins(self) -> bool:
        """Whether a forward here and now has bin sums, for its loss or for an observer."""
        # In this order: compiled code guards what it has read, and evaluation need not know of the rest.
        return self.training and torch.is_grad_enabled() and (self.collecting or self.observer is not None)

    def _retain(self, entry: BinLoss) -> None:
        if not torch.compiler.is_compiling():
            hooked = grouping.are_saves_hooked()
            if grouping.is_in_backward():  # checkpointing, which runs a forward again: the loss was taken long ago
                if not hooked:
                    warnings.warn(_REENTRANT, stacklevel=2)
                return
            hooked = hooked or (bool(self._retained) and self._saved_elsewhere)  # an earlier call in this forward was
            if hooked != self._saved_elsewhere:
                self._saved_elsewhere = hooked
        if distributed.may_reclaim_parameters():
            grouping.assign(self, "_alpha_in_graph", (self.alpha,))
            bins = entry.bins  # not by _replace, which dynamo of torch 2.11 cannot follow
            entry = BinLoss(entry.loss, Bins(bins.table, bins.alpha.clone(), bins.spec, bins.numel))
        if self.kind == "weight":
            self._retained.clear()
        self._retained.append(entry)

    @torch.no_grad()
    def initialise(self, x: Tensor, *, relu: bool = False, clip: float | None = None) -> None:
        """Set alpha = 2 * mean|x| / sqrt(max(qp, 1)) (LSQ, section 2.1); binary: mean|x|, its least-squares step.

        The first training forward calls it. With torch.distributed the mean is over all ranks, so that all hold
        the same alpha: every rank has to take part. A mean that is 0 or not finite leaves alpha and init_state as they
        were, as an init_state that is 1 does.

        Args:
            x, relu, clip: as in forward.
        """
        shared = distributed.ranks() > 1
        if x.numel() == 0 and not shared:
            return
        size = (x.detach().clamp(min=0, max=clip) if relu else x.detach()).abs()
        count = x.numel() // self.alpha.numel()
        mean = sketch.mean_per_step(size, self.spec.channel_axis) if count else torch.zeros_like(self.alpha)
        if shared:
            total = distributed.total(torch.cat([mean * count, torch.full_like(mean[:1], count)]))
            mean = total[:-1] / total[-1]
        step = sketch.lsq_step(mean, self.spec)
        usable = arguments.usable(step) & (self.init_state == 0)
        self.write_alpha(torch.where(usable, step, self.alpha), usable)
        self._unconfirmed = self._initialised

    def set_alpha(self, alpha: Tensor | float) -> None:
        """Set the steps, positive, [1] or [C]; the first training forward then leaves them alone. Reads the device.

        Raises:
            TypeError, ValueError: for steps that are not positive and finite, or of another number; nothing is set.
        """
        if not (is_number(alpha) or (isinstance(alpha, Tensor) and not (alpha.is_complex() or alpha.is_meta))):
            raise TypeError(f"alpha={alpha!r}: expected a tensor or a number, real")
        steps = torch.as_tensor(alpha).detach().to(self.alpha.dtype)
        if steps.numel() not in (1, self.alpha.numel()):
            raise ValueError(f"alpha has {steps.numel()} elements: expected {self.alpha.numel()}")
        bad = steps[~arguments.usable(steps)]
        if bad.numel():
            raise ValueError(f"alpha has {bad[0].item():g}: expected positive, finite step sizes")
        self.write_alpha(steps.reshape(-1))

    @torch.no_grad()
    def write_alpha(self, alpha: Tensor, usable: Tensor | None = None) -> None:
        """set_alpha() of what is known to be right, without a look at it: that would wait for the device.

        usable: which of the steps are new, bool; where none is, init_state stays as it was.
        """
        if self._made_on_meta and not torch.compiler.is_compiling():
            quantizer_state.leave_meta(self)
        self.alpha.copy_(alpha)
        if not isinstance(self.alpha, nn.Parameter) or self.alpha.is_meta:
            return  # functional_call's tensor, or nothing: the module's own alpha is as it was
        if usable is None:
            self.init_state.fill_(1)
        else:
            self.init_state.copy_(torch.maximum(self.init_state, usable.any().to(self.init_state)))
        self._initialised, self._unconfirmed = True, False

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set alpha to what it was before data, and let the next training forward set it from data again."""
        self.alpha.fill_(self.initial_alpha)
        self.init_state.zero_()
        self._initialised = self._unconfirmed = False
        self._tries = 0

    def take_retained(self) -> list[BinLoss]:
        """What training forwards have collected since the last call, in order; nothing is kept."""
        entries = self._retained
        grouping.assign(self, "_retained", [])
        return entries

    def extra_repr(self) -> str:
        axis = "" if self.spec.channel_axis is None else f", channel_axis={self.spec.channel_axis}"
        return f"{self.kind}, bits={self.spec.bits}, codes {self.spec.qn}..{self.spec.qp}{axis}"

    def _apply(self, fn, recurse=True):
        made = self.alpha.is_meta
        super()._apply(keeping_dtype(fn), recurse)
        if made and not self.alpha.is_meta:  # to_empty(): memory that holds anything
            self.reset_parameters()
            self._made_on_meta = False
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        quantizer_state.note_codes(self.spec, destination, prefix)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        quantizer_state.check(self, state_dict, prefix)
        alpha, init_state = state_dict.get(prefix + "alpha"), state_dict.get(prefix + "init_state")
        if alpha is not None and alpha.dtype != torch.float32:
            state_dict = {**state_dict, prefix + "alpha": alpha.to(torch.float32)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if alpha is not None and not alpha.is_meta:
            self._made_on_meta = False
            learned = init_state is None and bool((alpha.float() != self.initial_alpha).any())
            if learned and not self.init_state.is_meta:  # parameters alone, and no placeholders
                self.init_state.fill_(1)
                self._initialised, self._unconfirmed = True, False
                quantizer_state.warn_of(self.spec, self.init_state, local_metadata)
        if init_state is not None and not init_state.is_meta:
            self._initialised, self._unconfirmed, self._tries = bool((init_state != 0).all()), False, 0
            quantizer_state.warn_of(self.spec, init_state, local_metadata)

    def __getstate__(self) -> dict[str, Any]:
        # Collected losses are part of a graph, and an observer is of one model: neither deepcopy nor pickle takes them.
        return {**super().__getstate__(), "_retained": [], "_ready": None, "observer": None, "_alpha_in_graph": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        step_guard.register(self)


def keeping_dtype(fn):
    """fn for nn.Module._apply, so that a cast of the model (.half(), .to(torch.bfloat16)) moves a step size but never
    rounds it."""

    def keep(t: Tensor) -> Tensor:
        moved = fn(t)
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return keep


class LSQ_WeightQuantizer(LSQQuantizer):
    """LSQQuantizer of a weight: signed, alpha = 0.1 / max(|qn|, |qp|) before data.

    Args:
        num_bits: 1 to 8; 1 is binary, {-alpha, +alpha}.
        channel_axis, channels: for a step per channel, which dimension, and how many it has.
        device: where alpha is made.
    """

    def __init__(
        self, num_bits: int = 2, *, channel_axis: int | None = None, channels: int = 1,
        device: Device = None,
    ) -> None:  # fmt: skip
        spec = QuantSpec(check_bits(num_bits, "num_bits"), signed=True, channel_axis=channel_axis)
        initial = 0.1 / max(abs(spec.qn), abs(spec.qp))
        super().__init__(spec, "weight", initial_alpha=initial, channels=channels, device=device)

    @property
    def num_levels(self) -> int:
        return len(self.spec.codes)


class LSQ_ActivationQuantizer(LSQQuantizer):
    """LSQQuantizer of an activation: alpha = (clip_value or 4.0) / max(qp, 1) before data.

    Args:
        num_bits: 1 to 8.
        clip_value: only sets the first alpha; QuantizedClippedReLU is what clips.
        signed: True for an activation that follows no ReLU.
        device: where alpha is made.
    """

    def __init__(
        self, num_bits: int = 2, clip_value: float | None = None, *, signed: bool = False, device: Device = None
    ) -> None:
        spec = QuantSpec(check_bits(num_bits, "num_bits"), signed=signed)
        initial = (check_clip(clip_value, "clip_value") or 4.0) / max(spec.qp, 1)
        super().__init__(spec, "activation", initial_alpha=initial, device=device)


def quantizers(model: nn.Module) -> dict[str, LSQQuantizer]:
    """The quantizers of a model by module name, in the order of named_modules(); TypeError for no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected an nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, LSQQuantizer)}


def require_quantizers(model: nn.Module) -> dict[str, LSQQuantizer]:
    """quantizers(model), or a ValueError if there are none."""
    found = quantizers(model)
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no quantizers: call qbr.prepare(model, config) first")
    return found
