"""What torch's modules and functions do to the values that flow through them: to their grid and their sign, to the
memory that they are in."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from qbr import tracing
from qbr.stand_ins import IN_PLACE

# What is known of a tensor's values, from good to bad; a join is the maximum.
QUANTIZED, NON_NEGATIVE, SIGNED, UNKNOWN = 0, 1, 2, 3


def _both(*names: str) -> set:
    """Tensor's methods of these names, and torch's functions."""
    return {*names, *(getattr(torch, name) for name in names if hasattr(torch, name))}


def _and_in_place(*names: str) -> set:
    """_both, with the forms that write to their first argument."""
    return _both(*names, *(f"{name}_" for name in names))


# Those whose results are values of their (first) input, moved, with zeros at most: what was on a grid stays there.
_MOVING = {
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.UpsamplingNearest2d,
    F.dropout, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.pixel_shuffle,
    F.pixel_unshuffle, torch.cat, torch.concat, torch.stack, torch.max_pool2d, operator.getitem, "to",
    *_both("amax", "chunk", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape", "roll", "split",
           "squeeze", "transpose", "unflatten", "unsqueeze", "view"),
}  # fmt: skip
# Those whose results are sums of their (first) input's values with weights that are not negative.
_AVERAGING = {
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.UpsamplingBilinear2d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, *_both("mean", "sum"),
}  # fmt: skip
_NON_NEGATIVE = {
    nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus, nn.ReLU, nn.ReLU6, F.softmax, F.hardsigmoid,
    F.softplus, F.sigmoid, operator.abs, *_and_in_place("abs", "exp", "sigmoid", "softmax", "square"),
}  # fmt: skip
# Those whose results are not negative where no operand is.
_MONOTONE = {
    operator.add, operator.mul, operator.truediv, *_and_in_place("add", "mul", "multiply", "div", "divide"),
    *(made for made, of in IN_PLACE.items() if of in (operator.iadd, operator.imul, operator.itruediv)),
}  # fmt: skip
_RESIZING = {F.interpolate, F.upsample}

# Those that may put out their input's own memory: what is then changed in place changes for the reader of either.
VIEWS = {
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout,
    operator.getitem, "contiguous", "to", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda",
    *_both(
        "as_strided", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_to", "chunk", "conj", "detach", "diagonal",
        "dsplit", "expand", "expand_as", "flatten", "hsplit", "imag", "moveaxis", "movedim", "narrow", "permute",
        "ravel", "real", "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze", "swapaxes",
        "swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
        "vsplit",
    ),
}  # fmt: skip
VIEWING_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag", "data"}
KIND = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "size", "dim", "numel", "is_floating_point"}
_WRITING = {*IN_PLACE, operator.setitem}


def after_module(module: nn.Module, x: int) -> int | None:
    """The state of what one of torch's modules makes of an input in state x; None for those not known here."""
    kind = type(module)
    if kind is nn.Upsample:
        return _resized(module.mode, x)
    if kind in (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d):
        return _padded("constant", module.value, x)
    return _after(kind, x)


def after_call(node: Node, states: dict[Node, int]) -> int:
    """The state of what a call of a function or method makes of its operands."""
    operands = [*node.args, *node.kwargs.values()]
    if node.target in _RESIZING:
        return _resized(_argument(node, 3, "mode", "nearest"), join(operands[0], states))
    if node.target is F.pad:
        fill = _argument(node, 3, "value", None)
        return _padded(_argument(node, 2, "mode", "constant"), fill, join(operands[0], states))
    if node.target in _MONOTONE and all(isinstance(v, Node) or (type(v) in (int, float) and v >= 0) for v in operands):
        return max(join([value for value in operands if isinstance(value, Node)], states), NON_NEGATIVE)
    after = _after(node.target, join(operands[0], states)) if operands else None
    return SIGNED if after is None else after


def _after(target, x: int) -> int | None:
    if target in _MOVING:
        return x
    if target in _AVERAGING:
        return max(x, NON_NEGATIVE)
    return NON_NEGATIVE if target in _NON_NEGATIVE else None


def _resized(mode: str, x: int) -> int:
    if str(mode).startswith("nearest"):
        return x
    return max(x, SIGNED if mode == "bicubic" else NON_NEGATIVE)


def _padded(mode: str, fill, x: int) -> int:
    if mode != "constant" or not fill:
        return x
    return max(x, NON_NEGATIVE if type(fill) in (int, float) and fill > 0 else SIGNED)


def _argument(node: Node, index: int, name: str, default):
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def join(value, states: dict[Node, int]) -> int:
    """The worst of the nodes in an argument; what is not a tensor of the graph counts as SIGNED."""
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return max((states.get(node, SIGNED) for node in found), default=SIGNED)


def writes(node: Node) -> bool:
    """Whether a function or method changes its first argument in place."""
    if not isinstance(tracing.first(node), Node):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or node.target in _WRITING


def asks_for_kind(node: Node) -> bool:
    """Whether a node asks a tensor for its dtype, shape and the like only, and not for its values."""
    return (node.target is getattr and node.args[1] in KIND) or (node.op == "call_method" and node.target in KIND)
