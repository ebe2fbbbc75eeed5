"""The experiment scripts, run small on the CPU: files, figures, resumption, and what stops a run."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_data import make_folders

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
engine, models, options, report, runs = (
    importlib.import_module(f"cifar10.{name}") for name in ("engine", "models", "options", "report", "runs")
)
compare = importlib.import_module("compare")
baseline = importlib.import_module("cifar10_baseline").main
qat = importlib.import_module("cifar10_qat_br").main

TINY = ["--model", "resnet20", "--limit", "8", "--batch-size", "16", "--gpu", "-1"]
QAT = [*TINY, "--qat-epochs", "3", "--warmup-epochs", "1", "--lambda-br-act", "0.1"]
TIMINGS = {"images_per_second", "train_seconds", "seconds"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These batches are too small to share out, and a second thread that spins slows whatever runs beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def baseline_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    assert baseline([*TINY, "--epochs", "1", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def qat_flags(baseline_run):
    return [*QAT, "--pretrained-baseline", str(baseline_run / "checkpoints" / "best.pth")]


@pytest.fixture(scope="module")
def qat_run(qat_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat")
    assert qat([*qat_flags, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def no_report(monkeypatch):
    """Drawing the report takes longer than these runs, and has its own test."""
    monkeypatch.setattr(runs.report, "write", lambda folder: folder / "report.html")


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# What a run leaves behind


def test_results_say_what_ran_and_how_it_went(qat_run):
    results = _results(qat_run)
    assert results["status"] == "finished"
    assert results["command"].startswith("python experiments/cifar10_qat_br.py --model resnet20")
    assert results["options"]["num_bits_weight"] == 2 and results["options"]["momentum"] == 0.9
    assert results["versions"]["torch"] == torch.__version__
    assert results["data"]["train"] + results["data"]["val"] == 80
    epochs = results["epochs"]
    assert [e["phase"] for e in epochs] == ["warm-up", "BR", "BR"]
    assert "br_w" not in epochs[0] and epochs[1]["br_w"] > 0 and epochs[1]["br_a"] > 0
    assert len(epochs[2]["alphas"]) == 20 + 19  # a step for each call of a block's ReLU
    # Every call of a ReLU counts: 20 weights, the stem's ReLU, and two calls in each of nine blocks.
    assert len(epochs[2]["br_layers"]) == 20 + 1 + 18
    weights = sum(v for name, v in epochs[2]["br_layers"].items() if "relu" not in name)
    assert weights == pytest.approx(epochs[2]["br_w"], rel=1e-4)
    for epoch in epochs[1:]:
        assert epoch["loss"] == pytest.approx(epoch["ce"] + epoch["br_w"] + 0.1 * epoch["br_a"], rel=0.02)
    assert {"best", "last", "br_w", "br_a", "seconds"} <= set(results["final"])
    assert results["final"]["last"]["epoch"] == 3
    best = max(epochs[1:], key=lambda e: e["val_acc"])
    assert results["final"]["best"]["val_acc"] == best["val_acc"]


def test_the_best_epoch_is_one_with_br(qat_flags, tmp_path, no_report, monkeypatch):
    accuracies = iter([90.0, 60.0, 50.0, 40.0, 45.0])  # of three epochs, and on the test images of the last and best
    monkeypatch.setattr(runs.Trainer, "evaluate", lambda self, images: (1.0, next(accuracies)))
    assert qat([*qat_flags, "--output-dir", str(tmp_path)]) == 0
    final = _results(tmp_path)["final"]
    assert (final["best"]["epoch"], final["last"]["epoch"]) == (2, 3)
    assert torch.load(tmp_path / "checkpoints" / "best.pth", weights_only=True)["epoch"] == 2


def test_checkpoints_hold_plain_values_and_load_without_code(qat_run):
    for name in ("best", "last"):
        state = torch.load(qat_run / "checkpoints" / f"{name}.pth", weights_only=True)
        assert {"epoch", "model_state_dict", "optimizer_state_dict", "test_acc", "args"} <= set(state)
        assert type(state["args"]) is dict
        assert state["test_acc"] == _results(qat_run)["final"][name]["test_acc"]
    assert "layer3.2.conv2.weight_quantizer.alpha" in state["model_state_dict"]
    weights, alphas = state["optimizer_state_dict"]["param_groups"]
    assert (weights["weight_decay"], alphas["weight_decay"], weights["momentum"]) == (5e-4, 0.0, 0.9)


def test_report_is_made_again_from_the_saved_figures(qat_run, tmp_path):
    for name in ("results.json", "histograms.json"):
        shutil.copy(qat_run / name, tmp_path)
    page = report.write(tmp_path)
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert (
        names
        == {"losses", "accuracy", "bin_losses", "alphas", "weights"}
        == {path.stem for path in (qat_run / "plots").glob("*.png")}
    )
    assert page.read_text() == (qat_run / "report.html").read_text()
    assert page.read_text().count("data:image/png;base64,") == 5


def test_histograms_count_every_weight_before_and_after(qat_run):
    saved = json.loads((qat_run / "histograms.json").read_text())
    assert (saved["before"]["epoch"], saved["after"]["epoch"]) == (1, 3)
    for when in ("before", "after"):
        assert len(saved[when]["layers"]) == 20
        assert sum(saved[when]["layers"]["fc"]["counts"]) == 640


def test_epoch_lines_and_alpha_controls_are_printed(qat_flags, tmp_path, capsys, no_report):
    assert qat([*qat_flags, "--freeze-alpha", "--output-dir", str(tmp_path), "--tensorboard"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3 and "BR_W off  BR_A off" in lines[0]
    for word in ("loss", "CE", "acc", "val", "BR_W 0.", "BR_A ", "alpha_W", "alpha_A", "lr", "img/s"):
        assert word in lines[2]
    assert "no (frozen)" in printed and "comes with the repository" in printed
    epochs = _results(tmp_path)["epochs"]
    assert epochs[0]["alphas"] == epochs[1]["alphas"] == epochs[2]["alphas"]
    _check_tensorboard_tags(tmp_path / "tensorboard")


def test_a_float_network_can_be_trained_on(baseline_run, tmp_path, no_report):
    start = baseline_run / "checkpoints" / "best.pth"
    flags = [*TINY, "--epochs", "1", "--lr", "1e-30", "--output-dir", str(tmp_path)]
    assert baseline([*flags, "--pretrained-baseline", str(start)]) == 0
    before, after = (
        torch.load(folder / "checkpoints" / "best.pth", weights_only=True)["model_state_dict"]["fc.weight"]
        for folder in (baseline_run, tmp_path)
    )
    assert torch.equal(before, after)


def test_how_far_br_will_pull_is_told(qat_flags, tmp_path, capsys, no_report):
    assert qat([*qat_flags, "--output-dir", str(tmp_path / "faint"), "--lambda-br", "0.001"]) == 0
    told = capsys.readouterr().out
    assert "BR of weights: strength" in told and "0 % of the weights by a tenth or more; most bins" in told
    strong = ["--lambda-br", "1", "--regularizer", "dampening"]
    assert qat([*qat_flags, "--output-dir", str(tmp_path / "strong"), *strong]) == 0
    assert "dampening: strength" in capsys.readouterr().out


def test_what_bin_losses_add_to_the_loss_is_on_record(qat_flags, tmp_path, no_report):
    rising = ["--lambda-br-schedule", "cosine", "--drop-last"]  # batches of one size: means over steps are over images
    assert qat([*qat_flags, "--output-dir", str(tmp_path), *rising]) == 0
    _, first, second = _results(tmp_path)["epochs"]
    for epoch in (first, second):
        assert epoch["loss"] == pytest.approx(epoch["ce"] + epoch["br_w_term"] + epoch["br_a_term"], rel=1e-5)
    assert 0 < first["br_w_term"] < 0.5 * first["br_w"] and first["br_w_term"] < 0.5 * second["br_w_term"]


def test_a_step_size_that_leaps_within_an_epoch_is_told(tmp_path, capsys):
    lines = importlib.import_module("cifar10.lines")
    before = {"conv1": 0.01, "fc": 0.01, "relu": 0.5}
    assert lines.leaps(before, {"conv1": 0.029, "fc": 0.0034, "relu": 0.5, "new": 1.0}) == []
    (told,) = lines.leaps(before, {"conv1": 0.04, "fc": 0.001, "relu": 0.5})
    assert "alpha of fc went from 0.01 to 0.001 in this epoch, and 1 more leapt: too high an lr" in told


def _check_tensorboard_tags(folder: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    train = {f"Train/{t}" for t in ("Loss_Total", "Loss_CE", "Accuracy", "Loss_BR_Weight", "Loss_BR_Activation")}
    assert set(events.Tags()["scalars"]) == train | {"Test/Loss", "Test/Accuracy", "Val/Loss", "Val/Accuracy"}
    assert len(events.Scalars("Train/Loss_BR_Weight")) == 2


def test_every_fifth_epoch_tensorboard_gets_distributions(tmp_path):
    pytest.importorskip("tensorboard")
    logs = importlib.import_module("cifar10.logs")
    import qbr

    model = qbr.prepare(models.resnet20())
    board = logs.TensorBoard(tmp_path, 1)
    seen = []
    board.writer.add_histogram = lambda tag, *_: seen.append(tag)
    figures = dict.fromkeys(("loss", "ce", "train_acc", "val_loss", "val_acc"), 1.0)
    board.epoch({"epoch": 4, **figures}, model, torch.randn(2, 3, 32, 32))
    assert not seen
    board.epoch({"epoch": 5, **figures}, model, torch.randn(2, 3, 32, 32))
    board.close()
    assert {"Weights/fc", "Weights_Quantized/fc", "Activations/layer1.0.relu"} <= set(seen)


def test_quick_trains_its_own_baseline_first(tmp_path, capsys, no_report):
    flags = ["--quick", "--limit", "8", "--batch-size", "40", "--gpu", "-1", "--output-dir", str(tmp_path)]
    assert qat([*flags, "--num-bits-act", "32"]) == 0
    printed = capsys.readouterr().out
    assert "quantized test accuracy" in printed and f"report: {tmp_path / 'report.html'}" in printed
    assert "BR phase, first step -> last step: BR_W 0." in printed
    assert _results(tmp_path / "baseline")["status"] == _results(tmp_path)["status"] == "finished"
    assert not any(name.endswith("relu.quantizer") for name in _results(tmp_path)["epochs"][-1]["alphas"])


# Resumption


def _stop_in_epoch(monkeypatch, epoch: int, step: int) -> None:
    """The next run is interrupted in the middle of that epoch, as by a kill."""
    original = engine.Trainer._update

    def update(self, loss, at, failed_at):
        if self.model.training and self.epoch_now == epoch and at == step:
            raise KeyboardInterrupt
        return original(self, loss, at, failed_at)

    begin = engine.Trainer.train_epoch

    def train_epoch(self, number):
        self.epoch_now = number
        return begin(self, number)

    monkeypatch.setattr(engine.Trainer, "train_epoch", train_epoch)
    monkeypatch.setattr(engine.Trainer, "_update", update)


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a if k not in TIMINGS)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(qat_flags, qat_run, tmp_path, monkeypatch, no_report):
    flags = [*qat_flags, "--output-dir", str(tmp_path)]
    for epoch, step in ((1, 3), (2, 2), (3, 4)):
        with monkeypatch.context() as patch:
            _stop_in_epoch(patch, epoch, step)
            assert qat([*flags, "--resume"]) == 130
    assert qat(["--output-dir", str(tmp_path), "--resume"]) == 0  # what is left out comes from the checkpoint
    for name in ("best", "last"):
        there, here = (
            torch.load(folder / "checkpoints" / f"{name}.pth", weights_only=True) for folder in (qat_run, tmp_path)
        )
        for state in (there, here):
            for flag in options.FREE_ON_RESUME:
                state["args"].pop(flag)
        assert _equal(there, here)
    assert _equal(_results(qat_run)["epochs"], _results(tmp_path)["epochs"])
    assert _equal(_results(qat_run)["final"], _results(tmp_path)["final"])


def test_resuming_a_finished_run_changes_nothing(qat_run, capsys, no_report):
    before = (qat_run / "checkpoints" / "last.pth").read_bytes()
    assert qat(["--output-dir", str(qat_run), "--resume"]) == 0
    assert (qat_run / "checkpoints" / "last.pth").read_bytes() == before
    assert "quantized test accuracy" in capsys.readouterr().out


def test_resuming_with_other_flags_is_refused(qat_run, capsys):
    assert qat(["--output-dir", str(qat_run), "--resume", "--lr", "0.5", "--num-bits", "4"]) == 2
    message = capsys.readouterr().err
    assert "--lr 0.5 (was 0.01)" in message and "--num-bits-weight 4 (was 2)" in message


def test_a_baseline_goes_on_where_its_data_has_moved_to(tmp_path, monkeypatch, capsys, no_report):
    here, moved, other = (tmp_path / name for name in ("data", "moved", "other"))
    make_folders(here, per_class=8), make_folders(other, per_class=6)
    run, flags = tmp_path / "run", [*TINY, "--epochs", "2", "--val-fraction", "0", "--resume"]
    flags += ["--output-dir", str(run)]
    with monkeypatch.context() as patch:
        _stop_in_epoch(patch, 2, 0)
        assert baseline([*flags, "--data", str(here)]) == 130
    here.rename(moved)
    assert baseline([*flags, "--data", str(other)]) == 2
    assert "its images are {'train': 12, 'val': 0, 'test': 12}, and the run in" in capsys.readouterr().err
    assert baseline([*flags, "--data", str(moved)]) == 0
    results = _results(run)
    assert len(results["epochs"]) == 2 and results["options"]["data"] == str(moved)
    assert compare.row(run)[3] == "–"  # no validation images
    for content, message in (("[1]", "is none of a run"), ('{"status": "running"}', "says running: finish the run")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            compare.row(tmp_path)


def test_a_folder_that_holds_a_run_is_not_overwritten_by_accident(qat_run, qat_flags, capsys):
    before = (qat_run / "results.json").read_bytes()
    assert qat([*qat_flags, "--output-dir", str(qat_run)]) == 2
    assert "--resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert (qat_run / "results.json").read_bytes() == before


def test_a_run_from_before_a_flag_was_there_goes_on_as_it_began(tmp_path):
    flags = ["--output-dir", str(tmp_path), "--num-bits", "2", "--num-bits-first", "8", "--num-bits-last", "8"]
    began, _ = options.parse(options.qat_parser(), flags)
    new = {"br_first_last", "regularizer", "lambda_br_schedule", "lr_alpha_first_last"}
    saved = {name: value for name, value in options.plain(began).items() if name not in new}
    for given in ([], ["--br-first-last"], ["--regularizer", "br"]):
        goes_on = options.resumed(*options.parse(options.qat_parser(), [*flags, *given, "--resume"]), saved)
        assert goes_on.br_first_last and options.without_br(goes_on, models.resnet20()) == ()
    with pytest.raises(options.UserError, match="--regularizer dampening .was br.: a run goes on as it began"):
        options.resumed(*options.parse(options.qat_parser(), [*flags, "--regularizer", "dampening", "--resume"]), saved)
    assert options.without_br(began, models.resnet20()) == ("conv1", "fc")


def test_the_other_script_s_checkpoint_is_not_resumed(baseline_run, capsys):
    assert qat(["--output-dir", str(baseline_run), "--resume"]) == 2
    assert "not a checkpoint of cifar10_qat_br.py" in capsys.readouterr().err


# What stops a run


def test_nan_stops_the_run_names_the_layer_and_keeps_the_checkpoint(qat_flags, tmp_path, monkeypatch, capsys):
    begin = engine.Trainer.train_epoch

    def poisoned(self, epoch):
        if epoch == 2:
            with torch.no_grad():
                self.model.layer2[1].conv1.weight[0, 0, 0, 0] = float("nan")
        return begin(self, epoch)

    monkeypatch.setattr(engine.Trainer, "train_epoch", poisoned)
    assert qat([*qat_flags, "--output-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "epoch 2, step 1" in message and "layer2.1.conv1" in message and "last.pth (epoch 1)" in message
    state = torch.load(tmp_path / "checkpoints" / "last.pth", weights_only=True)
    assert state["epoch"] == 1 and all(t.isfinite().all() for t in state["model_state_dict"].values())
    results = _results(tmp_path)
    assert results["status"] == "diverged" and len(results["epochs"]) == 1


def _trainer(**changes) -> engine.Trainer:
    values = vars(options.parse(options.baseline_parser(), [*TINY, "--output-dir", "x"])[0]) | changes
    splits = importlib.import_module("cifar10.data").load(None, limit=8)
    torch.manual_seed(0)
    return engine.Trainer(models.resnet20(), splits, argparse.Namespace(**values), torch.device("cpu"), 2, quiet=True)


def test_a_bad_gradient_never_reaches_the_weights():
    trainer = _trainer()
    steps = []

    def blow_up(grad):
        steps.append(1)
        return grad * float("inf") if len(steps) >= 3 else grad

    trainer.model.layer2[0].conv2.weight.register_hook(blow_up)
    with pytest.raises(engine.TrainingDiverged, match=r"step 3: first in the gradient of layer2.0.conv2.weight"):
        trainer.train_epoch(1)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(b.isfinite().all() for s in trainer.optimizer.state.values() for b in s.values())


def test_an_epoch_reads_the_device_a_fixed_number_of_times():
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountReads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for batch_size in (24, 8):
        trainer = _trainer(batch_size=batch_size)
        trainer.train_epoch(1)  # the first step makes the momentum buffers
        with CountReads() as mode:
            trainer.train_epoch(2)
        counts.append(mode.reads)
    assert counts[0] == counts[1]
