"""What a user writes, for test_typing.py: a type checker reads it in its strict mode, and it runs."""

import torch
from torch import nn

import qbr
from qbr import QuantSpec, functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.relu(self.conv(x)).flatten(1))
        return y


def train(images: torch.Tensor, labels: torch.Tensor) -> float:
    config = qbr.QATConfig(weight_bits=2, act_bits=2, skip=["fc"], overrides={"conv": {"weight_bits": 4}})
    model: Net = qbr.prepare(Net(), config)
    model = qbr.calibrate(model, [images], method="mse", forward=lambda net, batch: net(batch))
    control = qbr.AlphaControl(warmup_epochs=1, freeze_weights=True, freeze_acts=qbr.Freeze(epoch=3)).attach(model)
    optimizer = torch.optim.SGD(qbr.parameter_groups(model, lr=0.01, weight_decay=5e-4), momentum=0.9)
    control.begin_epoch(1)
    loss = nn.functional.cross_entropy(model(images), labels)
    br = qbr.bin_loss(model, skip=["conv"])
    total: torch.Tensor = loss + 1.0 * br.weights + 0.1 * br.activations
    total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with qbr.Monitor(model) as monitor:
        figures = monitor.read(reset=True)
    for name, row in figures.items():
        print(name, row.alpha, row.loss)
    print(qbr.summary(model), qbr.plan(Net(), config), control.describe(), qbr.backends())
    plain: nn.Module = qbr.convert(model)
    return float(plain(images).detach().sum())


def tensors(x: torch.Tensor, alpha: torch.Tensor) -> int:
    spec = QuantSpec(bits=2, channel_axis=0)
    xhat, loss, bins = functional.fake_quantize_with_bin_loss(x, alpha, spec, backprop_to_alpha="scaled")
    many = functional.foreach_fake_quantize([x, xhat], [alpha, 0.5], [spec, QuantSpec(4)], alpha_grad=[1.0, 0.5])
    with qbr.use_backend("reference"):
        more = functional.foreach_bin_loss([x], [alpha], spec, backprop_to_alpha=[0.5])
    quantizer = qbr.LSQ_ActivationQuantizer(4, signed=True)
    quantizer.set_alpha(0.5)
    quantizer.init_state.fill_(1)
    regularizer = qbr.BinRegularizer(num_bits=2)
    br, mse, var, info = regularizer.compute_bin_loss(x, quantizer.alpha)
    print(loss, bins.counts, many[0], more[0].loss, br, mse, var, info["bins_used"])
    return spec.qp - spec.qn + len(spec.codes)


def wrong(model: Net) -> None:
    """Each line is an error to the type checker, or its comment is one (warn_unused_ignores)."""
    qbr.prepare("model")  # type: ignore[type-var]
    qbr.QATConfig(weight_bits="2")  # type: ignore[arg-type]
    qbr.AlphaControl(warmup_epochs="1")  # type: ignore[arg-type]
    functional.foreach_fake_quantize([torch.ones(1)], [0.5], "spec")  # type: ignore[arg-type]
    qbr.parameter_groups(model, lr="0.1", weight_decay=0.0)  # type: ignore[arg-type]
    bits: str = QuantSpec(2).qp  # type: ignore[assignment]
    print(bits)
