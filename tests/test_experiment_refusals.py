"""What the experiment scripts refuse, before anything is written, and the checkpoints that they read."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import qbr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
checkpoints, files, models = (importlib.import_module(f"cifar10.{name}") for name in ("checkpoints", "files", "models"))
baseline = importlib.import_module("cifar10_baseline").main
qat = importlib.import_module("cifar10_qat_br").main

TINY = ["--model", "resnet20", "--limit", "8", "--batch-size", "16", "--gpu", "-1"]


def _refused(main, flags: list[str], folder: Path, capsys) -> str:
    capsys.readouterr()
    assert main([*flags, "--output-dir", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.strip().splitlines()) == 1
    assert not folder.exists()
    return message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-bits-weight", "9"], "--num-bits-weight 9: expected 1 to 8, or 32"),
        (["--num-bits-act", "0"], "--num-bits-act 0: expected 1 to 8, or 32"),
        (["--num-bits", "16"], "--num-bits 16: expected 1 to 8, or 32"),
        (["--num-bits", "32"], "quantize nothing"),
        (["--qat-epochs", "20"], "--warmup-epochs 30 is beyond --qat-epochs 20"),
        (["--lambda-br", "-1"], "--lambda-br -1.0: expected 0 or more"),
        (["--lambda-br-act", "nan"], "--lambda-br-act nan: expected 0 or more"),
        (["--clip-value", "0"], "--clip-value 0.0: expected a positive number"),
        (["--lr", "0"], "--lr 0.0: expected a positive number"),
        (["--momentum", "1"], "--momentum 1.0"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--seed", str(2**63)], f"--seed {2**63}: expected less than 2^63"),
        (["--val-fraction", "1"], "--val-fraction 1.0"),
        (["--data", "no-such-folder"], "--data no-such-folder: no such folder"),
        (["--pretrained-baseline", "no-such.pth"], "--pretrained-baseline no-such.pth: no such file"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_bad_flags_are_refused(flags, expected, tmp_path, capsys):
    assert expected in _refused(qat, ["--limit", "1", *flags], tmp_path / "run", capsys)


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file" in _refused(baseline, TINY, tmp_path / "file" / "run", capsys)
    assert baseline(TINY) == 2 and "--output-dir is missing" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, capsys):
    names = "truncated", "text", "list", "other", "quantized"
    truncated, text, tensor, other, quantized = (tmp_path / f"{name}.pth" for name in names)
    checkpoints.save({"model_state_dict": models.resnet20().state_dict()}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    text.write_text("not a checkpoint")
    like_pickles = [tmp_path / f"text{i}" for i in range(4)]  # each begins with an opcode of pickle's
    for path, words in zip(like_pickles, ("args: lr", "batch: 3", "README", "Xy")):
        path.write_text(words)
    torch.save([1, 2], tensor)
    torch.save({"model_state_dict": models.resnet18().state_dict(), "args": {"model": "resnet18"}}, other)
    torch.save({"model_state_dict": qbr.prepare(models.resnet20(), qbr.QATConfig()).state_dict()}, quantized)
    for path, expected in (
        (truncated, "truncated, or not a checkpoint"),
        *((path, "truncated, or not a checkpoint") for path in (text, *like_pickles)),
        (tensor, "holds a list"),
        (other, "not a resnet20 of this data's classes: it was trained with --model resnet18"),
        (quantized, "a quantized model"),
        (tmp_path, "a folder"),
    ):
        message = _refused(qat, [*TINY, "--pretrained-baseline", str(path)], tmp_path / "run", capsys)
        assert expected in message and str(path) in message


class _Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran code from a checkpoint')",)


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"model_state_dict": {}, "args": _Attack()}, tmp_path / "attack.pth")
    flags = [*TINY, "--pretrained-baseline", str(tmp_path / "attack.pth")]
    assert "not a checkpoint" in _refused(qat, flags, tmp_path / "run", capsys)


class _Memory:
    def __reduce__(self):
        return bytearray, (1 << 40,)


def test_a_checkpoint_takes_no_memory_out_of_a_number(tmp_path, capsys):
    torch.save({"model_state_dict": {}, "args": _Memory()}, tmp_path / "attack.pth")
    flags = [*TINY, "--pretrained-baseline", str(tmp_path / "attack.pth")]
    assert "not a checkpoint" in _refused(qat, flags, tmp_path / "run", capsys)


def test_checkpoints_of_every_known_form_load(tmp_path):
    state = models.resnet20().state_dict()
    forms = {
        "predecessor": {"epoch": 3, "model_state_dict": state, "test_acc": 91.0, "args": argparse.Namespace(lr=0.1)},
        "state_dict": {"state_dict": state},
        "bare": state,
        "data parallel": {f"module.{name}": value for name, value in state.items()},
        "compiled": {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    }
    for kind, form in forms.items():
        path = tmp_path / f"{kind}.pth"
        torch.save(form, path)
        model = models.resnet20()
        checkpoints.load_float(model, "resnet20", path)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), kind


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": float("nan"), "b": [1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5]}
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5]}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_rank_0_leaves_no_rank_waiting(monkeypatch):
    processes = importlib.import_module("cifar10.processes")
    sent, met = [], []
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes.dist, "broadcast_object_list", lambda answer, src: sent.extend(answer))
    monkeypatch.setattr(processes.dist, "barrier", lambda: met.append(1))
    with pytest.raises(ZeroDivisionError):
        processes.on_main(lambda: 1 // 0)
    ((_, error),) = sent
    assert isinstance(error, files.UserError) and "rank 0" in str(error)
    with pytest.raises(ZeroDivisionError), processes.first_on_each_machine(True):
        1 // 0  # noqa: B018
    assert met == [1]
