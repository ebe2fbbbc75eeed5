"""What plan() warns of: the ways in which a model may become something else than its user asked for."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from qbr.calls import joined
from qbr.layers import ATTENTION, WEIGHT_LAYERS
from qbr.observed import read_elsewhere

LARGE = 0.02  # share of a model's parameters in a matrix that is worth a warning, whatever it is called


def all_of(planner) -> list[str]:
    """The warnings of a planner (qbr/plan.py) that has planned everything."""
    kinds = _functions, _in_place, _weights_read, _left_out, _ends, _inputs
    return [text for kind in kinds for text in kind(planner)]


def _functional(planner) -> list[str]:
    """The functional ReLUs that need a rewritten forward which cannot be had."""
    reading = planner.reading
    return [name for name in planner.given_up if name in reading.functional and name not in planner.spoiled]


def _functions(planner):
    owners = {name.rpartition(".")[0]: planner.given_up[name] for name in _functional(planner)}
    for name, why in {**planner.reading.hidden, **owners}.items():
        if planner.config.layer(joined(name, "functional_relu_1")).act_bits is not None:
            yield (f"{name or 'the model'} calls a ReLU as a function, and its forward cannot be read ({why}): "
                   "that ReLU stays in float; use an nn.ReLU module there")  # fmt: skip


def _in_place(planner):
    functional = _functional(planner)
    for name, why in planner.given_up.items():
        if name not in functional:
            if name not in planner.spoiled:
                why = f"what it changes is read afterwards, by a forward that cannot be read ({why})"
            yield f"{name} is a ReLU in place: {why}; it stays in float, use one that is not in place"


def _weights_read(planner):
    parameters = {joined(each.name, each.parameter): id(getattr(each.module, each.parameter))
                  for each in planner.plan.weights}  # fmt: skip
    readers = planner.reading.weights
    read = {name: readers[key] for name, key in parameters.items() if key in readers}
    if read:
        yield read_elsewhere(read)


def _left_out(planner):
    """Modules with a weight of a type that has no quantized form, but for those that config leaves in float."""
    kinds: dict[str, list[str]] = {}
    large = LARGE * sum(p.numel() for p in planner.model.parameters() if not is_lazy(p))
    for name, reason in planner.left_out.items():
        module, config = planner.model.get_submodule(name), planner.config.layer(name)
        if not config.skipped and config.weight_bits is not None and _has_weight(module, large):
            kinds.setdefault(f"{type(module).__name__} ({reason})", []).append(name or "(root)")
    if kinds:
        listed = "; ".join(f"{len(names)} {kind}, {_some(names)}" for kind, names in kinds.items())
        yield f"layers of types without a quantized form stay in float: {listed}; name them in QATConfig(skip=[...])"


def _has_weight(module: nn.Module, large: float) -> bool:
    """Whether a module has a matrix that is called a weight, or, if all parameters are its own, one with as many
    elements as ``large`` (experts; and not an encoder with positions beside its layers)."""
    if isinstance(module, (*WEIGHT_LAYERS, *ATTENTION)):
        return True
    own = [(name, p) for name, p in module.named_parameters(recurse=False) if not is_lazy(p)]
    if any(name.startswith("weight") and p.dim() > 1 for name, p in own):
        return True
    alone = len(own) == len(list(module.parameters()))
    return alone and any(p.numel() >= large and sum(size > 1 for size in p.shape) > 1 for _, p in own)


def _ends(planner):
    """Of first_layer and last_layer: where they fall on a layer that stays in float, or on one by guess."""
    config, order = planner.config, planner.order
    for argument, at in (("first_layer", 0), ("last_layer", -1)):
        bits = getattr(config, argument)
        if bits is None or not order:
            continue
        name, which = planner.names[order[at]], argument.partition("_")[0]
        if order[at] not in planner.reading.inputs:
            yield f"{argument}={bits}: the {which} layer, {name}, stays in float, so that no layer is given these bits"
        elif "" in planner.reading.untraced and not planner.ran:
            why = planner.reading.untraced[""]
            yield (
                f"{argument}={bits}: the model's forward cannot be read ({why}), and {name} counts as its {which} "
                "layer by the order of registration; plan and prepare learn that of calls from example="
            )


def _inputs(planner):
    layers = [layer for layer in planner.reading.inputs if type(layer) is not nn.Embedding]
    count = len(planner.float_inputs)
    if 2 * count > len(layers) and count > 2:
        names = _some([planner.names[layer] for layer in planner.float_inputs])
        yield (f"{count} of {len(layers)} layers get inputs in float, since these come from no ReLU that is quantized "
               f"({names}): quantize_inputs=True quantizes what flows into layers")  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
