"""torchvision for tests: ``load()``, which also imports a build for CUDA beside a torch that has none."""

from __future__ import annotations

import sys

import pytest
import torch

_libraries = []


def load() -> None:
    """Import torchvision, or skip the test. Its compiled operators need its own CUDA; its models need no operators, and
    importing it only that they are declared."""
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _libraries.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _libraries[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
