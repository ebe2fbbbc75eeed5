"""The flags of both scripts: definition, what --recipe, --quick and --resume set, every check that needs no file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import qbr

from . import recipes
from .files import UserError
from .models import MODELS, first_and_last
from .optim import COMPILE_MODES, SCHEDULES, WARMUP

FLOAT_BITS = 32
_NOT_GIVEN = object()
# What --quick changes, with the packed subset.
QUICK_BASELINE = {"model": "resnet20", "epochs": 3, "batch_size": 64, "output_dir": Path("runs/quick-baseline")}
# Two epochs of BR are 142 steps: lambda 1 would move a bin of 1,000 weights 2 % of the way to its level, 40 moves it
# half. 2 * lambda * lr <= 1.34, also with --recipe record's schedule, stays below 1.36, where a bin of one weight would
# start to oscillate under its Nesterov momentum (strength.limit). BR_A is 8.5 here, over four times the cross-entropy.
QUICK_QAT = {
    "model": "resnet20",
    "warmup_epochs": 1,
    "qat_epochs": 3,
    "batch_size": 64,
    "lr": 0.02,
    "alpha_init": "mse",
    "lambda_br": 40.0,
    "lambda_br_act": 0.1,
    "output_dir": Path("runs/quick"),
}
# Flags that may differ between a run and its resumption: they change no number.
FREE_ON_RESUME = {
    "output_dir", "resume", "overwrite", "gpu", "tensorboard", "download", "keep_warmup", "warmup_from",
}  # fmt: skip
MOVABLE = {"data", "pretrained_baseline"}  # the same files may lie elsewhere by then
_BEFORE = {"br_first_last": True}  # of flags whose default is not what was done before they were there


def baseline_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a float ResNet on CIFAR-10.")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument(
        "--pretrained-baseline",
        type=Path,
        metavar="FILE",
        help="float checkpoint to train on: what the epochs of quantization-aware training give a float network",
    )
    _add_common(parser, lr=0.1)
    parser.set_defaults(_quick=QUICK_BASELINE, _recipes=recipes.BASELINE)
    return _telling_defaults(parser)


def qat_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Quantization-aware training of a CIFAR-10 ResNet: LSQ, then LSQ with bin regularization (BR)."
    )
    parser.add_argument("--pretrained-baseline", type=Path, metavar="FILE", help="float checkpoint to start from")
    parser.add_argument(
        "--distill",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the loss on labels, given to the distance from what the float network says; LSQ's paper: 0.5",
    )
    parser.add_argument("--num-bits", type=int, help="bits of weights and activations; overrides the next two")
    parser.add_argument("--num-bits-weight", type=int, default=2, help="1 to 8; 32 leaves weights in float")
    parser.add_argument("--num-bits-act", type=int, default=2, help="1 to 8; 32 leaves activations in float")
    for which in ("first", "last"):
        parser.add_argument(f"--num-bits-{which}", type=int, metavar="BITS", help=f"of the {which} layer's weight")
    parser.add_argument("--clip-value", type=_number_or_none, help="upper clip of every ReLU; None (default) for none")
    parser.add_argument(
        "--step-per-call",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a step size for each call of a ReLU; with --no-... a block's two share one, as the predecessor's do",
    )
    parser.add_argument(
        "--alpha-init",
        choices=("lsq", "mse"),
        default="lsq",
        help="first step sizes: LSQ's 2 mean|x| / sqrt(Qp), or those of the least squared error on a few batches",
    )
    parser.add_argument("--lambda-br", type=float, default=1.0, help="strength of BR on weights")
    parser.add_argument("--lambda-br-act", type=float, default=1.0, help="strength of BR on activations")
    parser.add_argument(
        "--regularizer",
        choices=("br", "dampening"),
        default="br",
        help="the bin loss of weights: BR, or dampening (Nagel et al., 2022), which weighs every weight alike",
    )
    parser.add_argument(
        "--lambda-br-schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="both lambdas from BR's first step to the last: as they are, or rising from 0 (as Nagel et al. dampen)",
    )
    parser.add_argument(
        "--br-first-last",
        action="store_true",
        help="BR of the first and last layer's weights, too, where --num-bits-first, --num-bits-last give them other "
        "bits than the rest; default: of the rest alone",
    )
    parser.add_argument("--warmup-epochs", type=int, default=30, help="first epochs, without BR")
    parser.add_argument("--qat-epochs", type=int, default=100, help="all epochs, warm-up included")
    parser.add_argument("--freeze-alpha", action="store_true", help="alphas stay put once warm-up ends")
    parser.add_argument("--freeze-weight-alpha", action="store_true", help="the same for weights' alphas alone")
    parser.add_argument("--freeze-act-alpha", action="store_true", help="the same for activations' alphas alone")
    for side in ("weight", "act"):
        parser.add_argument(
            f"--freeze-{side}-alpha-epoch",
            type=int,
            default=0,
            metavar="N",
            help="the same from epoch N on, counted from 1; 0 (default) for never",
        )
    parser.add_argument("--lr-alpha", type=float, metavar="LR", help="lr of all alphas; default: --lr")
    parser.add_argument("--lr-alpha-act", type=float, metavar="LR", help="of activations' alone; default: --lr-alpha")
    parser.add_argument(
        "--lr-alpha-first-last",
        type=float,
        metavar="LR",
        help="of the alphas of the first and last layer's weights; default: --lr-alpha",
    )
    for flag, whose in (("", "weights'"), ("-act", "activations'")):
        parser.add_argument(
            f"--br-backprop-to-alpha{flag}",
            nargs="?",
            const=True,
            default=False,
            type=_to_alpha,
            metavar="HOW",
            help=f"BR moves {whose} alphas too; HOW: a fraction, or 'scaled' by LSQ's gradient scale",
        )
    parser.add_argument(
        "--br-bins",
        choices=("global", "rank"),
        default="global",
        help="under torchrun, BR of activations: over the whole batch (default) or over each process's share of it",
    )
    parser.add_argument("--keep-warmup", action="store_true", help="keep checkpoints of warm-up's end for other runs")
    parser.add_argument(
        "--warmup-from",
        type=Path,
        metavar="RUN",
        help="take warm-up from this run's folder (see --keep-warmup) instead of training it again; same results",
    )
    parser.add_argument("--monitor", action="store_true", help="also record how many weights change bins and return")
    _add_common(parser, lr=0.01)
    parser.set_defaults(_quick=QUICK_QAT, _recipes=recipes.QAT)
    return _telling_defaults(parser)


def _add_common(parser: argparse.ArgumentParser, lr: float) -> None:
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="resnet18")
    add("--data", type=Path, metavar="DIR", help="torchvision root or image folders; default: the packed subset")
    add("--download", action="store_true", help="fetch CIFAR-10 into --data (default ./data) with torchvision")
    add("--val-fraction", type=float, default=0.1, help="share of the training set held out to choose the best epoch")
    add("--limit", type=int, metavar="N", help="keep N images of every class and split, for trials")
    add("--batch-size", type=int, default=128, help="of all processes together under torchrun")
    add("--sync-bn", action="store_true", help="under torchrun on GPUs: BatchNorm over the whole batch")
    add("--lr", type=float, default=lr)
    add("--momentum", type=float, default=0.9)
    add("--nesterov", action=argparse.BooleanOptionalAction, default=False, help="Nesterov's form of the momentum")
    add("--weight-decay", type=float, default=5e-4)
    add("--lr-schedule", choices=SCHEDULES, default="cosine", help="from --lr to 0: half a cosine, or a straight line")
    add("--lr-warmup", type=float, metavar="SHARE", help="share of all steps in which lr first rises to --lr in a "
        f"straight line; default: {WARMUP['cosine']:g}, and {WARMUP['onecycle']:g} with onecycle")  # fmt: skip
    add("--label-smoothing", type=float, default=0.0, metavar="SHARE", help="of the label, given to all classes alike")
    add("--drop-last", action=argparse.BooleanOptionalAction, default=False,
        help="leave out the last images of an epoch where they do not fill a batch")  # fmt: skip
    add("--compile", choices=COMPILE_MODES, default="none", help="torch.compile of forward, loss and BR, and its mode")
    add("--gpu", type=int, default=0, help="CUDA device; the CPU where there is none, or with -1")
    add("--seed", type=int, default=42)
    add("--amp", choices=("none", "bf16"), default="none", help="bf16: autocast of the network to bfloat16")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format; faster so")
    add("--output-dir", type=Path, metavar="DIR", help="required, but with --quick")
    add("--resume", action="store_true", help="continue the run in --output-dir; flags left out are taken from it")
    add("--overwrite", action="store_true", help="replace the run in --output-dir")
    add("--tensorboard", action="store_true", help="also write TensorBoard logs")
    add("--quick", action="store_true", help="a small run on the packed subset, minutes on 2 cores")
    add("--recipe", choices=recipes.NAMES, default="default", help="a named set of defaults: docs/recipes.md")


def _telling_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """parser, with every default that is a number or a word in its flag's help."""
    for action in parser._actions:
        told = action.help or ""
        if isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool):
            if action.default != argparse.SUPPRESS and "default" not in told:
                action.help = f"{told} (default: %(default)s)".strip()
    return parser


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _to_alpha(text: str) -> float | str:
    if text == "scaled":
        return text
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give no value, a fraction from 0 to 1, or 'scaled'")
    return fraction


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """Options with --recipe's and --quick's values in the place of defaults, and the names of those that were given.

    Raises:
        UserError: for a value that cannot be, naming the flag. Unknown flags end in argparse's own message.
    """
    names = [action.dest for action in parser._actions if action.dest != "help"]
    seen = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN))))
    given = {name for name in names if seen[name] is not _NOT_GIVEN}
    values = {name: parser.get_default(name) for name in names}
    if "recipe" in given:
        values.update(seen["_recipes"][seen["recipe"]])
    if "quick" in given:
        values.update(seen["_quick"])
    values.update({name: seen[name] for name in given})
    options = argparse.Namespace(**values)
    if options.download and options.data is None:
        options.data = Path("data")
    if getattr(options, "num_bits", None) is not None:
        options.num_bits_weight = options.num_bits_act = options.num_bits
    if options.lr_warmup is None:
        options.lr_warmup = WARMUP[options.lr_schedule]
    check(options)
    return options, given


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as numbers, strings, booleans and None: what checkpoints and results.json hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def resumed(options: argparse.Namespace, given: set[str], saved: dict[str, Any]) -> argparse.Namespace:
    """The options of a run that goes on: ``saved``, unless a flag that was given contradicts it.

    Raises:
        UserError: listing the flags that differ.
    """
    now = plain(options)
    # What a run that began before a flag was there has done.
    default = (qat_parser() if "qat_epochs" in now else baseline_parser()).get_default
    saved = {**{name: _BEFORE.get(name, default(name)) for name in now}, **saved}
    names = given - FREE_ON_RESUME - MOVABLE
    if "num_bits" in names:
        names |= {"num_bits_weight", "num_bits_act"}
    differing = sorted(name for name in names if now[name] != saved.get(name))
    if differing:
        listed = ", ".join(f"{flag(name)} {now[name]} (was {saved.get(name)})" for name in differing)
        raise UserError(f"--resume: {listed}: a run goes on as it began; leave these out, or start another run")
    keep = (FREE_ON_RESUME | MOVABLE & given) & vars(options).keys()
    values = {**vars(options), **saved, **{name: getattr(options, name) for name in keep}}
    for name in ("data", "pretrained_baseline"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    return argparse.Namespace(**values)


def freeze(options: argparse.Namespace, side: str) -> bool | qbr.Freeze:
    """When the alphas of ``side`` ("weight" or "act") are held fixed, as AlphaControl takes it."""
    if options.freeze_alpha or getattr(options, f"freeze_{side}_alpha"):
        return True
    epoch = getattr(options, f"freeze_{side}_alpha_epoch")
    return qbr.Freeze(epoch=epoch) if epoch else False


def qat_config(options: argparse.Namespace, model: nn.Module) -> qbr.QATConfig:
    """What ``prepare`` does to ``model``."""
    # By name and not as QATConfig.first_layer: python -m qbr then knows their bits without the model.
    ends = dict(zip(first_and_last(model), (options.num_bits_first, options.num_bits_last), strict=True))
    return qbr.QATConfig(
        weight_bits=options.num_bits_weight,
        act_bits=options.num_bits_act,
        clip=options.clip_value,
        step_per_call=options.step_per_call,
        regularizer=options.regularizer,
        act_regularizer="br",
        overrides={name: {"weight_bits": bits} for name, bits in ends.items() if bits is not None},
    )


def without_br(options: argparse.Namespace, model: nn.Module) -> tuple[str, ...]:
    """Names of the quantized layers whose weights BR leaves alone; see --br-first-last."""
    if options.br_first_last:
        return ()
    ends = zip(first_and_last(model), _bits_of_ends(options))
    return tuple(name for name, bits in ends if bits not in (FLOAT_BITS, options.num_bits_weight))


def _bits_of_ends(options: argparse.Namespace) -> list[int]:
    ends = options.num_bits_first, options.num_bits_last
    return [options.num_bits_weight if bits is None else bits for bits in ends]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(options: argparse.Namespace) -> None:
    """Raise UserError for a value, or a pair of values, that cannot be trained with."""
    o = options

    def require(name: str, holds, expected: str) -> None:
        value = getattr(o, name, None)
        if value is not None and not holds(value):
            raise UserError(f"{flag(name)} {value}: expected {expected}")

    def positive(value: float) -> bool:
        return math.isfinite(value) and value > 0

    def not_negative(value: float) -> bool:
        return math.isfinite(value) and value >= 0

    for name in ("num_bits", "num_bits_weight", "num_bits_act", "num_bits_first", "num_bits_last"):
        require(name, lambda bits: 1 <= bits <= 8 or bits == FLOAT_BITS, f"1 to 8, or {FLOAT_BITS} for float")
    for name in ("epochs", "qat_epochs", "batch_size", "limit"):
        require(name, lambda count: count >= 1, "1 or more")
    for name in ("lr", "lr_alpha", "lr_alpha_act", "lr_alpha_first_last", "clip_value"):
        require(name, positive, "a positive number")
    at_epoch = ("freeze_weight_alpha_epoch", "freeze_act_alpha_epoch")
    for name in ("lambda_br", "lambda_br_act", "weight_decay", "warmup_epochs", "seed", *at_epoch):
        require(name, not_negative, "0 or more")
    require("seed", lambda seed: seed < 2**63, "less than 2^63")
    for name in ("momentum", "val_fraction", "lr_warmup", "label_smoothing"):
        require(name, lambda share: 0 <= share < 1, "0 or more, below 1")
    require("distill", lambda share: 0 <= share <= 1, "0 to 1")
    require("gpu", lambda index: index >= -1, "the index of a CUDA device, or -1 for the CPU")
    if hasattr(o, "qat_epochs"):
        if o.warmup_epochs > o.qat_epochs:
            raise UserError(
                f"--warmup-epochs {o.warmup_epochs} is beyond --qat-epochs {o.qat_epochs}, the total with warm-up: "
                "lower the first or raise the second"
            )
        if o.keep_warmup and o.warmup_epochs in (0, o.qat_epochs):
            raise UserError(
                f"--keep-warmup --warmup-epochs {o.warmup_epochs} --qat-epochs {o.qat_epochs}: no run could begin "
                "after such a warm-up; expected 1 epoch of it or more, and more of all than of it"
            )
        if o.distill and o.pretrained_baseline is None and not (o.quick or o.resume):
            raise UserError(f"--distill {o.distill:g}: name the float network to learn from, --pretrained-baseline")
        if o.num_bits_weight == o.num_bits_act == FLOAT_BITS:
            raise UserError("--num-bits-weight 32 --num-bits-act 32 quantize nothing: use cifar10_baseline.py")
        if o.lr_alpha_first_last is not None and FLOAT_BITS in _bits_of_ends(o):
            raise UserError(
                f"--lr-alpha-first-last {o.lr_alpha_first_last:g}: the first or last layer stays in float and has no "
                "alpha; name its bits, --num-bits-first, --num-bits-last"
            )
    if o.nesterov and o.momentum == 0:
        raise UserError("--nesterov --momentum 0.0: Nesterov's form needs a momentum; leave one of them out")
    if getattr(o, "monitor", False) and o.compile != "none":
        raise UserError(f"--monitor --compile {o.compile}: every epoch would be compiled anew; leave one of them out")
    if o.output_dir is None:
        raise UserError("--output-dir is missing: name the folder for this run (only --quick has a default)")
    if o.resume and o.overwrite:
        raise UserError("--resume and --overwrite: choose one")
