"""Drop-in layers: convolution and linear with a quantized weight, and ReLU with clip and quantization fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import TensorWeakRef

from qbr import ops
from qbr.grouping import assign
from qbr.quantizers import LSQ_ActivationQuantizer, LSQ_WeightQuantizer, LSQQuantizer, check_clip


class QuantizedConv2d(nn.Conv2d):
    """nn.Conv2d whose weight goes through ``weight_quantizer``, in training and in eval mode.

    Args:
        num_bits: of the weight, 1 to 8.
        padding_mode, device, dtype and all others: as in nn.Conv2d.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        num_bits: int = 2, *, padding_mode: str = "zeros", device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.weight_quantizer: LSQQuantizer = LSQ_WeightQuantizer(num_bits, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedLinear(nn.Linear):
    """nn.Linear whose weight goes through ``weight_quantizer``, in training and in eval mode.

    Args:
        num_bits: of the weight, 1 to 8.
        all others: as in nn.Linear.
    """

    def __init__(
        self, in_features, out_features, bias=True, num_bits: int = 2, *, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_quantizer: LSQQuantizer = LSQ_WeightQuantizer(num_bits, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedClippedReLU(nn.Module):
    """ReLU, clip and fake quantization in one pass: fake_quantize(min(max(x, 0), clip_value)).

    Args:
        clip_value: upper bound of the ReLU, positive; None for none.
        num_bits: of the activation, 1 to 8, unsigned.
        keep_pre_quant_activation: hold the last forward's min(max(x, 0), clip_value) until the next forward, in
            training and in eval; one more activation of memory and one more pass.
        device: where the quantizer's alpha is made.
    """

    def __init__(
        self, clip_value: float | None = None, num_bits: int = 2, *,
        keep_pre_quant_activation: bool = False, device=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.set_up(clip_value, num_bits, keep_pre_quant_activation, device)

    def set_up(self, clip_value, num_bits, keep_pre_quant_activation=False, device=None) -> None:
        """What __init__ does beyond nn.Module's own, for a module that becomes a QuantizedClippedReLU."""
        check_clip(clip_value, "clip_value")
        self.clip_value = None if clip_value is None else float(clip_value)
        self.num_bits = num_bits
        self.keep_pre_quant_activation = keep_pre_quant_activation
        self.quantizer: LSQQuantizer = LSQ_ActivationQuantizer(num_bits, clip_value, device=device)
        self._input: TensorWeakRef | None = None
        self._kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not ops.is_dense(x):
            x = x.contiguous()  # here and not below, so that the tensor that the graph saves is the one referred to
        if self.keep_pre_quant_activation or self._kept is not None:
            self._kept = clipped_relu(x, self.clip_value) if self.keep_pre_quant_activation else None
        # Weak: the input lives as long as the graph that needs it, and not because of this module.
        assign(self, "_input", None if torch.compiler.is_compiling() else TensorWeakRef(x))
        return self.quantizer(x, relu=True, clip=self.clip_value)

    @property
    def pre_quant_activation(self) -> Tensor | None:
        """min(max(x, 0), clip_value) of the last forward, in its graph, computed when it is read.

        There from a forward with gradients until its backward; None otherwise (in eval, under no_grad, after
        backward, in compiled code), unless ``keep_pre_quant_activation`` is set.
        """
        if self._kept is not None:
            return self._kept
        x = self._input() if self._input is not None else None
        return None if x is None else clipped_relu(x, self.clip_value)

    def extra_repr(self) -> str:
        return f"clip_value={self.clip_value}"

    def __getstate__(self):
        return {**self.__dict__, "_input": None, "_kept": None}


def clipped_relu(x: Tensor, clip: float | None) -> Tensor:
    """min(max(x, 0), clip), in the graph; the gradient passes where 0 < x <= clip in every version of torch."""
    y = x.relu()
    return y if clip is None else torch.where(x > clip, clip, y)


# What prepare() turns into what: exact types only, since a subclass may use its weight in a way of its own.
WEIGHT_LAYERS = {nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}
RELUS = (nn.ReLU, nn.ReLU6)
