"""What qbr.Monitor costs: a W2A2 training step with BR on ResNet-18 or ResNet-20, with and without it.

python benchmarks/monitor.py --model resnet18 --batch 32
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("benchmarks", "experiments")]
import measure  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cifar10.models import MODELS  # noqa: E402

import qbr  # noqa: E402

KINDS = {
    "without": None,
    "metrics": {"oscillations": False},
    "and oscillations": {},
    "and frequency": {"frequency": 0.01},
}


def step_of(base, images, labels, options: dict | None):
    """One training step, monitored as options say, as a function."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=5e-4), momentum=0.9)
    monitor = None if options is None else qbr.Monitor(model, **options)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        br = qbr.bin_loss(model)
        (loss + br.weights + br.activations).backward()
        optimizer.step()
        return monitor

    return step


def cpu_time_once(run, *_) -> measure.Seconds:
    """Seconds that this process took on its cores for one call."""
    start = time.process_time()  # backward runs in a thread of its own
    run()
    return measure.Seconds(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="one thread's own time: where others use the machine")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    base = qbr.prepare(MODELS[options.model](10), qbr.QATConfig(weight_bits=2, act_bits=2)).to(options.device)
    images = torch.randn(options.batch, 3, 32, 32, device=options.device)
    labels = torch.randint(10, (options.batch,), device=options.device)
    base(images)  # sets every alpha
    runs = {kind: step_of(base, images, labels, arguments) for kind, arguments in KINDS.items()}
    timer = cpu_time_once if options.cpu_time else None
    result = measure.alternate(runs, options.device, options.repeats, timer=timer)
    milliseconds = result["without"]["median_s"] * 1e3
    print(f"{options.model}, batch {options.batch}, {options.device}: {milliseconds:.1f} ms a step")
    for kind, row in list(result.items())[1:]:
        print(f"  {kind}: {row['ratio']:.3f} of that")


if __name__ == "__main__":
    main()
