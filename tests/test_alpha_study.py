"""The alpha study: what follows from runs' figures, its report, shared warm-ups, and (slow) a whole small study."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import qbr

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
study, study_report = (importlib.import_module(f"cifar10.{name}") for name in ("study", "study_report"))
MODELS = importlib.import_module("cifar10.models").MODELS
expected_pull = importlib.import_module("cifar10.strength").expected_pull
study_plots = importlib.import_module("cifar10.study_plots")
files, optim, options = (importlib.import_module(f"cifar10.{name}") for name in ("files", "optim", "options"))
alpha_study = importlib.import_module("alpha_study").main
qat = importlib.import_module("cifar10_qat_br").main

TINY = ["--model", "resnet20", "--limit", "8", "--batch-size", "16", "--gpu", "-1", "--monitor"]
ACCURACY = {"lsq": 60.0, "default": 60.1, "freeze": 62.0, "br-to-alpha": 55.0}


def _run(row: str, seed: int) -> dict:
    """A finished run's results.json, of two epochs of warm-up and one of BR."""
    alphas = [{"conv.weight_quantizer": w, "relu.quantizer": a} for w, a in ((0.5, 2.0), (0.4, 3.0))]
    epochs = [
        {"epoch": 1, "phase": "warm-up", "val_acc": 50.0, "alphas": alphas[0], "seconds": 3.0},
        {"epoch": 2, "phase": "warm-up", "val_acc": 59.5, "alphas": alphas[0], "seconds": 3.0},
        {"epoch": 3, "phase": "BR", "val_acc": 60.0, "alphas": alphas[1], "seconds": 4.0, "br_w": 0.2, "br_a": 1.5,
         "distance_w": 0.2,
         "oscillation": {"changed": 0.01, "oscillated": 0.002, "oscillating": 0.03, "layers": {"conv": 0.03}}},
    ]  # fmt: skip
    last = {"epoch": 3, "test_acc": ACCURACY[row] + 0.3 * seed}
    final = {"last": last, "br_w": {"start": 0.3, "end": 0.1}, "br_a": {"start": 2, "end": 1}}
    versions = {"torch": "2", "qbr": "0"}
    return {"status": "finished", "command": "c", "device": "cpu", "versions": versions, "epochs": epochs,
            "warmup_epochs": 2, "final": final}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A study of four rows and three seeds; one run of a fifth row has diverged."""
    baseline = {"command": "b", "device": "cpu", "versions": {}, "data": {"test": 10}, "options": {}}
    runs = {"baseline": {**baseline, "final": {"best": {"test_acc": 70.0}}}}
    runs |= {f"seed{seed}/{row}": _run(row, seed) for seed in range(3) for row in ACCURACY}
    runs["seed0/acts-only"] = {**_run("lsq", 0), "status": "diverged", "final": None}
    for name, results in runs.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    study.collect(tmp_path, study.manifest("smoke", None, []))
    return tmp_path


def test_figures_of_a_run(folder):
    results = study.read(folder / "results.json")
    found = study.in_numbers(results)["freeze"][1]
    assert found == {
        "test": 62.3, "br_w": 0.1, "br_a": 1, "distance": 0.2, "converged": 3, "oscillating": 3.0, "seconds": 10.0,
        "drift_w": pytest.approx(-20), "drift_a": pytest.approx(50),
    }  # fmt: skip
    assert "acts-only" not in study.by_row(results)


def test_oscillation_is_of_all_epochs_with_br(folder):
    """At the end lr is 0: the last epoch alone would tell the schedule."""
    run = _run("lsq", 0)
    run["epochs"].append({**run["epochs"][-1], "epoch": 4, "oscillation": {"oscillating": 0.01}})
    assert study.figures({**run, "row": "lsq"})["oscillating"] == pytest.approx(2.0)


def test_seeds_that_never_converge_leave_no_mean():
    assert study_report._cell([3.0, None, 4.0], 1) == "2 of 3" and study_report._cell([3.0, 5.0], 1) == "4.0 ± 1.4"
    assert study_report._cell([None, None], 1) == "" and study_report._cell([3.0], 1) == "3.0"


def test_the_reports_command_has_the_seeds_and_rows_that_are_there(folder):
    results = study.read(folder / "results.json")
    assert study_report._command(results).endswith("--scale smoke --seeds 0 1 2 --rows lsq default freeze br-to-alpha")
    results["seeds"] = [0, 1]
    assert "--seeds" not in study_report._command(results)


@pytest.mark.parametrize(
    "options, title",
    [
        ({"lambda_br": 0.0}, "W2A2 with LSQ alone"),
        ({"lambda_br": 1.0, "lambda_br_act": 0.1}, "W2A2 with LSQ and BR of weights and BR of activations"),
        ({"lambda_br": 1.0, "regularizer": "dampening", "num_bits_first": 8, "num_bits_last": 2},
         "W2A2 (first layer 8 bits) with LSQ and dampening of weights"),
        ({"lambda_br": 1.0, "num_bits_weight": 32}, "W32A2 with LSQ alone"),
    ],
)  # fmt: skip
def test_a_runs_report_is_called_what_it_is(options, title):
    report = importlib.import_module("cifar10.report")
    options = {"num_bits_weight": 2, "num_bits_act": 2, "lambda_br_act": 0.0, **options}
    assert report._what({"options": options, "epochs": [{}, {"br_w": 0.1}]}) == title
    assert report._what({"options": options, "epochs": [{}]}).endswith("with LSQ alone")


def test_a_study_of_activations_alone_has_its_report(folder):
    for path in folder.glob("seed*/*/results.json"):
        run = study.read(path)
        for epoch in run["epochs"] or ():
            epoch["oscillation"] = {"changed": None, "oscillated": None, "oscillating": None, "layers": {}}
        path.write_text(json.dumps(run))
    found = study.in_numbers(study.collect(folder, study.manifest("smoke", None, [])))
    assert found["freeze"][1]["oscillating"] is None and study_report.write(folder).exists()


def test_layers_of_other_bits_have_an_axis_of_their_own(folder):
    two = {"qn": -2, "qp": 1, "low": -3.5, "high": 2.5, "counts": [1] * 144}
    eight = {"qn": -128, "qp": 127, "low": -129.5, "high": 128.5, "counts": [1] * 264}
    for order in (("first", "conv"), ("conv", "first")):
        layers = {name: eight if name == "first" else two for name in (*order, "last")}
        kept = {when: {"epoch": 1, "layers": layers} for when in ("before", "after")}
        (folder / "seed1/lsq/histograms.json").write_text(json.dumps(kept))
        results = study.collect(folder, study.manifest("smoke", None, []))
        (ax,) = [ax for ax in study_plots.weights(results).axes if ax.get_visible()]
        assert [len(patch.get_data().values) for patch in ax.patches] == [144, 144]


def test_histograms_are_of_the_first_seed_that_has_finished(folder):
    (folder / "seed10/lsq").mkdir(parents=True)
    (folder / "seed10/lsq/results.json").write_text(json.dumps({**_run("lsq", 10)}))
    (folder / "seed0/lsq/results.json").write_text(json.dumps({**_run("lsq", 0), "status": "diverged"}))
    for seed in (0, 1, 10):
        (folder / f"seed{seed}/lsq/histograms.json").write_text(json.dumps({"seed": seed}))
    results = study.collect(folder, study.manifest("smoke", None, []))
    assert [run["seed"] for run in results["runs"] if "histograms" in run] == [1]


def test_only_runs_of_one_kind_of_device_are_called_defective(folder):
    for name, device in (("freeze", "cpu (1 threads)"), ("freeze-br-to-alpha", "cpu (2 threads)")):
        for seed in range(3):
            (folder / f"seed{seed}/{name}").mkdir(exist_ok=True)
            run = {**_run("freeze", seed), "device": device}
            run["final"] = {**run["final"], "br_w": {"end": 0.1 if name == "freeze" else 0.2}}
            (folder / f"seed{seed}/{name}/results.json").write_text(json.dumps(run))
    found = study_report.findings(study.collect(folder, study.manifest("smoke", None, [])))
    assert any("not to be compared: they ran as cpu (1 threads) and cpu (2 threads)" in each for each in found)


def test_a_baseline_that_diverged_is_none(tmp_path, capsys):
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline/results.json").write_text(json.dumps({"status": "diverged", "error": "e"}))
    assert alpha_study(["--scale", "smoke", "--rows", "lsq", "--seeds", "0", "--output", str(tmp_path)]) == 2
    assert "the baseline has failed: see" in capsys.readouterr().err


def test_a_difference_is_clear_only_where_its_interval_leaves_out_0(folder):
    results = study.read(folder / "results.json")
    assert study.difference(results, "default", "lsq").each == pytest.approx((0.1, 0.1, 0.1))
    assert study.difference(results, "br-to-alpha", "default").mean == pytest.approx(-5.1)
    assert study.difference(results, "lsq", "weights-only") is None
    paired = study.Difference((-0.54, -1.06, -0.04))  # of one sign, and yet: t = -1.86, where 4.30 is needed
    assert paired.half_width == pytest.approx(1.268, abs=1e-3) and not paired.clear
    assert study.Difference((-0.54, -0.46, -0.5)).clear
    assert not study.Difference((5.0,)).clear and study.Difference((5.0,)).half_width == float("inf")


def test_quantiles_of_students_t():
    known = {1: 12.706, 2: 4.303, 10: 2.228, 11: 2.201, 15: 2.131, 30: 2.042, 120: 1.980}  # any table's
    assert {freedom: round(study.t95(freedom), 3) for freedom in known} == known


def test_a_run_converges_where_the_seeds_reference_is_in_reach():
    def run(*accuracies):
        epochs = [{"epoch": i, "val_acc": each} for i, each in enumerate(accuracies, 1)]
        return {"epochs": epochs, "warmup_epochs": 1}

    reference = run(90.0, 70.0, 80.0)  # its warm-up does not count
    assert study._converged(run(90.0, 78.9, 79.0), reference) == 3
    assert study._converged(run(90.0, 60.0, 60.5), reference) is None  # what stands still does not converge
    assert study._converged(run(90.0, None, None), reference) is None


IMAGES = {"cpu": 13_500, "gpu": 49_000}  # an epoch's, by scale


def _options_of(scale: study.Scale, row: str):
    return options.parse(options.qat_parser(), [*scale.flags(row, ["--lambda-br", "7"]), "--output-dir", "x"])[0]


def _steps(o, scale: str) -> tuple[int, int]:
    """The steps before BR, and all of the run."""
    in_epoch = IMAGES[scale] // o.batch_size if o.drop_last else -(-IMAGES[scale] // o.batch_size)
    return in_epoch * o.warmup_epochs, in_epoch * o.qat_epochs


def test_rows_of_dampening_have_the_strength_of_their_scale():
    for scale in study.SCALES.values():
        parsed = [_options_of(scale, row) for row in ("dampening", "dampening-strong", "dampening-rising")]
        assert [each.regularizer for each in parsed] == ["dampening"] * 3
        assert parsed[1].lambda_br == pytest.approx(10 * parsed[0].lambda_br) == 10 * scale.dampening


@pytest.mark.parametrize("scale", list(IMAGES), ids="scale-{}".format)
@pytest.mark.parametrize("rising, constant", [("weights-rising", "weights-reach"), ("dampening-rising", "dampening")])
def test_a_rising_row_has_the_strength_of_the_constant_one(scale, rising, constant):
    def strength(row):
        o = _options_of(study.SCALES[scale], row)
        assert o.lambda_br_act == 0
        begin, steps = _steps(o, scale)
        lr, share = optim.factor(o.lr_schedule, steps, o.lr_warmup), optim.rise(o.lambda_br_schedule, begin, steps)
        assert (share is None) == (row == constant)
        return o.lambda_br * sum(lr(step) * (share(step) if share else 1) for step in range(begin, steps))

    assert strength(rising) == pytest.approx(strength(constant), rel=0.01)


def _pull(o, scale: str) -> tuple[float, str]:
    """Percent of its way that BR alone moves the median weight, and the line that says so, at random weights."""
    torch.manual_seed(0)
    model = qbr.prepare(MODELS[o.model](), qbr.QATConfig(weight_bits=2, act_bits=2))
    qbr.calibrate(model, [torch.randn(2, 3, 32, 32)], method=o.alpha_init)
    model(torch.randn(2, 3, 32, 32))
    line = expected_pull(model, o, *_steps(o, scale), ())
    return float(re.search(r"move the median weight by ([\d.]+) %", line)[1]), line


@pytest.mark.parametrize("scale", list(IMAGES), ids="scale-{}".format)
def test_br_that_reaches_takes_the_median_weight_half_of_the_way(scale):
    share, line = _pull(_options_of(study.SCALES[scale], "weights-rising"), scale)
    assert share == pytest.approx(50, abs=10), line
    assert "oscillate" not in line or " (0 of " in line


@pytest.mark.parametrize("recipe, percent", [("record", 0.76), ("fast", 0.32)])
def test_br_of_the_recipes_leaves_a_resnet18_where_it_is(recipe, percent):
    """The figures of docs/recipes.md."""
    o, _ = options.parse(options.qat_parser(), ["--recipe", recipe, "--output-dir", "x"])
    assert _pull(o, "gpu")[0] == pytest.approx(percent, rel=0.1)


def test_the_report_comes_from_results_json_alone(folder, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    (alone / "results.json").write_text((folder / "results.json").read_text())
    assert alpha_study(["--report", str(alone)]) == 0
    text, page = (alone / "report.md").read_text(), (alone / "report.html").read_text()
    assert "| BR; alpha frozen (S1) | 62.30 ± 0.30 | 0.1000 ± 0.0000 |" in text
    assert "Order of the guides' three rows by mean accuracy: freeze > default > br-to-alpha; the guides say" in text
    assert "BR on weights and activations against LSQ alone: +0.10 ± " in text
    for name in ("accuracy", "br", "oscillation", "alphas_weights", "alphas_activations"):
        assert (alone / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"]({name}.png)" in text
    assert page.count("data:image/png;base64,") == 5 and "http" not in page


def test_what_is_no_study_is_refused(tmp_path, capsys):
    for content, expected in (("{", "damaged"), ("{}", "not of an alpha study"), ('{"runs": []}', "no finished run")):
        (tmp_path / "results.json").write_text(content)
        assert alpha_study(["--report", str(tmp_path)]) == 2
        assert expected in capsys.readouterr().err
    assert alpha_study(["--jobs", "0", "--output", str(tmp_path / "x")]) == 2
    assert alpha_study(["--data", str(tmp_path / "absent"), "--output", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
    capsys.readouterr()
    assert alpha_study(["--output", str(tmp_path / "results.json" / "x")]) == 2
    assert "error: --output " in capsys.readouterr().err
    wrong = ["--scale", "smoke", "--output", str(tmp_path / "y"), "--", "--warmup-epochs", "5"]
    assert alpha_study(wrong) == 2 and not (tmp_path / "y").exists()  # before the baseline is trained
    assert "--warmup-epochs 5 is beyond --qat-epochs" in capsys.readouterr().err
    (tmp_path / "study.json").write_text('{"scale": "gpu"}')
    assert alpha_study(["--scale", "smoke", "--output", str(tmp_path)]) == 2
    assert "holds another study" in capsys.readouterr().err


def test_a_shared_warm_up_changes_nothing(tmp_path, monkeypatch, capsys):
    """A run that takes over another's warm-up ends as if it had trained it: to the bit, with other alpha controls."""
    monkeypatch.setattr(importlib.import_module("cifar10.report"), "write", lambda folder: folder)
    torch.set_num_threads(1)
    flags = [*TINY, "--qat-epochs", "2", "--warmup-epochs", "1"]
    first, alone, forked = (tmp_path / name for name in ("first", "alone", "forked"))
    reference = ["--lambda-br", "0", "--lambda-br-act", "0", "--keep-warmup"]
    assert qat([*flags, *reference, "--output-dir", str(first)]) == 0
    assert qat([*flags, "--freeze-alpha", "--output-dir", str(alone)]) == 0
    assert qat([*flags, "--freeze-alpha", "--warmup-from", str(first), "--output-dir", str(forked)]) == 0
    states = [torch.load(f / "checkpoints" / "last.pth", weights_only=True) for f in (alone, forked, first)]
    for key, value in states[0]["model_state_dict"].items():
        assert torch.equal(value, states[1]["model_state_dict"][key]), key
    assert states[0]["control_state_dict"] == states[1]["control_state_dict"] != states[2]["control_state_dict"]
    final, oscillation = (
        [json.loads((f / "results.json").read_text())[key] for f in (alone, forked)] for key in ("final", "epochs")
    )
    for each in final:
        del each["seconds"]
    assert final[0] == final[1]
    assert [e["oscillation"] for e in oscillation[0]] == [e["oscillation"] for e in oscillation[1]]
    capsys.readouterr()
    for change, expected in (
        (["--lr", "0.5"], "--lr 0.5 (there 0.01)"),
        (["--warmup-epochs", "2"], "has 1 epochs, this run's 2"),
        (["--qat-epochs", "1"], "--qat-epochs 1 (there 2)"),
        (["--qat-epochs", "1", "--keep-warmup"], "no run could begin after such a warm-up"),
        (["--warmup-from", str(alone)], "holds no warm-up"),
    ):
        refused = [*flags, "--warmup-from", str(first), *change, "--output-dir", str(tmp_path / "refused")]
        assert qat(refused) == 2
        assert expected in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_flags_of_a_study_overrule_its_strength_and_rows_overrule_both(tmp_path, monkeypatch, capsys):
    started = []

    class Ended:
        def __init__(self, command, **_):
            folder = Path(command[command.index("--output-dir") + 1])
            started.append((folder.name, options.parse(options.qat_parser(), command[2:])[0]))

        def poll(self):
            return 1

    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "results.json").write_text(json.dumps({"status": "finished"}))
    monkeypatch.setattr(subprocess, "Popen", Ended)
    monkeypatch.setattr(sys.modules["alpha_study"].warmup, "is_kept", lambda folder: True)
    rows = ["--rows", "weights-only", "default", "--seeds", "0"]
    module = sys.modules["alpha_study"]
    chosen = module._parser().parse_args(["--scale", "smoke", "--output", str(tmp_path), *rows, "--", "--lambda-br=50"])
    found = module._Study(chosen)
    with found._alone():
        found._run_all()
    strengths = {row: (each.lambda_br, each.lambda_br_act) for row, each in started}
    assert strengths == {"lsq": (0, 0), "default": (50, 0.1), "weights-only": (50, 0)}


def test_a_baseline_that_failed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar10_baseline.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(sys.modules["alpha_study"], "SCRIPTS", tmp_path)
    assert alpha_study(["--scale", "smoke", "--output", str(tmp_path / "study")]) == 2
    assert "the baseline has failed: see" in capsys.readouterr().err


def test_figures_without_validation_images(folder):
    run = study.by_row(study.read(folder / "results.json"))["freeze"][1]
    for epoch in run["epochs"]:
        epoch["val_acc"] = None
    assert study.figures(run)["converged"] is None and study.figures(run)["test"] == 62.3
    assert study.mean_and_spread([None, None]) is None


def test_sigterm_ends_a_study_and_its_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar10_baseline.py").write_text("import time; print('at work', flush=True); time.sleep(600)")
    monkeypatch.setattr(sys.modules["alpha_study"], "SCRIPTS", tmp_path)
    output = tmp_path / "study"
    log = output / "baseline" / "log.txt"

    def stop():
        while not (log.exists() and log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert alpha_study(["--scale", "smoke", "--output", str(output)]) == 143
    assert "stopped by SIGTERM: the same command goes on" in capsys.readouterr().err
    with (output / ".lock").open("w") as file:  # the runs have it, too, as long as they live
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_a_small_study_that_is_killed_goes_on(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "alpha_study.py"), "--scale", "smoke", "--rows", "default", "freeze"]
    command += ["--seeds", "0", "--jobs", "2", "--gpu", "-1", "--output", str(tmp_path)]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=12, capture_output=True)  # killed with SIGKILL; its runs go on to their end
    for _ in range(60):
        again = subprocess.run(command, capture_output=True, text=True)
        if "is at work there" not in again.stderr:
            break
        time.sleep(1)
    assert again.returncode == 0, again.stderr
    results = study.read(tmp_path / "results.json")
    assert {run["row"] for run in results["runs"]} == {"lsq", "default", "freeze"}
    assert all(run["status"] == "finished" for run in results["runs"])
    text = (tmp_path / "report.md").read_text()
    assert alpha_study(["--report", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() == text
