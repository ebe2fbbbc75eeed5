"""Packages that only exporting needs: imported when they are used, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

PIP = 'pip install ".[export]" in qbr\'s folder'
PACKAGES = "onnx onnxruntime onnxscript safetensors"


def need(name: str) -> ModuleType:
    """The module of that name.

    Raises:
        ImportError: naming the pip command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("onnx_ir", "onnxscript")
        message = f"this needs {package}, which cannot be imported ({error}): {PIP}, or pip install {PACKAGES}"
        raise ImportError(message, name=name) from error
