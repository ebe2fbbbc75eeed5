"""QATConfig: what prepare() quantizes, and how: for the model, for single names, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from qbr.arguments import check_bits, check_clip
from qbr.patterns import matches
from qbr.spec import check_flag, check_regularizer

_BITS = ("weight_bits", "act_bits", "first_layer", "last_layer")
_FLAGS = ("weight_per_channel", "quantize_inputs", "step_per_call", "collect_bin_loss")


@dataclass(frozen=True)
class LayerConfig:
    """What QATConfig says of one module; the fields are QATConfig's, and those that ``overrides`` may name.

    Attributes:
        weight_bits, act_bits: None for float.
        clip, weight_per_channel, quantize_inputs, input_signed: as in QATConfig.
        skipped: whether QATConfig.skip names the module.
    """

    weight_bits: int | None
    act_bits: int | None
    clip: float | None
    weight_per_channel: bool
    quantize_inputs: bool
    input_signed: bool | None
    skipped: bool


OVERRIDABLE = tuple(each.name for each in fields(LayerConfig) if each.name != "skipped")


@dataclass(frozen=True)
class QATConfig:
    """What prepare() quantizes, and how. ``print(qbr.plan(model, config))`` shows what it means for a model.

    Patterns are globs over module names (``"layer1.*.conv2"``); one that matches a container (``"layer1"``) covers what
    is in it. ReLUs that are called as functions have the names that ``qbr.plan`` shows.

    Attributes:
        weight_bits: of the weights of Conv1d, Conv2d, Conv3d, ConvTranspose2d, Linear, Embedding and
            MultiheadAttention, 1 to 8 (1: binary); 32 or None leaves them in float.
        act_bits: of the output of ReLU and ReLU6, and of inputs (``quantize_inputs``), 1 to 8; 32 or None: float.
        clip: upper bound of every ReLU, positive; None for none. A ReLU6 without it keeps its 6.
        skip: patterns of modules to leave in float.
        weight_per_channel: a step for each output channel (of an Embedding: for each row) instead of one for the
            tensor.
        collect_bin_loss: whether training forwards collect the bin loss for ``qbr.bin_loss(model)`` from the start; an
            AlphaControl that is attached decides by epoch instead.
        regularizer, act_regularizer: the bin loss of weights and of activations: "br" or "dampening" (docs/control.md);
            act_regularizer=None: the same for both. qbr.set_regularizer keeps them up to date.
        overrides: {pattern: {field: value}} for the fields in ``qbr.config.OVERRIDABLE``; of several patterns that
            match a module, the later one wins, field by field.
        first_layer, last_layer: bits of the first and of the last layer with a weight, in the order of calls (an
            auxiliary head that runs last is the last one: name the other in overrides): for its
            weight and, with ``quantize_inputs``, its input. 1 to 8; 32: float; None: as the others. Overrides win.
        quantize_inputs: also quantize what flows into a layer with a weight where it comes from no quantized ReLU (the
            image, a residual sum, a LayerNorm, GELU, pooled activations): ``input_quantizer``, one step per tensor.
        input_signed: whether those have signed codes; None: unless the model's graph shows that they are never
            negative.
        step_per_call: a ReLU module that its parent's forward calls several times has a step for each call; False:
            one for all.

    Raises:
        TypeError, ValueError: naming the field.
    """

    weight_bits: int | None = 2
    act_bits: int | None = 2
    clip: float | None = None
    skip: Sequence[str] = ()
    weight_per_channel: bool = False
    collect_bin_loss: bool = True
    regularizer: str = "br"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    first_layer: int | None = None
    last_layer: int | None = None
    quantize_inputs: bool = False
    input_signed: bool | None = None
    step_per_call: bool = True
    act_regularizer: str | None = None

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            if name not in ("skip", "overrides"):
                object.__setattr__(self, name, _checked(name, getattr(self, name), name))
        patterns = self.skip if isinstance(self.skip, (list, tuple)) else [None]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"skip={self.skip!r}: expected a list or tuple of patterns")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides={self.overrides!r}: expected {{pattern: {{field: value}}}}")
        checked = {}
        for pattern, values in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(values, Mapping):
                raise TypeError(f"overrides[{pattern!r}]={values!r}: expected {{field: value}}")
            unknown = sorted(set(values) - set(OVERRIDABLE), key=str)
            if unknown:
                raise ValueError(f"overrides[{pattern!r}] has {unknown}: expected some of {list(OVERRIDABLE)}")
            checked[pattern] = {name: _checked(name, value, f"overrides[{pattern!r}][{name!r}]")
                                for name, value in values.items()}  # fmt: skip
        object.__setattr__(self, "overrides", checked)
        if self.quantize_inputs and self.act_bits is None and not self._overrides("act_bits"):
            raise ValueError("quantize_inputs=True with act_bits=None: inputs have act_bits bits; name them")
        if self.input_signed is not None and not self.quantize_inputs and not self._overrides("quantize_inputs"):
            raise ValueError(f"input_signed={self.input_signed} without quantize_inputs=True: no input is quantized")

    def _overrides(self, name: str) -> bool:
        return any(name in values for values in self.overrides.values())

    def regularizer_of(self, kind: str) -> str:
        """The bin loss of "weight" or of "activation" quantizers."""
        return self.act_regularizer or self.regularizer if kind == "activation" else self.regularizer

    def layer(self, name: str, policy: int | None = None) -> LayerConfig:
        """What holds for the module of that name.

        Args:
            policy: first_layer or last_layer, where the module is that layer.
        """
        values = {field: getattr(self, field) for field in OVERRIDABLE}
        if policy is not None:
            bits = None if policy == 32 else policy
            values.update({side: bits for side in ("weight_bits", "act_bits") if values[side] is not None})
        for pattern, override in self.overrides.items():
            if matches(name, pattern):
                values.update(override)
        skipped = any(matches(name, pattern) for pattern in self.skip)
        if skipped:
            values["weight_bits"] = values["act_bits"] = None
        return LayerConfig(**values, skipped=skipped)

    def to_json(self) -> str:
        """All fields, those with their defaults too: a text that means the same under later versions."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> QATConfig:
        """What to_json() gave, or a JSON object with some of the fields.

        Raises:
            TypeError, ValueError: naming the field.
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"text is a {type(text).__name__}: expected the JSON that QATConfig.to_json() gives")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{text[:40]!r} is no JSON ({error}): expected what QATConfig.to_json() gives") from error
        if not isinstance(values, dict):
            raise TypeError(f"a {type(values).__name__} in JSON: expected an object with QATConfig's fields")
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"{unknown}: no fields of QATConfig; expected some of {[f.name for f in fields(cls)]}")
        return cls(**values)


torch.serialization.add_safe_globals([QATConfig])  # plain values: checkpoints that keep their arguments load


def _checked(name: str, value, argument: str):
    """value as the field keeps it; the error names the argument."""
    if name in ("weight_bits", "act_bits") and value == 32:
        return None
    if name in _BITS:
        if value is not None and value != 32:
            check_bits(value, argument, ", or 32 or None for float")
    elif name in _FLAGS:
        check_flag(value, argument)
    elif name == "input_signed":
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{argument}={value!r}: expected True, False or None")
    elif name == "clip":
        return check_clip(value, argument)
    elif name == "regularizer" or (name == "act_regularizer" and value is not None):
        check_regularizer(value, argument)
    return value
