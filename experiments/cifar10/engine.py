"""The training loop: one epoch and one evaluation, with figures that stay on the device until the epoch ends."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import qbr

from .data import Batches, ImageSet, Splits

CHECK_EVERY = 100  # steps between looks at the non-finite flag; each look waits for the device once
EVAL_BATCH = 500


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the layer."""


class Trainer:
    """Model, optimizer, schedule and data of one run, and everything that a resumption must restore.

    SGD with momentum, weight decay on weights alone (alphas have their own group), and a cosine schedule from lr to
    0 over all steps. The figures of an epoch are added up on the device and read once.

    Args:
        model: on ``device``; for quantization-aware training already prepared by qbr.
        splits: sets on the CPU; training and validation images are moved to ``device`` here.
        options: batch_size, lr, momentum, weight_decay, seed, amp and channels_last are read.
        epochs: length of the schedule.
        control: attached to ``model``; None trains in float.
        lambda_weights, lambda_acts: strength of BR.
        quiet: no progress bar even on a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        options: Any,
        device: torch.device,
        epochs: int,
        *,
        control: qbr.AlphaControl | None = None,
        lambda_weights: float = 0.0,
        lambda_acts: float = 0.0,
        quiet: bool = False,
    ) -> None:
        self.model, self.device, self.epochs, self.control, self.quiet = model, device, epochs, control, quiet
        self.lambda_weights, self.lambda_acts = lambda_weights, lambda_acts
        self.bf16 = options.amp == "bf16"
        self.channels_last = options.channels_last
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches = Batches(splits.train.to(device), options.batch_size, self.generator, self.channels_last)
        self.validation = splits.val.to(device)
        rates = {"lr": options.lr, "weight_decay": options.weight_decay}
        groups = qbr.parameter_groups(model, **rates) if control else [{"params": list(model.parameters()), **rates}]
        # The fused form skips a step on the device where found_inf says so: NaN never reaches the weights.
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs * len(self.batches))

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, as tensors and plain values."""
        on_cuda = self.device.type == "cuda"
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "control_state_dict": self.control.state_dict() if self.control else {},
            "rng": {
                "data": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if on_cuda else torch.empty(0, dtype=torch.uint8),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model_state_dict"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        if self.control:
            self.control.load_state_dict(state["control_state_dict"])
        self.generator.set_state(state["rng"]["data"])
        torch.set_rng_state(state["rng"]["torch"])
        if self.device.type == "cuda" and state["rng"]["cuda"].numel():
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on every batch once; return the epoch's figures, means over images.

        Returns:
            loss, ce, train_acc (percent), lr (of the first step), images_per_second, train_seconds; while BR is
            on also br_w, br_a (means over steps), br_w_start, br_w_end, br_a_start, br_a_end (first and last step)
            and br_layers {layer: mean over steps}.

        Raises:
            TrainingDiverged: on a NaN or infinity; the weights are those before the step that met it.
        """
        self.model.train()
        if self.control:
            self.control.begin_epoch(epoch)
        lr = self.optimizer.param_groups[0]["lr"]
        failed_at = torch.full((), -1, device=self.device)
        totals = torch.zeros(3, device=self.device)
        bins = _BinTotals()
        count = len(self.batches.labels)
        title = f"epoch {epoch}/{self.epochs}"
        start = time.perf_counter()
        with tqdm(total=count, desc=title, unit="img", leave=False, disable=True if self.quiet else None) as bar:
            for step, (x, y) in enumerate(self.batches):
                logits, ce, loss, bin_losses = self._forward(x, y)
                self.optimizer.zero_grad()
                loss.backward()
                failed_at = self._update(loss, step, failed_at)
                loss, ce = loss.detach(), ce.detach()
                totals += torch.stack([loss * len(y), ce * len(y), (logits.argmax(1) == y).sum()])
                bins.add(bin_losses)
                bar.update(len(y))
                if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(self.batches):
                    self._stop_if(failed_at, epoch)
        loss, ce, correct = totals.tolist()
        seconds = time.perf_counter() - start
        return {
            "loss": loss / count,
            "ce": ce / count,
            "train_acc": 100 * correct / count,
            "lr": lr,
            "images_per_second": count / seconds,
            "train_seconds": seconds,
            **bins.figures(),
        }

    def evaluate(self, split: ImageSet) -> tuple[float, float]:
        """Mean cross-entropy and accuracy in percent; one read of the device."""
        self.model.eval()
        totals = torch.zeros(2, device=self.device)
        with torch.no_grad():
            for x, y in Batches(split.to(self.device), EVAL_BATCH, channels_last=self.channels_last):
                logits = self._logits(x)
                totals += torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()])
        ce, correct = totals.tolist()
        return ce / len(split), 100 * correct / len(split)

    def _logits(self, x: Tensor) -> Tensor:
        context = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with context:
            return self.model(x).float()

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """logits [B, classes], CE and the whole loss (scalars in the graph), and qbr.bin_loss's result or None."""
        logits = self._logits(x)
        ce = F.cross_entropy(logits, y)
        if self.control is None or not self.control.br_active:
            return logits, ce, ce, None
        bins = qbr.bin_loss(self.model)
        return logits, ce, ce + self.lambda_weights * bins.weights + self.lambda_acts * bins.activations, bins

    def _update(self, loss: Tensor, step: int, failed_at: Tensor) -> Tensor:
        """One optimizer step unless this or an earlier one of the epoch was not finite; all on the device."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = (loss.detach() + nn.utils.get_total_norm(gradients)).isfinite()
        failed_at = torch.where(finite | (failed_at >= 0), failed_at, step)
        self.optimizer.found_inf = (failed_at >= 0).float()
        self.optimizer.step()
        self.scheduler.step()
        return failed_at

    def _stop_if(self, failed_at: Tensor, epoch: int) -> None:
        step = int(failed_at)
        if step >= 0:
            layer = self._first_not_finite(*self.batches.batch(step))
            raise TrainingDiverged(f"NaN or infinity in epoch {epoch}, step {step + 1}: first in {layer}")

    def _first_not_finite(self, x: Tensor, y: Tensor) -> str:
        """Where a NaN or infinity comes from: the failed step again, with a look at every module."""
        found: list[str] = []

        def look(name: str):
            def hook(_module, _inputs, output) -> None:
                if isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(f"the output of {name}")

            return hook

        self.model.train()
        leaves = [(name, module) for name, module in self.model.named_modules() if not list(module.children())]
        outer = [(name, module) for name, module in self.model.named_modules() if name and list(module.children())]
        hooks = [module.register_forward_hook(look(name)) for name, module in leaves + outer]
        _, ce, loss, bins = self._forward(x, y)
        for hook in hooks:
            hook.remove()
        if found:
            return found[0]
        if not ce.isfinite():
            return "the cross-entropy"
        if bins is not None and not loss.isfinite():
            names = [name for name, layer in bins.layers.items() if not layer.loss.isfinite()]
            return f"the bin regularization of {names[0]}" if names else "the sum of the losses"
        self.optimizer.zero_grad()
        loss.backward()
        # Gradients flow from the last layer to the first: the last bad one in forward order is where it began.
        names = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return f"the gradient of {names[-1]}" if names else "no layer when the step was repeated"


class _BinTotals:
    """BR's losses over an epoch, kept on the device until figures() reads them at once."""

    def __init__(self) -> None:
        self.steps, self.layers, self.total = 0, [], 0

    def add(self, bins: Any) -> None:
        if bins is None:
            return
        self.layers = list(bins.layers)
        sides = [bins.weights.detach(), bins.activations.detach()]
        self.last = torch.stack(sides + [layer.loss.detach() for layer in bins.layers.values()])
        if self.steps == 0:
            self.first = self.last
        self.total = self.total + self.last
        self.steps += 1

    def figures(self) -> dict[str, Any]:
        if self.steps == 0:
            return {}
        mean, first, last = torch.stack([self.total / self.steps, self.first, self.last]).tolist()
        figures = {"br_layers": dict(zip(self.layers, mean[2:]))}
        for index, side in enumerate(("br_w", "br_a")):
            figures.update({side: mean[index], f"{side}_start": first[index], f"{side}_end": last[index]})
        return figures
