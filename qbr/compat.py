"""The predecessor's names that are not also ours: grad_scale, round_pass and ActivationHookManager."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qbr.layers import QuantizedClippedReLU, check_version, clipped_relu, version_of
from qbr.spec import check_flag, is_number


class _GradScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()  # as (x - x * scale).detach() + x * scale is: a tensor that may be written to

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class _RoundPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def grad_scale(x: Tensor, scale: float) -> Tensor:
    """x itself, to the last bit; its gradient times scale (LSQ paper, section 2.2)."""
    _check_tensor(x)
    if not isinstance(scale, Tensor) and not is_number(scale):
        raise TypeError(f"scale={scale!r}: expected a number")
    return _GradScale.apply(x, scale)


def round_pass(x: Tensor) -> Tensor:
    """x rounded half to even; the gradient passes unchanged (straight-through estimator)."""
    _check_tensor(x)
    return _RoundPass.apply(x)


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x={x!r}: expected a tensor")


class ActivationHookManager:
    """Keeps what the activation modules of a model put out in a training forward, every call of every module.

    The calls of a module that runs more than once are ``name``, ``name@2``, ... Kept until the next forward of model,
    ``clear_activations()`` or ``set_training_mode(False)``; nothing is kept in eval mode. Where modules run outside of
    a forward of model (``model.forward(x)``, a part of it), each one's last call is kept. Copies of model are not
    watched.

    Args:
        model: its forward starts a new set.
        target_modules: module types to watch, by default ReLU and ReLU6; QuantizedClippedReLU always is.
        layer_names: a list of names to watch instead.
        exclude_first_last: leave out the first and the last match, of layer_names too, where more than two match.
        detach_activations: give tensors outside of the graph.

    Attributes:
        activations: {name: output}; hooks: the handles; registered_layers: the names that are watched.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: Sequence[type] | None = None,
        layer_names: Sequence[str] | None = None,
        exclude_first_last: bool = True,
        detach_activations: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r}: expected an nn.Module")
        self.model = model
        check_flag(exclude_first_last, "exclude_first_last")
        check_flag(detach_activations, "detach_activations")
        if isinstance(layer_names, str):
            raise TypeError(f"layer_names={layer_names!r}: expected a list of names")
        if isinstance(target_modules, type):
            raise TypeError(f"target_modules={target_modules.__name__}: expected a list of module types")
        if not all(isinstance(each, type) for each in target_modules or ()):
            raise TypeError(f"target_modules={target_modules!r}: expected a list of module types, such as nn.ReLU")
        self.target_modules: tuple[type, ...] = (nn.ReLU, nn.ReLU6) if target_modules is None else tuple(target_modules)
        self.layer_names: list[str] | None = None if layer_names is None else list(layer_names)
        self.exclude_first_last = exclude_first_last
        self.detach_activations = detach_activations
        self.training: bool = True
        self.activations: dict[str, Tensor] = {}
        self._inputs: dict[str, tuple[Tensor, int, float | None]] = {}
        self._calls: dict[str, int] = {}
        matches = self._matches()
        if exclude_first_last and len(matches) > 2:
            matches = matches[1:-1]
        self.registered_layers: list[str] = [name for name, _ in matches]
        self._inside = False  # whether a forward of model is running
        self.hooks: list[RemovableHandle] = [model.register_forward_pre_hook(self._around(True))]
        self.hooks.append(model.register_forward_hook(self._around(False), always_call=True))
        for name, module in matches:
            self.hooks.append(module.register_forward_hook(self._keep(name, module), with_kwargs=True))

    def _matches(self) -> list[tuple[str, nn.Module]]:
        modules = dict(self.model.named_modules())
        if self.layer_names is None:
            types = (*self.target_modules, QuantizedClippedReLU)
            return [(name, module) for name, module in modules.items() if isinstance(module, types)]
        unknown = [name for name in self.layer_names if name not in modules]
        if unknown:
            message = f"layer_names={unknown}: no such modules in the model; see model.named_modules()"
            warnings.warn(message, stacklevel=3)
        return [(name, module) for name, module in modules.items() if name in self.layer_names]

    # Hooks are functions of the manager's and not its methods, which a deepcopy of model would copy it with; the copy's
    # modules call them, too.
    def _around(self, starts: bool):
        def hook(module, *_):
            if module is self.model:
                self._inside = starts
                if starts:
                    self.clear_activations()

        return hook

    def _keep(self, name: str, watched: nn.Module):
        def hook(module, inputs, kwargs, output):
            if module is not watched or not (self.training and module.training):
                return
            self._calls[name] = call = self._calls.get(name, 0) + 1 if self._inside else 1
            key = name if call == 1 else f"{name}@{call}"
            self.activations[key] = output.detach() if self.detach_activations else output
            if isinstance(module, QuantizedClippedReLU):
                x = inputs[0] if inputs else kwargs["input"]
                x = x.detach() if self.detach_activations else x
                self._inputs[key] = x, version_of(x), module.clip_value

        return hook

    def get_activations(self) -> dict[str, Tensor]:
        """{name: what the module put out}; of a QuantizedClippedReLU, after quantization."""
        return dict(self.activations)

    def get_pre_quant_activations(self) -> dict[str, Tensor]:
        """{name: after ReLU and clip, before quantization} of every QuantizedClippedReLU call, in the graph.

        Raises:
            RuntimeError: where the input of such a call has been written to since.
        """
        for name, (x, version, _) in self._inputs.items():
            check_version(x, version, f"pre-quantization activation of {name!r}")
        return {name: clipped_relu(x, clip) for name, (x, _, clip) in self._inputs.items()}

    def clear_activations(self) -> None:
        """Drop what was kept; calls count from 1 again."""
        self.activations.clear()
        self._inputs.clear()
        self._calls.clear()

    def remove_hooks(self) -> None:
        """Watch no longer; what was kept stays."""
        for handle in self.hooks:
            handle.remove()
        self.hooks.clear()

    def get_registered_layers(self) -> list[str]:
        """The names that are watched, a copy of ``registered_layers``."""
        return list(self.registered_layers)

    def set_training_mode(self, mode: bool) -> None:
        """Whether forwards are kept; False drops what is there."""
        self.training = mode
        if not mode:
            self.clear_activations()

    def __enter__(self) -> ActivationHookManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove_hooks()
        self.clear_activations()
