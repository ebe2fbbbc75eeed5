"""calibrate(model, batches): set every step size from data before training starts, the same on every rank."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qbr import arguments, distributed, grouping, running
from qbr.observed import WeightReads, read_elsewhere
from qbr.quantizers import LSQQuantizer, quantizers, require_quantizers
from qbr.running import Model
from qbr.sketch import Mean, Sketch, elements, mean_step, mse_step, mse_step_of, quantile_step
from qbr.spec import is_number

METHODS = ("lsq", "mse", "percentile")
# Elements of a weight that are searched at once: in a CPU's cache; elsewhere as many as keep a device busy.
_IN_CACHE, _ON_DEVICE = 1 << 16, 1 << 24


def calibrate(
    model: Model,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "lsq",
    percentile: float = 99.9,
    forward: Callable[[Model, Any], Any] | None = None,
) -> Model:
    """Set every alpha of a prepared model, so that the first training forward need not.

    Weights are set from the weights. Then the batches run through the model in the mode it is in (train: BatchNorm
    uses the batch), without gradients; afterwards buffers and random number generators are as before. Each activation
    is set from all batches seen so far and quantized with that step on its way to the next layer, so that a layer is
    calibrated on what the quantized layers before it give: after one batch, method "lsq" has set every alpha to what
    the first training forward on that batch would have (in one process; several quantize by their own share meanwhile,
    and differ by a few percent). At the end statistics of all ranks are summed (one collective
    per quantizer, so ranks may have different numbers of batches) and every rank sets the same steps from them.

    Methods (binary tensors always take mean|x|, their least-squares step):
        "lsq": 2 * mean|x| / sqrt(max(qp, 1)); Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1.
        "mse": the step with the least squared error; from a histogram for whole tensors, from
            the elements for a step per channel.
        "percentile": the step that puts that percentile of |x| on the outermost level, within a bin of 0.14 %.

    Args:
        model: a prepared model; wrappers of torch.compile and DistributedDataParallel are looked through.
        batches: an iterable of tensors, of tuples or lists that start with the model's input (as a data loader gives
            them), or of dicts of the model's arguments. Moved to the model's device. Where only weights are quantized
            None will do; the first batch of others than iterators is run to see who reads weights past their layers.
        method, percentile: above; percentile in (0, 100].
        forward: ``forward(model, batch)`` instead, for a model that is called in another way.

    Returns:
        The same model.

    Raises (every step size is then as before):
        ValueError: for a model without quantizers, an unknown method, a percentile out of range, and where there are
            activations and no rank has a batch. TypeError: for batches that are no iterable of batches.

    Warns:
        UserWarning: of activations that no batch reached (the first training forward sets those) or whose data had no
            usable step (all 0, or not finite: their alpha stays as it was); of weights that the forward of another
            module than their layer reads, in float; of unsigned quantizers that were given values below 0.
    """
    found = require_quantizers(model)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {METHODS}")
    if not is_number(percentile):
        raise TypeError(f"percentile={percentile!r}: expected a number, more than 0, at most 100")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile}: expected more than 0, at most 100")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward={forward!r}: expected a function of (model, batch), or None")
    iterable = hasattr(type(batches), "__iter__") or hasattr(type(batches), "__getitem__")
    if not (iterable or batches is None) or isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(f"batches is one {type(batches).__name__}: expected an iterable of batches; pass [batch]")
    unmade = [name for name, quantizer in found.items() if quantizer.alpha.is_meta]
    if unmade:
        raise ValueError(f"model has parameters on meta, without data ({unmade[0]}.alpha): make them first, "
                         "model.to_empty(device=...), and load a state_dict")  # fmt: skip
    calibrator = _Calibrator(method, percentile / 100)
    names = {quantizer: name for name, quantizer in found.items()}
    with _all_or_none(names):
        waiting = _set_all(model, batches, calibrator, names, forward or running.run)
    _report(names, waiting, calibrator)
    _report_signs(running.unwrapped(model), names, calibrator)
    return model


def _set_all(model: nn.Module, batches, calibrator: _Calibrator, names, forward) -> list[LSQQuantizer]:
    """Set weights from the weights, and from the batches what waits for data; those are returned."""
    for quantizer, layer, name in grouping.weights(model):
        weight = layer._parameters.get(name)
        if quantizer in names and weight is not None and grouping.is_there(weight):
            calibrator.set_weight(quantizer, weight)
    waiting = [quantizer for quantizer in names if quantizer not in calibrator.done]
    if waiting:
        count = _run(running.unwrapped(model), batches, forward, calibrator, waiting)
        if not distributed.total(torch.tensor(float(count), device=waiting[0].alpha.device)).item():
            raise ValueError(f"batches has no batch, and {len(waiting)} step sizes are to be set from data: pass at "
                             "least one batch (an iterator may have been used up before)")  # fmt: skip
    elif isinstance(batches, Iterable) and not isinstance(batches, Iterator):
        with contextlib.suppress(Exception):  # nothing depends on it but a warning, of who reads weights
            _run(running.unwrapped(model), _first(batches), forward, calibrator, waiting)
    for quantizer in waiting:
        calibrator.finish(quantizer)
    return waiting


def _first(batches: Iterable):
    """The first batch; a data loader draws a random number for its iterator, which is to be undone like the others."""
    yield from itertools.islice(batches, 1)


_FLAGS = "_initialised", "_unconfirmed", "_made_on_meta", "_tries"


@contextlib.contextmanager
def _all_or_none(quantizers: Iterable[LSQQuantizer]):
    """Put the step sizes back as they were if calibration fails."""
    before = [(q, q.alpha.detach().clone(), q.init_state.clone(), [vars(q)[f] for f in _FLAGS]) for q in quantizers]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for quantizer, alpha, init_state, flags in before:
                quantizer.alpha.copy_(alpha)
                quantizer.init_state.copy_(init_state)
                vars(quantizer).update(zip(_FLAGS, flags))
        raise


def _run(model: nn.Module, batches, forward, calibrator: _Calibrator, waiting: list[LSQQuantizer]) -> int:
    """Run the batches with a hook on every quantizer that waits for data; how many there were."""
    count = 0
    hooks = [q.register_forward_pre_hook(calibrator.see, with_kwargs=True) for q in waiting]
    reads = WeightReads(model, [(layer, name) for _, layer, name in grouping.weights(model)])
    try:
        with running.undisturbed(model):
            for batch in _with_progress(() if batches is None else batches):
                with reads if count == 0 else contextlib.nullcontext():
                    forward(model, batch)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    calibrator.read_elsewhere = reads.found
    return count


def _with_progress(batches):
    """batches, with tqdm's bar (if it is installed, on a terminal, after five seconds)."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, "calibrate", unit="batch", disable=None, delay=5, leave=False)


def _report(names: dict[LSQQuantizer, str], waiting: list[LSQQuantizer], calibrator: _Calibrator) -> None:
    """Warn of what has no step from data."""
    unseen = [names[q] for q in waiting if q not in calibrator.done]
    read = {name.rpartition(".")[0] for name in calibrator.read_elsewhere}
    never = [name for name in unseen if name.rpartition(".")[0] in read]
    unseen = [name for name in unseen if name not in never]
    if unseen:
        message = f"no batch reached {unseen}: their first training forward sets them"
        warnings.warn(message, stacklevel=3)
    if never:
        message = f"no batch reached {never}, whose layers are not called: other forwards read their weights"
        warnings.warn(message, stacklevel=3)
    if calibrator.read_elsewhere:
        warnings.warn(read_elsewhere(calibrator.read_elsewhere), stacklevel=3)
    bad = [q for q, usable in calibrator.done.items() if not usable.any()]
    for quantizer in bad:
        quantizer._initialised = bool(quantizer.init_state.all())  # what nothing has set, a training forward may set
    empty = [q for q in bad if q in calibrator.without_data]
    for what, found in (("is all 0 or not finite", set(bad) - set(empty)), ("has no element: empty batches", empty)):
        if found:
            message = f"the data of {[names[q] for q in bad if q in found]} {what}: their step sizes stay as they were"
            warnings.warn(message, stacklevel=3)


def _report_signs(model: nn.Module, names: dict[LSQQuantizer, str], calibrator: _Calibrator) -> None:
    """Warn of unsigned quantizers that lose what is below 0, but of those that config has made so."""
    on_purpose = set()
    for part in model.modules():  # prepared by itself, it may be a part of what is calibrated
        config = vars(part).get("qat_config")
        for name, quantizer in quantizers(part).items() if config is not None else ():
            if config.layer(name.rpartition(".")[0]).input_signed is not None:
                on_purpose.add(quantizer)
    below = calibrator.below_zero.items()
    lost = [names[quantizer] for quantizer, any_ in below if quantizer not in on_purpose and bool(any_)]
    if lost:
        message = f"{lost} are unsigned and were given values below 0, which become 0: prepare with input_signed=True"
        warnings.warn(f"{message} for their layers (QATConfig, or its overrides)", stacklevel=3)


class _Calibrator:
    """Statistics of each quantizer's inputs, and the steps that follow from them.

    Attributes:
        done: {quantizer: which of its steps could be set}, tensors of bool on the device.
        read_elsewhere: {weight: name of the module that has read it past its layer in the first batch}.
        below_zero: {unsigned quantizer without a ReLU: whether it was given values below 0}, bool on the device.
        without_data: quantizers whose inputs had no element.
    """

    def __init__(self, method: str, quantile: float) -> None:
        self.method = method
        self.quantile = quantile
        self.done: dict[LSQQuantizer, Tensor] = {}
        self.read_elsewhere: dict[str, str] = {}
        self.below_zero: dict[LSQQuantizer, Tensor] = {}
        self.without_data: set[LSQQuantizer] = set()
        self._statistics: dict[LSQQuantizer, Mean | Sketch] = {}

    def set_weight(self, quantizer: LSQQuantizer, weight: Tensor) -> None:
        """Set the step of a weight that is at hand; each rank's weight counts."""
        axis = quantizer.spec.channel_axis
        if axis is None or self.method == "lsq" or quantizer.spec.binary:
            statistics = self._new(quantizer)
            statistics.add(weight.detach())
            statistics.reduce(distributed.total)
            self._set(quantizer, self._step(quantizer, statistics))
            return
        rows = weight.detach().movedim(axis, 0)[..., None].flatten(1)
        at_once = _IN_CACHE if rows.device.type == "cpu" else _ON_DEVICE
        parts = rows.split(max(at_once // max(rows.shape[1], 1), 1))
        if self.method == "mse":
            steps = [mse_step_of(part, quantizer.spec) for part in parts]
        else:
            steps = [quantile_step(elements(part), quantizer.spec, self.quantile) for part in parts]
        self._set(quantizer, distributed.total(torch.cat(steps).double()) / distributed.ranks())

    def see(self, quantizer: LSQQuantizer, args, kwargs) -> None:
        """A pre-hook of the quantizer: note its input, and set alpha from all that was seen here."""
        x = args[0].detach()
        if quantizer.kind == "weight" and quantizer.spec.channel_axis is not None and self.method != "lsq":
            if quantizer not in self.done:
                self.set_weight(quantizer, x)
            return
        if kwargs.get("relu"):
            x = x.clamp(min=0, max=kwargs.get("clip"))
        elif quantizer.spec.qn == 0:
            self.below_zero[quantizer] = (x < 0).any() | self.below_zero.get(quantizer, False)
        if quantizer.kind == "weight" and quantizer in self._statistics:
            return
        statistics = self._statistics.setdefault(quantizer, self._new(quantizer))
        statistics.add(x)
        self._set(quantizer, self._step(quantizer, statistics))

    def finish(self, quantizer: LSQQuantizer) -> None:
        """Set alpha from what all ranks have seen; every rank has to come here, in the same order."""
        if quantizer in self.done and quantizer not in self._statistics:
            return
        statistics = self._statistics.get(quantizer) or self._new(quantizer)
        statistics.reduce(distributed.total)
        if bool(statistics.count.sum() > 0):
            self._set(quantizer, self._step(quantizer, statistics))
        elif quantizer in self.done:
            self.without_data.add(quantizer)

    def _new(self, quantizer: LSQQuantizer) -> Mean | Sketch:
        if self.method == "lsq" or quantizer.spec.binary:
            return Mean(quantizer.alpha, quantizer.spec.channel_axis)
        return Sketch(quantizer.alpha.device)

    def _step(self, quantizer: LSQQuantizer, statistics) -> Tensor:
        if self.method == "lsq" or quantizer.spec.binary:
            return mean_step(statistics, quantizer.spec)
        few_levels = self.method == "mse" and max(quantizer.spec.qp, -quantizer.spec.qn) <= 32
        bins = statistics.bins(8 if few_levels else 1)  # a bin: a third of a step at most
        if self.method == "mse":
            return mse_step(bins, quantizer.spec)
        return quantile_step(bins, quantizer.spec, self.quantile)

    @torch.no_grad()
    def _set(self, quantizer: LSQQuantizer, step: Tensor) -> None:
        step = step.to(quantizer.alpha.dtype).reshape(quantizer.alpha.shape)
        self.done[quantizer] = usable = arguments.usable(step)
        quantizer.write_alpha(torch.where(usable, step, quantizer.alpha), usable)
