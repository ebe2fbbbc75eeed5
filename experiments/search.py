#!/usr/bin/env python3
"""Searches hyper-parameters of cifar10_qat_br.py by validation accuracy; test images are never looked at.

    python experiments/search.py --output-dir runs/search --trials 20 --halving 3 -- --recipe fast --val-fraction 0.1 \\
        --data data --pretrained-baseline runs/float/checkpoints/best.pth

What comes after -- are flags of cifar10_qat_br.py that all trials share. The same command goes on with a search that
was interrupted, in the middle of a trial, too; a larger --trials adds random trials. After every trial search.json and
its table search.md are written in --output-dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar10 import exits, space, trials
from cifar10.files import UserError, atomic_write, check_writable


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default = f"once for every flag; default: {' '.join(space.DEFAULT)}"
    rungs = "successive halving: the best 1 / ETA of the trials go on, for ETA times as many epochs; 0 for none"
    add("--output-dir", type=Path, required=True, metavar="DIR")
    add("--space", action="append", metavar="NAME=...", help=f"{space.FORM}; {default}")
    add("--method", choices=("random", "grid"), default="random", help="random draws, or every combination")
    add("--trials", type=int, default=20, metavar="N", help="random draws")
    add("--seed", type=int, default=0, help="of the draws; the seed of the trainings is --seed after --")
    add("--halving", type=int, default=0, metavar="ETA", help=rungs)
    add("--dry-run", action="store_true", help="list the trials, and write nothing")
    add("--table", action="store_true", help="make search.md again from search.json, and print it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, as exits.exit_code gives it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    args, fixed = arguments().parse_args(argv[:at]), argv[at + 1 :]
    return exits.exit_code(lambda: search(args, fixed))


def search(args: argparse.Namespace, fixed: list[str]) -> None:
    if args.table:
        text = trials.table(args.output_dir)
        with atomic_write(args.output_dir / "search.md", "w") as file:
            file.write(text)
        print(text)
        return
    for name, least in (("trials", 1), ("halving", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected {least} or more")
    if args.halving == 1:
        raise UserError("--halving 1: every rung would keep all trials; expected 2 or more, or 0 for none")
    check_writable(args.output_dir)
    axes = space.read(args.space)
    made = trials.Search(args.output_dir, axes, args.method, args.trials, args.seed, args.halving, fixed)
    if args.dry_run:
        print(made.listing())
        return
    made.run()
    print(f"\n{trials.table(args.output_dir)}")
    if made.best():
        print(f"the best again, with test images: {made.command()}")


if __name__ == "__main__":
    sys.exit(main())
