"""Exported files beside torch: equality, sizes and latency of a ResNet in onnxruntime, for each pair of bits.

    python benchmarks/export.py                                         # random ResNet-20s, calibrated on noise
    python benchmarks/export.py --checkpoint W2A2=runs/w2a2/checkpoints/best.pth --images batch.pt

Each line: whether onnxruntime's codes and outputs are torch's, the sizes of the float weights, the packed file and the
ONNX file, and milliseconds of one batch in torch (float and prepared) and in onnxruntime (exact and default settings).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qbr
from experiments.cifar10.models import MODELS
from qbr.export import compare, read_checkpoint, save_packed, session, to_onnx

PAIRS = ("W2A2", "W4A4", "W8A8", "W2A4", "W3A3")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32)
    if options.images is not None:
        images = torch.load(options.images, weights_only=True)[: options.batch].float()
    given = dict(text.split("=", 1) for text in options.checkpoint)
    results = []
    for name in given or PAIRS:
        model = _checkpoint(options.model, given[name]) if given else _random(options.model, name, images)
        results.append({"name": name, **measure(model, MODELS[options.model]().eval(), images, options)})
        print(_line(results[-1]), flush=True)
    if options.out is not None:
        about = {"torch": torch.__version__, "threads": options.threads, "batch": options.batch, "model": options.model}
        options.out.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet20")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FILE", help="instead of random ones")
    parser.add_argument("--images", type=Path, help="a tensor [N, 3, 32, 32] saved with torch.save, normalised")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--fold-batchnorm", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args()


def _random(name: str, bits: str, images: torch.Tensor) -> torch.nn.Module:
    weight_bits, act_bits = map(int, bits[1:].split("A"))
    model = qbr.prepare(MODELS[name](), qbr.QATConfig(weight_bits=weight_bits, act_bits=act_bits))
    for _ in range(3):
        model(images)  # steps and BatchNorm's statistics
    return model.eval()


def _checkpoint(name: str, path: str) -> torch.nn.Module:
    checkpoint = read_checkpoint(path)
    model = qbr.prepare(MODELS[name](), checkpoint.config)
    model.load_state_dict(checkpoint.state)
    return model.eval()


def measure(model, plain, images: torch.Tensor, options) -> dict:
    """Everything about one model; times are medians in milliseconds of a batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = to_onnx(model, images[:2], Path(folder) / "m.onnx", fold_batchnorm=options.fold_batchnorm)
        packed = save_packed(model, Path(folder) / "m.safetensors").stat().st_size
        found = compare(model, path, images)
        feed = {"x": images.numpy()}
        exact, default = (session(path, exact=each, threads=options.threads) for each in (True, False))
        got = default.run(None, feed)[0].argmax(1)
        with torch.no_grad():
            runs = {
                "torch_float_ms": lambda: plain(images),
                "torch_prepared_ms": lambda: model(images),
                "exact_ms": lambda: exact.run(None, feed),
                "default_ms": lambda: default.run(None, feed),
            }
            times = {key: _median(run, options.repeats) for key, run in runs.items()}
            top1 = model(images).argmax(1).numpy()
        return {
            "samples": found.rows, "top1_equal": found.top1_equal, "logits_difference": found.largest_difference,
            "logits_scale": found.scale, "codes": sum(total for _, total in found.codes.values()),
            "codes_differing": sum(differing for differing, _ in found.codes.values()),
            "samples_differing": found.rows_differing, "from_tie": found.from_tie,
            "quantizers_differing": sum(found.quantizers.values()), "default_top1_equal": int((got == top1).sum()),
            "float_bytes": sum(p.numel() * 4 for p in plain.parameters()), "packed_bytes": packed,
            "onnx_bytes": path.stat().st_size, **times,
        }  # fmt: skip


def _median(run, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _line(r: dict) -> str:
    return (
        f"{r['name']}: top-1 equal {r['top1_equal']}/{r['samples']} (default settings {r['default_top1_equal']}), "
        f"logits differ by {r['logits_difference']:.2g} of {r['logits_scale']:.2g}; {r['codes_differing']} of "
        f"{r['codes']} codes differ in {r['samples_differing']} samples, first within {r['from_tie']:.1g} steps of a "
        f"tie; {r['quantizers_differing']} given the same values; bytes: float {r['float_bytes']:,}, packed "
        f"{r['packed_bytes']:,}, ONNX {r['onnx_bytes']:,}; ms: torch float {r['torch_float_ms']:.1f}, prepared "
        f"{r['torch_prepared_ms']:.1f}, onnxruntime exact {r['exact_ms']:.1f}, default {r['default_ms']:.1f}"
    )


if __name__ == "__main__":
    main()
