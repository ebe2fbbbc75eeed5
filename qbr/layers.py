"""Drop-in layers: those of torch.nn with a quantized weight, and ReLU with clip and quantization fused.

Their forwards' argument is called ``input``, as torch.nn's is: models may pass it by that name.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.types import Device
from torch.utils.weak import TensorWeakRef

from qbr.arguments import check_clip
from qbr.calls import Counted
from qbr.grouping import assign
from qbr.kernels import is_dense
from qbr.quantizers import LSQ_ActivationQuantizer, LSQ_WeightQuantizer, LSQQuantizer
from qbr.spec import check_flag


class _QuantizedWeight(nn.Module):
    """What the layers share: the weight's quantizer, and one of the layer's input where prepare() gave it one."""

    def quantized_weight(self) -> Tensor:
        return through(self, "weight_quantizer", self.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        return through(self, "input_quantizer", x)


def through(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """x through the quantizer that module has under that name; x itself if it has none."""
    quantizer = module._modules.get(name)
    return x if quantizer is None else quantizer(x)


class _QuantizedConv(_QuantizedWeight):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class _NumBits(_QuantizedWeight):
    def __init__(self, *args: Any, num_bits: int = 2, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight_quantizer: LSQQuantizer = LSQ_WeightQuantizer(num_bits, device=self.weight.device)


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """nn.Conv2d whose weight goes through ``weight_quantizer``, in training and in eval mode.

    Args:
        num_bits: of the weight, 1 to 8.
        padding_mode, device, dtype and all others: as in nn.Conv2d.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, num_bits: int = 2, *,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros", device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.weight_quantizer: LSQQuantizer = LSQ_WeightQuantizer(num_bits, device=device)


class QuantizedConv1d(_NumBits, _QuantizedConv, nn.Conv1d):
    """nn.Conv1d, as QuantizedConv2d; ``num_bits`` by name."""


class QuantizedConv3d(_NumBits, _QuantizedConv, nn.Conv3d):
    """nn.Conv3d, as QuantizedConv2d; ``num_bits`` by name."""


class QuantizedConvTranspose2d(_NumBits, nn.ConvTranspose2d):
    """nn.ConvTranspose2d, as QuantizedConv2d; ``num_bits`` by name. A step per channel runs along dimension 1 of the
    weight, the output channels of a group."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = self.quantized_input(input)
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            x, self.quantized_weight(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """nn.Linear whose weight goes through ``weight_quantizer``, in training and in eval mode.

    Args:
        num_bits: of the weight, 1 to 8.
        all others: as in nn.Linear.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, num_bits: int = 2, *, device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_quantizer: LSQQuantizer = LSQ_WeightQuantizer(num_bits, device=device)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedEmbedding(_NumBits, nn.Embedding):
    """nn.Embedding whose table goes through ``weight_quantizer``; ``num_bits`` by name.

    ``max_norm`` renormalises the rows of the float weight, as in nn.Embedding, before they are quantized. Gradients
    are dense (``sparse`` is refused by prepare()).
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:
            torch.embedding_renorm_(self.weight.detach(), input, self.max_norm, self.norm_type)
        weight = self.quantized_weight()
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose projections' weights are quantized; prepare() makes it.

    ``in_proj_weight_quantizer`` (or those of q_proj_weight, k_proj_weight and v_proj_weight) and
    ``out_proj.weight_quantizer``; ``input_quantizer`` for the query, ``memory_quantizer`` for a key that is not the
    query (without it, and for a value that is not the key, the same step as for the tensor before). Any of them may
    be absent. What goes into ``out_proj`` stays in float. torch's fused inference path, which would read the float
    weights, is not taken.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        key_padding_mask = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
        )
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, check_other=False)
        query, key, value = self._inputs(query, key, value)
        names = ("in_proj_weight",) if self._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = {name: through(self, f"{name}_quantizer", getattr(self, name)) for name in names}
        output, attention = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, weights.pop("in_proj_weight", None), self.in_proj_bias,
            self.bias_k, self.bias_v, self.add_zero_attn, self.dropout,
            through(self.out_proj, "weight_quantizer", self.out_proj.weight), self.out_proj.bias,
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim, average_attn_weights=average_attn_weights,
            is_causal=is_causal, **weights,
        )  # fmt: skip
        return (output.transpose(1, 0) if self.batch_first and output.dim() == 3 else output), attention

    def _inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized where there are quantizers, and in the order (length, batch, channels); what was one tensor stays
        one, since torch then multiplies by all projections at once."""
        memory = "memory_quantizer" if "memory_quantizer" in self._modules else "input_quantizer"
        same_key, same_value = key is query, value is key
        query = self._laid_out(through(self, "input_quantizer", query))
        key = query if same_key else self._laid_out(through(self, memory, key))
        value = key if same_value else self._laid_out(through(self, memory, value))
        return query, key, value

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.transpose(1, 0) if self.batch_first and x.dim() == 3 else x


class QuantizedTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer whose ``activation`` is a module; prepare() makes it.

    torch's own, copied or unpickled, puts a functional relu in the place of such a module.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


class QuantizedClippedReLU(Counted, nn.Module):
    """ReLU, clip and fake quantization in one pass: fake_quantize(min(max(x, 0), clip_value)).

    Where prepare() found that it is called several times, each call has a quantizer of its own: ``quantizer``,
    ``quantizer_2``, and so on (qbr/calls.py). A state_dict that has the first one only sets all from it.

    Args:
        clip_value: upper bound of the ReLU, positive; None for none.
        num_bits: of the activation, 1 to 8, unsigned.
        keep_pre_quant_activation: hold the last forward's min(max(x, 0), clip_value) until the next forward, in
            training and in eval, on the way to the loss, so that gradients reach it; one more activation of memory and
            the passes of ReLU and clip. In 16 bits it is clipped to clip_value as they round it.
        device: where the quantizer's alpha is made.
    """

    def __init__(
        self, clip_value: float | None = None, num_bits: int = 2, *,
        keep_pre_quant_activation: bool = False, device: Device = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.set_up(clip_value, num_bits, keep_pre_quant_activation, device)

    def set_up(
        self, clip_value: float | None, num_bits: int, keep_pre_quant_activation: bool = False, device: Device = None,
        calls: int = 1,
    ) -> None:  # fmt: skip
        """What __init__ does beyond nn.Module's own, for a module that becomes a QuantizedClippedReLU.

        Args:
            calls: how many quantizers it has; qbr.calls.count_calls() has to tell it which call is which.
        """
        self.clip_value: float | None = check_clip(clip_value, "clip_value")
        self.keep_pre_quant_activation: bool = check_flag(keep_pre_quant_activation, "keep_pre_quant_activation")
        self.quantizer: LSQQuantizer = LSQ_ActivationQuantizer(num_bits, clip_value, device=device)
        for name in call_names("quantizer", calls)[1:]:
            self.add_module(name, LSQ_ActivationQuantizer(num_bits, clip_value, device=device))
        self._input: tuple[TensorWeakRef, int] | None = None
        self._kept: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if not is_dense(x):
            x = x.contiguous()  # here and not below, so that the tensor that the graph saves is the one referred to
        quantizer = self.quantizer
        if self.calls > 1:
            quantizer = self._modules[call_names("quantizer", self.calls)[self.next_call()]]
        if self.keep_pre_quant_activation:
            self._kept = clipped_relu(x, self.clip_value)
            return quantizer(self._kept)  # on the way to the loss, so that gradients reach it
        if self._kept is not None:
            self._kept = None
        # Weak: the input lives as long as the graph that needs it, and not because of this module.
        assign(self, "_input", None if torch.compiler.is_compiling() else (TensorWeakRef(x), version_of(x)))
        return quantizer(x, relu=True, clip=self.clip_value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in call_names(prefix + "quantizer", self.calls)[1:]:
            for key in ("alpha", "init_state"):
                if f"{prefix}quantizer.{key}" in state_dict:
                    state_dict.setdefault(f"{name}.{key}", state_dict[f"{prefix}quantizer.{key}"])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def num_bits(self) -> int:
        return self.quantizer.num_bits

    @property
    def pre_quant_activation(self) -> Tensor | None:
        """min(max(x, 0), clip_value) of the last forward, in its graph, computed when it is read.

        There from a forward with gradients until its backward; in compiled code None. What is kept is the forward's
        input, weakly: None where nothing else holds it, as after backward or under no_grad, unless
        ``keep_pre_quant_activation`` is set. None may be assigned, which drops it.

        Raises:
            RuntimeError: where the forward's input has been written to since.
        """
        if self._kept is not None or self._input is None:
            return self._kept
        reference, version = self._input
        x = reference()
        if x is None:
            return None
        check_version(x, version, "pre_quant_activation")
        return clipped_relu(x, self.clip_value)

    @pre_quant_activation.setter
    def pre_quant_activation(self, value: None) -> None:
        if value is not None:
            raise AttributeError("pre_quant_activation: only None can be assigned, which drops it")
        self._input = self._kept = None

    def extra_repr(self) -> str:
        return f"clip_value={self.clip_value}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_input": None, "_kept": None}


def version_of(x: Tensor) -> int:
    """How often x has been written to; 0 for a tensor of torch.inference_mode, which does not count."""
    return 0 if x.is_inference() else x._version


def check_version(x: Tensor, version: int, name: str) -> None:
    """Raise RuntimeError, naming what was asked for, if x has been written to since its version was that."""
    if version_of(x) != version:
        raise RuntimeError(f"{name}: the forward's input has been written to since; read it before that, or use "
                           "QuantizedClippedReLU(keep_pre_quant_activation=True)")  # fmt: skip


def clipped_relu(x: Tensor, clip: float | None) -> Tensor:
    """min(max(x, 0), clip), in the graph; the gradient passes where 0 < x <= clip in every version of torch."""
    y = x.relu()
    if clip is None:
        return y
    beyond = (x if x.dtype == torch.float64 else x.float()) > clip  # 16 bits would round clip first
    return torch.where(beyond, clip, y)


def call_names(name: str, calls: int) -> list[str]:
    """The name of what a module has for each of its calls: ``name``, ``name_2``, ``name_3``."""
    return [name, *(f"{name}_{call}" for call in range(2, calls + 1))]


def renormalised(module: nn.Module, weight: Tensor) -> Tensor:
    """An Embedding's rows within its ``max_norm``, as its forward makes them; any other weight itself."""
    if getattr(module, "max_norm", None) is None:
        return weight
    rows = torch.arange(len(weight), device=weight.device)
    return torch.embedding_renorm_(weight.clone(), rows, module.max_norm, module.norm_type)


# What prepare() turns into what: exact types only, since a subclass may use its weight in a way of its own.
WEIGHT_LAYERS = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
}
ATTENTION = {nn.MultiheadAttention: QuantizedMultiheadAttention}
RELUS = (nn.ReLU, nn.ReLU6)
