"""What a model calls, and what flows into its layers: the graphs of qbr/tracing.py, followed from the root."""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qbr import tracing
from qbr.calls import joined
from qbr.layers import ATTENTION, RELUS, WEIGHT_LAYERS
from qbr.tracing import Call, Untraceable
from qbr.value_states import (
    NON_NEGATIVE,
    QUANTIZED,
    SIGNED,
    UNKNOWN,
    VIEWING_ATTRIBUTES,
    VIEWS,
    after_call,
    after_module,
    asks_for_kind,
    join,
    writes,
)

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class FunctionalReLU:
    """A ReLU that owner's forward calls as a function.

    ``given`` are the arguments of that forward that its graph has; None where the ReLU is the ``activation`` of a
    torch.nn transformer layer, which is an attribute.
    """

    owner: nn.Module
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
        given: {owner: the ways in which its forward is called}.
        in_place: {owner: the ReLU modules it calls, to be quantized, whose input in place is read afterwards}.
        spoiled: {name of a ReLU to be quantized: whose forward reads what the ReLU, in another forward, changed in
            place before}.
        weights: {id of a parameter: the name of a module whose forward reads its values}.
        untraced: {module name: why its forward could not be read, in one of the ways in which it is called}.
        hidden: the same of those that seem to call a ReLU as a function, be it in one mode.
    """

    calls: dict[nn.Module, dict[nn.Module, int]] = field(default_factory=dict)
    uneven: set[nn.Module] = field(default_factory=set)
    functional: dict[str, FunctionalReLU] = field(default_factory=dict)
    inputs: dict[nn.Module, int] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)
    memory: dict[nn.Module, int] = field(default_factory=dict)
    given: dict[nn.Module, list[Call]] = field(default_factory=dict)
    in_place: dict[nn.Module, set[nn.Module]] = field(default_factory=dict)
    spoiled: dict[str, str] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)


def read(
    model: nn.Module,
    quantized: Callable[[str], bool],
    example: tuple[tuple, dict[str, Any]] | None = None,
) -> Reading:
    """Follow the forwards of model and all it calls, without data.

    Args:
        quantized: whether the ReLU of a name, a module's or a function's, will put out quantized values.
        example: (args, kwargs) that the model is called with: which arguments are tensors, and what the others are.
    """
    reader = _Reader(model, quantized, example)
    reader.visit("", model, None, {})
    reader.reached = False
    for name, module in model.named_modules():  # what nothing calls, as far as is known
        if module not in reader.visited:
            reader.visit(name, module, None, {})
    return reader.reading


class _Reader:
    def __init__(self, model: nn.Module, quantized, example) -> None:
        self.model = model
        self.quantized = quantized
        self.example = example
        self.names = {module: name for name, module in model.named_modules()}
        self.reading = Reading()
        self.visited: set[nn.Module] = set()
        self.reached = True  # whether the forwards that are followed are called by the model's
        self.followed: dict[tuple, int] = {}  # what a forward puts out, by what it is called with
        self.changed: dict[nn.Module, dict[str, set[str]]] = {}  # {owner: {argument: ReLUs that change it in place}}
        self.written: dict[nn.Module, dict[str, int]] = {}  # {owner: {argument: the state of what is written to it}}
        self.return_none: set[nn.Module] = set()
        self.look_at_numbers: set[nn.Module] = set()  # owners that are read with the numbers they are given

    def visit(self, name: str, module: nn.Module, node: Node | None, states: dict[Node, int]) -> int:
        """What a call of module puts out; what is called inside is noted. Without node: nothing is known of it."""
        self.visited.add(module)
        kind = type(module)
        inputs = [join(value, states) for value in (*node.args, *node.kwargs.values())] if node is not None else []
        first = UNKNOWN if node is None else inputs[0] if inputs else SIGNED
        self._reach(module)
        if kind in WEIGHT_LAYERS or kind in ATTENTION:
            if kind in ATTENTION:
                self._attention(module, node, states)
            else:
                self._enter(module, first)
            return SIGNED
        if kind in RELUS and self.quantized(name):
            return QUANTIZED
        after = after_module(module, first)
        if after is not None:
            return after
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
        self._enter(module, join(query, states))
        memory = [join(each, states) for each, before in ((key, query), (value, key)) if each is not before]
        if memory:
            self.reading.memory[module] = max(*memory, self.reading.memory.get(module, QUANTIZED))

    def _children(self, module: nn.Module) -> None:
        for child in module.children():
            if child not in self.visited:
                self.visit(self.names[child], child, None, {})

    def _follow(self, name: str, owner: nn.Module, node: Node | None, outside: dict[Node, int]) -> int:
        try:
            call = self._call(owner, node)
            unknown = UNKNOWN if node is None and not (self.reached and name == "") else SIGNED
            loose = call.with_numbers_left_open()
            if loose.values.keys() != call.values.keys() and owner not in self.look_at_numbers:
                try:
                    return self._follow_call(name, owner, loose, unknown, outside)
                except Untraceable:
                    self.look_at_numbers.add(owner)
            return self._follow_call(name, owner, call, unknown, outside)
        except Untraceable as error:
            if _has_forward(owner):
                self.reading.untraced[name] = str(error)
                self._hide(name, owner, error)
            self._children(owner)
            return UNKNOWN

    def _follow_call(self, name: str, owner: nn.Module, call: Call, unknown: int, outside: dict[Node, int]) -> int:
        inputs = {each: unknown if x is None else join(x, outside) for each, x in call.tensors.items()}
        key = owner, tuple(inputs.items()), call.containers, repr(call.values)
        if key not in self.followed:
            self.followed[key] = self._both(name, owner, inputs, call)
        ways = self.reading.given.setdefault(owner, [])
        if not any(way.tensors.keys() == call.tensors.keys() and repr(way.values) == repr(call.values) for way in ways):
            ways.append(call)
        return self.followed[key]

    def _call(self, owner: nn.Module, node: Node | None) -> Call:
        if node is not None:
            return tracing.call(owner, node.args, node.kwargs)
        if owner is self.model and self.example is not None:
            args, kwargs = self.example
            with contextlib.suppress(TypeError):  # of an example that the forward does not take, running it tells
                inspect.signature(owner.forward).bind(*args, **kwargs)
                return tracing.call(owner, args, kwargs)
        return tracing.unknown_call(owner)

    def _hide(self, name: str, owner: nn.Module, error: Untraceable) -> None:
        if tracing.may_call_relu(owner):
            self.reading.hidden[name] = str(error)

    def _both(self, name: str, owner: nn.Module, inputs: dict[str, int], call: Call) -> int:
        """What owner puts out, in training and in eval mode."""
        given = {"containers": call.containers, "values": call.values}
        graph = tracing.trace(owner, tuple(inputs), **given)
        asked = {node.target for node in graph.nodes if "asked" in node.meta}
        if any(type(x) in (int, float) and name in asked for name, x in call.tensors.items()):
            raise Untraceable("it asks for the type of a number")
        if any(_holds_none(call.tensors[each]) for each in call.containers) and tracing.asks_for_none(owner):
            raise Untraceable("it asks for None, and is called with a list or dict that has one")
        state, calls = self._walk(name, owner, graph, inputs)
        try:
            graph_of_eval = tracing.trace(owner, tuple(inputs), training=False, **given)
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
                if called in self.return_none and each.users and tracing.asks_for_none(owner):
                    raise Untraceable(f"{each.target} returns None, and it asks for None")
                for argument, state in self.written.get(called, {}).items():
                    self._write(owner, self._call(called, each).tensors.get(argument), state, states)
                self._in_place(owner, called, each)
            elif each in relus:
                full = joined(name, f"functional_relu_{relus.index(each) + 1}")
                states[each] = self._function(full, FunctionalReLU(owner, tracing.bound(each), tuple(inputs)))
                if tracing.works_in_place(each) and states[each] == QUANTIZED:
                    self._changes(owner, each, tracing.first(each), {full}, helped=True)
            elif each.op in ("call_function", "call_method"):
                states[each] = after_call(each, states)
                if writes(each):
                    self._write(owner, tracing.first(each), states[each], states)
            elif each.op == "get_attr" and not each.target.startswith("_tensor_constant"):
                if not all(map(asks_for_kind, each.users)):
                    self.reading.weights.setdefault(id(operator.attrgetter(each.target)(owner)), name)
            elif each.op == "output":
                if each.args[0] is None:
                    self.return_none.add(owner)
                return join(each.args[0], states), calls

    def _write(self, owner: nn.Module, x, state: int, states: dict[Node, int]) -> None:
        """Something in that state is written to x."""
        views = self._views(owner, x) if isinstance(x, Node) else []
        states.update(dict.fromkeys(views, state))
        if views and views[0].op == "placeholder":
            mine = self.written.setdefault(owner, {})
            mine[views[0].target] = max(state, mine.get(views[0].target, state))

    def _in_place(self, owner: nn.Module, called: nn.Module, node: Node) -> None:
        """Note what ReLUs that are to be quantized change in place for those who read it after this call."""
        name = self.names[called]
        if type(called) in RELUS and called.inplace and self.quantized(name):
            if tracing.readers_after(node):
                self.reading.in_place.setdefault(owner, set()).add(called)
            self._changes(owner, node, tracing.first(node), {name}, helped=True)
        for argument, relus in self.changed.get(called, {}).items():
            self._changes(owner, node, self._call(called, node).tensors.get(argument), relus, helped=False)

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
        return kind in VIEWS

    def _function(self, name: str, relu: FunctionalReLU) -> int:
        self.reading.functional.setdefault(name, relu)
        return QUANTIZED if self.quantized(name) else NON_NEGATIVE

    def _transformer_layer(self, name: str, layer: nn.Module) -> int:
        """torch.nn's own layers do not trace; what they call, once each, is known."""
        state = SIGNED
        activation = layer.activation
        if isinstance(activation, nn.Module):
            self.visited.add(activation)
            if type(activation) in RELUS:
                state = QUANTIZED if self.quantized(self.names[activation]) else NON_NEGATIVE
        elif activation in tracing.RELU_FUNCTIONS:
            relu = FunctionalReLU(layer, tracing.RELU_FUNCTIONS[activation], None)
            state = self._function(joined(name, "activation"), relu)
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


def _holds_none(value) -> bool:
    """Whether a list, tuple or dict has None in it."""
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_none, value.values() if isinstance(value, dict) else value))
    return value is None


def _has_forward(owner: nn.Module) -> bool:
    """Whether owner has a forward of its own (a ModuleList has none)."""
    return type(owner).forward is not nn.Module.forward


def _is_torchs(kind: type) -> bool:
    """Whether a class is torch.nn's, so that its forward is not looked into; a Sequential is."""
    return kind.__module__.startswith(("torch.nn.", "torch.ao.")) and kind is not nn.Sequential


def _source(call: Node) -> tuple:
    """What makes the input of a call, dropout aside."""
    while True:
        call = tracing.first(call)
        if not isinstance(call, Node) or call.target is not F.dropout:
            return getattr(call, "op", None), getattr(call, "target", call)
