"""What the forward of a module calls, read with torch.fx: one graph for each module, with its children as leaves.

Reading module by module needs no model that traces as a whole: where one forward does not trace, only what it calls
itself is unknown. The graphs also rewrite a forward so that a ReLU called as a function becomes a module.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from qbr.grouping import are_saves_hooked
from qbr.side_effects import Undone
from qbr.stand_ins import StandIn, told_apart

RELU_FUNCTIONS = {F.relu: None, F.relu_: None, torch.relu: None, torch.relu_: None, F.relu6: 6.0}  # and their bounds
_RELU_METHODS = ("relu", "relu_")
_RELU_NAMES = {"relu", "relu_", "relu6"}
_VALUES = (
    bool, int, float, complex, str, bytes, range, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format, enum.Enum,
)  # fmt: skip
_MODE_QUESTIONS = {"is_grad_enabled", "is_inference_mode_enabled", "is_inference", "is_autocast_enabled"}


class Untraceable(Exception):
    """Why a forward could not be read."""


class Call(NamedTuple):
    """What a forward is called with.

    Attributes:
        tensors: {argument: what its caller's graph, or the example, has for it}; None where all that is known is that
            it has no default.
        values: {argument: a plain value, or lists and the like of such, if it is not the default}.
    """

    tensors: dict[str, Any]
    values: dict[str, Any]

    def with_numbers_left_open(self) -> Call:
        """The same, with stand-ins for the numbers among the values, which may be others in the next call."""
        numbers = {name: value for name, value in self.values.items() if type(value) in (int, float)}
        rest = {name: value for name, value in self.values.items() if name not in numbers}
        return Call({**self.tensors, **numbers}, rest)

    @property
    def containers(self) -> tuple[str, ...]:
        """The arguments that are lists, tuples or dicts and not tensors."""
        return tuple(each for each, value in self.tensors.items() if isinstance(value, (list, tuple, dict)))


def _modes() -> dict[str, object]:
    autocast = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    return {"gradients or autocast": (torch.is_grad_enabled(), autocast),
            "what is saved for backward": are_saves_hooked()}  # fmt: skip


class _Tracer(torch.fx.Tracer):
    """Every child is a leaf; arguments that are neither named nor among the values keep their default.

    With ``strict``, buffers are stand-ins as well, and what a graph would not keep is refused: a call under another
    gradient or autocast mode or under hooks for saved tensors (checkpointing, offloading), a question for the type of
    what it has computed, a result of a class of its own that fx takes for a dict.
    """

    def __init__(self, names: tuple[str, ...], strict: bool, containers: Container[str], values: dict) -> None:
        super().__init__()
        self.names = names
        self.values = values
        self.containers = containers
        self.strict = strict
        self.modes = _modes() if strict else None
        self.proxy_buffer_attributes = strict

    def proxy(self, node: Node) -> StandIn:
        return StandIn(node, self)

    def kind_of(self, node: Node) -> type:
        """What a value is to isinstance: a tensor, but for containers; which are the arguments asked for, is noted."""
        if node.op == "placeholder":
            node.meta["asked"] = True
            return object if node.target in self.containers else torch.Tensor
        if self.strict:
            raise Untraceable("it asks for the type of what it has computed, which a graph does not")
        return torch.Tensor

    def create_arg(self, value):
        if self.strict and issubclass(type(value), dict) and type(value) not in (dict, OrderedDict):
            raise Untraceable(f"it makes a {type(value).__name__}, of which a graph would make a dict")
        return super().create_arg(value)

    def create_node(self, *args, **kwargs):
        for what, value in (self.modes or {}).items():
            if _modes()[what] != value:
                raise Untraceable(f"it switches {what}, which a graph does not keep")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module, name) -> bool:
        return True

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in self.names}

        def on_stand_ins(root, *given):
            return root_fn(root, **dict(zip(self.names, given)), **self.values)

        return on_stand_ins, [self.root, *proxies.values()]


def parameters(owner: nn.Module) -> dict[str, object]:
    """{argument of forward: its default, or inspect.Parameter.empty}, in order.

    Raises:
        Untraceable: for *args, **kwargs, positional-only arguments and a forward that was replaced on the instance.
    """
    if "forward" in owner.__dict__:
        raise Untraceable("its forward was replaced on the instance")
    try:
        found = list(inspect.signature(type(owner).forward).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise Untraceable("its forward is no Python function") from error
    odd = [p.name for p in found if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if odd:
        raise Untraceable(f"forward takes {', '.join(odd)}")
    return {p.name: p.default for p in found}


def call(owner: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Call:
    """owner's forward, called with nodes of a graph, or with tensors, and with other values."""
    defaults = parameters(owner)
    given = {**dict(zip(defaults, args)), **kwargs}
    tensors = {name: given[name] for name in defaults if _is_computed(given.get(name))}
    values = {name: _thawed(value) for name, value in given.items() if name not in tensors}
    return Call(tensors, {name: value for name, value in values.items() if not is_same(value, defaults.get(name))})


def unknown_call(owner: nn.Module) -> Call:
    """owner's forward, called with tensors for all that has no default."""
    return Call({name: None for name, default in parameters(owner).items() if default is inspect.Parameter.empty}, {})


def is_same(value, default) -> bool:
    """Whether value is the default, or equal to it: a plain value, or a list, tuple or dict of such."""
    if value is default:
        return True
    if isinstance(value, tuple) and isinstance(default, tuple):  # a torch.Size, too
        return len(value) == len(default) and all(map(is_same, value, default))
    if type(value) is not type(default):
        return False
    if isinstance(value, list):
        return len(value) == len(default) and all(map(is_same, value, default))
    if isinstance(value, dict):
        return value.keys() == default.keys() and all(is_same(value[key], default[key]) for key in value)
    if isinstance(value, slice):
        return is_same((value.start, value.stop, value.step), (default.start, default.stop, default.step))
    return isinstance(value, _VALUES) and value == default


def _is_computed(value) -> bool:
    """Whether a value is a node or a tensor, or has one in it; any object but plain values counts as such."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_computed, value))
    if isinstance(value, Mapping):
        return any(map(_is_computed, value.values()))
    if isinstance(value, slice):
        return any(map(_is_computed, (value.start, value.stop, value.step)))
    return not isinstance(value, _VALUES)


def _thawed(value):
    """Lists and dicts as a caller makes them, of torch.fx's that refuse changes."""
    if isinstance(value, list):
        return [_thawed(each) for each in value]
    if isinstance(value, dict):
        return {key: _thawed(each) for key, each in value.items()}
    return tuple(map(_thawed, value)) if type(value) is tuple else value


def trace(
    owner: nn.Module,
    names: tuple[str, ...],
    training: bool = True,
    strict: bool = False,
    containers: Container[str] = (),
    values: dict[str, Any] | None = None,
) -> Graph:
    """The graph of owner's forward in training or in eval mode, with all its children as leaves.

    Nothing is left behind: attributes, tensors, owner's mode and the random number generators are as before.

    Args:
        names: the arguments that are given as tensors.
        strict: refuse what a graph cannot repeat; in the graph, buffers are read anew, as parameters always are.
        containers: those of them that are lists, tuples or dicts of tensors.
        values: what other arguments are given; all others keep their defaults.

    Raises:
        Untraceable: with torch.fx's reason; or that random numbers were drawn, so that it may call other things the
            next time; or that forward changes one of the values.
    """
    named = list(functions(owner))
    if strict and any(names & _MODE_QUESTIONS for _, _, names in named):
        raise Untraceable("it asks whether gradients or autocast are on, which a graph does not")
    if any(_asks_for_class(function.__code__, values, {*owner._modules}) for function, values, _ in named):
        raise Untraceable("it asks for a value's class by match, __class__ or singledispatch: a stand-in has its own")
    undone, mine = Undone(owner), _thawed(values or {})
    try:
        with told_apart([function for function, *_ in named]), undone, torch.enable_grad():
            owner.__dict__["training"] = training
            tracer = _Tracer(names, strict, containers, mine)
            try:
                graph = tracer.trace(owner)
            finally:
                tracer.root = None  # the tracer is part of cycles, in which owner would live on
    except Untraceable:
        raise
    except Exception as error:  # the forward is anyone's code, run on stand-ins for tensors: it may raise anything
        reason = str(error).strip().split("\n")[0]
        raise Untraceable(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from error
    if undone.drew:
        raise Untraceable("it draws random numbers, and may do something else the next time")
    if repr(mine) != repr(values or {}):
        raise Untraceable("it changes a list or dict that it is called with")
    if strict and undone.unrepeatable:
        raise Untraceable(f"{undone.unrepeatable[0]}, which a graph does not repeat")
    return graph


def relu_calls(graph: Graph) -> list[Node]:
    """The calls of a ReLU as a function or method, in order."""
    return [
        node
        for node in graph.nodes
        if (node.op == "call_function" and node.target in RELU_FUNCTIONS)
        or (node.op == "call_method" and node.target in _RELU_METHODS)
    ]


def readers_after(call: Node) -> list[Node]:
    """Who else reads the input of a call after it."""
    x = first(call)
    return [user for user in x.users if call < user] if isinstance(x, Node) else []


def first(call: Node):
    """The first argument of a call."""
    return next(iter((*call.args, *call.kwargs.values())), None)


def bound(node: Node) -> float | None:
    """The upper bound of a functional ReLU: 6 for relu6."""
    return RELU_FUNCTIONS.get(node.target)


def may_call_relu(owner: nn.Module) -> bool:
    """Whether a forward that cannot be read, or one of the methods and functions that it names (torch's functions
    excepted), names a ReLU that is no child of owner; sources are not needed."""
    return any(
        names & _RELU_NAMES or any(inspect.isroutine(value) and value in RELU_FUNCTIONS for value in values)
        for _, values, names in functions(owner)
    )


def functions(owner: nn.Module) -> Iterator[tuple[types.FunctionType, list, set[str]]]:
    """Of owner's forward, and of the functions and methods that it names, torch's excepted: (itself, the values of
    the names in it that are known, functions in lists and dicts among them, the names but for owner's children)."""
    kind, seen = type(owner), set()
    waiting = [kind.forward]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = _names(code, {*owner._modules}, next(iter(code.co_varnames), None))
        values = [owner.__dict__.get(name, function.__globals__.get(name)) for name in names]
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # what is not there yet
                values.append(cell.cell_contents)
        values += [each for value in values if type(value) in (list, tuple) for each in value]
        values += [each for value in values if type(value) is dict for each in value.values()]
        values = [_inner(value) for value in values]
        of_class = [vars(base).get(name) for name in names for base in kind.__mro__ if base not in nn.Module.__mro__]
        modules = [value for value in values if inspect.ismodule(value) and not value.__name__.startswith("torch")]
        yield function, [*values, *of_class, *(vars(m).get(name) for m in modules for name in names)], names
        methods = [getattr(method, "__func__", method) for method in of_class]
        waiting += [method for method in methods if inspect.isfunction(method)]
        waiting += [
            value
            for value in values
            if inspect.isfunction(value) and not str(value.__module__).startswith("torch.")
        ]


def instructions(code: types.CodeType) -> list[dis.Instruction]:
    """What code does, without what only prepares a call in some versions of Python."""
    return [each for each in dis.get_instructions(code) if each.opname not in ("PUSH_NULL", "CACHE", "PRECALL")]


def asks_for_none(owner: nn.Module) -> bool:
    """Whether owner's forward, or what it names, asks whether anything is None: of a stand-in the answer is no."""
    codes = [function.__code__ for function, *_ in functions(owner)]
    for code in codes:  # codes grows
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    asking = (each.opname for code in codes for each in dis.get_instructions(code))
    return any(name == "IS_OP" or (name.startswith("POP_JUMP") and name.endswith("NONE")) for name in asking)


def _asks_for_class(code: types.CodeType, values: list, children: set[str]) -> bool:
    """Whether a function matches values with classes, reads ``x.__class__`` of what is not self or one of its children,
    or calls what functools.singledispatch has made."""
    if any(map(_dispatches, values)):
        return True
    path: list[str | None] = []  # the variable, and its attributes that are read one after another
    for each in instructions(code):
        if each.opname == "MATCH_CLASS":
            return True
        if each.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            path = [loaded(each)]
        elif each.argval == "__class__" and (path[:1] != ["self"] or not children.issuperset(path[1:2])):
            return True
        else:
            path.append(each.argval)
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return any(_asks_for_class(each, [], children) for each in inner)


def loaded(instruction: dis.Instruction) -> str | None:
    """The local variable that an instruction leaves on top of the stack; of the two that one of Python 3.13 names, the
    last."""
    name = instruction.opname
    if not name.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")) and "_LOAD_FAST" not in name:
        return None
    return instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval


def _dispatches(value) -> bool:
    """Whether a value is what functools.singledispatch or singledispatchmethod has made."""
    if isinstance(value, functools.singledispatchmethod):
        return True
    return isinstance(value, types.FunctionType) and isinstance(vars(value).get("registry"), types.MappingProxyType)


def _inner(value):
    """What a partial function calls."""
    while isinstance(value, functools.partial):
        value = value.func
    return value


def _names(code: types.CodeType, children: set[str], me: str | None) -> set[str]:
    """The names in a function's code and in that of the functions inside it, but for children read of ``me``."""
    inner = [_names(each, children, me) for each in code.co_consts if isinstance(each, types.CodeType)]
    found, before = set().union(*inner), None
    for each in instructions(code):
        mine = before is not None and me is not None and loaded(before) == me
        if each.opcode in dis.hasname and not (mine and each.argval in children):
            found.add(each.argval)
        before = each
    return found


def works_in_place(call: Node) -> bool:
    """Whether a functional ReLU writes its result to its input."""
    if call.target in (F.relu_, torch.relu_, "relu_"):
        return True
    return call.target in (F.relu, F.relu6) and bool([*call.args[1:2], call.kwargs.get("inplace", False)][0])
