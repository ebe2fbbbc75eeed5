"""prepare(model, QATConfig(...)): make a float model quantization-aware, in place."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from qbr.layers import RELUS, WEIGHT_LAYERS, QuantizedClippedReLU
from qbr.quantizers import LSQ_WeightQuantizer, check_bits, check_clip, quantizers
from qbr.regularizer import watch


@dataclass(frozen=True)
class QATConfig:
    """What prepare() quantizes, and how.

    Attributes:
        weight_bits: of Conv2d and Linear weights, 1 to 8 (1: binary); 32 or None leaves them in float.
        act_bits: of the output of ReLU and ReLU6 modules, 1 to 8; 32 or None leaves them in float.
        clip: upper bound of every ReLU, positive; None for none. A ReLU6 without it keeps its 6.
        skip: glob patterns of module names to leave in float; a pattern that matches a container (``"layer1"``) covers
            what is in it.
        weight_per_channel: a step for each output channel instead of one for the tensor.
        collect_bin_loss: whether training forwards collect the bin loss for ``qbr.bin_loss(model)`` from the start; an
            AlphaControl that is attached decides by epoch instead.

    Raises:
        TypeError, ValueError: naming the field.
    """

    weight_bits: int | None = 2
    act_bits: int | None = 2
    clip: float | None = None
    skip: tuple[str, ...] = ()
    weight_per_channel: bool = False
    collect_bin_loss: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits"):
            if getattr(self, name) == 32:
                object.__setattr__(self, name, None)
            if getattr(self, name) is not None:
                check_bits(getattr(self, name), name)
        check_clip(self.clip, "clip")
        if isinstance(self.skip, str):
            raise TypeError(f"skip={self.skip!r}: expected a list or tuple of patterns")
        object.__setattr__(self, "skip", tuple(self.skip))


def prepare(model: nn.Module, config: QATConfig | None = None) -> nn.Module:
    """Turn model's Conv2d, Linear, ReLU and ReLU6 modules into their quantized forms, in place.

    All are found before any is changed. A module keeps its identity: its class changes and a quantizer is added, so
    parameters, dtype, device, padding_mode, requires_grad, hooks, training mode, ties and everyone's references to it
    stay. Exact types only: a subclass may use its weight in its own way. ReLUs that are called as functions are not
    seen. Build the optimizer afterwards, from ``qbr.parameter_groups(model, ...)``.

    Args:
        model: any module; may itself be such a layer.
        config: what to quantize; QATConfig() if not given.

    Returns:
        The same model.

    Raises:
        ValueError: if the model was prepared before, has nothing to quantize on a side that config quantizes, or if a
            pattern in config.skip matches nothing. The model is unchanged then.
    """
    config = QATConfig() if config is None else config
    if not isinstance(config, QATConfig):
        raise TypeError(f"config={config!r}: expected a qbr.QATConfig")
    before = next(iter(quantizers(model)), None)
    if before is not None:
        raise ValueError(f"model has quantizers already ({before!r}): prepare it once, from its float form")
    weights, relus = _find(model, config)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    for module in weights:
        _quantize_weight(module, config)
    for module in relus:
        _quantize_relu(module, config, device)
    for quantizer in quantizers(model).values():
        quantizer.collecting = config.collect_bin_loss
    watch(model)
    return model


def _find(model: nn.Module, config: QATConfig) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules whose weight, and those whose output is to be quantized; checks that config makes sense for model."""
    if config.weight_bits is None and config.act_bits is None:
        raise ValueError("weight_bits=None and act_bits=None (32 means the same): nothing to quantize; name one")
    unmatched = set(config.skip)
    found: tuple[list[nn.Module], list[nn.Module]] = ([], [])
    skipped = [0, 0]
    for name, module in model.named_modules():
        side = 0 if type(module) in WEIGHT_LAYERS else 1 if type(module) in RELUS else None
        if side is None:
            continue
        matching = {pattern for pattern in config.skip if _matches(name, pattern)}
        unmatched -= matching
        if matching:
            skipped[side] += 1
        elif (config.weight_bits, config.act_bits)[side] is not None:
            found[side].append(module)
    if unmatched:
        raise ValueError(f"skip={sorted(unmatched)}: no Conv2d, Linear, ReLU or ReLU6 has such a name")
    for side, argument, what in ((0, "weight_bits", "Conv2d or Linear"), (1, "act_bits", "ReLU or ReLU6 module")):
        bits = getattr(config, argument)
        if bits is not None and not found[side]:
            reason = f"all {skipped[side]} are skipped" if skipped[side] else "the model has none"
            message = f"{argument}={bits}: no {what} to quantize ({reason}); pass {argument}=None to leave it out"
            raise ValueError(message)
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether pattern matches a module's name or that of a container around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _quantize_weight(module: nn.Module, config: QATConfig) -> None:
    weight = module.weight
    axis, channels = (0, weight.shape[0]) if config.weight_per_channel else (None, 1)
    module.__class__ = WEIGHT_LAYERS[type(module)]
    module.weight_quantizer = LSQ_WeightQuantizer(
        config.weight_bits, channel_axis=axis, channels=channels, device=weight.device
    ).train(module.training)


def _quantize_relu(module: nn.Module, config: QATConfig, device: torch.device) -> None:
    clip = 6.0 if config.clip is None and type(module) is nn.ReLU6 else config.clip
    module.__class__ = QuantizedClippedReLU
    for leftover in ("inplace", "min_val", "max_val"):
        module.__dict__.pop(leftover, None)
    module.set_up(clip, config.act_bits, device=device)
    module.quantizer.train(module.training)
