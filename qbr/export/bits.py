"""Codes as bits: packing integers of 1 to 8 bits without gaps, little-endian, and back."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 20  # values at a time, a multiple of 8: a byte of work space for every bit


def packed_size(count: int, width: int) -> int:
    """Bytes of ``count`` values of ``width`` bits."""
    return (count * width + 7) // 8


def pack(values: Tensor, width: int) -> Tensor:
    """Values as a stream of bits: bit j of value i is bit (i * width + j) % 8 of byte (i * width + j) // 8.

    Args:
        values: uint8, any shape, each below 2^width; walked in row-major order.
        width: 1 to 8.

    Returns:
        uint8 [packed_size(values.numel(), width)]; bits beyond the last value are 0.

    Raises:
        ValueError: for a width or a value out of range.
    """
    _check_width(width)
    values = values.reshape(-1)
    if values.dtype != torch.uint8 or (values.numel() and int(values.max()) >> width):
        raise ValueError(f"values ({values.dtype}) for width={width}: expected uint8 below {1 << width}")
    shifts = torch.arange(width, dtype=torch.uint8)
    weights = 1 << torch.arange(8, dtype=torch.uint8)
    parts = []
    for chunk in values.split(CHUNK):
        bits = ((chunk[:, None] >> shifts) & 1).reshape(-1)
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
        parts.append((bits * weights).sum(1, dtype=torch.uint8))
    return torch.cat(parts) if parts else values


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """What ``pack`` was given, as uint8 [count].

    Raises:
        ValueError: unless packed is uint8 [packed_size(count, width)], with zeros beyond the last value.
    """
    _check_width(width)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, width),):
        raise ValueError(f"{packed.dtype} {tuple(packed.shape)} for {count} values of {width} bits: "
                         f"expected uint8 ({packed_size(count, width)},)")  # fmt: skip
    shifts = torch.arange(8, dtype=torch.uint8)
    weights = 1 << torch.arange(width, dtype=torch.uint8)
    parts = []
    for chunk in packed.split(CHUNK // 8 * width):
        bits = ((chunk[:, None] >> shifts) & 1).reshape(-1)
        whole = len(bits) // width * width
        if bits[whole:].any():
            raise ValueError(f"bits are set beyond the last of {count} values of {width} bits")
        parts.append((bits[:whole].reshape(-1, width) * weights).sum(1, dtype=torch.uint8))
    values = torch.cat(parts) if parts else packed
    if values[count:].any():
        raise ValueError(f"bits are set beyond the last of {count} values of {width} bits")
    return values[:count]


def _check_width(width: int) -> None:
    if not 1 <= width <= 8:
        raise ValueError(f"width={width}: expected 1 to 8")
