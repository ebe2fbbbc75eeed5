#!/usr/bin/env python3
"""Packs the subset that the repository ships, cifar10/subset.npz, from a CIFAR-10 pack of JPEG images.

usage: make_subset.py PACK [--train-per-class 500] [--test-per-class 100] [--output cifar10/subset.npz]

PACK is an .npz with train_jpeg and test_jpeg (uint8, the files one after another), train_offsets and test_offsets
(int64 [N + 1]), train_labels and test_labels (uint8 [N]) and classes (str [10]). The subset has the same keys and
keeps the first images of every class, in PACK's order, byte for byte. Compression shrinks it to about 2 MB, since
every JPEG of such a pack begins with the same 600 bytes of tables.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def subset(pack: dict, per_class: dict[str, int]) -> dict[str, np.ndarray]:
    """The first per_class[split] images of every class, under the pack's own keys."""
    result = {"classes": pack["classes"]}
    for split, count in per_class.items():
        jpeg, offsets, labels = (pack[f"{split}_{key}"] for key in ("jpeg", "offsets", "labels"))
        first = [np.flatnonzero(labels == label)[:count] for label in range(len(pack["classes"]))]
        kept = np.sort(np.concatenate(first))
        files = [jpeg[offsets[i] : offsets[i + 1]] for i in kept]
        result[f"{split}_jpeg"] = np.concatenate(files)
        result[f"{split}_offsets"] = np.cumsum([0, *map(len, files)], dtype=np.int64)
        result[f"{split}_labels"] = labels[kept]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--train-per-class", type=int, default=500)
    parser.add_argument("--test-per-class", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "cifar10" / "subset.npz")
    args = parser.parse_args()
    with np.load(args.pack, allow_pickle=False) as file:
        pack = dict(file)
    packed = subset(pack, {"train": args.train_per_class, "test": args.test_per_class})
    np.savez_compressed(args.output, **packed)
    sizes = ", ".join(f"{len(packed[f'{split}_labels'])} {split} images" for split in ("train", "test"))
    print(f"{args.output}: {sizes}, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
