"""ResNet-18 and ResNet-20 for 32x32 images, with the module names that checkpoints of either kind use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class SubsampleShortcut(nn.Module):
    """He et al.'s option A: every second pixel, and zeros for the channels that are new; no parameters.

    forward: [B, C, H, W] -> [B, outputs, ceil(H / 2), ceil(W / 2)], any float dtype.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.padding)


class BasicBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus the shortcut, relu; one ``relu`` module serves both places, as in torchvision.

    forward: [B, inputs, H, W] -> [B, outputs, H / stride, W / stride], any float dtype.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + identity)


class ResNet(nn.Module):
    """A CIFAR ResNet of basic blocks: 3x3 stride-1 stem, no max-pool, global average pool, one linear layer.

    Args:
        widths: channels of each stage; every stage after the first halves the resolution.
        blocks: basic blocks in a stage.
        projection: True for 1x1 convolution shortcuts (ResNet-18), False for option A (ResNet-20).
        num_classes: outputs of ``fc``.

    forward: images [B, 3, 32, 32] -> logits [B, num_classes], any float dtype.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016; section 4.2 for ResNet-20.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, projection: bool, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        inputs = widths[0]
        self.stages = []
        for number, outputs in enumerate(widths, start=1):
            stage = []
            for index in range(blocks):
                stride = 2 if index == 0 and number > 1 else 1
                stage.append(BasicBlock(inputs, outputs, stride, _shortcut(inputs, outputs, stride, projection)))
                inputs = outputs
            self.stages.append(f"layer{number}")
            self.add_module(self.stages[-1], nn.Sequential(*stage))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _shortcut(inputs: int, outputs: int, stride: int, projection: bool) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if projection:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    return SubsampleShortcut(inputs, outputs)


def resnet18(num_classes: int = 10) -> ResNet:
    """torchvision's ResNet-18 with a 3x3 stride-1 stem and no max-pool: 11.2 million parameters for ten classes."""
    return ResNet((64, 128, 256, 512), blocks=2, projection=True, num_classes=num_classes)


def resnet20(num_classes: int = 10) -> ResNet:
    """ResNet-20 with option A shortcuts: 0.27 million parameters for ten classes."""
    return ResNet((16, 32, 64), blocks=3, projection=False, num_classes=num_classes)


MODELS = {"resnet18": resnet18, "resnet20": resnet20}


def first_and_last(model: nn.Module) -> tuple[str, str]:
    """Names of the first and of the last layer with a weight, in the order in which the model holds them."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return layers[0], layers[-1]
