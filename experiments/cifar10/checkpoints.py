"""Checkpoints: written whole, read without running code, from this project, from its predecessor, or bare."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbr.export.files import check_archive
from qbr.export.predecessor import state_of

from .files import UserError, atomic_write

REMEDY = "name a checkpoint that cifar10_baseline.py or the predecessor wrote, or a state_dict saved with torch.save"


# What torch.load makes of a damaged file, and of a text that begins like a pickle.
_NOT_READ = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, ValueError, LookupError,
    TypeError, AttributeError, OSError,
)  # fmt: skip


def save(state: dict[str, Any], *paths: Path) -> None:
    """torch.save by atomic_write, to one path after another: each is always a whole checkpoint, the old or the new."""
    whole = io.BytesIO()  # of a full disk under its archive, torch would tell as of a broken archive
    torch.save(state, whole)
    for path in paths:
        with atomic_write(path) as file:
            file.write(whole.getbuffer())


def load(path: Path, flag: str) -> dict[str, Any]:
    """The dict that ``path`` holds, on the CPU.

    Loaded with weights_only=True: a checkpoint cannot run code; nor can it take more memory than its bytes account for.
    argparse.Namespace, which the predecessor's checkpoints carry, is let through: it only holds values.

    Raises:
        UserError: naming ``flag``, the file, what is wrong with it and the remedy.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: {'a folder' if path.is_dir() else 'no such file'}; {REMEDY}")
    try:
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_READ as error:
        # torch's own words tell how to load it unsafely: not what anyone should do with a file that is not theirs.
        why = type(error.__cause__ or error).__name__
        raise UserError(f"{flag} {path}: truncated, or not a checkpoint ({why}); {REMEDY}") from error
    if not isinstance(state, dict):
        raise UserError(f"{flag} {path}: holds a {type(state).__name__}, not a checkpoint; {REMEDY}")
    return state


def model_state(checkpoint: dict[str, Any], path: Path, flag: str) -> dict[str, Tensor]:
    """The model's state_dict, wherever in the checkpoint it is."""
    state = state_of(checkpoint)
    if state is None:
        raise UserError(f"{flag} {path}: holds no model_state_dict, state_dict, model or bare state_dict; {REMEDY}")
    return state


def load_float(model: nn.Module, model_name: str, path: Path) -> dict[str, Any]:
    """Load a float checkpoint, named by --pretrained-baseline, into ``model``, every entry of it.

    Returns:
        The options it was trained with, as far as the file tells.

    Raises:
        UserError: for a file that is no checkpoint, or one of another architecture.
    """
    flag = "--pretrained-baseline"
    checkpoint = load(path, flag)
    state = model_state(checkpoint, path, flag)
    if any(name.endswith("quantizer.alpha") for name in state):
        raise UserError(f"{flag} {path}: a quantized model; name the float baseline it was made from")
    expected = model.state_dict()
    differing = [
        f"{name} is {_shape(state.get(name))}, expected {_shape(expected.get(name))}"
        for name in {**expected, **state}
        if _shape(state.get(name)) != _shape(expected.get(name))
    ]
    args = checkpoint.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args or {}
    if differing:
        was = args.get("model")
        known = f"it was trained with --model {was}; " if was and was != model_name else ""
        raise UserError(
            f"{flag} {path}: not a {model_name} of this data's classes: {known}{len(differing)} of {len(expected)} "
            f"entries differ ({differing[0]}); set --model to what it holds"
        )
    model.load_state_dict(state)
    return args


def _shape(value: Tensor | None) -> str:
    return "absent" if value is None else str(tuple(value.shape))
