#!/usr/bin/env python3
"""Quantization-aware training on CIFAR-10: LSQ in warm-up, then LSQ with bin regularization. --help lists the flags.

cifar10_qat_br.py --quick needs nothing else: a short float baseline and W2A2 training on the images that come with
the repository.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cifar10 import options, runs


def main(argv: Sequence[str] | None = None) -> int:
    return runs.cli(options.qat_parser(), runs.QAT, argv)


if __name__ == "__main__":
    sys.exit(main())
