"""plan(model, config): what prepare() would do to a model, as data and as a table, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.fx
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from qbr import discovery, distributed, observed, plan_warnings, running
from qbr.calls import joined
from qbr.config import LayerConfig, QATConfig
from qbr.discovery import FunctionalReLU, Reading
from qbr.graph_modules import RewrittenGraphs
from qbr.kernels.reference import DTYPES
from qbr.layers import ATTENTION, RELUS, WEIGHT_LAYERS
from qbr.patterns import matches
from qbr.quantizers import quantizers
from qbr.spec import QuantSpec
from qbr.traced_forward import TracedForward
from qbr.tracing import Call, Untraceable
from qbr.value_states import QUANTIZED, SIGNED, UNKNOWN

# What a field of an override is said of.
_TAKES = {
    "weight_bits": ("weight",),
    "weight_per_channel": ("weight",),
    "act_bits": ("ReLU", "input that is quantized"),
    "clip": ("ReLU",),
    "quantize_inputs": ("input",),
    "input_signed": ("input",),
}
_IN_PROJ = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass
class PlannedWeight:
    """``parameter`` of ``module`` gets ``<parameter>_quantizer``; ``layer`` is whose forward uses it."""

    name: str
    module: nn.Module
    layer: nn.Module
    parameter: str
    spec: QuantSpec


@dataclass
class PlannedReLU:
    """A ReLU that becomes a QuantizedClippedReLU: a module, or the call of a function.

    ``places``: {owner: how many calls its forward makes} where each call gets its own step.
    """

    name: str
    module: nn.Module | None
    function: FunctionalReLU | None
    bits: int
    clip: float | None
    places: dict[nn.Module, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return max(sum(self.places.values()), 1)


@dataclass
class PlannedInput:
    """``module`` gets the quantizer ``attribute`` for what flows into it."""

    name: str
    module: nn.Module
    attribute: str
    bits: int
    signed: bool


@dataclass
class Plan:
    """What prepare() would do; ``print(plan)`` shows it as a table.

    Attributes:
        weights, relus, inputs: what becomes quantized.
        forwards: {module: the forward that takes the place of its own, with its functional ReLUs as modules, and with
            the results of ReLU modules where these worked in place}.
        rows: the table: name, type, weight, activation, note.
        warnings: what may not be what was asked for: ReLUs and layers that stay in float, weights that are read in
            float, a first or last layer that is not known, most inputs in float.
    """

    weights: list[PlannedWeight] = field(default_factory=list)
    relus: list[PlannedReLU] = field(default_factory=list)
    inputs: list[PlannedInput] = field(default_factory=list)
    forwards: dict[nn.Module, TracedForward | RewrittenGraphs] = field(default_factory=dict)
    rows: list[tuple[str, ...]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("name", "type", "weight", "activation", "note"), *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"warning: {each}" for each in self.warnings)])


def plan(model: nn.Module, config: QATConfig | None = None, *, example: Any = None) -> Plan:
    """What ``prepare(model, config)`` would do; model is unchanged.

    Args:
        model: any module that is not prepared yet.
        config: QATConfig() if not given.
        example: one batch, as in ``calibrate``. It is run once where a forward does not trace, to count how often it
            calls a ReLU module (without it such a module has one step for all calls), and to learn which layers come
            first and last. Without it the model's own forward counts as called with tensors for all that has no
            default, and with nothing else. Buffers and random number generators are as before afterwards.

    Raises:
        ValueError: if the model was prepared before, has nothing to quantize on a side that config quantizes, if a
            pattern in config matches nothing, or if a layer cannot have what config says. TypeError: for a config or
            a model that is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected an nn.Module")
    distributed.check_unwrapped(model)
    config = QATConfig() if config is None else config
    if not isinstance(config, QATConfig):
        raise TypeError(f"config={config!r}: expected a qbr.QATConfig")
    before = next(iter(quantizers(model)), None)
    if before is not None:
        raise ValueError(f"model has quantizers already ({before!r}): prepare it once, from its float form, and "
                             "add quantizers of your own afterwards")  # fmt: skip
    return _Planner(model, config, example).plan


class _Planner:
    def __init__(self, model: nn.Module, config: QATConfig, example) -> None:
        self.model = model
        self.config = config
        self.plan = Plan()
        self.names = {module: name for name, module in model.named_modules()}
        self.given_up: dict[str, str] = {}  # ReLUs that need a rewritten forward which cannot be had, and why
        self.spoiled: set[str] = set()  # those of them that work in place for the reader of another forward
        self.reading = self._read(model, None if example is None else running.arguments(example))
        self.ran = example is not None and bool(self.reading.untraced)
        if self.ran:
            observed.add_calls(model, example, self.reading)
        self.layers = list(self.reading.inputs)
        self.order = self.reading.order or self.layers
        self.left_out = {name: reason for name, module in model.named_modules() if (reason := _left_out(module))}
        self.float_inputs: list[nn.Module] = []  # layers, embeddings aside, that nothing quantized is known to reach
        self._check_patterns()
        functions: dict[nn.Module, dict[str, FunctionalReLU]] = {}
        for name, function in self.reading.functional.items():
            functions.setdefault(function.owner, {})[name] = function
        for name, module in model.named_modules():
            if module in self.reading.inputs:
                self._layer(name, module)
            elif type(module) in RELUS:
                self._relu(name, module, None)
            else:
                self._row_of_a_kind(name, module)
            for function_name, function in functions.get(module, {}).items():
                self._relu(function_name, None, function)
        self.plan.warnings += plan_warnings.all_of(self)
        self._check_ties()
        self._check_found()

    # What there is

    def _read(self, model: nn.Module, example: tuple[tuple, dict[str, Any]] | None) -> Reading:
        """The reading of model, with a rewritten forward where ReLUs to be quantized need one."""
        while True:
            reading = discovery.read(model, lambda name: self._bits_of_relu(name) is not None, example)
            failed = self._rewrite(reading)
            if not failed and not reading.spoiled:
                return reading
            self.given_up.update(failed)
            for name, reader in reading.spoiled.items():
                self.given_up[name] = f"{reader or 'the model'} reads what it changes in place"
                self.spoiled.add(name)

    def _bits_of_relu(self, name: str) -> int | None:
        return None if name in self.given_up else self.config.layer(name).act_bits

    def _rewrite(self, reading: Reading) -> dict[str, str]:
        """Fill plan.forwards; {name: why} of the ReLUs for which that is impossible."""
        self.plan.forwards, failed = {}, {}
        owners: dict[nn.Module, list[str]] = {owner: [] for owner in reading.in_place}
        for name, function in reading.functional.items():
            if function.given is not None:
                owners.setdefault(function.owner, []).append(name)
        for owner, mine in owners.items():
            in_place = reading.in_place.get(owner, set())
            wanted = [name.rpartition(".")[2] if self._bits_of_relu(name) is not None else None for name in mine]
            if any(wanted) or in_place:
                try:
                    if self.names[owner] in reading.untraced:
                        raise Untraceable(reading.untraced[self.names[owner]])
                    self.plan.forwards[owner] = self._forward(owner, reading.given[owner], wanted, in_place)
                except Untraceable as error:
                    failed |= dict.fromkeys([*mine, *(self.names[relu] for relu in in_place)], str(error))
        return failed

    def _forward(self, owner: nn.Module, ways: list[Call], relus: list, in_place: set[nn.Module]):
        call, *more = ways
        if more:
            raise Untraceable("it is called with different arguments")
        kind = RewrittenGraphs if isinstance(owner, torch.fx.GraphModule) else TracedForward
        return kind(owner, tuple(call.tensors), relus, in_place, call.values)

    def _policy(self, layer: nn.Module) -> int | None:
        first, last = layer is self.order[0], layer is self.order[-1]
        if first and last and None not in (self.config.first_layer, self.config.last_layer):
            if self.config.first_layer != self.config.last_layer:
                raise ValueError(f"first_layer={self.config.first_layer} and last_layer={self.config.last_layer}: the "
                                 "model has one layer with a weight, which is both; name one")  # fmt: skip
        if first and self.config.first_layer is not None:
            return self.config.first_layer
        return self.config.last_layer if last else None

    # What becomes of it

    def _layer(self, name: str, module: nn.Module) -> None:
        config = self.config.layer(name, self._policy(module))
        attention = type(module) in ATTENTION
        parameters = [(name, module, each) for each in _IN_PROJ if getattr(module, each, None) is not None]
        if attention:
            parameters.append((joined(name, "out_proj"), module.out_proj, "weight"))
        else:
            parameters = [(name, module, "weight")]
        inputs, note = self._inputs(name, module, config), ""
        if attention and config.quantize_inputs and inputs:
            note = "the input of out_proj stays in float"
        for owner_name, owner, parameter in parameters:
            own = config if owner is module else self.config.layer(owner_name, self._policy(module))
            if own.weight_bits is not None:
                spec = _weight_spec(owner_name, owner, own, getattr(owner, parameter).dtype)
                self.plan.weights.append(PlannedWeight(owner_name, owner, module, parameter, spec))
                bits = f"{own.weight_bits} bits" + (", per channel" if own.weight_per_channel else "")
            else:
                bits = "float (skip)" if own.skipped else "float"
            label = owner_name if parameter == "weight" else f"{owner_name} {parameter}".strip()
            self._row(label, owner, bits, ", ".join(inputs) if owner is module else "", note)
            inputs, note = [], ""

    def _inputs(self, name: str, module: nn.Module, config: LayerConfig) -> list[str]:
        if config.act_bits is None or type(module) is nn.Embedding:
            return []
        states = {"input_quantizer": self.reading.inputs[module]}
        if module in self.reading.memory:
            states["memory_quantizer"] = self.reading.memory[module]
        if not config.quantize_inputs:
            worst = max(states.values())
            if worst not in (QUANTIZED, UNKNOWN):
                self.float_inputs.append(module)
            return [] if worst == QUANTIZED else ["input unknown" if worst == UNKNOWN else "input float"]
        if states["input_quantizer"] == QUANTIZED:  # else memory needs its own, or would get the input's
            states = {name: state for name, state in states.items() if state != QUANTIZED}
        kinds = []
        for attribute, state in states.items():
            signed = state >= SIGNED if config.input_signed is None else config.input_signed
            self.plan.inputs.append(PlannedInput(name, module, attribute, config.act_bits, signed))
            kind = ("signed" if signed else "unsigned") + (", input unknown" if state == UNKNOWN else "")
            kinds.append(f"{attribute.partition('_')[0]} {config.act_bits} bits {kind}")
        return kinds

    def _relu(self, name: str, module: nn.Module | None, function: FunctionalReLU | None) -> None:
        config = self.config.layer(name)
        owner = module if function is None else function.owner
        kind = type(module).__name__ if function is None else "function"
        bits = self._bits_of_relu(name)
        if bits is None:
            reason = " (skip)" if config.skipped else " (not rewritten)" if name in self.given_up else ""
            self._row(name, kind, "", "float" + reason, self.given_up.get(name, ""))
            return
        bound = function.clip if function is not None else 6.0 if type(owner) is nn.ReLU6 else None
        clip = bound if config.clip is None else config.clip
        callers = self.reading.calls.get(module, {}) if function is None else {}
        calls = sum(callers.values())
        planned = PlannedReLU(name, module, function, bits, clip)
        rewritten = any(module in relus for relus in self.reading.in_place.values())
        if function is not None:
            rewritten = function.given is not None
        notes = [self._rewritten(function.owner if function else None)] if rewritten else []
        unread = self._unread(module, callers)
        if calls > 1:
            planned.places = callers if self.config.step_per_call and not unread else {}
            notes.append(f"called {calls} times, {planned.steps} {'steps' if planned.steps > 1 else 'step'}")
        if unread and callers:
            notes.append(f"one step for all calls: {unread}'s forward, which may call it too, does not trace")
        if module in self.reading.uneven:
            notes.append("one step for calls that differ between training and eval")
        elif not callers and name.rpartition(".")[0] in self.reading.untraced:
            notes.append("one step for all calls: its parent's forward does not trace")
        self.plan.relus.append(planned)
        self._row(name, kind, "", f"{bits} bits" + ("" if clip is None else f", clip {clip:g}"), "; ".join(notes))

    def _unread(self, relu: nn.Module | None, callers: dict) -> str:
        """The name of a module that holds relu and whose forward, of which no calls are known, may call it."""
        holders = (m for m in self.names if relu is not None and relu in m._modules.values() and m not in callers)
        return next((self.names[m] for m in holders if self.names[m] in self.reading.untraced), "")

    def _rewritten(self, owner: nn.Module | None) -> str:
        forward = self.plan.forwards.get(owner)
        forward = forward.forward if isinstance(forward, RewrittenGraphs) else forward
        left = [name for name in forward.defaults if name not in forward.given] if forward else []
        fixed = [f"{name}={forward.values[name]!r}" for name in left if name in forward.values]
        fixed += [f"{name} at the default" for name in left if name not in forward.values]
        return "part of a rewritten forward" + (f", with {', '.join(fixed)}" if fixed else "")

    def _row_of_a_kind(self, name: str, module: nn.Module) -> None:
        """The row of a module that is of none of the exact types, and stays in float, if there is something to it."""
        if name in self.left_out:
            reason = f"float ({self.left_out[name]})"
            self._row(name, module, *(("", reason) if isinstance(module, tuple(RELUS)) else (reason, "")), "")

    def _row(self, name: str, kind, weight: str, activation: str, note: str) -> None:
        kind = kind if isinstance(kind, str) else type(kind).__name__
        self.plan.rows.append((name or "(root)", kind, weight, activation, note))

    # What cannot be

    def _check_patterns(self) -> None:
        kinds = {self.names[m]: type(m) for m in self.names}
        layers = {n: kind is not nn.Embedding for n, kind in kinds.items() if kind in (*WEIGHT_LAYERS, *ATTENTION)}
        layers |= {joined(n, "out_proj"): False for n, kind in kinds.items() if kind in ATTENTION}
        relus = {*(n for n, kind in kinds.items() if kind in RELUS), *self.reading.functional}
        for argument in ("skip", "overrides"):
            known = [*layers, *relus, *(self.left_out if argument == "skip" else ())]  # float already: said on purpose
            lost = [p for p in getattr(self.config, argument) if not any(matches(n, p) for n in known)]
            if lost:
                raise ValueError(f"{argument}={sorted(lost)}: nothing that can be quantized has such a name; see "
                                 "model.named_modules(), or print(qbr.plan(model))")  # fmt: skip
        for pattern, fields in self.config.overrides.items():
            inputs = [name for name, takes in layers.items() if takes and matches(name, pattern)]
            takers = {
                "weight": [name for name in layers if matches(name, pattern)],
                "ReLU": [name for name in relus if matches(name, pattern)],
                "input": inputs,
                "input that is quantized": [name for name in inputs if self.config.layer(name).quantize_inputs],
            }
            for field_name in fields:
                wanted = _TAKES[field_name]
                if not any(takers[kind] for kind in wanted):
                    raise ValueError(f"overrides[{pattern!r}][{field_name!r}]: nothing of that name has a "
                                     f"{' or an '.join(wanted)}; see print(qbr.plan(model))")  # fmt: skip

    def _check_ties(self) -> None:
        seen: dict[int, PlannedWeight] = {}
        for each in self.plan.weights:
            other = seen.setdefault(id(getattr(each.module, each.parameter)), each)
            if other.spec != each.spec:
                raise ValueError(f"{other.name} and {each.name} share one weight, and config gives them {other.spec} "
                                 f"and {each.spec}: override both alike, or skip one")  # fmt: skip

    def _check_found(self) -> None:
        config = self.config
        if not (self.plan.weights or self.plan.relus or self.plan.inputs):
            if config.weight_bits is None and config.act_bits is None:
                message = "weight_bits=None and act_bits=None (32 means the same): nothing to quantize; name one"
                raise ValueError(message)
        relus = sum(type(module) in RELUS for module in self.names) + len(self.reading.functional)
        for argument, found, count, what in (
            ("weight_bits", self.plan.weights, len(self.layers), "layer with a weight"),
            ("act_bits", [*self.plan.relus, *self.plan.inputs], relus, "ReLU or ReLU6"),
        ):
            bits = getattr(config, argument)
            if bits is not None and not found:
                reason = f"all {count} are skipped or in float" if count else "the model has none"
                if argument == "act_bits" and not count:
                    reason += "; quantize_inputs=True quantizes what flows into layers instead"
                why = "".join(f"; {each}" for each in self.plan.warnings)
                raise ValueError(f"{argument}={bits}: no {what} to quantize ({reason}); pass {argument}=None to leave "
                                 f"that side out{why}")  # fmt: skip


def _left_out(module: nn.Module) -> str | None:
    """Why a module stays in float that is of none of the exact types, if there is something in it to quantize."""
    kind = next((kind for kind in (*WEIGHT_LAYERS, *ATTENTION, *RELUS) if isinstance(module, kind)), None)
    part = isinstance(module, (NonDynamicallyQuantizableLinear, ParametrizationList))  # of what has a row
    has_matrix = any(not is_lazy(p) and p.dim() > 1 for p in module.parameters(recurse=False))
    if part or type(module) is kind or (kind is None and not has_matrix):
        return None
    if is_parametrized(module):
        return "parametrized"
    if isinstance(module, LazyModuleMixin):
        return "lazy: run the model once before"
    return "no quantized form" if kind is None else f"subclass of {kind.__name__}"


def _weight_spec(name: str, module: nn.Module, config: LayerConfig, dtype: torch.dtype) -> QuantSpec:
    if dtype not in DTYPES:
        raise TypeError(f"{name} has a weight of {dtype}: expected float32, bfloat16, float16 or float64; cast it, or "
                        f"skip it: QATConfig(skip=[{name!r}])")  # fmt: skip
    if isinstance(module, nn.Embedding):
        if module.sparse:
            raise ValueError(f"{name} is an Embedding with sparse=True: a quantized weight has a dense gradient; "
                             f"make it with sparse=False, or skip it: QATConfig(skip=[{name!r}])")  # fmt: skip
        if config.weight_bits == 1 and module.padding_idx is not None:
            raise ValueError(f"{name} is an Embedding with padding_idx={module.padding_idx} and weight_bits=1: binary "
                             "codes have no 0 for it; give it 2 bits or more by overrides")  # fmt: skip
    if config.weight_bits == 1 and any(buffer.endswith("weight_mask") for buffer in module._buffers):
        raise ValueError(f"{name} is pruned and has weight_bits=1: binary codes have no 0 for what is pruned; give it "
                         "2 bits or more by overrides, or prune.remove and train it dense")  # fmt: skip
    axis = None
    if config.weight_per_channel:
        axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    return QuantSpec(config.weight_bits, signed=True, channel_axis=axis)
