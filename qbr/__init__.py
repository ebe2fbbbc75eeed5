"""qbr: quantization-aware training with learned step sizes (LSQ) and bin regularization (BR), fused."""

from qbr import functional
from qbr.kernels import BackendUnavailable, backends, use_backend
from qbr.spec import QuantSpec

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "QuantSpec", "backends", "functional", "use_backend"]
