"""What a model calls, and what flows into its layers: the graphs of qbr/tracing.py, followed from the root."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qbr import tracing
from qbr.calls import joined
from qbr.layers import ATTENTION, RELUS, WEIGHT_LAYERS
from qbr.stand_ins import IN_PLACE
from qbr.tracing import Untraceable

# What is known of a tensor's values, from good to bad; a join is the maximum.
QUANTIZED, NON_NEGATIVE, SIGNED, UNKNOWN = 0, 1, 2, 3

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Modules and calls whose results are values of their (first) input, moved: what was on a grid stays there.
_MOVING_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip


def _both(*names: str) -> set:
    """Tensor's methods of these names, and torch's functions."""
    return {*names, *(getattr(torch, name) for name in names if hasattr(torch, name))}


# Those that may put out their input's own memory: what is then changed in place changes for the reader of either.
_VIEWS = {
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
_AVERAGING_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_NON_NEGATIVE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus, nn.ReLU, nn.ReLU6)
_MOVING = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.cat,
    torch.stack, torch.chunk, torch.split, operator.getitem, F.dropout, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.pixel_shuffle, torch.max_pool2d, "flatten", "view", "reshape",
    "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "chunk", "split", "expand", "clone", "detach", "to",
}  # fmt: skip
_AVERAGING = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    torch.mean, "mean",
}  # fmt: skip
_WRITING = {*IN_PLACE, operator.setitem}
KIND = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "size", "dim", "numel", "is_floating_point"}
VIEWING_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag", "data"}
_ADDING = {operator.add, torch.add, "add", "add_", *(made for made, of in IN_PLACE.items() if of is operator.iadd)}


@dataclass
class FunctionalReLU:
    """A ReLU that owner's forward calls as a function: the ``index``-th there, from 0.

    ``given`` are the arguments of that forward that its graph has; None where the ReLU is the ``activation`` of a
    torch.nn transformer layer, which is an attribute.
    """

    owner: nn.Module
    name: str
    index: int
    clip: float | None
    given: tuple[str, ...] | None


@dataclass
class Reading:
    """What was found.

    Attributes:
        calls: {ReLU module: {owner: how many calls the owner's forward makes}}; 1 where they are not the same in
            training and in eval mode, which makes the ReLU ``uneven`` if one of the modes has several.
        functional: the ReLUs called as functions, by name (owner.functional_relu_1 ...; owner.activation).
        inputs: {layer with a weight: the worst of what flows into it, over all calls}, in the order of first calls.
        order: those of them, and of subclasses of them, that the model's forward reaches, as far as is known.
        memory: {attention layer: the worst of the keys that are not the query and the values that are not the key}.
        given: {owner: the ways in which its forward is called: (arguments that its graph has, others given)}.
        in_place: {owner: the ReLU modules it calls, to be quantized, whose input in place is read afterwards}.
        spoiled: {name of a ReLU to be quantized: whose forward reads what the ReLU, in another forward, changed in
            place before}.
        weights: {id of a parameter: the name of a module whose forward reads its values}.
        untraced: {module name: why its forward could not be read}.
        hidden: the same of those that seem to call a ReLU as a function, be it in one mode.
    """

    calls: dict[nn.Module, dict[nn.Module, int]] = field(default_factory=dict)
    uneven: set[nn.Module] = field(default_factory=set)
    functional: dict[str, FunctionalReLU] = field(default_factory=dict)
    inputs: dict[nn.Module, int] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)
    memory: dict[nn.Module, int] = field(default_factory=dict)
    given: dict[nn.Module, set[tuple]] = field(default_factory=dict)
    in_place: dict[nn.Module, set[nn.Module]] = field(default_factory=dict)
    spoiled: dict[str, str] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)


def read(model: nn.Module, quantized: Callable[[str, nn.Module | None], bool]) -> Reading:
    """Follow the forwards of model and all it calls, without data.

    Args:
        quantized: whether the ReLU of a name (and module; None: a function) will put out quantized values.
    """
    reader = _Reader(model, quantized)
    reader.visit("", model, None, {})
    reader.reached = False
    for name, module in model.named_modules():  # what nothing calls, as far as is known
        if module not in reader.visited:
            reader.visit(name, module, None, {})
    return reader.reading


class _Reader:
    def __init__(self, model: nn.Module, quantized) -> None:
        self.quantized = quantized
        self.names = {module: name for name, module in model.named_modules()}
        self.reading = Reading()
        self.visited: set[nn.Module] = set()
        self.reached = True  # whether the forwards that are followed are called by the model's
        self.followed: dict[tuple, int] = {}  # what a forward puts out, by what it is called with
        self.changed: dict[nn.Module, dict[str, set[str]]] = {}  # {owner: {argument: ReLUs that change it in place}}

    def visit(self, name: str, module: nn.Module, node: Node | None, states: dict[Node, int]) -> int:
        """What a call of module puts out; what is called inside is noted. Without node: nothing is known of it."""
        self.visited.add(module)
        kind = type(module)
        inputs = [_state(value, states) for value in (*node.args, *node.kwargs.values())] if node is not None else []
        first = UNKNOWN if node is None else inputs[0] if inputs else SIGNED
        self._reach(module)
        if kind in WEIGHT_LAYERS or kind in ATTENTION:
            if kind in ATTENTION:
                self._attention(module, node, states)
            else:
                self._enter(module, first)
            return SIGNED
        if kind in RELUS and self.quantized(name, module):
            return QUANTIZED
        if kind in _MOVING_MODULES:
            return first
        if kind in _AVERAGING_MODULES:
            return max(first, NON_NEGATIVE)
        if kind in _NON_NEGATIVE_MODULES:
            return NON_NEGATIVE
        if kind in _TRANSFORMER_LAYERS:
            return self._transformer_layer(name, module)
        if _is_torchs(kind):
            self._children(module)
            return SIGNED
        return self._follow(name, module, node, states)

    def _reach(self, module: nn.Module) -> None:
        if self.reached and is_layer(module) and module not in self.reading.order:
            self.reading.order.append(module)

    def _enter(self, layer: nn.Module, state: int) -> None:
        self.reading.inputs[layer] = max(state, self.reading.inputs.get(layer, state))

    def _attention(self, module: nn.Module, node: Node | None, states: dict[Node, int]) -> None:
        self.visited.update(module.children())
        if node is None:
            self._enter(module, UNKNOWN)
            return
        given = {**dict(zip(("query", "key", "value"), node.args)), **node.kwargs}
        query, key, value = (given.get(each) for each in ("query", "key", "value"))
        self._enter(module, _state(query, states))
        memory = [_state(each, states) for each, before in ((key, query), (value, key)) if each is not before]
        if memory:
            self.reading.memory[module] = max(*memory, self.reading.memory.get(module, QUANTIZED))

    def _children(self, module: nn.Module) -> None:
        for child in module.children():
            if child not in self.visited:
                self.visit(self.names[child], child, None, {})

    def _follow(self, name: str, owner: nn.Module, node: Node | None, outside: dict[Node, int]) -> int:
        try:
            given = tracing.arguments(owner, node)
            unknown = UNKNOWN if node is None and not (self.reached and name == "") else SIGNED
            inputs = {each: unknown if value is None else _state(value, outside) for each, value in given.items()}
            containers = tuple(each for each, value in given.items() if isinstance(value, (list, tuple, dict)))
            key = owner, tuple(inputs.items()), containers
            if key not in self.followed:
                self.followed[key] = self._both(name, owner, inputs, containers)
            ways = self.reading.given.setdefault(owner, set())
            ways.add((tuple(given), tuple(tracing.others(owner, node))))
            return self.followed[key]
        except Untraceable as error:
            if _has_forward(owner):
                self.reading.untraced[name] = str(error)
                self._hide(name, owner, error)
            self._children(owner)
            return UNKNOWN

    def _hide(self, name: str, owner: nn.Module, error: Untraceable) -> None:
        if tracing.may_call_relu(owner):
            self.reading.hidden[name] = str(error)

    def _both(self, name: str, owner: nn.Module, inputs: dict[str, int], containers: tuple[str, ...]) -> int:
        """What owner puts out, in training and in eval mode."""
        graph = tracing.trace(owner, tuple(inputs), containers=containers)
        state, calls = self._walk(name, owner, graph, inputs)
        try:
            graph_of_eval = tracing.trace(owner, tuple(inputs), training=False, containers=containers)
        except Untraceable as error:
            calls_of_eval = None
            self._hide(name, owner, error)
        else:
            calls_of_eval = calls
            if str(graph_of_eval) != str(graph):
                state_of_eval, calls_of_eval = self._walk(name, owner, graph_of_eval, inputs)
                state = max(state, state_of_eval)
        for relu in {**calls, **(calls_of_eval or {})}:
            if not self.reached and relu in self.reading.calls:
                continue  # a reached forward calls what it finds in this module by itself
            in_training, in_eval = calls.get(relu, []), (calls_of_eval or {}).get(relu, [])
            even = calls_of_eval is not None and in_training == in_eval
            if not even and max(len(in_training), len(in_eval)) > 1:
                self.reading.uneven.add(relu)
            self.reading.calls.setdefault(relu, {})[owner] = len(in_training) if even else 1
        return state

    def _walk(self, name: str, owner: nn.Module, graph: Graph, inputs: dict[str, int]) -> tuple[int, dict]:
        """(what graph puts out, {ReLU module: where the input of each of its calls comes from})."""
        relus = tracing.relu_calls(graph)
        calls: dict[nn.Module, list] = {}
        states: dict[Node, int] = {}
        for each in graph.nodes:
            if each.op == "placeholder":
                states[each] = inputs[each.target]
            elif each.op == "call_module":
                called = owner.get_submodule(each.target)
                if type(called) in RELUS:
                    calls.setdefault(called, []).append(_source(each))
                states[each] = self.visit(self.names[called], called, each, states)
                self._in_place(owner, called, each)
            elif each in relus:
                index = relus.index(each)
                states[each] = self._function(name, owner, tuple(inputs), index, tracing.bound(each))
                if tracing.works_in_place(each) and states[each] == QUANTIZED:
                    self._changes(owner, each, tracing.first(each), {_functional(name, index)}, helped=True)
            elif each.op in ("call_function", "call_method"):
                states[each] = _called(each, states)
                if _writes(each):
                    states.update(dict.fromkeys(self._views(owner, tracing.first(each)), states[each]))
            elif each.op == "get_attr" and not each.target.startswith("_tensor_constant"):
                if not all(map(_asks_for_its_kind, each.users)):
                    self.reading.weights.setdefault(id(operator.attrgetter(each.target)(owner)), name)
            elif each.op == "output":
                return _state(each.args[0], states), calls

    def _in_place(self, owner: nn.Module, called: nn.Module, node: Node) -> None:
        """Note what ReLUs that are to be quantized change in place for those who read it after this call."""
        name = self.names[called]
        if type(called) in RELUS and called.inplace and self.quantized(name, called):
            if tracing.readers_after(node):
                self.reading.in_place.setdefault(owner, set()).add(called)
            self._changes(owner, node, tracing.first(node), {name}, helped=True)
        for argument, relus in self.changed.get(called, {}).items():
            self._changes(owner, node, tracing.arguments(called, node).get(argument), relus, helped=False)

    def _changes(self, owner: nn.Module, node: Node, x, relus: set[str], helped: bool) -> None:
        """relus change x in place at node; whoever reads x itself afterwards may be helped by a rewritten forward."""
        views = self._views(owner, x) if isinstance(x, Node) else []
        if any(node < user for view in views if view < node and not (helped and view is x) for user in view.users):
            self.reading.spoiled.update(dict.fromkeys(relus, self.names[owner]))
        if views and views[0].op == "placeholder":
            self.changed.setdefault(owner, {}).setdefault(views[0].target, set()).update(relus)

    def _views(self, owner: nn.Module, x: Node) -> list[Node]:
        """What may be in the same memory as x, its origin first."""
        while self._is_view(owner, x):
            x = tracing.first(x)
        found = [x]
        for node in found:  # found grows
            found += [user for user in node.users if self._is_view(owner, user) and tracing.first(user) is node]
        return found

    def _is_view(self, owner: nn.Module, node: Node) -> bool:
        if not isinstance(tracing.first(node), Node):
            return False
        if node.target is getattr:
            return node.args[1] in VIEWING_ATTRIBUTES
        kind = type(owner.get_submodule(node.target)) if node.op == "call_module" else node.target
        return kind in _VIEWS

    def _function(self, name: str, owner: nn.Module, given: tuple[str, ...], index: int, clip: float | None) -> int:
        full = _functional(name, index)
        self.reading.functional.setdefault(full, FunctionalReLU(owner, name, index, clip, given))
        return QUANTIZED if self.quantized(full, None) else NON_NEGATIVE

    def _transformer_layer(self, name: str, layer: nn.Module) -> int:
        """torch.nn's own layers do not trace; what they call, once each, is known."""
        state = SIGNED
        activation = layer.activation
        if isinstance(activation, nn.Module):
            self.visited.add(activation)
            if type(activation) in RELUS:
                full = self.names[activation]
                state = QUANTIZED if self.quantized(full, activation) else NON_NEGATIVE
        elif activation in tracing.RELU_FUNCTIONS:
            full = joined(name, "activation")
            clip = tracing.RELU_FUNCTIONS[activation]
            self.reading.functional[full] = FunctionalReLU(layer, name, 0, clip, None)
            state = QUANTIZED if self.quantized(full, None) else NON_NEGATIVE
        for child in layer.children():
            self.visited.add(child)
            self._reach(child)
            if type(child) in WEIGHT_LAYERS:
                self._enter(child, state if child is layer.linear2 else SIGNED)
            elif type(child) in ATTENTION:
                self._enter(child, SIGNED)
                self.visited.update(child.children())
                if child is getattr(layer, "multihead_attn", None):
                    self.reading.memory[child] = SIGNED
        return SIGNED


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with a weight, or of a subclass of one, which stays in float."""
    part_of_attention = isinstance(module, NonDynamicallyQuantizableLinear)
    return isinstance(module, (*WEIGHT_LAYERS, *ATTENTION)) and not part_of_attention


def _has_forward(owner: nn.Module) -> bool:
    """Whether owner has a forward of its own (a ModuleList has none)."""
    return type(owner).forward is not nn.Module.forward


def _is_torchs(kind: type) -> bool:
    """Whether a class is torch.nn's, so that its forward is not looked into; a Sequential is."""
    return kind.__module__.startswith(("torch.nn.", "torch.ao.")) and kind is not nn.Sequential


def _functional(name: str, index: int) -> str:
    return joined(name, f"functional_relu_{index + 1}")


def _asks_for_its_kind(user: Node) -> bool:
    """Whether a node asks a tensor for its dtype, shape and the like only, and not for its values."""
    return (user.target is getattr and user.args[1] in KIND) or (user.op == "call_method" and user.target in KIND)


def _writes(node: Node) -> bool:
    """Whether a function or method changes its first argument in place."""
    if not isinstance(tracing.first(node), Node):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or node.target in _WRITING


def _source(call: Node) -> tuple:
    """What makes the input of a call, dropout aside."""
    while True:
        call = next(iter((*call.args, *call.kwargs.values())), None)
        if not isinstance(call, Node) or call.target is not F.dropout:
            return getattr(call, "op", None), getattr(call, "target", call)


def _state(value, states: dict[Node, int]) -> int:
    """The worst of the nodes in an argument; what is not a tensor of the graph counts as SIGNED."""
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return max((states.get(node, SIGNED) for node in found), default=SIGNED)


def _called(node: Node, states: dict[Node, int]) -> int:
    operands = [*node.args, *node.kwargs.values()]
    if node.target in _MOVING:
        return _state(operands[0], states)
    if node.target in _AVERAGING:
        return max(_state(operands[0], states), NON_NEGATIVE)
    if node.target in _ADDING and all(isinstance(v, Node) or (type(v) in (int, float) and v >= 0) for v in operands):
        return max(_state([value for value in operands if isinstance(value, Node)], states), NON_NEGATIVE)
    return SIGNED
