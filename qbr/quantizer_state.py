"""What a state_dict says of a quantizer: checked before anything is written, and told where it is of another kind.

The keys, alpha and init_state, are the predecessor's; the range of the codes stands beside them, in the state_dict's
metadata, which plain dicts and files of other formats do not keep.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from qbr.arguments import usable
from qbr.spec import QuantSpec

_AVERAGED = (
    "a state_dict's init_state lies between 0 and 1: an average that began before the step sizes were set, so that "
    "they are averages with placeholders: call qbr.calibrate(model, batches), or begin averages afterwards"
)


def check(quantizer: nn.Module, state_dict, prefix: str = "") -> None:
    """Raise ValueError unless the alpha and init_state that state_dict has for this quantizer can be used."""
    for name, mine in (("alpha", quantizer.alpha), ("init_state", quantizer.init_state)):
        key, value = prefix + name, state_dict.get(prefix + name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != mine.shape or not value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} is {got} in the state_dict: expected float32 {tuple(mine.shape)}; "
                             "load it into a model that was prepared with the same configuration")
        if value.is_meta:
            continue
        if name == "init_state" and not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{key}={value.tolist()} in the state_dict: expected 0 (unset) or 1; delete it and "
                             f"{prefix}alpha and load with strict=False to set the step from data again")
        if name == "alpha" and not bool(usable(value.to(mine.dtype)).all()):
            raise ValueError(f"{key}={value.tolist()} in the state_dict: expected positive, finite steps in float32; "
                             f"delete it and {prefix}init_state and load with strict=False to set it from data again")


def note_codes(spec: QuantSpec, destination, prefix: str) -> None:
    """Put bits and range of the codes into a state_dict's metadata."""
    if hasattr(destination, "_metadata"):
        destination._metadata.setdefault(prefix[:-1], {})["codes"] = [spec.bits, spec.qn, spec.qp]


def warn_of(spec: QuantSpec, init_state: Tensor, metadata: dict) -> None:
    """Warn of what was loaded and cannot be meant: step sizes of other codes, or averages with placeholders."""
    if bool(((init_state > 0) & (init_state < 1)).any()):
        warnings.warn(_AVERAGED, stacklevel=3)
    bits, qn, qp = metadata.get("codes", (spec.bits, spec.qn, spec.qp))
    if (bits, qn, qp) != (spec.bits, spec.qn, spec.qp):
        mine = f"{spec.bits} bits (codes {spec.qn}..{spec.qp})"
        warnings.warn(f"step sizes of {bits} bits (codes {qn}..{qp}) were loaded for {mine}: call "
                      "qbr.calibrate(model, batches) next", stacklevel=3)  # fmt: skip


def leave_meta(quantizer: nn.Module) -> None:
    """Start over with what was made on meta and got neither a state_dict nor a value since: transformers'
    from_pretrained() gives it memory that holds anything."""
    alpha, init_state = quantizer.alpha, quantizer.init_state
    ordinary = type(alpha) is nn.Parameter and type(init_state) is Tensor and not (alpha.is_meta or init_state.is_meta)
    if not ordinary or torch._C._are_functorch_transforms_active() or torch._guards.active_fake_mode() is not None:
        return  # still there, sharded, traced, or the caller's own tensors (functional_call's)
    quantizer._made_on_meta = False
    if not bool((init_state == 1).all() & usable(alpha).all()):
        quantizer.reset_parameters()
