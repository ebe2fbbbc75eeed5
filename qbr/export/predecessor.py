"""Checkpoints that torch.save wrote, the predecessor's and qbr's own: weights are read, nothing in them is run."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbr.arguments import usable
from qbr.config import QATConfig
from qbr.export.files import CHECKPOINT, check_archive, check_output, described, kind_of
from qbr.export.packed import write_packed
from qbr.spec import QuantSpec
from qbr.whole import write_whole

_WEIGHT, _ACTIVATION = ".weight_quantizer.alpha", ".quantizer.alpha"
_LATER_CALL = re.compile(r"\.quantizer_\d+\.alpha$")
CONVERTED = (".safetensors", ".pth", ".pt")  # what convert_checkpoint writes: packed weights, or a checkpoint
_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


class _Values:
    """What an argparse.Namespace in a checkpoint is read as: its values, and no methods."""


@dataclass
class Checkpoint:
    """What a checkpoint holds of a model.

    Attributes:
        state: its state_dict, on the CPU, without the prefixes of DataParallel and torch.compile, with the versions in
            its metadata; loads into ``qbr.prepare(model, config)`` with strict=True.
        config: what it was quantized with; None for a float model.
        predecessor: whether the predecessor wrote it.
    """

    state: dict[str, Tensor]
    config: QATConfig | None
    predecessor: bool

    def spec(self, quantizer: str) -> QuantSpec | None:
        """The range of a quantizer of the predecessor's layers, which qbr's scripts use, too; None where names and
        config do not tell it."""
        name = f"{quantizer}.alpha"
        layer = self.config.layer(quantizer.rpartition(".")[0])
        by_order = self.config.first_layer is not None or self.config.last_layer is not None
        if name.endswith(_WEIGHT) and layer.weight_bits is not None and not by_order:
            channels, shape = self.state[name].numel(), self.state[quantizer.removesuffix("_quantizer")].shape
            axis = None if not layer.weight_per_channel else 0 if shape[0] == channels else 1
            if axis == 0 and len(shape) > 2 and shape[1] == channels:
                return None  # of a transposed convolution it would be 1
            return QuantSpec(layer.weight_bits, channel_axis=axis)
        if (name.endswith(_ACTIVATION) or _LATER_CALL.search(name)) and layer.act_bits is not None:
            return QuantSpec(layer.act_bits, signed=False)
        return None

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """{quantizer name: its range}.

        Raises:
            ValueError: where names and config do not tell a range.
        """
        specs = {name.removesuffix(".alpha"): self.spec(name.removesuffix(".alpha")) for name in steps(self.state)}
        unknown = [name for name, spec in specs.items() if spec is None]
        if unknown:
            raise ValueError(f"names and config do not tell the range of {unknown[0]}: load the checkpoint into its "
                             "model and use qbr.export.save_packed (on the command line --model)")  # fmt: skip
        return specs

    @property
    def weights(self) -> dict[str, tuple[str, Tensor]]:
        """{weight: (its quantizer's name, the float values)}."""
        names = [name.removesuffix(".alpha") for name in self.state if name.endswith(_WEIGHT)]
        return {name.removesuffix("_quantizer"): (name, self.state[name.removesuffix("_quantizer")]) for name in names}


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: QATConfig | None = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    clip: float | None = None,
) -> Checkpoint:
    """Read a checkpoint of the predecessor or of qbr's CIFAR-10 scripts, or a bare state_dict.

    torch.load with weights_only=True; an argparse.Namespace, which the predecessor's checkpoints carry, is read as
    values. Its bits and clip tell how the model was quantized.

    Args:
        path: a file of torch.save (PyTorch 1.6 or later); ``model_state_dict``, ``state_dict``, ``model`` or a bare
            one; beside it ``config``, QATConfig's fields or to_json().
        config: how the model was prepared, instead of what the checkpoint says.
        weight_bits, act_bits, clip: the same, one by one, instead of config's, too; 32 for float.

    Raises:
        FileNotFoundError. ValueError: for a file that is damaged or no checkpoint, whose tensors claim more than its
            bytes, that does not tell its bits (name them), or with a step that is not positive and finite; for one
            of the predecessor with 1-bit weights, whose three levels qbr's binary does not have.
    """
    path = Path(path)
    if kind_of(path) != CHECKPOINT:
        raise ValueError(f"{path} is {described(path)}, not a checkpoint of torch.save; nothing in it was run")
    size = check_archive(path)
    try:
        with torch.serialization.safe_globals([(_Values, "argparse.Namespace")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words tell how to load it unsafely: not what anyone should do with a file that is not theirs.
        raise ValueError(f"{path} holds more than tensors and plain values; it was not run. Save its state_dict alone "
                         "where it was made") from error  # fmt: skip
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is truncated or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    state = _state(content, path, size)
    args, predecessor = content.get("args"), isinstance(content.get("args"), _Values)
    args = vars(args) if predecessor else args if isinstance(args, dict) else {}
    if not steps(state):
        return Checkpoint(state, None, predecessor)
    # Half-precision checkpoints hold their steps so, too; a quantizer's are float32.
    state.update({name: state[name].float() for name in steps(state) if state[name].is_floating_point()})
    config = config or _recorded(content, path)
    if config is None:
        config = _config(args, state, weight_bits, act_bits, clip, path)
    else:
        given = {"weight_bits": weight_bits, "act_bits": act_bits, "clip": clip}
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
    if predecessor and config.weight_bits == 1:
        raise ValueError(f"{path}: 1-bit weights of the predecessor have the levels -1, 0 and 1, which qbr's 1 bit "
                         "(-1 and 1) does not; train it again with qbr")  # fmt: skip
    checkpoint = Checkpoint(state, config, predecessor)
    _check(checkpoint, path)
    return checkpoint


def convert_checkpoint(old: str | os.PathLike[str], new: str | os.PathLike[str], **options: Any) -> Path:
    """Write a checkpoint as one of qbr's: packed weights for ``.safetensors``, else a checkpoint to train on from.

    The latter is a file of torch.save with plain values only, ``model_state_dict`` and ``config`` (QATConfig's
    fields): torch.load reads it with its defaults.

    Args:
        old, options: as for ``read_checkpoint``.
        new: the suffix tells the kind: .safetensors, .pth or .pt.

    Raises:
        as ``read_checkpoint`` and ``save_packed``.
    """
    new = Path(new)
    check_output(new, Path(old), CONVERTED)
    checkpoint = read_checkpoint(old, **options)
    if checkpoint.config is None:
        raise ValueError(f"{old} is a float model (no step sizes in it): qbr.prepare takes it as it is")
    if new.suffix == ".safetensors":
        return write_packed(new, checkpoint.state, checkpoint.weights, checkpoint.specs, checkpoint.config)
    content = {"model_state_dict": checkpoint.state, "config": asdict(checkpoint.config)}
    return write_whole(new, lambda temporary: torch.save(content, temporary))


def state_of(content: dict) -> dict[str, Tensor] | None:
    """The state_dict in a checkpoint's content, without the prefixes of wrappers; None where there is none."""
    state = next((content[name] for name in ("model_state_dict", "state_dict", "model") if name in content), content)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        return None
    versions = _versions(state)
    while wrapper := next((each for each in _WRAPPERS if all(str(name).startswith(each) for name in state)), None):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
        versions = {f"{name}.".removeprefix(wrapper)[:-1]: value for name, value in versions.items()}
    state = OrderedDict(state)
    state._metadata = OrderedDict({name: {"version": version} for name, version in versions.items()})
    return state


def _versions(state: dict) -> dict[str, int]:
    """{module: version of its class} of a state_dict that has its metadata; some classes (torchvision's MNASNet) load
    nothing without."""
    metadata = getattr(state, "_metadata", None)
    found = metadata.items() if isinstance(metadata, dict) else ()
    versions = {name: each.get("version") for name, each in found if isinstance(each, dict)}
    return {str(name): version for name, version in versions.items() if isinstance(version, int)}


def _state(content: dict, path: Path, size: int) -> dict[str, Tensor]:
    state = state_of(content)
    if state is None:
        raise ValueError(f"{path} holds no model_state_dict, state_dict, model or bare state_dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{path}: {name!r} is no ordinary tensor")
        claimed = tensor.numel() * tensor.element_size()
        if claimed > size:
            raise ValueError(f"{path}: {name} claims {claimed} bytes, in a file of {size}")
        state[name] = tensor.detach()
    return state


def _recorded(content: dict, path: Path) -> QATConfig | None:
    values = content.get("config")
    if not isinstance(values, (dict, str)):
        return None
    try:
        return QATConfig.from_json(values) if isinstance(values, str) else QATConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config is none of QATConfig: {error}") from error


def _config(args: dict, state, weight_bits, act_bits, clip, path: Path) -> QATConfig:
    both = args.get("num_bits")
    sides = {}
    for side, given, word, quantized in (
        ("weight_bits", weight_bits, "num_bits_weight", any(name.endswith(_WEIGHT) for name in state)),
        ("act_bits", act_bits, "num_bits_act", any(name.endswith(_ACTIVATION) for name in state)),
    ):
        found = given if given is not None else both if both is not None else args.get(word)
        if quantized and found is None:
            flag = side.replace("_", "-")
            raise ValueError(f"{path} does not tell its bits: name them, {side}=... (on the command line --{flag})")
        sides[side] = found if quantized else None
    config = QATConfig(**sides, clip=clip if clip is not None else args.get("clip_value"))
    # What the model had as layers in float, and whether a ReLU that is called twice had a step for each call.
    names = [name.removesuffix(".weight") for name, value in state.items() if name.endswith(".weight")
             and value.dim() > 1 and f"{name}_quantizer.alpha" not in state]  # fmt: skip
    skip = tuple(names) if config.weight_bits is not None else ()
    return replace(config, skip=skip, step_per_call=any(_LATER_CALL.search(name) for name in state))


def steps(state: dict[str, Tensor]) -> list[str]:
    """The names of the step sizes in a state_dict."""
    return [name for name in state if re.search(r"(^|[._])quantizer(_\d+)?\.alpha$", name)]


def _check(checkpoint: Checkpoint, path: Path) -> None:
    state = checkpoint.state
    for name in steps(state):
        alpha, weight = state[name], name.removesuffix("_quantizer.alpha")
        if not alpha.is_floating_point() or alpha.dim() != 1:
            raise ValueError(f"{path}: {name} is {alpha.dtype} {tuple(alpha.shape)}, expected float32 (1,)")
        if not usable(alpha).all():
            raise ValueError(f"{path}: {name} is {alpha.tolist()}: expected positive, finite step sizes (the "
                             "predecessor lets a step die); delete it and calibrate, or train again")  # fmt: skip
        if name.endswith("weight_quantizer.alpha") and weight not in state:
            raise ValueError(f"{path}: {name} is there, and no {weight}")
