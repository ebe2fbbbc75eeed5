"""convert(model): a prepared model as a plain module, for inference: quantized weights folded in, no quantizers."""

from __future__ import annotations

import warnings

import torch
import torch.fx
from torch import Tensor, nn

from qbr import functional, running
from qbr.calls import Counted
from qbr.layers import WEIGHT_LAYERS, QuantizedClippedReLU, call_names, renormalised
from qbr.quantizers import LSQQuantizer, keeping_dtype, quantizers
from qbr.regularizer import unwatch
from qbr.spec import check_flag

_FLOAT_LAYERS = {quantized: plain for plain, quantized in WEIGHT_LAYERS.items()}


@torch.fx.wrap  # a dtype decides, which symbolic_trace of a converted model cannot ask
def _computed(x: Tensor) -> Tensor:
    """x as it is quantized: in float32, or float64."""
    return x if x.dtype == torch.float64 else x.float()


class FakeQuantize(Counted, nn.Module):
    """What is left of an activation's quantizers: (ReLU and clip, and) rounding to the grid, in torch's own operations.

    Args:
        steps: the quantizers, one for each call of the module (qbr/calls.py); all of one spec.
        relu, clip: whether min(max(x, 0), clip) is quantized instead of x.

    Attributes:
        alpha: buffer [calls] ([C] with a step per channel), float32 whatever dtype the model is cast to.
    """

    def __init__(self, steps: list[LSQQuantizer], relu: bool = False, clip: float | None = None) -> None:
        super().__init__()
        self.set_up(steps, relu, clip)

    def set_up(self, steps: list[LSQQuantizer], relu: bool, clip: float | None) -> None:
        """What __init__ does beyond nn.Module's own, for a module that becomes a FakeQuantize."""
        spec = steps[0].spec
        self.qn, self.qp, self.binary = spec.qn, spec.qp, spec.binary
        self.axis = spec.channel_axis
        self.relu, self.clip = relu, clip
        self.calls = len(steps)
        self.register_buffer("alpha", torch.cat([step.alpha.detach() for step in steps]))

    def forward(self, input: Tensor) -> Tensor:
        """xhat in input's shape and dtype, to the bit what the quantizer gives."""
        y = _computed(input)
        alpha = self._alpha(y.dim()).to(y.dtype)
        if self.relu:
            y = y.clamp(min=0.0, max=self.clip)
        v = y / alpha
        codes = torch.where(v >= 0, 1.0, -1.0) if self.binary else v.clamp(self.qn, self.qp).round()
        return torch.where(v.isnan(), v, codes * alpha).to(input.dtype)

    def _alpha(self, dim: int) -> Tensor:
        if self.axis is None:
            return self.alpha[self.next_call()]
        return self.alpha.reshape([-1 if i == self.axis % dim else 1 for i in range(dim)])

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        relu = "" if not self.relu else ", relu" if self.clip is None else f", relu, clip={self.clip:g}"
        return f"codes {self.qn}..{self.qp}{relu}"


def convert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """model without quantizers: its outputs in eval mode are the same to the bit, under the same backend of torch;
    those of attention to rounding, since torch's products round by whether a weight asks for gradients.

    Conv1d, Conv2d, Conv3d, ConvTranspose2d, Linear and Embedding are torch.nn's again; their weights are the quantized
    values (codes times alpha), in the dtype they had. Activations are quantized by FakeQuantize modules, in torch's own
    operations, so that nothing of qbr's kernels is needed. A layer whose input is quantized keeps its qbr class, with a
    FakeQuantize as ``input_quantizer``; so does one whose weight a hook computes (torch.nn.utils.prune, the older
    weight_norm and spectral_norm), with one as ``weight_quantizer``: prune.remove() and the like come first, to have it
    folded. A MultiheadAttention keeps its own, too, since torch's fused inference path would round differently; its
    state_dict is nn.MultiheadAttention's. A forward that reads a layer's weight itself, of which prepare() warns, reads
    the quantized one from now on. qbr's hooks are gone, but for those that count calls where one ReLU has
    several steps; the user's stay.

    Args:
        model: a prepared model, in any mode; it is left alone (a copy is converted) unless ``inplace``.
        inplace: convert model itself and return it; optimizers and others that hold its weights hold the float ones.

    Raises:
        ValueError: for a model without quantizers.

    Warns:
        UserWarning: of step sizes that were never set from data.
    """
    check_flag(inplace, "inplace")
    if not quantizers(model):
        raise ValueError(f"model ({type(model).__name__}) has no quantizers: nothing to convert")
    warn_unset(model)
    if not inplace:
        model = running.copied(model)
    unwatch(model)
    folded: dict[tuple[int, int], tuple] = {}
    for module in list(model.modules()):
        _fold(module, folded)
        if isinstance(module, QuantizedClippedReLU):
            _plain_relu(module)
    return model


def warn_unset(model: nn.Module) -> None:
    """Warn, at the caller's caller, of step sizes that were never set from data."""
    found = quantizers(model).items()
    # The buffer itself: AveragedModel and the like write to it, and a forward without usable data does not.
    unset = [name for name, each in found if not bool(each.init_state.all())]
    if unset:
        message = f"the step sizes of {unset} were never set from data: qbr.calibrate(model, batches) first, or train"
        warnings.warn(message, stacklevel=3)


def _fold(module: nn.Module, folded: dict) -> None:
    """Replace module's quantized weights by their values and its other quantizers by FakeQuantize."""
    for name, quantizer in list(module._modules.items()):
        if not isinstance(quantizer, LSQQuantizer) or isinstance(module, QuantizedClippedReLU):
            continue
        parameter = name.removesuffix("_quantizer")
        if quantizer.kind == "weight" and parameter in module._parameters:
            weight = module._parameters[parameter]
            key = id(weight), id(quantizer)  # tied weights stay tied
            if key not in folded:
                x = _renormalised_for_good(module, weight.detach())
                value = functional.fake_quantize(x, quantizer.alpha.detach(), quantizer.spec)
                folded[key] = weight, nn.Parameter(value, requires_grad=weight.requires_grad)
            module._parameters[parameter] = folded[key][1]
            del module._modules[name]
        else:
            module._modules[name] = FakeQuantize([quantizer])
    left = {"input_quantizer", "weight_quantizer"} & module._modules.keys()
    if not left and type(module) in _FLOAT_LAYERS:
        module.__class__ = _FLOAT_LAYERS[type(module)]


def _renormalised_for_good(module: nn.Module, weight: Tensor) -> Tensor:
    """renormalised(), for good: torch would renormalise an Embedding's quantized rows at every look-up."""
    weight = renormalised(module, weight)
    if isinstance(module, nn.Embedding):
        module.max_norm = None
    return weight


def _plain_relu(module: QuantizedClippedReLU) -> None:
    names = call_names("quantizer", module.calls)
    steps, clip = [module._modules.pop(name) for name in names], module.clip_value
    for name in ("clip_value", "keep_pre_quant_activation", "_input", "_kept"):
        del module.__dict__[name]
    module.__class__ = FakeQuantize
    module.set_up(steps, True, clip)
