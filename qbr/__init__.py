"""qbr: quantization-aware training with learned step sizes (LSQ) and bin regularization (BR), fused."""

from qbr import export, functional, schedules
from qbr.alpha_control import AlphaControl
from qbr.calibrate import calibrate
from qbr.compat import ActivationHookManager, grad_scale, round_pass
from qbr.config import QATConfig
from qbr.convert import convert
from qbr.freezing import Freeze
from qbr.kernels import BackendUnavailable, backends, use_backend
from qbr.layer_summary import summary
from qbr.layers import (
    QuantizedClippedReLU,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiheadAttention,
)
from qbr.monitor import Monitor
from qbr.optimizer_groups import parameter_groups
from qbr.plan import plan
from qbr.prepare import prepare
from qbr.quantizers import LSQ_ActivationQuantizer, LSQ_WeightQuantizer, LSQQuantizer
from qbr.regularizer import BinRegularizer, bin_loss, set_regularizer
from qbr.spec import QuantSpec
from qbr.writers import CSVWriter, TensorBoardWriter

__version__ = "0.1.0"
__all__ = [
    "ActivationHookManager",
    "AlphaControl",
    "BackendUnavailable",
    "BinRegularizer",
    "CSVWriter",
    "Freeze",
    "LSQQuantizer",
    "LSQ_ActivationQuantizer",
    "LSQ_WeightQuantizer",
    "Monitor",
    "QATConfig",
    "QuantSpec",
    "QuantizedClippedReLU",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "TensorBoardWriter",
    "backends",
    "bin_loss",
    "calibrate",
    "convert",
    "export",
    "functional",
    "grad_scale",
    "parameter_groups",
    "plan",
    "prepare",
    "round_pass",
    "schedules",
    "set_regularizer",
    "summary",
    "use_backend",
]
