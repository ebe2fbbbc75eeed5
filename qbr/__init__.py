"""qbr: quantization-aware training with learned step sizes (LSQ) and bin regularization (BR), fused."""

from qbr import export, functional
from qbr.alpha_control import AlphaControl, parameter_groups
from qbr.calibrate import calibrate
from qbr.compat import ActivationHookManager, grad_scale, round_pass
from qbr.config import QATConfig
from qbr.convert import convert
from qbr.kernels import BackendUnavailable, backends, use_backend
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
from qbr.plan import plan
from qbr.prepare import prepare
from qbr.quantizers import LSQ_ActivationQuantizer, LSQ_WeightQuantizer, LSQQuantizer
from qbr.regularizer import BinRegularizer, bin_loss
from qbr.spec import QuantSpec

__version__ = "0.1.0"
__all__ = [
    "ActivationHookManager",
    "AlphaControl",
    "BackendUnavailable",
    "BinRegularizer",
    "LSQQuantizer",
    "LSQ_ActivationQuantizer",
    "LSQ_WeightQuantizer",
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
    "use_backend",
]
