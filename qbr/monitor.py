"""Monitor: figures of every quantized layer while a model trains, added up on the device and read when asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from qbr import distributed, grouping, metrics
from qbr.functional import Bins
from qbr.quantizers import LSQQuantizer
from qbr.regularizer import by_layer
from qbr.spec import check_flag, is_number

OSCILLATING = 0.005  # a weight that oscillates more often than this counts as oscillating (Nagel et al., section 2.3)
_UP, _DOWN = 1, 2  # how a code turned; 0 where it did not


class LayerFigures(NamedTuple):
    """One layer's figures since the Monitor was made or reset, plain numbers; None where nothing was seen.

    Attributes:
        kind, bits: "weight" or "activation", and its width.
        alpha: its step now; with a step per channel, their mean.
        loss, mse, var, quantization_mse, mean_distance, effectiveness, pct_near_levels, bins_used: as
            qbr.metrics.BinMetrics has them, of the bins of all forwards pooled.
        levels: how many codes there are.
        steps: of weights, how often the layer was seen with other weights or alpha than the time before.
        changed: share of the weights that changed their code in such a step, on average.
        oscillated: share of them that changed it back, against the direction of their change before, on average.
        oscillating: share of them whose frequency of that is above 0.005 now; None without ``frequency``.
    """

    kind: str
    bits: int
    alpha: float
    loss: float | None
    mse: float | None
    var: float | None
    quantization_mse: float | None
    mean_distance: float | None
    effectiveness: float | None
    pct_near_levels: float | None
    bins_used: int | None
    levels: int
    steps: int | None
    changed: float | None
    oscillated: float | None
    oscillating: float | None


class Monitor:
    """Watches the quantizers of a model in training forwards; nothing waits for the device until ``read()``.

        monitor = qbr.Monitor(model)
        for epoch in ...:
            train(model)
            figures = monitor.read(reset=True)       # {layer: LayerFigures}, one transfer
        monitor.close()

    The figures come from the bin sums of the pass that quantizes; in warm-up, where no bin loss is wanted, that pass
    computes them for the Monitor alone, and training stays the same to the bit. An oscillation is a change of a
    weight's code against the direction of its change before; the codes are those of the forward's own result. A weight
    is seen once for every new value, however often its layer runs; under torch.compile at every run of the layer.
    In distributed training the figures of activations are those of this process.

    Memory beside the model's: two bytes for each quantized weight, with ``frequency`` six. It is no part of the
    model: no state_dict, copy or pickle of the model has it. One that is made anew starts its counts anew.

    Args:
        model: a prepared model.
        oscillations: count the codes' changes, too.
        frequency: momentum m of each weight's own frequency of oscillation, f = m * oscillated + (1 - m) * f, such as
            0.01; None to do without.

    Raises:
        TypeError, ValueError: for a model without quantizers, or one that a Monitor watches already; naming a bad
            argument.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, section 4.1.
    """

    def __init__(self, model: nn.Module, *, oscillations: bool = True, frequency: float | None = None) -> None:
        found = by_layer(model)
        if any(quantizer.observer is not None for quantizer in found.values()):
            raise ValueError("model is watched by a Monitor already: use that one, or close() it first")
        check_flag(oscillations, "oscillations")
        if frequency is not None and not is_number(frequency):
            raise TypeError(f"frequency={frequency!r}: expected a number between 0 and 1, or None")
        if frequency is not None and not (oscillations and 0 < frequency < 1):
            raise ValueError(f"frequency={frequency}, oscillations={oscillations}: expected a momentum between 0 and 1 "
                             "with oscillations=True, or None")  # fmt: skip
        weights = grouping.quantized_weights(model) if oscillations else {}
        self._observers: dict[str, Observer] = {}
        for name, quantizer in found.items():
            codes = CodeChanges(weights[quantizer], quantizer, frequency) if quantizer in weights else None
            self._observers[name] = Observer(quantizer, codes)
        for observer in self._observers.values():  # once nothing can fail any more, for want of memory
            observer.quantizer.observer = observer

    def read(self, *, reset: bool = False) -> dict[str, LayerFigures]:
        """Each layer's figures, in one transfer from the device.

        Args:
            reset: start the sums and counts anew; what a weight's last code, direction and frequency were stays.
        """
        check_flag(reset, "reset")
        values = iter(metrics.to_host([t for observer in self._observers.values() for t in observer.tensors()]))
        figures = {name: observer.figures(values) for name, observer in self._observers.items()}
        if reset:
            self.reset()
        return figures

    def reset(self) -> None:
        """Start the sums and counts anew."""
        for observer in self._observers.values():
            observer.reset()

    def close(self) -> None:
        """Leave the model alone; what was counted can still be read."""
        for observer in self._observers.values():
            if observer.quantizer.observer is observer:
                observer.quantizer.observer = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Observer:
    """The sums of one quantizer's bin tables, and what its codes do.

    Args:
        quantizer: whose forward calls ``see``.
        codes: of a weight whose codes are followed; else None.
    """

    def __init__(self, quantizer: LSQQuantizer, codes: CodeChanges | None) -> None:
        self.quantizer = quantizer
        self.codes = codes
        slots = quantizer.spec.num_slots
        self.table = torch.zeros(3 * slots + 2, dtype=torch.float64, device=quantizer.alpha.device)
        self._seen: tuple | None = None

    @torch.no_grad()
    def see(self, x: Tensor, xhat: Tensor, bins: Bins) -> None:
        """Add one training forward: what was quantized, the result, and the sums of its pass."""
        if not torch.compiler.is_compiling():
            if grouping.is_in_backward():
                return  # a checkpointed forward that backward runs again
            if self.quantizer.kind == "weight":
                # By a weak reference: the address of a weight that a parametrization made is free for the next.
                value = WeakIdRef(x), x._version, self.quantizer.alpha._version
                if value == self._seen:
                    return  # the same weight once more in one step
                self._seen = value
        if self.table.device != bins.table.device:
            self.table = self.table.to(bins.table.device)
        self.table += bins.table
        if self.codes is not None:
            self.codes.see(xhat.detach(), self.quantizer)

    def stepped(self) -> None:
        """An optimizer has stepped: the weight is another one, even where its version does not tell (FSDP)."""
        self._seen = None

    def tensors(self) -> list[Tensor]:
        """What figures() needs on the host."""
        return [self.table, distributed.whole(self.quantizer.alpha), *(self.codes.tensors() if self.codes else ())]

    def figures(self, values) -> LayerFigures:
        """From the values of tensors(), which are next in this iterator."""
        spec = self.quantizer.spec
        table, alphas = next(values), next(values)
        pooled = metrics.from_values(table, alphas, spec)
        names = LayerFigures._fields[3:11]
        seen = {name: getattr(pooled, name) if pooled.numel else None for name in names}
        changes = self.codes.figures(values) if self.codes else (None,) * 4
        alpha = sum(alphas) / len(alphas)
        return LayerFigures(self.quantizer.kind, spec.bits, alpha, **seen, levels=len(spec.codes),
                            **dict(zip(LayerFigures._fields[12:], changes)))  # fmt: skip

    def reset(self) -> None:
        self.table.zero_()
        if self.codes is not None:
            self.codes.counts.zero_()


class CodeChanges:
    """The last code of every element of a weight, the way of its last change, and how many elements changed.

    Args:
        weight: gives shape, layout and device.
        quantizer: its quantizer.
        frequency: the momentum of each element's frequency of oscillation; None to do without.
    """

    def __init__(self, weight: Tensor, quantizer: LSQQuantizer, frequency: float | None) -> None:
        spec = quantizer.spec
        self.momentum = frequency
        self.started = False
        small = -128 <= spec.qn and spec.qp <= 127
        # By shape and strides, not like the weight: a sharded one is a DTensor, and its forward's result is none.
        dtype = torch.int8 if small else torch.int16
        self.codes = torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device).zero_()
        # What a turn against the last one is: _DOWN after a way up, _UP after a way down, 0 before any change.
        self.back = torch.zeros_like(self.codes, dtype=torch.uint8)
        self.frequency = None if frequency is None else torch.zeros_like(self.codes, dtype=torch.float32)
        # steps, elements that changed their code, elements that changed it back
        self.counts = torch.zeros(3, dtype=torch.int64, device=weight.device)

    def see(self, xhat: Tensor, quantizer: LSQQuantizer) -> None:
        """Count what has changed since the last call.

        Between tensors of bytes: on a CPU such operations take a tenth of those with a scalar, or with a where().
        """
        if self.codes.device != xhat.device or self.codes.stride() != xhat.stride():
            self._lie_as(xhat)
        shape = quantizer.spec.step_shape(xhat.dim())
        codes = (xhat.float() * quantizer.alpha.reciprocal().reshape(shape)).round_().to(self.codes.dtype)
        if self.started:
            up, down = (codes > self.codes).view(torch.uint8), (codes < self.codes).view(torch.uint8)
            turn = torch.add(up, down, alpha=_DOWN)
            turned_back = turn & self.back
            self.back ^= turned_back
            self.back |= torch.add(down, up, alpha=_DOWN)
            back = _total(turned_back) + _total(turned_back & up)  # 1 + 1 for each _UP, 2 + 0 for each _DOWN
            self.counts += torch.stack([torch.ones_like(back), _total(up) + _total(down), back // 2])
            if self.frequency is not None:
                self.frequency.mul_(1.0 - self.momentum).add_(turned_back != 0, alpha=self.momentum)
        self.codes.copy_(codes)
        self.started = True

    def _lie_as(self, xhat: Tensor) -> None:
        """Move to xhat's device and layout: the model has been moved."""
        for name in ("codes", "back", "frequency"):
            mine = getattr(self, name)
            if mine is not None:
                setattr(self, name, torch.empty_like(xhat, dtype=mine.dtype).copy_(mine))
        self.counts = self.counts.to(xhat.device)

    def tensors(self) -> list[Tensor]:
        """What figures() needs on the host."""
        often = [] if self.frequency is None else [(self.frequency > OSCILLATING).sum()]
        return [self.counts, *often]

    def figures(self, values) -> tuple:
        """(steps, changed, oscillated, oscillating) from the values of tensors(), which are next in this iterator."""
        steps, changed, back = next(values)
        numel = max(self.codes.numel(), 1)
        often = None if self.frequency is None else next(values)[0] / numel
        if not steps:
            return 0, None, None, often
        return int(steps), changed / steps / numel, back / steps / numel, often


def _total(small: Tensor) -> Tensor:
    """The sum of a dense uint8 tensor of numbers up to 3, int64; 64 of them fit a byte, a fast sum on a CPU."""
    flat = small.as_strided((small.numel(),), (1,))
    whole = flat.numel() // 64 * 64
    return flat[:whole].view(64, -1).sum(0, dtype=torch.uint8).sum() + flat[whole:].sum()
