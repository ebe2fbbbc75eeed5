"""From the exporter's graph to the deployed one: quantizers become integer initializers, QuantizeLinear and
DequantizeLinear; BatchNorms go into the scales."""

from __future__ import annotations

import ast
import json
from typing import Any

import numpy as np
import torch

from qbr.export.codes import codes_of
from qbr.export.optional import need
from qbr.spec import QuantSpec

DOMAIN, OP = "qbr", "lsq_fwd"
# Integer types by name in ONNX: (least code, greatest code). The first one that holds a range is taken.
STORAGE = {
    "UINT2": (0, 3),
    "INT2": (-2, 1),
    "UINT4": (0, 15),
    "INT4": (-8, 7),
    "UINT8": (0, 255),
    "INT8": (-128, 127),
}
# Activations are never stored, so that narrow types save nothing: onnxruntime 1.31 quantizes to UINT2 at half the speed
# of UINT8, and its default optimizer makes invalid graphs of 2-bit activations. A Clip keeps their range instead.
ACTIVATIONS = ("UINT8", "INT8")
OPSETS = {2: 25, 4: 21, 8: 21}  # the first opset that has the type, by its width; below 21 no layer reads 4 bits
IR_VERSIONS = {21: 10, 25: 13}


def storage(spec: QuantSpec, names: tuple[str, ...] = tuple(STORAGE)) -> tuple[str, int]:
    """(ONNX integer type, zero point) of a range; UINT8 with a zero point where no type holds it as it is.

    Raises:
        ValueError: for a range that no zero point of UINT8 moves into the type.
    """
    for name in names:
        low, high = STORAGE[name]
        if (low < 0) == (spec.qn < 0) and low <= spec.qn and spec.qp <= high:
            return name, 0
    if not -255 <= spec.qn <= 0:
        raise ValueError(f"codes {spec.qn}..{spec.qp}: no 8-bit type of ONNX holds them, with a zero point either; "
                         "expected a lower end of -255 to 0, or 0..255")  # fmt: skip
    return "UINT8", -spec.qn


def opset(weights: list[QuantSpec]) -> int:
    """The lowest opset that holds weights of these ranges."""
    return max((OPSETS[int(storage(spec)[0].lstrip("UINT"))] for spec in weights), default=21)


def translation(x, alpha, qn, qp, binary, channel_axis, relu, clip):
    """The exporter's translation of ``lsq_fwd``: one node, which ``lower`` replaces when all values are known."""
    return _lsq_fwd_op()(
        x, alpha, qn=qn, qp=qp, binary=int(binary), channel_axis=channel_axis, relu=int(relu), clip=float(clip)
    )


def _lsq_fwd_op():
    schemas, values = need("onnx").defs.OpSchema, need("onnxscript").values
    floats = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double")]
    parameters = [schemas.FormalParameter(name, "T" if name == "x" else "S") for name in ("x", "alpha")]
    attributes = [schemas.Attribute(name, schemas.AttrType.INT, "") for name in ("qn", "qp", "binary", "relu")]
    attributes.append(schemas.Attribute("channel_axis", schemas.AttrType.INT, ""))
    attributes.append(schemas.Attribute("clip", schemas.AttrType.FLOAT, ""))
    schema = schemas(
        OP, DOMAIN, 1, inputs=parameters, outputs=[schemas.FormalParameter("xhat", "T")],
        type_constraints=[("T", floats, ""), ("S", floats, "")], attributes=attributes,
    )  # fmt: skip
    return values.Op(values.Opset(DOMAIN, 1), OP, schema)


class Lowering:
    """Rewrites one onnx_ir model in place.

    Args:
        model: with ``qbr::lsq_fwd`` nodes.
        version: its opset.
        fold_batchnorm: see ``to_onnx``.
    """

    def __init__(self, model: Any, version: int, fold_batchnorm: bool) -> None:
        self.ir = need("onnxscript").ir
        self.model, self.graph, self.version = model, model.graph, version
        self.notes: dict[str, dict] = {}  # what the graph does not say of its codes, for people and for inspect
        self._made: dict[tuple, Any] = {}
        self._names: dict[str, int] = {}
        for node in [node for node in self.graph if (node.domain, node.op_type) == (DOMAIN, OP)]:
            self._lower(node)
        if fold_batchnorm:
            for node in [node for node in self.graph if node.op_type == "BatchNormalization"]:
                self._fold(node)
        model.opset_imports.pop(DOMAIN, None)
        model.metadata_props["qbr"] = json.dumps({"format": 1, "tensors": self.notes})

    # Quantizers

    def _lower(self, node) -> None:
        x, alpha = node.inputs
        spec, relu, clip = _call(node)
        name = self._unique(_layer(node))
        if alpha.const_value is None:
            raise ValueError(f"the step sizes of {name} are computed in forward: only parameters can be exported")
        step = torch.from_numpy(alpha.const_value.numpy().copy())
        if alpha.dtype != self.ir.DataType.FLOAT or x.dtype == self.ir.DataType.DOUBLE:
            raise ValueError(f"{name} quantizes float64: export model.float(), ONNX quantizes no double")
        # A parameter that an activation's quantizer reads may have a ReLU before it, or codes too narrow for the opset.
        if x.is_initializer() and not relu and opset([spec]) <= self.version:
            key = id(x), id(alpha), spec
            if key not in self._made:
                self._made[key] = self._weight(node, name, x, step, spec)
            xhat = self._made[key]
        else:
            xhat = self._activation(node, name, x, step, spec, relu, clip)
        xhat.shape, xhat.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(xhat, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _weight(self, node, name: str, weight, step, spec: QuantSpec):
        x = torch.from_numpy(weight.const_value.numpy().astype(np.float32))
        type_name, zero_point = storage(spec)
        codes = codes_of(weight.name, x, step, spec).numpy() + zero_point
        self._note(name, spec, type_name, parameter=weight.name)
        inputs = [self._constant(f"{weight.name}_codes", codes, type_name), self._scale(name, step, spec)]
        if zero_point:
            inputs.append(self._zero_point(name, step, spec, type_name, zero_point))
        xhat = self._op(node, "DequantizeLinear", inputs, name, **_axis(spec))
        return self._cast(node, xhat, weight.dtype, name)

    def _activation(self, node, name: str, x, step, spec: QuantSpec, relu: bool, clip: float):
        dtype, type_name, zero_point = x.dtype, *storage(spec, ACTIVATIONS)
        y = self._cast(node, x, self.ir.DataType.FLOAT, name)
        self._note(name, spec, type_name)
        if spec.binary:
            return self._cast(node, self._binary(node, name, y, step, spec), dtype, name)
        y = self._clip(node, name, y, step, spec, clip, type_name, zero_point)
        parameters = [
            self._scale(name, step, spec),
            self._zero_point(name, step, spec, type_name, zero_point),
        ]
        codes = self._op(node, "QuantizeLinear", [y, *parameters], name, **_axis(spec))
        xhat = self._op(node, "DequantizeLinear", [codes, *parameters], name, **_axis(spec))
        return self._cast(node, xhat, dtype, name)

    def _clip(self, node, name, y, step, spec: QuantSpec, clip: float, type_name: str, zero_point: int):
        """y within the range, where QuantizeLinear's type is wider than that: at least qn and at most the code of
        clip, which round to themselves."""
        low, high = (bound - zero_point for bound in STORAGE[type_name])
        top = torch.full_like(step, clip).div(step).clamp(spec.qn, spec.qp).round()
        if spec.channel_axis is None:
            bounds = [spec.qn * step[0] if spec.qn > low else None, top[0] * step[0] if top[0] < high else None]
            if bounds == [None, None]:
                return y
            inputs = [None if bound is None else self._constant(f"{name}.bound_{i}", bound.numpy(), "FLOAT")
                      for i, bound in enumerate(bounds)]  # fmt: skip
            return self._op(node, "Clip", [y, *inputs], name)
        for op, codes in (("Max", torch.full_like(step, spec.qn)), ("Min", top)):
            bound = (codes * step).reshape(spec.step_shape(len(node.inputs[0].shape))).numpy()
            y = self._op(node, op, [y, self._constant(f"{name}.{op.lower()}", bound, "FLOAT")], name)
        return y

    def _binary(self, node, name, y, step, spec: QuantSpec):
        """alpha where y / alpha >= 0, -alpha elsewhere: no integer type of ONNX rounds to -1 and 1 alone."""
        step = step.reshape(spec.step_shape(len(node.inputs[0].shape))).numpy()
        plus, minus = (self._constant(f"{name}.{word}", value, "FLOAT") for word, value in
                       (("alpha", step), ("minus_alpha", -step)))  # fmt: skip
        v = self._op(node, "Div", [y, plus], name)
        zero = self._constant(f"{name}.zero", np.zeros((), np.float32), "FLOAT")
        return self._op(node, "Where", [self._op(node, "GreaterOrEqual", [v, zero], name), plus, minus], name)

    # BatchNorm

    def _fold(self, norm) -> None:
        """conv(x, codes * alpha) * s + t = conv(x, codes * (alpha * s)) + t: no code changes. Left alone where the
        weight has no codes, a factor s is not positive, or somebody else reads the convolution or its weight."""
        layer = norm.inputs[0].producer()
        axis = _output_axis(layer)
        if axis is None or not self._read_once(norm.inputs[0]) or any(v.is_graph_output() for v in norm.outputs[1:]):
            return
        dequantize = layer.inputs[1].producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or not self._read_once(layer.inputs[1]):
            return
        bias = layer.inputs[2] if len(layer.inputs) > 2 else None
        constants = [*norm.inputs[1:5], *([bias] if bias is not None else [])]
        scale = dequantize.inputs[1].const_value.numpy()
        if any(value.const_value is None for value in constants) or dequantize.inputs[0].const_value is None:
            return
        if scale.size > 1 and dequantize.attributes["axis"].value % dequantize.inputs[0].shape.rank() != axis:
            return
        gamma, beta, mean, var, *rest = (value.const_value.numpy().astype(np.float64) for value in constants)
        factor = gamma / np.sqrt(var + norm.attributes["epsilon"].value)
        scale = (scale * factor).astype(np.float32)
        if not (np.isfinite(scale) & (scale > 0)).all():
            return
        shift = beta - (mean - (rest[0] if rest else 0.0)) * factor
        name = _layer(norm)
        inputs = [dequantize.inputs[0], self._constant(f"{name}.scale", scale, "FLOAT")]
        if len(dequantize.inputs) > 2:
            zero_point = np.broadcast_to(dequantize.inputs[2].const_value.numpy(), scale.shape)
            inputs.append(self._constant(f"{name}.zero_point", zero_point, "UINT8"))
        weight = self._op(dequantize, "DequantizeLinear", inputs, name, axis=axis)
        weight.shape, weight.type = layer.inputs[1].shape, layer.inputs[1].type
        layer.replace_input_with(1, weight)
        if bias is not None:
            layer.resize_inputs(2)
        # Not the layer's own bias: onnxruntime's default optimizer would round that to a grid.
        shape = [-1] + [1] * (layer.inputs[1].shape.rank() - 2 if layer.op_type != "Gemm" else 0)
        shift = self._constant(f"{name}.shift", shift.astype(np.float32).reshape(shape), "FLOAT")
        result = self._op(norm, "Add", [norm.inputs[0], shift], name)
        result.shape, result.type = norm.outputs[0].shape, norm.outputs[0].type
        norm.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove([norm, dequantize], safe=True)

    def _read_once(self, value) -> bool:
        return len(value.uses()) == 1 and not value.is_graph_output()

    # Building

    def _note(self, name: str, spec: QuantSpec, type_name: str, **more) -> None:
        codes = {"bits": spec.bits, "qn": spec.qn, "qp": spec.qp, "binary": spec.binary}
        self.notes[name] = {**codes, "type": type_name, **more}

    def _unique(self, name: str) -> str:
        self._names[name] = count = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}@{count}"

    def _scale(self, name: str, step, spec: QuantSpec):
        step = step[0] if spec.channel_axis is None else step
        return self._constant(f"{name}.scale", step.numpy(), "FLOAT")

    def _zero_point(self, name: str, step, spec: QuantSpec, type_name: str, zero_point: int):
        shape = () if spec.channel_axis is None else tuple(step.shape)
        return self._constant(f"{name}.zero_point", np.full(shape, zero_point), type_name)

    def _constant(self, name: str, value: np.ndarray, type_name: str):
        ir = self.ir
        dtype = ir.DataType[type_name]
        if name in self.graph.initializers:
            name = next(f"{name}_{i}" for i in range(2, 1 << 30) if f"{name}_{i}" not in self.graph.initializers)
        tensor = ir.Tensor(np.ascontiguousarray(value).astype(dtype.numpy()).reshape(np.shape(value)), dtype, name=name)
        made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _op(self, place, op: str, inputs: list, name: str, **attributes):
        """The output of a new node before ``place``."""
        label = self._unique(f"{name}/{op}")
        node = self.ir.node(op, inputs, attributes, name=label, metadata_props=dict(place.metadata_props))
        node.outputs[0].name = label
        self.graph.insert_before(place, node)
        return node.outputs[0]

    def _cast(self, place, value, dtype, name: str):
        if dtype == (self.ir.DataType.FLOAT if value.dtype is None else value.dtype):
            return value
        cast = self._op(place, "Cast", [value], name, to=int(dtype))
        cast.type = self.ir.TensorType(dtype)
        return cast


def _call(node) -> tuple[QuantSpec, bool, float]:
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    axis = values["channel_axis"] if values["channel_axis"] >= 0 else None
    if values["binary"]:
        return QuantSpec(1, channel_axis=axis), bool(values["relu"]), values["clip"]
    qn, qp = values["qn"], values["qp"]
    return QuantSpec(max(1, (qp - qn).bit_length()), qn < 0, axis, qn, qp), bool(values["relu"]), values["clip"]


def _axis(spec: QuantSpec) -> dict[str, int]:
    return {} if spec.channel_axis is None else {"axis": spec.channel_axis}


def _layer(node) -> str:
    """The name of the module that made a node, as the exporter noted it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    names = ast.literal_eval(scopes) if scopes else []
    return names[-2] if len(names) > 1 and names[-2] else node.name or node.op_type


def _output_axis(layer) -> int | None:
    """Which dimension of a layer's weight its output channels are; None for what BatchNorm cannot fold into."""
    if layer is None:
        return None
    if layer.op_type == "Conv":
        return 0
    group = layer.attributes["group"].value if "group" in layer.attributes else 1
    if layer.op_type == "ConvTranspose" and group == 1:
        return 1
    if layer.op_type == "Gemm" and _gemm(layer) == (1.0, 1.0, 0, 1):
        return 0
    return None


def _gemm(layer) -> tuple:
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    return tuple(layer.attributes[n].value if n in layer.attributes else value for n, value in defaults.items())
