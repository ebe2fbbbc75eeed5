"""A training step of ResNet-18 at W2A2 with BR: its time and its peak memory, against float and the predecessor."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("benchmarks", "experiments")]
import measure  # noqa: E402
import predecessor  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cifar10.models import MODELS  # noqa: E402

import qbr  # noqa: E402


def step_of(kind: str, base, images, labels):
    """One training step, as a function: float, predecessor, lsq (no BR), fused (qbr, one step for a ReLU) or drop-in
    (the predecessor's interface: a regularizer that the caller hands weights and activations)."""
    model = copy.deepcopy(base)
    hooks: dict = {}

    def drop_in_regularizer(model):
        if not hooks:
            hooks["manager"] = qbr.ActivationHookManager(model, exclude_first_last=False)
            model(images)
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight_quantizer")}
        weights = {n: m.weight for n, m in layers.items()}
        alphas = {n: m.weight_quantizer.alpha for n, m in layers.items()}
        acts = hooks["manager"].get_pre_quant_activations()
        steps = {n: m.quantizer.alpha for n, m in model.named_modules() if isinstance(m, qbr.QuantizedClippedReLU)}
        w = qbr.BinRegularizer(num_bits=2).compute_total_loss(weights, alphas)[0]
        return w, qbr.BinRegularizer(num_bits=2, signed=False).compute_total_loss(acts, steps)[0]

    regularizers = {"predecessor": predecessor.model_bin_loss, "fused": lambda m: qbr.bin_loss(m)[:2]}
    regularizer = (regularizers | {"drop-in": drop_in_regularizer}).get(kind)
    if kind == "predecessor":
        predecessor.prepare(model, 2, 2)
    elif kind != "float":
        # One step for both calls of a block's ReLU, as the predecessor has it: the losses are compared.
        config = qbr.QATConfig(weight_bits=2, act_bits=2, collect_bin_loss=kind == "fused", step_per_call=False)
        qbr.prepare(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            loss = F.cross_entropy(model(images), labels)
        for part in regularizer(model) if regularizer else ():
            loss = loss + part
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _under(backend: str, step):
    def run():
        with qbr.use_backend(backend):
            return step()

    return run


def inputs(device: str, batch: int):
    torch.manual_seed(0)
    base = MODELS["resnet18"](10).to(device)
    images = torch.randn(batch, 3, 32, 32, device=device)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # as the experiments train
        base, images = (t.to(memory_format=torch.channels_last) for t in (base, images))
    return base, images, torch.randint(10, (batch,), device=device)


Cases = tuple[Iterable[tuple], Callable[..., dict]]  # what is measured, and what makes a row of one case


def cases(device: str, quick: bool, repeats: int) -> Cases:
    batches = ([4] if quick else [32]) if device == "cpu" else ([128] if quick else [128, 512])
    kinds = "float", "lsq", "fused", "predecessor"
    return [(b,) for b in batches], lambda batch: row(device, batch, repeats, kinds)


def row(device: str, batch: int, repeats: int, kinds: Sequence[str]) -> dict:
    """The steps of step_of's ``kinds``, float the first, in units of the float step; their first losses agree."""
    base, images, labels = inputs(device, batch)
    steps = {kind: step_of(kind, base, images, labels) for kind in kinds}
    if device == "cuda" and "fused" in kinds:  # beside "auto", which takes Triton: whose launches cost the host less?
        steps["fused, native"] = _under("native", step_of("fused", base, images, labels))
    losses = {kind: [step().item() for _ in range(2)] for kind, step in steps.items()}
    for kind in steps.keys() - {"float", "lsq"}:
        torch.testing.assert_close(losses[kind][0], losses["predecessor"][0], rtol=0.02, atol=0.02)
    result = measure.alternate_apart(steps, "predecessor", device, repeats, warm_up=1)
    times = ", ".join(f"{kind} {r['ratio']:.3f}x" for kind, r in result.items())
    print(f"ResNet-18 step, batch {batch}: float {result['float']['median_s']:.3f} s; {times}", flush=True)
    return {
        "part": "step", "device": device, "batch": batch, **{f"ratio {k}": r["ratio"] for k, r in result.items()},
        "first_losses": losses, "times": result,
    }  # fmt: skip


def memory_cases(device: str, quick: bool, repeats: int) -> Cases:
    """Peak memory of a training step, each kind in a process of its own: resident after three steps on the CPU,
    allocated in the third one on CUDA, since cuDNN tries algorithms with large workspaces in the first."""
    batch = (8 if quick else 32) if device == "cpu" else 128
    return [(batch,)], lambda batch: _memory_row(device, batch)


def _memory_row(device: str, batch: int) -> dict:
    peaks = {}
    for kind in ("float", "lsq", "fused", "predecessor"):
        command = [sys.executable, __file__, kind, device, str(batch)]
        peaks[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    beyond = {kind: peak["peak_bytes"] - peaks["float"]["peak_bytes"] for kind, peak in peaks.items()}
    share = beyond["fused"] / max(beyond["predecessor"], 1)
    mb = {kind: round(peak["peak_bytes"] / 1e6) for kind, peak in peaks.items()}
    print(f"peak memory, batch {batch}, MB: {mb}; beyond float {share:.2f} of the predecessor's", flush=True)
    return {"part": "memory", "device": device, "batch": batch, "share_of_predecessor": share, "times": peaks}


def _peak(kind: str, device: str, batch: int) -> dict:
    step = step_of(kind, *inputs(device, batch))
    for _ in range(2):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    # Not getrusage: its figure survives exec, so it would be the parent's.
    status = Path("/proc/self/status").read_text()
    return {"peak_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024}


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
