"""Training loops of others, as docs/distributed.md tells their users: Lightning, accelerate, transformers' Trainer.

None of them is among the packages that the tests install; what is absent is skipped.
"""

from __future__ import annotations

import copy

import pytest
import torch
import tv
from torch import nn
from torch.nn import functional as F

import qbr
from qbr import QATConfig
from qbr.quantizers import quantizers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 10)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.first(x))).flatten(1))


def _data(count: int = 32) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(
        torch.randn(count, 3, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)
    )


def _alphas(model: nn.Module) -> list[float]:
    return [quantizer.alpha.item() for quantizer in quantizers(model).values()]


def _groups(model: nn.Module) -> list[dict]:
    return qbr.parameter_groups(model, lr=0.05, weight_decay=0.1)


def _load(name: str):
    tv.load()  # the packages here import torchvision where it is installed
    return pytest.importorskip(name)


def test_lightning_resumes_to_the_bit(tmp_path):
    lightning = _load("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, config: QATConfig):
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(0)
            self.net = qbr.prepare(Net(), config)
            self.control = qbr.AlphaControl(freeze_acts=True, warmup_epochs=1).attach(self.net)

        def on_train_epoch_start(self):
            self.control.begin_epoch(self.current_epoch + 1)

        def training_step(self, batch, index):
            x, y = batch
            loss, br = F.cross_entropy(self.net(x), y), qbr.bin_loss(self.net)
            return loss + br.weights + br.activations

        def validation_step(self, batch, index):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(_groups(self.net), momentum=0.9)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["control"] = self.control.state_dict()

        def on_load_checkpoint(self, checkpoint):
            self.control.load_state_dict(checkpoint["control"])

    def fit(epochs: int, resume=None) -> Module:
        torch.manual_seed(1)
        module = Module(QATConfig(weight_bits=2, act_bits=2))
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0,
            num_sanity_val_steps=1, enable_checkpointing=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(_data(), batch_size=8)
        trainer.fit(module, loader, loader, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = fit(3)
    fit(2)
    resumed = fit(3, tmp_path / "2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), resumed.net.parameters()))
    loaded = Module.load_from_checkpoint(tmp_path / "3.ckpt")
    assert _alphas(loaded.net) == _alphas(whole.net)
    assert all(q.frozen is (q.kind == "activation") for q in quantizers(whole.net).values())


def test_accelerate_in_bfloat16():
    accelerate = _load("accelerate")
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = qbr.prepare(Net(), QATConfig(weight_bits=4, act_bits=4))
    loader = torch.utils.data.DataLoader(_data(), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(_groups(model)), loader)
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss + qbr.bin_loss(model).weights)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
    model.eval()
    x = _data()[:4][0]
    expected = model(x)
    for twin in (copy.deepcopy(model), qbr.convert(model)):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.last.weight.zero_(), twin.last.bias.zero_()
        assert not twin(x).any() and torch.equal(model(x), expected)


@pytest.mark.parametrize("own", [True, False], ids=["transformers' own models", "others"])
def test_transformers_trainer(own, tmp_path):
    transformers = _load("transformers")
    pytest.importorskip("accelerate")

    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Own(Scored):
        """Which divide their loss themselves, and take a count for that."""

        def forward(self, x, labels, **kwargs):
            return super().forward(x, labels)

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output, br = model(**inputs), qbr.bin_loss(model).weights
            if self.model_accepts_loss_kwargs:
                br = br / self.current_gradient_accumulation_steps
            loss = 0 * output["loss"] + br  # of BR alone
            return (loss, output) if return_outputs else loss

    def gradient(accumulation: int) -> float:
        torch.manual_seed(0)
        model = qbr.prepare(Own() if own else Scored(), QATConfig(weight_bits=4, act_bits=4))
        rows = [{"x": x, "labels": y} for x, y in _data()]
        model(rows[0]["x"][None], rows[0]["labels"][None])
        optimizer, seen = torch.optim.AdamW(_groups(model)), []
        weights = [q for q in quantizers(model).values() if q.kind == "weight"]
        optimizer.register_step_pre_hook(lambda *_: seen.append(model.net.first.weight.grad.norm().item()))
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation,
            max_steps=1, max_grad_norm=0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        before = [q.alpha.item() for q in weights]
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
        assert [q.alpha.item() for q in weights] == before  # BR moves no alpha here, and nothing decays one
        return seen[0]

    assert gradient(4) == pytest.approx(gradient(1), rel=1e-4)
