"""Running an exported file: a session whose optimizer keeps results, and a comparison with the model in torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbr import functional
from qbr.export.optional import need
from qbr.quantizers import LSQQuantizer, quantizers, require_quantizers
from qbr.running import unwrapped

# Rewrites of onnxruntime after which other numbers come out: a bias rounded to a grid of its own; BatchNorm, scales
# and sums moved into weights.
INEXACT = [
    "WeightBiasQuantization", "ConvBNFusion", "ConvMulFusion", "ConvAddFusion", "MatMulAddFusion",
    "MatMulScaleFusion", "MatMulBNFusion", "BatchNormalizationAddFusion",
]  # fmt: skip
TOO_OLD = "files with 2-bit types want onnxruntime 1.24 or newer, and with it Python 3.11"
_QUANTIZING = ("QuantizeLinear", "Where")  # what an activation's codes come from; Where: 1 bit, signed


def session(path: str | os.PathLike[str], *, exact: bool = True, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU.

    Args:
        path: a file from ``to_onnx``.
        exact: compute what the file says, in float32 between the quantizers. False leaves all of onnxruntime's
            rewrites on: with 8 bits it may then compute in integers, and round biases and sums otherwise.
        threads: of one operator; None for onnxruntime's choice.

    Raises:
        ImportError: naming the pip command. FileNotFoundError; ValueError: for what onnxruntime cannot open.
    """
    runtime = need("onnxruntime")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return _open(str(path), runtime, exact, threads)
    except Exception as error:  # onnxruntime's error types share no base of their own
        remedy = "; " + TOO_OLD if "IR version" in str(error) else ""
        raise ValueError(f"{path}: onnxruntime cannot open it: {error}{remedy}") from error


def _open(model: str | bytes, runtime, exact: bool, threads: int | None):
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    disabled = INEXACT if exact else []
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


@dataclass
class Comparison:
    """What onnxruntime gives beside torch, on the same batch.

    Attributes:
        rows: how many samples: the size of the first output's first dimension.
        top1_equal: for how many of them its largest entry is at the same place; None unless it is [samples, classes].
        largest_difference: between the first outputs; scale: the largest magnitude in torch's.
        codes: {quantizer call: (codes that differ, codes)} with each runtime on its own activations.
        from_tie: the largest distance from a tie, in steps, of a value that torch quantizes otherwise where its
            sample's codes first differ: with sums in another order, values within rounding of a tie fall to the
            other side, and what follows from them differs more.
        rows_differing: samples with a code that differs.
        unplaced: codes that differ in tensors whose first dimension is not the samples', as of windows or tokens:
            neither ``rows_differing`` nor ``from_tie`` counts them.
        quantizers: {quantizer call: codes that differ} where qbr quantizes the very values that onnxruntime did.
        missed: calls of torch's that the file does not show by that name, and whose codes were not compared: of a
            quantizer under two names, and of one whose output is not used.
    """

    rows: int = 0
    top1_equal: int | None = None
    largest_difference: float = 0.0
    scale: float = 0.0
    from_tie: float = 0.0
    rows_differing: int = 0
    unplaced: int = 0
    codes: dict[str, tuple[int, int]] = field(default_factory=dict)
    quantizers: dict[str, int] = field(default_factory=dict)
    missed: tuple[str, ...] = ()

    def __add__(self, other: Comparison) -> Comparison:
        """Of two batches through one file: counts add up, differences are the larger ones."""
        if not self.rows or not other.rows:
            return other if other.rows else self
        if self.codes and other.codes and self.codes.keys() != other.codes.keys():
            raise ValueError("comparisons of two different files do not add up")
        codes = {
            name: tuple(sum(each.codes.get(name, (0, 0))[i] for each in (self, other)) for i in (0, 1))
            for name in self.codes or other.codes
        }
        equal = (self.top1_equal, other.top1_equal)
        return Comparison(
            rows=self.rows + other.rows,
            top1_equal=None if None in equal else sum(equal),
            largest_difference=max(self.largest_difference, other.largest_difference),
            scale=max(self.scale, other.scale),
            from_tie=max(self.from_tie, other.from_tie),
            rows_differing=self.rows_differing + other.rows_differing,
            unplaced=self.unplaced + other.unplaced,
            codes=codes,
            quantizers={name: self.quantizers.get(name, 0) + other.quantizers.get(name, 0) for name in codes},
            missed=self.missed or other.missed,
        )

    def __str__(self) -> str:
        differing, total = (sum(pair[i] for pair in self.codes.values()) for i in (0, 1))
        missed = f"; not compared: {', '.join(self.missed)}" if self.missed else ""
        equal = "" if self.top1_equal is None else f"top-1 equal for {self.top1_equal} of {self.rows}; "
        where = f"in {self.rows_differing} of {self.rows} samples, first within {self.from_tie:.1g} steps of a tie"
        if self.unplaced:
            where = f"{differing - self.unplaced} of them {where}, the others in tensors without a row for each sample"
        return (f"{equal}outputs differ by {self.largest_difference:.3g} at most (largest magnitude {self.scale:.3g}); "
                f"{differing} of {total} activation codes differ, {where}; given the same values, "
                f"{sum(self.quantizers.values())} do{missed}")  # fmt: skip


def compare(
    model: nn.Module, path: str | os.PathLike[str], example: Tensor | tuple[Any, ...] | Mapping[str, Any], *,
    exact: bool = True,
) -> Comparison:  # fmt: skip
    """Run an exported file and the model it was made from on one batch.

    Args:
        model: in any mode; evaluated in eval mode. path: from ``to_onnx``.
        example: a batch, as for ``to_onnx``, of any size that the file takes.
        exact: as in ``session``; the codes are always those of an exact session.

    Returns:
        A Comparison, on the host.

    Raises:
        ImportError, FileNotFoundError, ValueError: as ``session``; ValueError for a model without quantizers, or one
            whose first output has another shape than the file's.
    """
    require_quantizers(model)
    model = unwrapped(model)  # as to_onnx, which names the file's nodes
    onnx = need("onnx")
    args = tuple(example) if isinstance(example, (tuple, list)) else () if isinstance(example, Mapping) else (example,)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    expected, taps = _run_torch(model, args, kwargs)
    plain = session(path, exact=exact)
    feed = _feed(plain, args, kwargs)
    result = Comparison()
    _compare_outputs(result, expected, torch.from_numpy(plain.run(None, feed)[0]).float())
    proto = onnx.load(str(path))
    tapped = {node.name.rpartition("/")[0]: node for node in proto.graph.node if node.op_type in _QUANTIZING}
    tapped = {name: node for name, node in tapped.items() if name in taps}
    result.missed = tuple(name for name in taps if name not in tapped)
    inner = _with_outputs(onnx, proto, tapped)
    values = {**feed, **dict(zip([each.name for each in inner.get_outputs()], inner.run(None, feed)))}
    seen = torch.zeros(result.rows, dtype=torch.bool)  # samples that differ
    for name, node in tapped.items():
        quantizer, x, xhat, relu, clip = taps[name]
        theirs = _codes(torch.from_numpy(values[_dequantized(proto, node)]), quantizer)
        different = theirs != _codes(xhat, quantizer)
        result.codes[name] = int(different.sum()), different.numel()
        _note_ties(result, seen, different, x, quantizer)
        entered = torch.from_numpy(values[_entering(proto, node)])
        ours = functional.fake_quantize(entered, quantizer.alpha.detach(), quantizer.spec, relu=relu, clip=clip)
        result.quantizers[name] = int((theirs != _codes(ours, quantizer)).sum())
    return result


def _run_torch(model: nn.Module, args, kwargs) -> tuple[Tensor, dict[str, tuple]]:
    """(first output, {name of a quantizer's call: (quantizer, x, xhat, relu, clip)}) in eval mode."""
    taps: dict[str, tuple] = {}

    def tap(name):
        def hook(module: LSQQuantizer, inputs, options, output):
            calls = sum(key.partition("@")[0] == name for key in taps)
            key = name if calls == 0 else f"{name}@{calls + 1}"
            relu, clip = options.get("relu", False), options.get("clip")
            taps[key] = module, inputs[0].detach(), output.detach().float(), relu, clip

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [quantizer.register_forward_hook(tap(name), with_kwargs=True)
             for name, quantizer in quantizers(model).items() if quantizer.kind == "activation"]  # fmt: skip
    try:
        with torch.no_grad():
            output = model.eval()(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return _first(output), taps


def _first(output) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output.float()


def _feed(plain, args, kwargs) -> dict[str, np.ndarray]:
    names = [each.name for each in plain.get_inputs()]
    values = {**dict(zip(names, args)), **{name: value for name, value in kwargs.items() if name in names}}
    return {name: value.detach().cpu().numpy() for name, value in values.items()}


def _compare_outputs(result: Comparison, expected: Tensor, got: Tensor) -> None:
    if got.shape != expected.shape:
        raise ValueError(f"the model's first output is {tuple(expected.shape)} and the file's {tuple(got.shape)}: was "
                         "it made from this model?")  # fmt: skip
    result.largest_difference = (expected - got).abs().max().item()
    result.scale = expected.abs().max().item()
    result.rows = len(expected) if expected.dim() else 1
    if expected.dim() == 2:
        result.top1_equal = int((expected.argmax(1) == got.argmax(1)).sum())


def _codes(xhat: Tensor, quantizer: LSQQuantizer) -> Tensor:
    return (xhat.float() / quantizer.alpha.detach().reshape(quantizer.spec.step_shape(xhat.dim()))).round()


def _note_ties(result: Comparison, seen: Tensor, different: Tensor, x: Tensor, quantizer: LSQQuantizer) -> None:
    if len(different) != len(seen):  # not one row for each sample
        result.unplaced += int(different.sum())
        return
    rows = different.flatten(1).any(1)
    first = rows & ~seen
    seen |= rows
    result.rows_differing = int(seen.sum())
    if first.any():
        v = x.float() / quantizer.alpha.detach().reshape(quantizer.spec.step_shape(x.dim()))
        distance = (v - v.floor() - 0.5).abs()[first][different[first]]
        result.from_tie = max(result.from_tie, distance.max().item())


def _with_outputs(onnx, proto, tapped: dict):
    """A session that also puts out what enters and leaves each quantizer."""
    wanted = {name for node in tapped.values() for name in (_entering(proto, node), _dequantized(proto, node))}
    present = {each.name for each in (*proto.graph.output, *proto.graph.input)}
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for name in sorted(wanted - present):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return _open(proto.SerializeToString(), need("onnxruntime"), True, None)


def _dequantized(proto, node) -> str:
    if node.op_type == "Where":
        return node.output[0]
    return next(n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in node.output)


def _entering(proto, node) -> str:
    """What a quantizer reads: before its Clip."""
    producers = {output: each for each in proto.graph.node for output in each.output}
    name = node.input[0]
    while name in producers and producers[name].name.rpartition("/")[0] == node.name.rpartition("/")[0]:
        name = producers[name].input[0]
    return name
