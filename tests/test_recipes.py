"""The recipes of the experiments: what they set, each ingredient, compiled steps, and the GPU stages that use them."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from guards import no_host_reads

import qbr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
data, engine, optim, options, recipes, runs = (
    importlib.import_module(f"cifar10.{name}") for name in ("data", "engine", "optim", "options", "recipes", "runs")
)
baseline, qat = (importlib.import_module(f"cifar10_{name}").main for name in ("baseline", "qat_br"))
PARSERS = {"baseline": (options.baseline_parser, recipes.BASELINE), "qat": (options.qat_parser, recipes.QAT)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    yield from tiny.small(monkeypatch, runs, optim)


def _state(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.pth", weights_only=True)


def _parse(script: str, *flags: str) -> argparse.Namespace:
    return options.parse(PARSERS[script][0](), ["--output-dir", "x", *flags])[0]


def _trainer(*flags: str, epochs: int = 3, device: str = "cpu") -> engine.Trainer:
    o = _parse("qat", *tiny.QAT, *flags)
    torch.manual_seed(o.seed)
    model = qbr.prepare(tiny.model(10), qbr.QATConfig(weight_bits=2, act_bits=2, step_per_call=o.step_per_call))
    control = qbr.AlphaControl(freeze_acts=options.freeze(o, "act"), warmup_epochs=1)
    model.to(device, memory_format=torch.channels_last)
    splits = data.load(None, limit=8)
    return engine.Trainer(
        model, splits, o, torch.device(device), epochs, control=control.attach(model), lambda_weights=1.0,
        lambda_acts=0.1, quiet=True,
    )  # fmt: skip


# What a recipe is


def test_a_relu_that_is_called_twice_has_one_step_or_two(tmp_path):
    for flags, steps in (([], 2), (["--no-step-per-call"], 1)):
        folder = tmp_path / str(len(flags))
        once = ["--qat-epochs", "1", "--warmup-epochs", "1", "--compile", "none", "--output-dir", str(folder)]
        assert qat([*tiny.QAT, *flags, *once]) == 0
        names = _state(folder)["model_state_dict"]
        assert sum(name.startswith("2.quantizer") and name.endswith("alpha") for name in names) == steps


def test_first_step_sizes_of_the_least_squared_error(tmp_path):
    trainer, again = _trainer(), _trainer()
    drawn = list(again.batches)  # all of the first epoch: 5 batches
    again.model.train()
    qbr.calibrate(again.model, [x for x, _ in drawn[: engine.CALIBRATION_BATCHES]], method="mse")
    trainer.calibrate("mse")
    assert tiny.equal(trainer.model.state_dict(), again.model.state_dict())
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(trainer.batches, drawn, strict=True))
    folders = [tmp_path / name for name in ("lsq", "mse", "killed")]
    still = [*tiny.QAT, "--lr", "1e-30", "--compile", "none"]
    assert qat([*still, "--output-dir", str(folders[0])]) == 0
    assert qat([*still, "--alpha-init", "mse", "--output-dir", str(folders[1])]) == 0
    before, after = (json.loads((f / "results.json").read_text())["epochs"][-1]["alphas"] for f in folders[:2])
    assert before.keys() == after.keys() and not any(before[name] == after[name] for name in before)
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt(patch, engine, after=12)
        assert qat([*still, "--alpha-init", "mse", "--output-dir", str(folders[2])]) == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(engine.Trainer, "calibrate")  # a run that goes on has its step sizes
        assert qat(["--resume", "--output-dir", str(folders[2])]) == 0
    assert tiny.equal(_state(folders[1])["model_state_dict"], _state(folders[2])["model_state_dict"])


def test_first_and_last_layer_have_bits_of_their_own_in_the_checkpoint_too(tmp_path):
    flags = ["--num-bits", "3", "--num-bits-first", "8", "--num-bits-last", "32", "--qat-epochs", "1"]
    assert qat([*tiny.QAT, *flags, "--output-dir", str(tmp_path)]) == 0
    checkpoint = qbr.export.read_checkpoint(tmp_path / "checkpoints" / "last.pth")
    weights = {name: spec.bits for name, spec in checkpoint.specs.items() if spec.signed}
    assert weights == {"0.weight_quantizer": 8, "3.weight_quantizer": 3}
    assert all(spec.bits == 3 for spec in checkpoint.specs.values() if not spec.signed)
    qbr.prepare(tiny.model(10), checkpoint.config).load_state_dict(checkpoint.state)
    with pytest.raises(options.UserError, match="--num-bits-last 9: expected 1 to 8, or 32"):
        _parse("qat", "--num-bits-last", "9")


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_is_a_set_of_defaults_to_which_flags_are_given(script, name):
    plain, chosen = _parse(script), _parse(script, "--recipe", name)
    wanted = PARSERS[script][1][name]
    changed = {key for key in vars(plain) if getattr(plain, key) != getattr(chosen, key)} - {"recipe"}
    assert changed == {key for key in wanted if wanted[key] != getattr(plain, key)}
    assert all(getattr(chosen, key) == value for key, value in wanted.items())
    given = _parse(script, "--recipe", name, "--lr", "0.5", "--no-drop-last", "--compile", "none", "--batch-size", "7")
    assert (given.lr, given.drop_last, given.compile, given.batch_size) == (0.5, False, "none", 7)


def test_quick_keeps_a_recipe_small():
    quick = _parse("qat", "--quick", "--recipe", "record")
    assert (quick.model, quick.qat_epochs, quick.batch_size) == ("resnet20", 3, 64)
    assert quick.nesterov and quick.lr_schedule == "onecycle" and quick.lr_alpha == 0.02


def test_the_fast_recipe_scales_lr_with_the_batch():
    for script in PARSERS:
        plain, fast = _parse(script), _parse(script, "--recipe", "fast")
        assert fast.lr / plain.lr == pytest.approx(fast.batch_size / plain.batch_size)


@pytest.mark.parametrize(("main", "flags"), [(baseline, [*tiny.FLAGS, "--epochs", "2"]), (qat, tiny.QAT)])
def test_the_default_recipe_changes_no_number(main, flags, tmp_path):
    folders = [tmp_path / "without", tmp_path / "with"]
    assert main([*flags, "--output-dir", str(folders[0])]) == 0
    assert main([*flags, "--recipe", "default", "--output-dir", str(folders[1])]) == 0
    for name in ("best", "last"):
        a, b = (_state(folder, name) for folder in folders)
        for state in (a, b):
            state["args"].pop("output_dir")
        assert tiny.equal(a, b)
    made = a["optimizer_state_dict"]["param_groups"]
    assert all((g["nesterov"], g["momentum"], g["dampening"]) == (False, 0.9, 0) for g in made)
    assert a["scheduler_state_dict"]["T_max"] == 5 * a["epoch"]


def test_results_record_every_option_of_the_recipe(tmp_path):
    flags = ["--recipe", "record", *tiny.QAT, "--output-dir", str(tmp_path)]
    assert qat(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    expected = {**recipes.QAT["record"], "recipe": "record", "batch_size": 16, "qat_epochs": 3, "warmup_epochs": 1}
    assert results["options"].items() >= expected.items()
    assert results["epochs"][0]["images_per_second"] > 0 and "from epoch 10" in results["alpha_control"]


# The ingredients


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.2), (7, 0.0), (100, 0.2), (1044, 0.05), (10, 0.99)])
def test_lr_rises_to_its_peak_and_falls_to_almost_0(name, steps, warmup):
    at = [optim.factor(name, steps, warmup)(step) for step in range(steps + 1)]
    rising = round(warmup * steps)
    assert max(at) == 1.0 and min(at[:-1], default=1.0) > 0 and at[-1] == 0.0
    assert all(a < b for a, b in zip(at[:rising], at[1:rising]))
    assert all(a > b for a, b in zip(at[rising:], at[rising + 1 :]))
    if name == "onecycle" and steps == 100:
        assert at[9] == 0.5 and at[60] == 0.5 and at[19] == at[20] == 1.0


def test_without_warm_up_the_cosine_is_the_one_that_it_was():
    trainer = _trainer()
    assert type(trainer.scheduler) is torch.optim.lr_scheduler.CosineAnnealingLR
    longer = optim.factor("cosine", 15, 0.0)
    for step in range(15):
        lr = trainer.optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(0.01 * longer(step)) == pytest.approx(0.005 * (1 + math.cos(math.pi * step / 15)))
        trainer.optimizer.step()
        trainer.scheduler.step()


def test_alphas_have_the_lr_that_they_are_given():
    weights, alphas = _trainer("--lr-alpha", "0.002", "--nesterov").optimizer.param_groups
    assert (weights["lr"], alphas["lr"], weights["nesterov"], alphas["weight_decay"]) == (0.01, 0.002, True, 0.0)
    assert _trainer().optimizer.param_groups[1]["lr"] == 0.01


def test_alphas_of_the_first_and_last_layer_have_the_lr_that_they_are_given():
    trainer = _trainer("--lr-alpha-first-last", "0.0005", "--num-bits-first", "8", "--num-bits-last", "8")
    model = trainer.model
    apart = [p for g in trainer.optimizer.param_groups if g["lr"] == 0.0005 for p in g["params"]]
    assert {id(p) for p in apart} == {id(model[i].weight_quantizer.alpha) for i in (0, 7)}


def test_smoothed_labels_are_in_the_training_loss_alone():
    x, y = next(iter(_trainer().batches))
    sharp, smooth = _trainer(), _trainer("--label-smoothing", "0.2")
    logits, ce, *_ = smooth._forward(smooth.model, x, y, len(y), False)
    log_p = logits.log_softmax(1)
    expected = 0.8 * -log_p[range(len(y)), y].mean() + 0.2 * -log_p.mean()
    assert ce.item() == pytest.approx(expected.item(), rel=1e-5)
    sharp._forward(sharp.model, x, y, len(y), False)  # sets the alphas, too
    assert sharp.evaluate(sharp.validation) == smooth.evaluate(smooth.validation)


def test_a_last_batch_that_is_not_full_is_left_out():
    split = data.ImageSet(torch.zeros(10, 32, 32, 3, dtype=torch.uint8), torch.arange(10))
    all_of_it, whole = (data.Batches(split, 4, torch.Generator().manual_seed(0), drop_last=d) for d in (False, True))
    assert [len(y) for _, y in all_of_it] == [4, 4, 2] and all_of_it.count == 10
    assert [len(y) for _, y in whole] == [4, 4] and whole.count == 8
    seen = {int(label) for _ in range(5) for _, labels in whole for label in labels}
    assert seen == set(range(10))  # another two in every epoch


def test_alphas_are_frozen_from_the_epoch_that_is_named():
    o = _parse("qat", *tiny.QAT, "--freeze-act-alpha-epoch", "3")
    assert options.freeze(o, "act") == qbr.Freeze(epoch=3) and options.freeze(o, "weight") is False
    o = _parse("qat", *tiny.QAT, "--freeze-act-alpha-epoch", "3", "--freeze-alpha")
    assert options.freeze(o, "act") is True and options.freeze(o, "weight") is True
    trainer = _trainer("--freeze-act-alpha-epoch", "3")
    alpha = trainer.model[2].quantizer.alpha
    seen = []
    for epoch in (1, 2, 3):
        trainer.train_epoch(epoch)
        seen.append(alpha.item())
    assert seen[0] != seen[1] == seen[2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--nesterov", "--momentum", "0"], "needs a momentum"),
        (["--lr-warmup", "1"], "--lr-warmup 1.0: expected 0 or more, below 1"),
        (["--label-smoothing", "-0.1"], "--label-smoothing -0.1: expected 0 or more, below 1"),
        (["--lr-alpha", "0"], "--lr-alpha 0.0: expected a positive number"),
        (["--lr-alpha-first-last", "0.1", "--num-bits-last", "32"], "0.1: the first or last layer stays in float"),
        (["--freeze-act-alpha-epoch", "-1"], "--freeze-act-alpha-epoch -1: expected 0 or more"),
        (["--monitor", "--compile", "default"], "every epoch would be compiled anew"),
        (["--drop-last", "--batch-size", "100"], "no whole batch; lower the first or give --no-drop-last"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, expected, tmp_path, capsys):
    assert qat([*tiny.QAT, *flags, "--output-dir", str(tmp_path / "run")]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_quick_trains_no_baseline_for_flags_that_cannot_be(tmp_path, capsys):
    flags = ["--quick", "--limit", "5", "--drop-last", "--batch-size", "5000", "--output-dir", str(tmp_path / "run")]
    assert qat(flags) == 2
    assert "no whole batch" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_several_processes_are_not_compiled(monkeypatch):
    monkeypatch.setattr(optim.processes, "world", lambda: 2)
    with pytest.raises(optim.UserError, match="--compile default: works in a single process"):
        optim.compiled(lambda: None, "default")
    assert optim.compiled(len, "none") is len


# A whole run


@pytest.mark.parametrize("mode", ["none", pytest.param("default", marks=pytest.mark.slow)])
def test_a_resumed_record_run_equals_the_uninterrupted_one_bit_for_bit(mode, tmp_path, monkeypatch):
    """bf16, one-cycle, Nesterov, phases of freezing: every epoch is interrupted once."""
    flags = ["--recipe", "record", *tiny.QAT, "--freeze-act-alpha-epoch", "3", "--compile", mode, "--output-dir"]
    assert qat([*flags, str(tmp_path / "one")]) == 0
    for steps in (2, 5, 7):  # of 4 an epoch
        with monkeypatch.context() as patch:
            tiny.interrupt(patch, engine, steps)
            assert qat([*flags, str(tmp_path / "two"), "--resume"]) == 130
    assert qat(["--output-dir", str(tmp_path / "two"), "--resume"]) == 0
    for name in ("best", "last"):
        assert tiny.equal(*(_state(tmp_path / run, name) for run in ("one", "two")), frozenset({"args"}))


def test_compiled_steps_equal_eager_ones_in_one_graph_for_each_phase():
    def run(mode: str) -> list:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = _trainer("--compile", mode, "--drop-last", "--label-smoothing", "0.1", "--lr-schedule", "onecycle")
        figures = [trainer.train_epoch(epoch) for epoch in (1, 2, 3)]
        return [figures, dict(trainer.model.state_dict())]

    eager, compiled = run("none"), run("default")
    assert tiny.equal(eager, compiled) and compiled[0][2]["br_w"] > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # warm-up, BR


@pytest.mark.parametrize("recipe", ["fast", "record"])
def test_an_epoch_reads_the_device_as_often_however_many_steps_it_has(recipe):
    counts = []
    for batch_size in ("24", "8"):
        trainer = _trainer("--recipe", recipe, "--batch-size", batch_size, "--compile", "none")
        trainer.train_epoch(2)  # the first step makes the momentum buffers, and sets the alphas
        with no_host_reads(count=True) as guard:
            trainer.train_epoch(3)
        counts.append(len(guard.reads))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("device", "mode"),
    [
        pytest.param("cpu", "default", marks=pytest.mark.slow),
        pytest.param("cuda", "default", marks=pytest.mark.gpu),
        pytest.param("cuda", "reduce-overhead", marks=pytest.mark.gpu),
    ],
)
def test_inductor_s_steps_come_close_to_eager_ones(device, mode, monkeypatch):
    monkeypatch.setattr(optim, "BACKEND", "inductor")
    flags = ["--recipe", "record", *tiny.QAT, "--lr", "0.001", "--lr-alpha", "0.001"]
    eager, compiled = (_trainer(*flags, "--compile", each, device=device) for each in ("none", mode))
    for epoch in (1, 2, 3):
        expected, got = eager.train_epoch(epoch), compiled.train_epoch(epoch)
        for key in ("loss", "ce", *(("br_w", "br_a") if epoch > 1 else ())):
            assert got[key] == pytest.approx(expected[key], rel=0.05), (epoch, key)


# The stages for a GPU


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_gpu_stages_give_flags_that_exist_to_runs_in_an_order_that_works(device, tmp_path):
    gpu = importlib.import_module("gpu")
    plan = gpu.training(tmp_path, device == "cuda", tmp_path)
    trained: dict[str, argparse.Namespace] = {}
    for command in (command for stage in plan.values() for command in stage):
        script = Path(command[1]).stem
        assert (ROOT / command[1]).is_file()
        if script == "alpha_study":
            o = importlib.import_module(script)._parser().parse_args(command[2:])
            assert (o.scale, o.output, o.data) == (
                "gpu" if device == "cuda" else "smoke", tmp_path / "alpha-study", tmp_path,
            )  # fmt: skip
            continue
        if script == "compare":
            assert set(command[2:]) <= trained.keys()
            continue
        o, _ = options.parse(PARSERS[script.split("_")[1]][0](), command[2:])
        start = getattr(o, "pretrained_baseline", None)
        if start is not None:
            assert trained[str(start.parents[1])].model == o.model
        if getattr(o, "warmup_from", None) is not None:
            assert trained[str(o.warmup_from)].keep_warmup and trained[str(o.warmup_from)].compile == o.compile
        assert o.resume and str(o.output_dir) not in trained
        trained[str(o.output_dir)] = o
    of_recipe = {name: sum(o.recipe == name for o in trained.values()) for name in ("fast", "record")}
    assert of_recipe == {"fast": 11, "record": 16 if device == "cuda" else 7}
    reach = trained[str(tmp_path / "resnet18-w2a2-reach")]
    assert (reach.lambda_br_schedule, reach.lambda_br_act) == ("cosine", 0)
    assert reach.lambda_br == pytest.approx(985.6 if device == "cuda" else 46.8)  # docs/recipes.md, benchmarks/GPU.md
    assert list(plan) == ["pace", "fast", "reach", "record", "record_seeds", "accuracy", "alpha_study"]


def test_the_gpu_stages_end_what_a_command_has_started(tmp_path):
    """At the deadline a study goes, and the runs that it has started, one that ignores the request included."""
    gpu = importlib.import_module("gpu")
    script = f"(trap '' TERM; exec sleep 600) & echo $! > {tmp_path}/pid; wait"
    with (tmp_path / "log").open("w") as log:
        assert gpu.run(["sh", "-c", script], log, time.time() + 3) == 124
        assert gpu.run([sys.executable, "-c", "raise SystemExit(5)"], log, time.time() + 60) == 5
    command = Path("/proc", (tmp_path / "pid").read_text().strip(), "cmdline")
    assert not command.exists() or command.read_bytes() == b""  # gone, or not buried yet
