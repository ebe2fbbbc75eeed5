"""What a run of a model on data shows where its forwards cannot be read: calls of ReLUs, the order of layers, and
forwards that read the weights of other modules' layers."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qbr import grouping, running
from qbr.calls import joined
from qbr.discovery import Reading, is_layer
from qbr.layers import RELUS
from qbr.value_states import KIND, VIEWING_ATTRIBUTES


class _Stack:
    """The modules whose forwards are running, the innermost last, inside a context."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.running: list[nn.Module] = []
        self._hooks: list = []

    def __enter__(self) -> _Stack:
        for module in self.model.modules():
            self._hooks.append(module.register_forward_pre_hook(self.entered))
            self._hooks.append(module.register_forward_hook(self.left, always_call=True))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def entered(self, module: nn.Module, *_) -> None:
        self.running.append(module)

    def left(self, module: nn.Module, *_) -> None:
        if self.running and self.running[-1] is module:  # else another hook raised before it entered
            self.running.pop()


class _Calls(_Stack):
    """Counts the calls of ReLUs in the forwards of ``untraced``, and notes the order in which layers run."""

    def __init__(self, model: nn.Module, reading: Reading) -> None:
        super().__init__(model)
        self.reading = reading
        self.untraced = {model.get_submodule(name) for name in reading.untraced}
        self.counts: list[dict[nn.Module, int]] = []
        self.order: list[nn.Module] = []

    def entered(self, module: nn.Module, *_) -> None:
        if type(module) in RELUS and self.running and self.running[-1] in self.untraced:
            self.counts[-1][module] = self.counts[-1].get(module, 0) + 1
        if is_layer(module) and module not in self.order:
            self.order.append(module)
        super().entered(module)
        self.counts.append({})

    def left(self, *_) -> None:
        module = self.running.pop()
        for relu, count in self.counts.pop().items():
            callers = self.reading.calls.setdefault(relu, {})
            callers[module] = max(count, callers.get(module, 0))


def add_calls(model: nn.Module, example, reading: Reading) -> None:
    """Add to reading.calls what forwards that do not trace call, from one run on example; the order of layers too, if
    the model's own forward is among them."""
    with _Calls(model, reading) as seen, running.undisturbed(model):
        running.run(model, example)
    if "" in reading.untraced:
        reading.order = seen.order


class WeightReads(TorchFunctionMode):
    """A context in which forwards run that may read the weights of layers that are not theirs.

    torch's own modules and qbr's are not looked at: they know what they read.

    Args:
        weights: (module, name of its parameter).

    Attributes:
        found: {full name of a parameter: name of the module whose forward has read it}.
    """

    def __init__(self, model: nn.Module, weights: list[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.weights = {id(module._parameters.get(name)): (module, name) for module, name in weights}
        self.found: dict[str, str] = {}
        self._stack = _Stack(model)

    def __enter__(self) -> WeightReads:
        self._stack.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._stack.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._stack.running and not _asks_for_kind(function):
            reader = self._stack.running[-1]
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, Tensor) and id(tensor) in self.weights:
                        self._see(reader, *self.weights[id(tensor)])
        return function(*args, **kwargs)

    def _see(self, reader: nn.Module, owner: nn.Module, parameter: str) -> None:
        torchs = type(reader).__module__.startswith(("torch.nn.", "qbr."))
        if reader is not owner and not torchs and not _is_in(grouping.quantize_together):
            self.found[joined(self.names[owner], parameter)] = self.names[reader]


def _is_in(function) -> bool:
    """Whether a function is running: a hook that runs before the hooks here know whose forward has begun."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def _asks_for_kind(function) -> bool:
    """Whether a function, or the getter of an attribute, asks a tensor for its dtype, shape and the like only."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(function.__self__, "__name__", "") not in VIEWING_ATTRIBUTES
    return name in KIND


def read_elsewhere(found: dict[str, str]) -> str:
    """The warning of weights that forwards of other modules read: {parameter: reader}."""
    readers = sorted({name or "the model" for name in found.values()})
    return (
        f"{list(found)}: read by forwards that are not their layers' (of {readers}), which get the float values "
        "until convert(): call the layers there, or leave these weights in float with QATConfig(skip=...)"
    )
