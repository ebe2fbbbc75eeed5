"""inspect(path): what a file holds, tensor by tensor: bits, steps, bins and bytes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbr.arguments import usable
from qbr.export import bits
from qbr.export.codes import codes_of, width
from qbr.export.files import CHECKPOINT, ONNX, PACKED, described, kind_of
from qbr.export.optional import need
from qbr.export.packed import read_packed
from qbr.export.predecessor import read_checkpoint, steps
from qbr.spec import QuantSpec

_HEAD = ("tensor", "kind", "shape", "bits", "step", "bins", "bytes")


@dataclass
class Row:
    """One quantized tensor. ``bins``: (codes that occur, codes there are) of a weight; None for an activation."""

    name: str
    kind: str
    shape: tuple[int, ...] | None
    bits: int | None
    steps: Tensor
    bins: tuple[int, int] | None
    bytes: int


@dataclass
class Inspection:
    """What ``inspect`` found; ``print`` shows it as a table.

    Attributes:
        kind: "ONNX", "packed" or "checkpoint"; details: more on it, in words.
        rows: the quantized tensors. rest: bytes of all others; size: of the file.
    """

    kind: str
    details: str
    size: int
    rows: list[Row] = field(default_factory=list)
    rest: int = 0

    def __str__(self) -> str:
        lines = [_HEAD]
        for row in self.rows:
            steps = f"{row.steps.min().item():.4g}"
            if row.steps.numel() > 1:
                steps += f"..{row.steps.max().item():.4g} ({row.steps.numel()})"
            shape = "" if row.shape is None else "x".join(map(str, row.shape)) or "1"
            bins = "" if row.bins is None else f"{row.bins[0]}/{row.bins[1]}"
            width = "?" if row.bits is None else str(row.bits)
            lines.append((row.name, row.kind, shape, width, steps, bins, f"{row.bytes:,}" if row.bytes else ""))
        lines.append(("everything else", "", "", "", "", "", f"{self.rest:,}"))
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        cells = [[c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
        table = "\n".join("  ".join(line).rstrip() for line in cells)
        return f"{self.kind}: {self.details}; {self.size:,} bytes\n{table}"


def inspect(path: str | os.PathLike[str], **options: Any) -> Inspection:
    """What an ONNX file of ``to_onnx``, a packed file or a checkpoint holds. Nothing in it is run.

    Args:
        options: for a checkpoint, as ``read_checkpoint``'s.

    Raises:
        FileNotFoundError. ValueError: for a file that is damaged, claims more than its bytes, or is none of these.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind == PACKED:
        return _packed(path)
    if kind == CHECKPOINT:
        return _checkpoint(path, options)
    if kind == ONNX:
        return _onnx(path)
    raise ValueError(f"{path} is {described(path)}: expected .onnx, .safetensors or a checkpoint of torch.save")


def _nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _occupied(codes: Tensor) -> int:
    return len(torch.unique(codes))


def _activation(name: str, spec: QuantSpec | None, alpha: Tensor) -> Row:
    return Row(name, "activation", None, None if spec is None else spec.bits, alpha, None, 4 * alpha.numel())


def _packed(path: Path) -> Inspection:
    packed = read_packed(path)
    config = "no config" if packed.config is None else (
        f"weight_bits={packed.config.weight_bits}, act_bits={packed.config.act_bits}")  # fmt: skip
    found = Inspection("packed", f"safetensors, {config}", path.stat().st_size)
    counted = set()
    for quantizer, spec in packed.specs.items():
        key, name = f"{quantizer}.alpha", quantizer.removesuffix("_quantizer")
        if name in packed.weights:
            _, codes, _ = packed.weights[name]
            bins, size = (_occupied(codes), len(spec.codes)), bits.packed_size(codes.numel(), width(spec))
            found.rows.append(Row(name, "weight", tuple(codes.shape), spec.bits, packed.tensors[key], bins, size))
        else:
            found.rows.append(_activation(quantizer, spec, packed.tensors[key]))
            counted.add(key)
    found.rest = _nbytes(tensor for name, tensor in packed.tensors.items() if name not in counted)
    return found


def _checkpoint(path: Path, options) -> Inspection:
    checkpoint = read_checkpoint(path, **options)
    config = "float, nothing quantized" if checkpoint.config is None else (
        f"weight_bits={checkpoint.config.weight_bits}, act_bits={checkpoint.config.act_bits}")  # fmt: skip
    who = "the predecessor's" if checkpoint.predecessor else "torch.save"
    found = Inspection("checkpoint", f"{who}, {config}", path.stat().st_size)
    counted = set()
    for key in steps(checkpoint.state) if checkpoint.config is not None else ():
        name, alpha = key.removesuffix(".alpha"), checkpoint.state[key]
        spec, weight = checkpoint.spec(name), name.removesuffix("_quantizer")
        if name.endswith("weight_quantizer"):
            tensor, bins = checkpoint.state[weight], None
            if spec is not None:
                bins = _occupied(codes_of(weight, tensor, alpha, spec)), len(spec.codes)
            known = None if spec is None else spec.bits
            found.rows.append(Row(weight, "weight", tuple(tensor.shape), known, alpha, bins, _nbytes([tensor])))
            counted.add(weight)
        else:
            found.rows.append(_activation(name, spec, alpha))
            counted.add(key)
    found.rest = _nbytes(tensor for name, tensor in checkpoint.state.items() if name not in counted)
    return found


def _onnx(path: Path) -> Inspection:
    onnx = need("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        notes = {each.key: each.value for each in model.metadata_props}.get("qbr")
        notes = json.loads(notes)["tensors"] if notes else {}
        opset = next((each.version for each in model.opset_import if not each.domain), None)
        found = Inspection("ONNX", f"opset {opset}, IR version {model.ir_version}", path.stat().st_size)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        used = set()
        for node in model.graph.node:
            if node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.input[1] in tensors:
                row = _onnx_row(onnx, path, node, tensors, notes)
                if row is not None:
                    found.rows.append(row)
                    used.update({node.input[0], node.input[1]} & tensors.keys())
        found.rest = sum(_onnx_bytes(tensor) for name, tensor in tensors.items() if name not in used)
        return found
    except ValueError:
        raise
    except Exception as error:  # protobuf's and onnx's errors have no base of their own
        raise ValueError(f"{path} is damaged, or no ONNX model: {type(error).__name__}: {error}") from error


def _onnx_row(onnx, path: Path, node, tensors, notes) -> Row | None:
    step = torch.from_numpy(_array(onnx, path, tensors[node.input[1]]).astype(np.float32).reshape(-1).copy())
    if not usable(step).all():
        raise ValueError(f"{path}: {node.input[1]} has step sizes that are not positive and finite")
    if node.op_type == "QuantizeLinear":
        name = node.name.removesuffix("/QuantizeLinear") or node.output[0]
        note = notes.get(name, {})
        return Row(name, "activation", None, note.get("bits"), step, None, 4 * step.numel())
    if node.input[0] not in tensors:
        return None
    tensor = tensors[node.input[0]]
    name = tensor.name.removesuffix("_codes")
    note = next((each for each in notes.values() if each.get("parameter") == name), {})
    codes = torch.from_numpy(_array(onnx, path, tensor).astype(np.int16))
    of = len(QuantSpec(1).codes) if note.get("binary") else note["qp"] - note["qn"] + 1 if note else None
    kind = "weight, " + onnx.TensorProto.DataType.Name(tensor.data_type)
    bins = (_occupied(codes), of) if of is not None else None
    return Row(name, kind, tuple(tensor.dims), note.get("bits"), step, bins, _onnx_bytes(tensor))


def _array(onnx, path: Path, tensor) -> np.ndarray:
    """The tensor's values, if the file has as many as it claims."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError(f"{path}: {tensor.name} lies in another file; inspect reads one file only")
    per_value = {"INT2": 0.25, "UINT2": 0.25, "INT4": 0.5, "UINT4": 0.5}
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    size = per_value.get(name) or np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    if any(n < 0 for n in tensor.dims) or prod(tensor.dims) * size > max(tensor.ByteSize(), 1) * 4:
        raise ValueError(f"{path}: {tensor.name} claims the shape {list(tensor.dims)}, in {tensor.ByteSize()} bytes")
    return onnx.numpy_helper.to_array(tensor)


def _onnx_bytes(tensor) -> int:
    return len(tensor.raw_data) or tensor.ByteSize()
