"""Packed weights: a safetensors file with codes at their true width, steps, all else as it is, and the config.

Format 1. The metadata has one entry, ``qbr``, JSON: ``config`` (QATConfig's fields, or null), ``quantizers`` (the range
of each by name), ``weights`` ({name: its quantizer, shape and dtype}) and ``aliases`` ({name: the name of the same
tensor}). A quantized weight is stored under its own name, as uint8 [packed_size]: qbr/export/bits.py.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbr.config import QATConfig
from qbr.convert import warn_unset
from qbr.export import bits
from qbr.export.codes import (
    check_parameters,
    check_range,
    check_steps,
    codes_of,
    from_unsigned,
    stored_weights,
    to_unsigned,
    values_of,
    width,
)
from qbr.export.files import PACKED, described, kind_of
from qbr.export.optional import need
from qbr.layers import renormalised
from qbr.prepare import prepare
from qbr.quantizers import quantizers
from qbr.running import unwrapped
from qbr.spec import QuantSpec
from qbr.whole import write_whole

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_LATER_CALL = re.compile(r"(quantizer)_\d+\.(alpha|init_state)$")


@dataclass
class Packed:
    """What a packed file holds, checked.

    Attributes:
        config: of prepare(), or None where the file does not say.
        specs: {quantizer name: QuantSpec}.
        weights: {name: (quantizer name, codes int16 in the weight's shape, dtype)}.
        tensors: {name: tensor} of everything else, steps among them.
        aliases: {name: the name in ``weights`` or ``tensors`` that it shares}.
    """

    config: QATConfig | None = None
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    weights: dict[str, tuple[str, Tensor, torch.dtype]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights as codes * alpha, which quantize to the same codes, and everything else."""
        state = dict(self.tensors)
        for name, (quantizer, codes, dtype) in self.weights.items():
            state[name] = values_of(codes, self.tensors[f"{quantizer}.alpha"], self.specs[quantizer], dtype)
        return {**state, **{name: state[first] for name, first in self.aliases.items()}}


def save_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    config: QATConfig | None = None,
    float_dtype: torch.dtype | None = None,
) -> Path:
    """Write a prepared model's weights as a safetensors file: codes at 1 to 8 bits each, no pickle.

    Args:
        model: a model from ``qbr.prepare``; left as it is.
        path: where the file goes, usually .safetensors; written whole or not at all.
        config: what the model was prepared with, by default what ``prepare`` noted on it; ``load_packed`` needs it
            to prepare a float model.
        float_dtype: torch.float16 or torch.bfloat16 to store what is not quantized (BatchNorm, biases, layers in
            float) in half the bytes; outputs are then no longer the same to the bit. Steps stay float32.

    Returns:
        path.

    Raises:
        ImportError: naming the pip command, without safetensors.
        ValueError: for a model without quantizers, for quantized weights that are computed (pruned, parametrized), and
            for weights or steps that are not finite, or steps that are not positive. TypeError: for a state_dict with
            something that is no tensor.

    Warns:
        UserWarning: of step sizes that were never set from data, and of a model that was prepared in parts, of which
            the file has no config.
    """
    model = unwrapped(model)
    found = quantizers(model)
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no quantizers: qbr.prepare it before packing")
    if float_dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"float_dtype={float_dtype}: expected torch.float16, torch.bfloat16 or None for no cast")
    warn_unset(model)
    weights = {}
    check_parameters(model)
    for each in stored_weights(model):
        weight = renormalised(each.module, each.weight.detach().cpu())
        weights[each.name] = each.quantizer_name, weight
    specs = {name: quantizer.spec for name, quantizer in found.items()}
    noted = getattr(model, "qat_config", None)
    if None not in (config, noted) and config != noted:
        raise ValueError(f"config={config}: the model was prepared with {noted}; leave config out")
    config = noted if config is None else config
    apart = [name for name, module in model.named_modules() if name and getattr(module, "qat_config", None) is not None]
    if config is None and apart:
        warnings.warn(f"{path} has no config: the model was prepared in parts ({', '.join(apart[:3])}); load_packed "
                      "wants a model whose parts are prepared as these were", stacklevel=2)  # fmt: skip
    return write_packed(path, model.state_dict(keep_vars=True), weights, specs, config, float_dtype)


def write_packed(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    weights: Mapping[str, tuple[str, Tensor]],
    specs: Mapping[str, QuantSpec],
    config: QATConfig | None,
    float_dtype: torch.dtype | None = None,
) -> Path:
    """save_packed without a model.

    Args:
        state: a state_dict; tensors that are one object are stored once.
        weights: {name in state: (its quantizer's name, the weight that is quantized)}.
        specs: {quantizer name: QuantSpec}.
    """
    save_file = need("safetensors.torch").save_file
    stored: dict[str, Tensor] = {}
    described_weights, aliases, seen = {}, {}, {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__} in the state_dict: only tensors can be packed")
        first = seen.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        elif name in weights:
            quantizer, weight = weights[name]
            spec, alpha = specs[quantizer], state[f"{quantizer}.alpha"].detach().cpu()
            codes = codes_of(name, weight, alpha, spec)
            _check_kept(name, codes, alpha, spec, weight.dtype)
            stored[name] = bits.pack(to_unsigned(codes, spec), width(spec))
            dtype = str(weight.dtype).removeprefix("torch.")
            described_weights[name] = {"quantizer": quantizer, "shape": list(weight.shape), "dtype": dtype}
        else:
            stored[name] = _as_stored(name, tensor.detach().cpu(), specs, float_dtype)
    about = {
        "format": FORMAT,
        "config": None if config is None else asdict(config),
        "quantizers": {name: _spec_to_json(spec) for name, spec in specs.items()},
        "weights": described_weights,
        "aliases": aliases,
    }
    metadata = {"format": "pt", "qbr": json.dumps(about)}
    return write_whole(path, lambda temporary: save_file(stored, temporary, metadata))


def _as_stored(name: str, tensor: Tensor, specs, float_dtype: torch.dtype | None) -> Tensor:
    owner, _, last = name.rpartition(".")
    if owner in specs:
        if last == "alpha":
            check_steps(name, tensor)
    elif float_dtype is not None and tensor.dtype in (torch.float32, torch.float64):
        cast = tensor.to(float_dtype)
        if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
            raise ValueError(f"{name} has values beyond {float_dtype}: pack with float_dtype=None or torch.bfloat16")
        tensor = cast
    return tensor.contiguous().clone()


def _check_kept(name: str, codes: Tensor, alpha: Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    """Raise ValueError unless codes * alpha in dtype quantizes to the same codes (a step below float16's range)."""
    if not torch.equal(codes_of(name, values_of(codes, alpha, spec, dtype), alpha, spec), codes):
        raise ValueError(f"{name}: its levels cannot be told apart in {dtype}; pack the model in float32")


def load_packed(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Load a packed file into a model, whose outputs in eval mode are then those of the saved one, to the bit.

    Weights become codes * alpha: the float weights that were trained are not in the file. Embeddings with
    ``max_norm`` lose it: their rows are within it already.

    Args:
        model: a prepared model; a float model, which is prepared with the file's config; or a function that makes
            one of the two.
        path: from ``save_packed`` or ``python -m qbr convert``.

    Returns:
        The model, in the mode that it had.

    Raises:
        ImportError: naming the pip command, without safetensors. FileNotFoundError.
        ValueError: for a file that is damaged, no such file, or for another model; the model is as it was then.
            No code in a file is run, and no more memory taken than its own bytes unpack to.
    """
    packed = read_packed(path)
    if not isinstance(model, nn.Module):
        model = model()
    target = unwrapped(model)
    if not quantizers(target):
        if packed.config is None:
            raise ValueError(f"{path} has no config, and model has no quantizers: qbr.prepare(model, config) first")
        trial = prepare(copy.deepcopy(target), packed.config)
        _check_fits(trial, packed, path)
        _load(trial, packed)
        prepare(target, packed.config)
    _check_fits(target, packed, path)
    _load(target, packed)
    for each in stored_weights(target):
        if getattr(each.module, "max_norm", None) is not None:
            each.module.max_norm = None
    return model


def _load(model: nn.Module, packed: Packed) -> None:
    """With the versions of model's own classes, without which some (torchvision's MNASNet) load nothing."""
    state = OrderedDict(packed.state_dict())
    state._metadata = model.state_dict()._metadata
    model.load_state_dict(state)


def _check_fits(model: nn.Module, packed: Packed, path) -> None:
    """Raise ValueError, naming the first difference, unless the file is of a model like this one."""
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()}
    shapes |= {name: tuple(codes.shape) for name, (_, codes, _) in packed.weights.items()}
    shapes |= {name: shapes[first] for name, first in packed.aliases.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in {**expected, **shapes}:
        if name not in shapes and _LATER_CALL.sub(r"\1.\2", name) in shapes:
            continue  # one step for all calls in the file: load_state_dict gives it to each
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"{path} is of another model: {name} is {shapes.get(name, 'absent')} in the file and "
                             f"{expected.get(name, 'absent')} in the model")  # fmt: skip
    for name, quantizer in quantizers(model).items():
        if name in packed.specs and packed.specs[name] != quantizer.spec:
            raise ValueError(f"{path} was quantized otherwise: {name} is {packed.specs[name]} in the file and "
                             f"{quantizer.spec} in the model")  # fmt: skip


def read_packed(path: str | os.PathLike[str]) -> Packed:
    """A packed file, every part of it checked.

    Raises:
        as ``load_packed``.
    """
    if kind_of(path) != PACKED:
        hint = "; python -m qbr convert makes one of a checkpoint" if "torch.save" in described(path) else ""
        raise ValueError(f"{path} is {described(path)}, not safetensors; nothing in it was run{hint}")
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if "qbr" not in metadata:
        raise ValueError(f"{path} is safetensors, but not from qbr.export.save_packed: it has no qbr metadata")
    try:
        return _parse(json.loads(metadata["qbr"]), tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: the file contradicts itself: {reason}") from error


def _parse(about: dict[str, Any], tensors: dict[str, Tensor]) -> Packed:
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']!r}: this version of qbr reads {FORMAT}")
    config = None if about["config"] is None else QATConfig.from_json(json.dumps(about["config"]))
    packed = Packed(config, {name: _spec_from_json(values) for name, values in about["quantizers"].items()})
    for name, spec in packed.specs.items():
        check_range(name, spec)
        alpha = tensors[f"{name}.alpha"]
        if alpha.dtype != torch.float32 or alpha.dim() != 1 or (spec.channel_axis is None and alpha.numel() != 1):
            raise ValueError(f"{name}.alpha is {alpha.dtype} {tuple(alpha.shape)}")
        check_steps(f"{name}.alpha", alpha)
    for name, values in about["weights"].items():
        packed.weights[name] = _weight(name, values, packed.specs, tensors)
    packed.tensors = {name: tensor for name, tensor in tensors.items() if name not in packed.weights}
    for name, first in about["aliases"].items():
        if name in tensors or first not in tensors:
            raise ValueError(f"{name} is said to be {first}")
        packed.aliases[name] = first
    return packed


def _weight(name: str, values, specs, tensors) -> tuple[str, Tensor, torch.dtype]:
    quantizer, shape, dtype = values["quantizer"], values["shape"], DTYPES[values["dtype"]]
    if quantizer != f"{name}_quantizer":
        raise ValueError(f"{name} is said to be quantized by {quantizer!r}")
    spec, alpha, stored = specs[quantizer], tensors[f"{quantizer}.alpha"], tensors[name]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"{name} has the shape {shape!r}")
    channels = 1
    if spec.channel_axis is not None:
        if not -len(shape) <= spec.channel_axis < len(shape):
            raise ValueError(f"{name} {shape} has no dimension {spec.channel_axis}")
        channels = shape[spec.channel_axis]
    if alpha.numel() != channels:
        raise ValueError(f"{name} {shape} has {alpha.numel()} steps: expected {channels}")
    try:
        codes = from_unsigned(bits.unpack(stored, width(spec), prod(shape)), spec)
    except ValueError as error:
        raise ValueError(f"{name} {shape}: {error}") from error
    return quantizer, codes.reshape(shape), dtype


def _spec_to_json(spec: QuantSpec) -> dict[str, Any]:
    values = {"bits": spec.bits, "signed": spec.signed, "channel_axis": spec.channel_axis}
    return values if spec.binary else {**values, "qn": spec.qn, "qp": spec.qp}


def _spec_from_json(values: dict[str, Any]) -> QuantSpec:
    known = ("bits", "signed", "channel_axis", "qn", "qp")
    return QuantSpec(**{name: values[name] for name in known if name in values})
