"""prepare(model, QATConfig(...)): make a float model quantization-aware, in place."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from qbr.calls import count_calls
from qbr.config import QATConfig
from qbr.graph_modules import keep_in_copies
from qbr.layers import ATTENTION, WEIGHT_LAYERS, QuantizedClippedReLU, QuantizedTransformerDecoderLayer
from qbr.plan import Plan, PlannedReLU, plan
from qbr.quantizers import LSQ_ActivationQuantizer, LSQ_WeightQuantizer, LSQQuantizer, quantizers
from qbr.regularizer import watch
from qbr.running import Model, device_beside, device_of


def prepare(model: Model, config: QATConfig | None = None, *, example: Any = None) -> Model:
    """Turn model's layers and ReLUs into their quantized forms, in place; ``qbr.plan`` shows which.

    All are found before any is changed. A module keeps its identity: its class changes and a quantizer is added, so
    parameters, dtype, device, padding_mode, requires_grad, hooks, training mode, ties and everyone's references to it
    stay. Exact types only: a subclass may use its weight in its own way. ReLUs that are called as functions are found
    with torch.fx, module by module; such a module gets a traced forward, which calls ReLU modules instead. A ReLU
    module that its parent calls several times gets a step for each call. Tied weights share one quantizer.

    Then ``qbr.calibrate(model, batches)``, and the optimizer, from ``qbr.parameter_groups(model, ...)``: one that was
    built before has none of the step sizes, and its first step raises.

    Args:
        model: any module; may itself be such a layer.
        config: what to quantize; QATConfig() if not given.
        example: one batch, for what forwards that do not trace call, and in which order (see ``plan``).

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: as ``plan``; the model is unchanged then.

    Warns:
        UserWarning: each of ``plan(...).warnings``: of ReLUs that stay in float because they are called as functions,
            or work in place, in a forward that does not trace; of layers of types without a quantized form; of weights
            that another forward than their layer's reads, in float; of a first or last layer that is not known; where
            most inputs are in float.
    """
    planned = plan(model, config, example=example)
    config = QATConfig() if config is None else config
    for warning in planned.warnings:
        warnings.warn(warning, stacklevel=2)
    _quantize_weights(planned)
    for each in planned.inputs:
        _become_quantized(each.module)
        quantizer = LSQ_ActivationQuantizer(each.bits, signed=each.signed, device=device_of(each.module))
        each.module.add_module(each.attribute, quantizer.train(each.module.training))
    for each in planned.relus:
        _quantize_relu(each, device_beside(model, each.name))
    for forward in planned.forwards.values():
        forward.install()
    count_calls({each.module: list(each.places.items()) for each in planned.relus if each.steps > 1})
    _mend_transformers(model)
    for quantizer in quantizers(model).values():
        quantizer.collecting = config.collect_bin_loss
        quantizer.regularizer = config.regularizer_of(quantizer.kind)
    watch(model)
    model.qat_config = config  # what packed files keep, so that they load into a float model
    keep_in_copies(model)
    return model


def _quantize_weights(planned: Plan) -> None:
    made: dict[int, LSQQuantizer] = {}
    for each in planned.weights:
        weight, spec = getattr(each.module, each.parameter), each.spec
        key = id(weight)
        if key not in made:
            made[key] = LSQ_WeightQuantizer(
                spec.bits, channel_axis=spec.channel_axis, channels=spec.channels(weight.shape), device=weight.device
            ).train(each.module.training)
        _become_quantized(each.layer)
        each.module.add_module(f"{each.parameter}_quantizer", made[key])


def _become_quantized(module: nn.Module) -> None:
    """Change a layer's class, once."""
    module.__class__ = {**WEIGHT_LAYERS, **ATTENTION}.get(type(module), type(module))


def _quantize_relu(planned: PlannedReLU, device: torch.device) -> None:
    function = planned.function
    if function is None:
        module = planned.module
        module.__class__ = QuantizedClippedReLU
        for leftover in ("inplace", "min_val", "max_val"):
            module.__dict__.pop(leftover, None)
        module.set_up(planned.clip, planned.bits, device=device, calls=planned.steps)
    else:
        module = QuantizedClippedReLU(planned.clip, planned.bits, device=device)
        module.training = function.owner.training
        setattr(function.owner, planned.name.rpartition(".")[2], module)
    for child in module.children():
        child.train(module.training)


def _mend_transformers(model: nn.Module) -> None:
    """Keep torch.nn's fused inference paths, which read float weights, away from layers that have quantizers, and
    copies of a decoder layer from losing its activation's."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quantizers(module):
            module.activation_relu_or_gelu = 0  # what the fused path has to know of; forward calls ``activation``
        if isinstance(module, nn.TransformerEncoder) and quantizers(module):
            module.use_nested_tensor = False
        if type(module) is nn.TransformerDecoderLayer and isinstance(module.activation, QuantizedClippedReLU):
            module.__class__ = QuantizedTransformerDecoderLayer
