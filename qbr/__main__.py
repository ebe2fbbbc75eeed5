"""The command line: python -m qbr export | inspect | convert."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from qbr.config import QATConfig
from qbr.export import convert_checkpoint, inspect, load_packed, read_checkpoint, save_packed, to_onnx
from qbr.export.files import PACKED, check_output, kind_of
from qbr.export.predecessor import CONVERTED
from qbr.prepare import prepare
from qbr.quantizers import quantizers

_ABOUT = """\
From a trained network to a deployed one.

  inspect   what a file holds: for each quantized tensor its bits, step sizes, used bins and bytes
  convert   an old checkpoint into packed weights (.safetensors) or into one to train on from (.pth)
  export    a checkpoint into an ONNX file with integer weights, which onnxruntime runs
"""
_CHECKPOINT = (
    "a checkpoint that torch.save wrote (this project's best.pth, its predecessor's, or a bare state_dict), "
    "or packed weights (.safetensors). Nothing in it is run"
)
_EXAMPLES = {
    "export": "python -m qbr export best.pth resnet20.onnx --model experiments.cifar10.models:resnet20 --input 3,32,32",
    "inspect": "python -m qbr inspect resnet20.onnx",
    "convert": "python -m qbr convert old/best.pth resnet18.safetensors",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 2 with one line on stderr that says what is wrong."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qbr", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python -m qbr COMMAND --help tells more of each.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    export = _command(commands, "export", _export, "Write a checkpoint as ONNX: weights as packed 2-, 4- or 8-bit "
                      "integers, activations quantized with their learned steps, any batch size.")  # fmt: skip
    export.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=_CHECKPOINT)
    export.add_argument("out", metavar="OUT.onnx", type=Path, help="the file to write")
    _model(export, required=True)
    export.add_argument("--input", metavar="C,H,W", required=True, type=_sizes,
                        help="the size of one input without the batch, such as 3,32,32")  # fmt: skip
    export.add_argument(
        "--fold-batchnorm",
        action="store_true",
        help="put BatchNorms into the scales of weights; rounds otherwise than torch does",
    )
    _bits(export)

    look = _command(commands, "inspect", _inspect, "Show what an ONNX file, packed weights or a checkpoint hold.")
    look.add_argument("file", metavar="FILE", type=Path, help=".onnx, .safetensors, or a checkpoint of torch.save")
    _bits(look)

    convert = _command(commands, "convert", _convert, "Write a checkpoint, the predecessor's or this project's, as "
                       "packed weights or as a checkpoint that qbr trains on from.")  # fmt: skip
    convert.add_argument("old", metavar="OLD", type=Path,
                         help="a checkpoint that torch.save wrote. Nothing in it is run")  # fmt: skip
    convert.add_argument("new", metavar="NEW", type=Path, help=".safetensors: packed integer weights, for deployment; "
                         ".pth: float weights and steps, for training")  # fmt: skip
    _model(convert, required=False)
    _bits(convert)
    return parser


def _command(commands, name: str, run: Callable, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about.partition(":")[0], description=about,
                                 epilog=f"example: {_EXAMPLES[name]}",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _model(parser: argparse.ArgumentParser, required: bool) -> None:
    more = "" if required else "; only needed where the checkpoint's names do not tell its layers"
    parser.add_argument("--model", metavar="MODULE:FUNCTION", required=required,
                        help="a function that makes the float network, called without arguments; its module is "
                             "imported from here or from the Python path" + more)  # fmt: skip


def _bits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model was quantized, where the checkpoint does not tell")
    group.add_argument("--config", metavar="FILE.json", type=Path, help="a QATConfig as QATConfig.to_json() gives it")
    group.add_argument("--weight-bits", type=int, metavar="N", help="1 to 8, or 32 for float")
    group.add_argument("--act-bits", type=int, metavar="N", help="1 to 8, or 32 for float")
    group.add_argument("--clip", type=float, metavar="X", help="upper bound of every ReLU")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers with commas, such as 3,32,32")
    return sizes


def _how(options: argparse.Namespace) -> dict:
    config = None
    if options.config is not None:
        try:
            config = QATConfig.from_json(options.config.read_text())
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config {options.config}: {error}") from error
    return {"config": config, "weight_bits": options.weight_bits, "act_bits": options.act_bits, "clip": options.clip}


def _factory(text: str) -> Callable[[], nn.Module]:
    module, colon, function = text.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"--model {text}: expected MODULE:FUNCTION, such as torchvision.models:resnet18")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {text}: {error}") from error
    if not callable(factory):
        raise ValueError(f"--model {text} is a {type(factory).__name__}: expected a function that makes the network")
    return factory


def _loaded(path: Path, options: argparse.Namespace) -> nn.Module:
    model = _factory(options.model)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {options.model} made a {type(model).__name__}: expected an nn.Module")
    if kind_of(path) == PACKED:
        if not quantizers(model) and options.config is not None:
            prepare(model, _how(options)["config"])
        return load_packed(model, path)
    checkpoint = read_checkpoint(path, **_how(options))
    if checkpoint.config is None:
        raise ValueError(f"{path} is a float model (no step sizes in it): train it quantized first")
    if not quantizers(model):
        prepare(model, checkpoint.config)
    for name, quantizer in quantizers(model).items():
        spec = checkpoint.spec(name) if f"{name}.alpha" in checkpoint.state else None
        if spec is not None and spec.bits != quantizer.spec.bits:
            raise ValueError(f"{path} does not fit --model {options.model}: {name} has {spec.bits} bits in the "
                             f"checkpoint and {quantizer.spec.bits} in the model")  # fmt: skip
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        differences = str(error).splitlines()[1:]  # a line for each tensor
        more = f", and {len(differences) - 1} more such lines" if len(differences) > 1 else ""
        first = differences[0].strip()[:300] if differences else str(error)
        raise ValueError(f"{path} does not fit --model {options.model}: {first}{more}") from error
    return model


def _export(options: argparse.Namespace) -> None:
    check_output(options.out, options.checkpoint, (".onnx",))
    model = _loaded(options.checkpoint, options)
    to_onnx(model, torch.zeros(2, *options.input), options.out, fold_batchnorm=options.fold_batchnorm)
    try:
        print(inspect(options.out))
    except ValueError as error:  # above 2 GB
        print(f"written: {error}")


def _inspect(options: argparse.Namespace) -> None:
    how = _how(options)
    print(inspect(options.file, **how))


def _convert(options: argparse.Namespace) -> None:
    check_output(options.new, options.old, CONVERTED)
    if options.model is not None:
        if options.new.suffix != ".safetensors":
            raise ValueError(f"--model {options.model} is for packed weights (.safetensors), and {options.new} is none")
        save_packed(_loaded(options.old, options), options.new)
    else:
        convert_checkpoint(options.old, options.new, **_how(options))
    before, after = (path.stat().st_size for path in (options.old, options.new))
    print(f"{options.old} ({before:,} bytes) -> {options.new} ({after:,} bytes)")


if __name__ == "__main__":
    sys.exit(main())
