"""TensorBoard under the predecessor's tags: scalars every epoch, histograms every fifth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qbr

from .files import UserError

HISTOGRAMS_EVERY = 5  # epochs


def check_installed() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install tensorboard, or leave the flag out") from error


class TensorBoard:
    """Writes one run's logs to ``folder``; epochs from ``first_epoch`` on replace what an earlier process wrote.

    Test/ holds the test figures of the best and the last epoch, once, at the end; validation is under Val/.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, figures: dict[str, Any], model: nn.Module, images: Tensor) -> None:
        """One epoch's figures; every fifth epoch also the distributions, activations those of ``images``."""
        epoch = figures["epoch"]
        tags = {"Loss_Total": "loss", "Loss_CE": "ce", "Accuracy": "train_acc"}
        tags |= {"Loss_BR_Weight": "br_w", "Loss_BR_Activation": "br_a"}
        for tag, key in tags.items():
            self._scalar(f"Train/{tag}", figures.get(key), epoch)
        self._scalar("Val/Loss", figures["val_loss"], epoch)
        self._scalar("Val/Accuracy", figures["val_acc"], epoch)
        if epoch % HISTOGRAMS_EVERY == 0:
            self._distributions(epoch, model, images)
        self.writer.flush()

    def test(self, epoch: int, loss: float, accuracy: float) -> None:
        self._scalar("Test/Loss", loss, epoch)
        self._scalar("Test/Accuracy", accuracy, epoch)

    def close(self) -> None:
        self.writer.close()

    def _scalar(self, tag: str, value: float | None, epoch: int) -> None:
        if value is not None:
            self.writer.add_scalar(tag, value, epoch)

    @torch.no_grad()
    def _distributions(self, epoch: int, model: nn.Module, images: Tensor) -> None:
        model.eval()
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, (qbr.QuantizedConv2d, qbr.QuantizedLinear)):
                self.writer.add_histogram(f"Weights/{name}", module.weight, epoch)
                self.writer.add_histogram(f"Weights_Quantized/{name}", module.weight_quantizer(module.weight), epoch)
            elif isinstance(module, qbr.QuantizedClippedReLU):
                hooks.append(module.register_forward_hook(self._activations(name, epoch)))
            elif isinstance(module, qbr.LSQQuantizer):
                self.writer.add_scalar(f"Alpha/{name}", module.alpha.mean(), epoch)
        if hooks:
            model(images)
        for hook in hooks:
            hook.remove()

    def _activations(self, name: str, epoch: int):
        """Before quantization; of a module that is called more than once, the last call."""

        def hook(module: qbr.QuantizedClippedReLU, inputs: tuple[Tensor], _output: Tensor) -> None:
            self.writer.add_histogram(f"Activations/{name}", inputs[0].clamp(0, module.clip_value), epoch)

        return hook
