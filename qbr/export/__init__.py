"""From a trained network to a deployed one: ONNX files, packed weights, and readers for both.

Nothing here is needed for training; onnx, onnxruntime, onnxscript and safetensors are imported when they are used.
"""

from qbr.export.inspect import Inspection, inspect
from qbr.export.onnx import to_onnx
from qbr.export.packed import load_packed, save_packed
from qbr.export.predecessor import Checkpoint, convert_checkpoint, read_checkpoint
from qbr.export.runtime import Comparison, compare, session

__all__ = [
    "Checkpoint",
    "Comparison",
    "Inspection",
    "compare",
    "convert_checkpoint",
    "inspect",
    "load_packed",
    "read_checkpoint",
    "save_packed",
    "session",
    "to_onnx",
]
