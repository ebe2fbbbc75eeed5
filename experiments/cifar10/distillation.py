"""Knowledge distillation: the float network that quantization-aware training starts from is its teacher as well."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoints, processes
from .files import UserError


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's classes from the teacher's, mean over images: a scalar in the graph.

    Args:
        student, teacher: logits [B, classes], float32.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, at temperature 1, which Esser et al.,
    Learned Step Size Quantization, ICLR 2020, take for LSQ.
    """
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def teacher(model: nn.Module, model_name: str, path: Path, started: dict[str, Any] | None) -> nn.Module:
    """The float network at ``path``, in eval mode and without gradients, on the CPU; rank 0's alone has its weights.

    Args:
        model: a network of its architecture, not prepared; stays as it is.
        started: the checkpoint that a run goes on from, whose teacher this must have been; None for a new run.

    Raises:
        UserError: for a file that is no such network, or another one than the run began with.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    processes.on_main(_load, network, model_name, path, started)
    return network


def digest(network: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, as the processes' first one has them."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _load(network: nn.Module, model_name: str, path: Path, started: dict[str, Any] | None) -> None:
    checkpoints.load_float(network, model_name, path)
    if started is not None and started.get("teacher") != digest(network):
        raise UserError(
            f"--pretrained-baseline {path}: not the network that this run has been distilled from; name that one"
        )
