"""qbr: quantization-aware training with learned step sizes (LSQ) and bin regularization (BR), fused."""

from qbr import functional, schedules
from qbr.alpha_control import AlphaControl, parameter_groups
from qbr.compat import ActivationHookManager, grad_scale, round_pass
from qbr.freezing import Freeze
from qbr.kernels import BackendUnavailable, backends, use_backend
from qbr.layer_summary import summary
from qbr.layers import QuantizedClippedReLU, QuantizedConv2d, QuantizedLinear
from qbr.monitor import Monitor
from qbr.prepare import QATConfig, prepare
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
    "QuantizedConv2d",
    "QuantizedLinear",
    "TensorBoardWriter",
    "backends",
    "bin_loss",
    "functional",
    "grad_scale",
    "parameter_groups",
    "prepare",
    "round_pass",
    "schedules",
    "set_regularizer",
    "summary",
    "use_backend",
]
