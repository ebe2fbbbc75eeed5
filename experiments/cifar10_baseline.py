#!/usr/bin/env python3
"""Trains a float ResNet on CIFAR-10, the starting point of cifar10_qat_br.py. --help lists the flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cifar10 import options, runs


def main(argv: Sequence[str] | None = None) -> int:
    return runs.cli(options.baseline_parser(), runs.BASELINE, argv)


if __name__ == "__main__":
    sys.exit(main())
