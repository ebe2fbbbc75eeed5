"""A forward that torch.fx has read, in which ReLUs called as functions are modules: what takes forward's place."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import types
import warnings
import weakref
from collections.abc import Container
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from qbr.tracing import (
    Untraceable,
    asks_for_none,
    bound,
    first,
    functions,
    instructions,
    is_same,
    loaded,
    parameters,
    readers_after,
    relu_calls,
    trace,
    works_in_place,
)

_PLAIN = (bool, int, float, str, type(None))
_KEPT = "_qbr_forward"  # the attribute of an owner that has its traced forward, whoever wraps that
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class TracedForward:
    """A forward read by torch.fx in both modes, in which some ReLUs are modules; it takes forward's place on owner.

    An attribute that the original forward reads, other than parameters, buffers, modules and ``training``, has the
    value of the time of reading. Where one of these has changed since, a call warns of a flag or a string, of what
    became None and of a new member of a ModuleDict, and raises for a number, for None that became something and for
    other modules in a container (if it called only some of those in it, it warns); compiled code does neither. What a
    ReLU changed in place is read from its result.

    Args:
        owner: whose forward it is.
        given: the arguments that the graphs have.
        relus: the name that a ReLU module has in owner for each functional call, in order; None leaves one alone.
        in_place: ReLU modules that owner calls, which work in place and will no longer.
        values: {argument: what every call has to give it}; all others must keep their defaults.

    Raises:
        Untraceable: if a mode does not trace, the modes call different ReLUs, or forward does what a graph does not
            repeat (see trace).
    """

    def __init__(
        self,
        owner: nn.Module,
        given: tuple[str, ...],
        relus: list[str | None],
        in_place: Container[nn.Module] = (),
        values: dict[str, Any] | None = None,
    ) -> None:
        self._owner = weakref.ref(owner)  # not the owner, of which this is an attribute: it would live on as a cycle
        self.given = given
        self.values = values or {}
        self.defaults = parameters(owner)
        self._asks_for_none = asks_for_none(owner)
        self._are_first = tuple(self.defaults)[: len(given)] == given and not self.values
        graphs = {mode: trace(owner, given, mode, strict=True, values=values) for mode in (True, False)}
        self._tensors = {i for graph in graphs.values() for i, node in enumerate(graph.nodes) if "asked" in node.meta}
        if len({tuple(map(bound, relu_calls(graph))) for graph in graphs.values()}) > 1:
            raise Untraceable("it calls different ReLUs in training and in eval mode")
        self._lists = _lists(owner, graphs.values())
        self._names = [name for name in _attributes_read(owner) if name not in self._lists]
        self._code = {mode: _rewritten(owner, graph, relus, in_place) for mode, graph in graphs.items()}
        self._read = self._as_it_is()
        self._compile()

    @property
    def owner(self) -> nn.Module:
        """Whose forward it is."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError("the model of this forward is gone: keep the model, and not its forward alone")
        return owner

    @property
    def __self__(self) -> nn.Module:
        return self.owner

    @property
    def __func__(self):
        """As a bound method has: what wraps a forward (accelerate's autocast) then binds it to the owner's copies."""
        return _of_owner

    def install(self) -> None:
        """Take the place of owner's forward."""
        self.owner.forward = self.owner.__dict__[_KEPT] = self

    def _compile(self) -> None:
        self._functions = {}
        for mode, (source, names) in self._code.items():
            scope = {name: value.load() if isinstance(value, _Module) else value for name, value in names.items()}
            exec(compile(source, f"<forward of {type(self.owner).__name__}, read by qbr>", "exec"), scope)
            self._functions[mode] = scope["forward"]
        original = inspect.signature(type(self.owner).forward)
        self.__signature__ = original.replace(parameters=list(original.parameters.values())[1:])  # torch.export asks

    @property
    def __code__(self) -> types.CodeType:
        """What torch.export names the source by."""
        return self._functions[self.owner.training].__code__

    def __call__(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            self._refuse_changes()
        exact = not kwargs and len(args) == len(self.given) and self._are_first
        if exact and self._asks_for_none:
            for each in args:  # and no generator, which dynamo may meet alone
                exact = exact and each is not None
        if not exact:
            args = self._bind(args, kwargs)
        for i in self._tensors:
            if not isinstance(args[i], torch.Tensor):
                call = f"{type(self.owner).__name__}.forward({self.given[i]}=<{type(args[i]).__name__}>)"
                raise TypeError(f"{call}: this forward asks for its type, and was read by torch.fx for a tensor; use "
                                "nn.ReLU instead of the function there, or QATConfig(skip=...)")  # fmt: skip
        owner = self.owner
        return self._functions[owner.training](owner, *args)

    def _as_it_is(self) -> dict[str, object]:
        """What the graphs have of owner and do not read anew: plain values, ``...`` for any other but None, and lists'
        names."""
        owner = self.owner
        found = {name: _plain(owner, name) for name in self._names}
        for path in self._lists:
            with contextlib.suppress(AttributeError):  # of what is gone the graph's own call tells
                module = owner.get_submodule(path)
                if isinstance(module, _CONTAINERS):  # a wrapper (torch.compile's, checkpointing's) hands on the names
                    found[path] = list(module._modules)
        return found

    def _refuse_changes(self) -> None:
        now = self._as_it_is()
        if now == self._read:
            return
        for name in self._read.keys() & now.keys():
            then = self._read[name]
            if now[name] is then or now[name] == then or (now[name] != now[name] and then != then):
                continue
            was, is_now = ("an object" if value is ... else repr(value) for value in (then, now[name]))
            text = (
                f"{type(self.owner).__name__}.{name} was {was} when qbr.prepare read this forward, which calls a "
                f"ReLU as a function, and is {is_now} now: the forward goes on as it was read. Change it before "
                "prepare, or use nn.ReLU there, or QATConfig(skip=...)"
            )
            # A dict's new member changes nothing where the others are taken by name, as may be where not all are.
            grown = name in self._lists and set(then) < set(now[name]) and self._is_dict(name)
            flag = type(now[name]) is type(then) and type(then) in (bool, str)
            flag = flag or (then is ... and now[name] is None)  # which may be what this mode does not call
            if flag or grown or not self._lists.get(name, True):
                warnings.warn(text, stacklevel=3)
            else:
                raise RuntimeError(text)

    def _is_dict(self, path: str) -> bool:
        return isinstance(self.owner.get_submodule(path), nn.ModuleDict)

    def _bind(self, args, kwargs) -> list:
        found = {**dict(zip(self.defaults, args)), **kwargs}
        known = all(name in self.defaults for name in found)
        if len(args) > len(self.defaults) or len(found) < len(args) + len(kwargs) or not known:
            raise TypeError(f"{type(self.owner).__name__}.forward was called with arguments that it does not have")
        for name, default in self.defaults.items():
            value, read = found.get(name, default), self.values.get(name, default)
            if name in self.given:
                if name in found and not (value is None and self._asks_for_none):
                    continue
                read = "a value of its own"
            elif is_same(value, read):
                continue
            else:
                read = repr(read) if name in self.values else "its default"
            shown = "" if value is inspect.Parameter.empty else f"{name}=<{type(value).__name__}>"
            call = f"{type(self.owner).__name__}.forward({shown})"
            raise TypeError(f"{call}: this forward calls a ReLU as a function and was read by torch.fx with {read} for "
                            f"{name!r}; use nn.ReLU there, or name in prepare(example=...) what the model is called "
                            "with, or QATConfig(skip=...)")  # fmt: skip
        return [found[name] for name in self.given]

    def __getstate__(self):
        left = ("_functions", "__signature__", "_alone")
        kept = {name: value for name, value in self.__dict__.items() if name not in left}
        return {**kept, "_owner": self.owner}

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)
        owner = state["_owner"]
        self._owner = weakref.ref(owner)
        # An owner that is there already has been made for this copy of its forward alone, and lives for it.
        self._alone = owner if owner.__dict__.get(_KEPT) is self else None
        self._compile()


def _of_owner(owner: nn.Module, *args, **kwargs):
    """owner's own traced forward."""
    return owner.__dict__[_KEPT](*args, **kwargs)


def _plain(owner: nn.Module, name: str):
    """The attribute, if it has a plain value or is None; else, for a tensor, a module or any other object, ``...``."""
    for kept in (owner._modules, owner._parameters, owner._buffers, owner.__dict__):
        if kept.get(name) is not None:
            return kept[name] if type(kept[name]) in _PLAIN else ...
    value = inspect.getattr_static(type(owner), name, None)  # what the class has for all
    return value if type(value) in _PLAIN else ... if isinstance(value, property) else None


def _attributes_read(owner: nn.Module) -> list[str]:
    """The names that owner's forward, and the methods and properties that it names, read of owner; but ``training``."""
    kind, found = type(owner), set()
    methods = {getattr(f, "__code__", None) for base in kind.__mro__ for f in map(_unwrapped, vars(base).values())}
    named = [function.__code__ for function, *_ in functions(owner)]
    # A method only where self's is meant, and not what has the name of a tensor's.
    waiting, seen = named[:1] + [code for code in named[1:] if code not in methods], set()
    while waiting:
        code = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        me = code.co_varnames[0] if code in methods and code.co_argcount else "self"
        for name in _read_of(code, me) - found:
            found.add(name)
            attribute = getattr(kind, name, None)
            attribute = attribute.fget if isinstance(attribute, property) else _unwrapped(attribute)
            if inspect.isfunction(attribute):
                waiting.append(attribute.__code__)
    return sorted(found - {"training"})


def _unwrapped(function):
    return inspect.unwrap(function) if inspect.isfunction(function) else function


def _read_of(code: types.CodeType, me: str) -> set[str]:
    """The names that code, and what stands inside it, reads of the variable ``me``, by getattr too."""
    inner = [_read_of(each, me) for each in code.co_consts if isinstance(each, types.CodeType)]
    found = set().union(*inner)
    steps = instructions(code)
    for before, each in zip(steps, steps[1:]):
        if loaded(before) == me:
            asked = each.opname == "LOAD_CONST" and isinstance(each.argval, str) and each.argval.isidentifier()
            if each.opname in ("LOAD_ATTR", "LOAD_METHOD") or asked:
                found.add(each.argval)
    return found


def _lists(owner: nn.Module, graphs) -> dict[str, bool]:
    """{path of a container in owner of which its graphs call every member by itself, or several: whether all}."""
    used: dict[str, set[str]] = {}
    for node in (node for graph in graphs for node in graph.nodes if node.op == "call_module"):
        names = node.target.split(".")
        for end in range(1, len(names)):
            used.setdefault(".".join(names[:end]), set()).add(names[end])
    containers = {path: owner.get_submodule(path) for path in used}
    return {
        path: used[path] == {*module._modules}
        for path, module in containers.items()
        if isinstance(module, _CONTAINERS) and (used[path] == {*module._modules} or len(used[path]) > 1)
    }


class _Module:
    """A Python module, which copies and pickles cannot hold."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self):
        return importlib.import_module(self.name)


def _rewritten(owner: nn.Module, graph: Graph, relus: list[str | None], in_place: Container[nn.Module]) -> tuple:
    """(source of a function ``forward(self, ...)``, the names it uses) of the rewritten graph."""
    rewrite(owner, graph, relus, in_place)
    code = graph.python_code("self")
    found = code.globals.items()
    return code.src, {name: _Module(value.__name__) if inspect.ismodule(value) else value for name, value in found}


def rewrite(owner: nn.Module, graph: Graph, relus: list[str | None], in_place: Container[nn.Module]) -> None:
    """Change a graph of owner: modules for its ReLU calls, and readers of the result where these work in place.

    Args, Raises: as TracedForward's.
    """
    if any(node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in graph.nodes):
        raise Untraceable("its forward makes a tensor of its own, which would never change again")
    calls = relu_calls(graph)
    if len(calls) != len(relus):
        raise Untraceable("it is called in several ways, which call different ReLUs")
    names = dict(zip(calls, relus))
    for node in list(graph.nodes):
        name = names.get(node)
        changes_input = node.op == "call_module" and owner.get_submodule(node.target) in in_place
        if name is None and not changes_input:
            continue
        x, result = first(node), node
        readers = readers_after(node) if changes_input or works_in_place(node) else []
        if name is not None:
            with graph.inserting_after(node):
                result = graph.call_module(name, (x,))
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        for user in readers:  # they have read what was written to x
            user.replace_input_with(x, result)
