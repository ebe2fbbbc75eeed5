"""Exported files beside torch: equality on a test set, sizes, and latency in onnxruntime, for each pair of bits.

    python benchmarks/export.py                                         # random ResNet-20s, calibrated on noise
    python benchmarks/export.py --checkpoint W2A2=runs/w2a2/checkpoints/best.pth --data DIR --out FILE.json

With --data (as the CIFAR scripts take it) every test image goes through both runtimes, and accuracies are told; else
64 samples of noise do. For each checkpoint: whether onnxruntime's codes and outputs are torch's (--part equality), and
whether torch's own are the same without oneDNN, where convolutions add up in another order (itself); the bytes of the
float weights, of the float ONNX file, of the packed file and of the quantized ONNX file; and the median milliseconds of
a batch for each size in --batch (latency): in torch (float, prepared) and in onnxruntime (float, quantized with exact
and with default settings), taken in turns. --out also writes the same as a table, FILE.md, and adds a part to what is
there; --table prints that of a FILE.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measure  # noqa: E402

import qbr  # noqa: E402
from experiments.cifar10 import data  # noqa: E402
from experiments.cifar10.models import MODELS  # noqa: E402
from qbr.export import Comparison, compare, read_checkpoint, save_packed, session, to_onnx  # noqa: E402
from qbr.export.optional import need  # noqa: E402

PAIRS = ("W2A2", "W4A4", "W8A8", "W2A4", "W3A3")
NOISE = 64  # samples where there is no --data
CHUNK = 500  # samples that go through both runtimes at once
PARTS = ("equality", "itself", "latency")
RUNTIMES = ("torch float", "torch prepared", "onnxruntime float", "quantized, exact", "quantized, default")


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch.onnx.export's notes to itself
    options = _options()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())))
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, labels = _images(options.data)
    given = dict(text.split("=", 1) for text in options.checkpoint)
    about = {**measure.environment("cpu"), "onnxruntime": need("onnxruntime").__version__, "model": options.model}
    results, parts = _earlier(options.out, options.model)
    how = {key: about.pop(key) for key in ("command", "commit", "date", "threads")}
    about["parts"] = {**parts, **dict.fromkeys(options.part, how)}
    for name in given or PAIRS:
        model = _checkpoint(options.model, given[name]) if given else _random(options.model, name, images)
        found = examine(model, MODELS[options.model]().eval(), images, labels, options)
        results[name] = {**results.get(name, {}), "name": name, **found}
        print(json.dumps(found), flush=True)
        if options.out is not None:  # after each: nothing measured is lost
            result = {**about, "results": list(results.values())}
            measure.write(options.out, json.dumps(result, indent=1) + "\n")
            measure.write(options.out.with_suffix(".md"), table(result) + "\n")
    print(table({**about, "results": list(results.values())}))


def _earlier(path: Path | None, model: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """What the file holds of this model already, by name, and how each part was made: a later part joins it."""
    result = json.loads(path.read_text()) if path is not None and path.exists() else {}
    if result.get("model") != model:
        return {}, {}
    return {each["name"]: each for each in result["results"]}, result["parts"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet20")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FILE", help="instead of random ones")
    parser.add_argument("--data", type=Path, metavar="DIR", help="test images: CIFAR-10's root or image folders")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes that are timed")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--evaluator", type=int, default=4, metavar="N",
                        help="images that go through onnx's reference evaluator, too, which is slow")  # fmt: skip
    parser.add_argument("--fold-batchnorm", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print the table of an earlier result")
    return parser.parse_args()


def _images(folder: Path | None) -> tuple[Tensor, Tensor | None]:
    """Normalised images [N, 3, 32, 32] and their labels [N], None for noise."""
    if folder is None:
        return torch.randn(NOISE, 3, 32, 32), None
    test = data.load(folder).test
    return next(iter(data.Batches(test, len(test), channels_last=False)))


def _random(name: str, bits: str, images: Tensor) -> nn.Module:
    weight_bits, act_bits = map(int, bits[1:].split("A"))
    model = qbr.prepare(MODELS[name](), qbr.QATConfig(weight_bits=weight_bits, act_bits=act_bits))
    for _ in range(3):
        model(images[:NOISE])  # steps and BatchNorm's statistics
    return model.eval()


def _checkpoint(name: str, path: str) -> nn.Module:
    checkpoint = read_checkpoint(path)
    model = qbr.prepare(MODELS[name](), checkpoint.config)
    model.load_state_dict(checkpoint.state)
    return model.eval()


def examine(model: nn.Module, plain: nn.Module, images: Tensor, labels: Tensor | None, options) -> dict:
    """The figures of one model that were asked for; ``plain``: the same network in float, for its sizes and times."""
    with tempfile.TemporaryDirectory() as folder:
        path = to_onnx(model, images[:2], Path(folder) / "m.onnx", fold_batchnorm=options.fold_batchnorm)
        plain_path = _float_onnx(plain, images[:2], Path(folder) / "float.onnx")
        figures = {
            "float_bytes": sum(p.numel() * 4 for p in plain.parameters()),
            "float_onnx_bytes": plain_path.stat().st_size,
            "packed_bytes": save_packed(model, Path(folder) / "m.safetensors").stat().st_size,
            "onnx_bytes": path.stat().st_size,
        }
        default = session(path, exact=False, threads=options.threads)
        if "equality" in options.part:
            figures |= _equality(model, path, default, images, labels, options)
        if "itself" in options.part:
            figures["itself"] = _itself(model, images)
        if "latency" in options.part:
            runs = {
                "torch float": lambda x: _torch(plain, x),
                "torch prepared": lambda x: _torch(model, x),
                "onnxruntime float": _runner(session(plain_path, exact=False, threads=options.threads)),
                "quantized, exact": _runner(session(path, exact=True, threads=options.threads)),
                "quantized, default": _runner(default),
            }
            figures["ms"] = {str(size): _times(runs, images[:size], options.repeats) for size in options.batch}
        return figures


def _equality(model: nn.Module, path: Path, default, images: Tensor, labels: Tensor | None, options) -> dict:
    found = sum((compare(model, path, chunk) for chunk in images.split(CHUNK)), Comparison())
    top1 = {
        "torch": torch.cat([_torch(model, chunk) for chunk in images.split(CHUNK)]).argmax(1),
        "default": torch.cat([torch.from_numpy(_run(default, chunk)) for chunk in images.split(CHUNK)]).argmax(1),
    }
    figures = {
        "samples": found.rows, "top1_equal": found.top1_equal,
        "default_top1_equal": int((top1["torch"] == top1["default"]).sum()),
        "logits_difference": found.largest_difference, "logits_scale": found.scale,
        "codes": sum(total for _, total in found.codes.values()),
        "codes_differing": sum(differing for differing, _ in found.codes.values()),
        "samples_differing": found.rows_differing, "from_tie": found.from_tie,
        "quantizers": {name: [found.quantizers[name], *found.codes[name]] for name in found.codes},
        "evaluator_difference": _beside_evaluator(path, images[: options.evaluator]),
    }  # fmt: skip
    if labels is not None:
        figures["accuracy"] = {name: 100 * (each == labels).float().mean().item() for name, each in top1.items()}
    return figures


def _itself(model: nn.Module, images: Tensor) -> dict:
    """torch beside torch: the same model and images without oneDNN, whose convolutions add up in another order."""
    difference, equal = 0.0, 0
    for chunk in images.split(CHUNK):
        ours = _torch(model, chunk)
        with torch.backends.mkldnn.flags(enabled=False):
            theirs = _torch(model, chunk)
        difference = max(difference, (ours - theirs).abs().max().item())
        equal += int((ours.argmax(1) == theirs.argmax(1)).sum())
    return {"top1_equal": equal, "logits_difference": difference}


def _beside_evaluator(path: Path, images: Tensor) -> float:
    """The largest difference of logits between onnxruntime and onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    exact = session(path)
    theirs = ReferenceEvaluator(str(path)).run(None, {exact.get_inputs()[0].name: images.numpy()})[0]
    return float(abs(theirs - _run(exact, images)).max())


def _float_onnx(plain: nn.Module, x: Tensor, path: Path) -> Path:
    torch.onnx.export(plain, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},),
                      external_data=False)  # fmt: skip
    return path


@torch.no_grad()
def _torch(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _runner(each):
    return functools.partial(_run, each)


def _run(each, x: Tensor):
    return each.run(None, {each.get_inputs()[0].name: x.numpy()})[0]


def _times(runs: dict, x: Tensor, repeats: int) -> dict[str, float]:
    found = measure.alternate({name: functools.partial(run, x) for name, run in runs.items()}, "cpu", repeats)
    return {name: 1e3 * each["median_s"] for name, each in found.items()}


def table(result: dict) -> str:
    """Markdown of one result file: equality, bytes, and milliseconds."""
    rows = [
        f"{result['model']}; torch {result['torch']}, onnxruntime {result['onnxruntime']}, {result['hardware']}; "
        + ", ".join(f"{part} at {how['commit']}" for part, how in result["parts"].items()),
        "",
        "| | test accuracy | top-1 equal | with default settings | logits differ by | codes that differ | in samples "
        "| first, from a tie | given the same values | reference evaluator's logits | torch beside itself |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (each for each in result["results"] if "samples" in each):
        accuracy = f"{r['accuracy']['torch']:.2f} %" if "accuracy" in r else ""
        same = r.get("itself")
        itself = f"{same['top1_equal']:,} equal, logits {same['logits_difference']:.2g}" if same else ""
        rows.append(
            f"| {r['name']} | {accuracy} | {r['top1_equal']:,} of {r['samples']:,} | {r['default_top1_equal']:,} "
            f"| {r['logits_difference']:.2g} of {r['logits_scale']:.2g} | {r['codes_differing']:,} of {r['codes']:,} "
            f"| {r['samples_differing']} | {r['from_tie']:.1g} steps | {sum(x for x, *_ in r['quantizers'].values())} "
            f"| {r['evaluator_difference']:.2g} | {itself} |"
        )
    rows += ["", "| bytes | float weights | float ONNX | quantized ONNX | packed |", "|---|---|---|---|---|"]
    for r in result["results"]:
        kinds = ("float_bytes", "float_onnx_bytes", "onnx_bytes", "packed_bytes")
        rows.append(f"| {r['name']} | " + " | ".join(f"{r[kind]:,}" for kind in kinds) + " |")
    threads = result["parts"].get("latency", {}).get("threads")
    rows += ["", f"| ms, {threads} threads | batch | {' | '.join(RUNTIMES)} |", "|---|---|" + "---|" * len(RUNTIMES)]
    for r in result["results"]:
        for size, times in r.get("ms", {}).items():
            rows.append(f"| {r['name']} | {size} | " + " | ".join(f"{times[name]:.1f}" for name in RUNTIMES) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
