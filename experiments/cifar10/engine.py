"""The training loop: one epoch and one evaluation, with figures that stay on the device until the epoch ends."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import qbr
from qbr.quantizers import quantizers

from . import distillation, optim, processes
from .data import Batches, ImageSet, Splits
from .files import UserError

CHECK_EVERY = 100  # steps between looks at the non-finite flag; each look waits for the device once
EVAL_BATCH = 500
CALIBRATION_BATCHES = 8
NOT_AGAIN = "no layer when the step was repeated"


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the layer."""


def check_batches(images: int, options: Any) -> None:
    """Raise UserError unless ``images`` training images make batches that every process has a share of."""
    if images == 0:
        raise UserError("--val-fraction and --limit leave no training images; lower the first or raise the second")
    batch, of = options.batch_size, processes.world()
    if options.drop_last and images < batch:
        raise UserError(
            f"--batch-size {batch} --drop-last: the training set has {images} images, no whole batch; lower the first "
            "or give --no-drop-last"
        )
    smallest = batch if options.drop_last else images % batch or batch
    if smallest < of:
        raise UserError(
            f"--batch-size {batch}: the last batch of an epoch has {smallest} images, fewer than the {of} processes "
            "that share it; choose another"
        )


class Trainer:
    """Model, optimizer, schedule and data of one run, and everything that a resumption must restore.

    SGD with momentum, no weight decay on alphas (they have their own group), and a schedule from lr to 0 over all
    steps (optim.py). The figures of an epoch are added up on the device and read once. Under torchrun the processes
    share every batch, and all of them call the same methods.

    Args:
        model: on ``device``; for quantization-aware training already prepared by qbr.
        splits: sets on the CPU; training and validation images are moved to ``device`` here.
        options: those of the optimizer, the schedule and the batches are read, seed, amp, channels_last, compile and
            label_smoothing.
        epochs: length of the schedule.
        control: attached to ``model``; None trains in float.
        lambda_weights, lambda_acts: strength of BR.
        teacher: what --distill's share of the loss compares with, on ``device``; None to train on labels alone.
        global_bins: under torchrun, BR of activations over the whole batch instead of over each process's share.
        skip: layers that BR leaves alone, as qbr.bin_loss takes them.
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
        teacher: nn.Module | None = None,
        global_bins: bool = True,
        skip: Sequence[str] = (),
        quiet: bool = False,
    ) -> None:
        self.model, self.device, self.epochs, self.control, self.quiet = model, device, epochs, control, quiet
        self.lambda_weights, self.lambda_acts, self.global_bins = lambda_weights, lambda_acts, global_bins
        self.skip = skip
        self.teacher, self.distill = teacher, options.distill if teacher is not None else 0.0
        self.bf16 = options.amp == "bf16"
        self.channels_last = options.channels_last
        self.generator = torch.Generator().manual_seed(options.seed)
        self.smoothing = options.label_smoothing
        self.batches = Batches(
            splits.train.to(device), options.batch_size, self.generator, self.channels_last, options.drop_last
        )
        self.validation = splits.val.to(device)
        self.net = processes.parallel(model, device)  # what training calls
        self.optimizer = optim.sgd(model, options, quantized=control is not None)
        self.scheduler = optim.schedule(self.optimizer, options, epochs * len(self.batches))
        self.compiled = optim.compiled(self._forward, options.compile)
        steps = len(self.batches)
        self.rises = control and optim.rise(options.lambda_br_schedule, options.warmup_epochs * steps, epochs * steps)
        self.rise = torch.ones((), device=device)  # of both lambdas; a tensor, so that no step is compiled anew

    def calibrate(self, method: str) -> None:
        """Set every alpha from the first batches of the first epoch, which is drawn again afterwards."""
        before = self.generator.get_state()
        first = itertools.islice(self.batches, CALIBRATION_BATCHES)
        self.model.train()
        qbr.calibrate(self.model, (images for images, _ in first), method=method)
        self.generator.set_state(before)

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on, as tensors and plain values."""
        on_cuda = self.device.type == "cuda"
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "control_state_dict": self.control.state_dict() if self.control else {},
            "config": asdict(self.model.qat_config) if self.control else None,  # for python -m qbr
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
            on also br_w, br_a (means over steps), br_w_start, br_w_end, br_a_start, br_a_end (first and last step),
            br_w_term, br_a_term (what they add to the loss, means over steps) and br_layers {layer: mean over steps}.

        Raises:
            TrainingDiverged: on a NaN or infinity; the weights are those before the step that met it.
        """
        self.model.train()
        if self.control:
            self.control.begin_epoch(epoch)
        lr = self.optimizer.param_groups[0]["lr"]
        failed_at = torch.full((), -1, device=self.device)
        totals = torch.zeros(3, device=self.device)
        bins = _BinTotals(torch.tensor([self.lambda_weights, self.lambda_acts], device=self.device))
        count = self.batches.count
        alphas_set = all(quantizer.initialised for quantizer in quantizers(self.model).values())
        title = f"epoch {epoch}/{self.epochs}"
        start = time.perf_counter()
        with tqdm(total=count, desc=title, unit="img", leave=False, disable=True if self.quiet else None) as bar:
            for step, (x, y) in enumerate(self.batches):
                # A forward that sets the alphas would be a graph of its own, for one step.
                forward = self.compiled if alphas_set or step else self._forward
                if self.rises:
                    self.rise.fill_(self.rises((epoch - 1) * len(self.batches) + step))
                logits, ce, loss, bin_losses = forward(self.net, x, y, self.batches.size(step), self.br_active)
                self.optimizer.zero_grad()
                loss.backward()
                failed_at = self._update(loss, step, failed_at)
                loss, ce = loss.detach(), ce.detach()
                mine = len(y) if self.net is self.model else self.batches.size(step) / processes.world()
                totals += torch.stack([loss * mine, ce * len(y), (logits.argmax(1) == y).sum()])
                bins.add(bin_losses, self.rise)
                bar.update(self.batches.size(step))
                if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(self.batches):
                    self._stop_if(failed_at, epoch)
        loss, ce, correct = processes.total(totals).tolist()
        processes.as_on_main(self.model)
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
                if len(y) == 0:
                    continue
                logits = self._logits(self.model, x)
                totals += torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()])
        ce, correct = processes.total(totals).tolist()
        return ce / len(split), 100 * correct / len(split)

    @property
    def br_active(self) -> bool:
        return self.control is not None and self.control.br_active

    def _logits(self, net: nn.Module, x: Tensor) -> Tensor:
        context = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with context:
            return net(x).float()

    def _forward(
        self, net: nn.Module, x: Tensor, y: Tensor, images: int, br: bool
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """logits [B, classes], CE and the whole loss (scalars in the graph), and qbr.bin_loss's result or None.

        images: in the whole batch, of which x and y are this process's share. Gradients are averaged over the
        processes, so that the loss weighs a share by its size. br: whether the loss has BR.
        """
        logits = self._logits(net, x)
        ce = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        task = ce
        if self.teacher is not None:
            with torch.no_grad():
                soft = self._logits(self.teacher, x)
            task = torch.lerp(ce, distillation.loss(logits, soft), self.distill)
        weighed = task if self.net is self.model else task * (len(y) * processes.world() / images)
        if not br:
            return logits, ce, weighed, None
        bins = qbr.bin_loss(self.model, global_bins=self.global_bins, skip=self.skip)
        br = self.lambda_weights * bins.weights + self.lambda_acts * bins.activations
        return logits, ce, weighed + (self.rise * br if self.rises else br), bins

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
        step = int(processes.largest(failed_at))
        if step >= 0:
            layers = processes.each(self._first_not_finite(*self.batches.batch(step), self.batches.size(step)))
            layer = next((each for each in layers if each != NOT_AGAIN), NOT_AGAIN)
            raise TrainingDiverged(f"NaN or infinity in epoch {epoch}, step {step + 1}: first in {layer}")

    def _first_not_finite(self, x: Tensor, y: Tensor, images: int) -> str:
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
        _, ce, loss, bins = self._forward(self.model, x, y, images, self.br_active)
        for hook in hooks:
            hook.remove()
        if found:
            return found[0]
        if not ce.isfinite():
            return "the cross-entropy"
        if not loss.isfinite():
            layers = {} if bins is None else bins.layers
            names = [name for name, layer in layers.items() if not layer.loss.isfinite()]
            return f"the bin regularization of {names[0]}" if names else "the sum of the losses"
        self.optimizer.zero_grad()
        loss.backward()
        # Gradients flow from the last layer to the first: the last bad one in forward order is where it began.
        names = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return f"the gradient of {names[-1]}" if names else NOT_AGAIN


class _BinTotals:
    """BR's losses over an epoch, kept on the device until figures() reads them at once."""

    def __init__(self, lambdas: Tensor) -> None:
        self.lambdas = lambdas  # of weights, of activations
        self.steps, self.layers, self.total, self.terms = 0, [], 0, 0

    def add(self, bins: Any, rise: Tensor) -> None:
        if bins is None:
            return
        self.layers = list(bins.layers)
        sides = [bins.weights.detach(), bins.activations.detach()]
        self.last = torch.stack(sides + [layer.loss.detach() for layer in bins.layers.values()])
        if self.steps == 0:
            self.first = self.last
        self.total = self.total + self.last
        self.terms = self.terms + rise * self.lambdas * self.last[:2]
        self.steps += 1

    def figures(self) -> dict[str, Any]:
        if self.steps == 0:
            return {}
        rows = [self.total / self.steps, self.first, self.last, self.terms / self.steps]
        read = (processes.total(torch.cat(rows)) / processes.world()).split([len(row) for row in rows])
        mean, first, last, terms = (row.tolist() for row in read)
        figures = {"br_layers": dict(zip(self.layers, mean[2:]))}
        for index, side in enumerate(("br_w", "br_a")):
            figures.update({side: mean[index], f"{side}_start": first[index], f"{side}_end": last[index]})
            figures[f"{side}_term"] = terms[index]
        return figures
