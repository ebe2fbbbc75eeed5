"""The experiments under kills, signals, full disks and read-only folders: no figure changes, no file is half there.

The quick tests choose the moments; the long one (-m slow) kills 30 times, at random moments and within writes.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

for _needed in ("tqdm", "PIL", "matplotlib"):
    pytest.importorskip(_needed)
if not sys.platform.startswith("linux"):
    pytest.skip("uses fork, capabilities and mounts of Linux", allow_module_level=True)
from mishaps import NOT_ALLOWED, Server  # noqa: E402 (imports what Windows does not have)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
folders, options = (importlib.import_module(f"cifar10.{name}") for name in ("folders", "options"))

SCRIPT = "cifar10_qat_br"
FLAGS = ["--model", "resnet20", "--limit", "4", "--val-fraction", "0.25", "--batch-size", "16", "--gpu", "-1",
         "--qat-epochs", "3", "--warmup-epochs", "1", "--lambda-br-act", "0.1"]  # fmt: skip
STEPS = 2  # of an epoch: 30 training images
TIMES = {"images_per_second", "train_seconds", "seconds"}


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def launch(server, tmp_path_factory):
    """launch(folder, plan, *flags): the return code and what was printed, of a run that resumes what is there."""
    log = tmp_path_factory.mktemp("logs") / "log"

    def launch(folder: Path, plan: dict | None = None, *flags: str) -> tuple[int, str]:
        flags = flags or ("--resume",)
        plan = {"small": True, **(plan or {})}
        code, _ = server.run(log, plan, SCRIPT, [*FLAGS, "--output-dir", str(folder), *flags])
        return code, log.read_text()

    return launch


@pytest.fixture(scope="module")
def reference(launch, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("reference")
    assert launch(folder)[0] == 0
    return folder


# What must hold after every mishap, and at the end


def check_whole(folder: Path) -> list[Path]:
    """Every file is whole; gives what killed writes left, which carries no file's name."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.rglob("*.pth"):
        assert torch.load(path, weights_only=True)["epoch"] >= 1
    for path in folder.rglob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    for path in folder.rglob("*.html"):
        assert path.read_text().endswith("</body></html>\n")
    left = [path for path in folder.rglob("*.tmp")]
    assert all(path.name.startswith(".") for path in left)
    return left


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a if key not in TIMES)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def check_same(folder: Path, reference: Path) -> None:
    """Weights, optimizer, schedule, random states, alphas, history and figures are the reference's, to the bit."""
    files = {path.relative_to(reference) for path in reference.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == files
    for name in (name for name in files if name.suffix == ".pth"):
        one, other = (torch.load(each / name, weights_only=True) for each in (reference, folder))
        for state in (one, other):
            for flag in options.FREE_ON_RESUME:
                state["args"].pop(flag)
        assert one["history"] and one["optimizer_state_dict"]["state"] and _same(one, other), name
    for name in (name for name in files if name.name == "results.json"):
        one, other = (json.loads((each / name).read_text()) for each in (reference, folder))
        assert one["status"] == other["status"] == "finished"
        for key in ("epochs", "final", "best", "data", "versions"):
            assert _same(one[key], other[key]), (name, key)
    for name in (name for name in files if name.name == "histograms.json"):
        assert (reference / name).read_bytes() == (folder / name).read_bytes()


def _epoch(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["epoch"]


# Kills


def test_three_kills_leave_whole_files_and_change_no_bit(launch, reference, tmp_path):
    moments = [
        {"event": "half last.pth"},  # nothing else is there yet
        {"event": "replaced last.pth"},  # epoch 1, the best so far, whose best.pth is not there yet
        {"event": "half results.json", "count": 250},
    ]
    for moment in moments:
        code, printed = launch(tmp_path, moment)
        assert code == -signal.SIGKILL, printed
        left = check_whole(tmp_path)
        assert len(left) == (moment["event"] != "replaced last.pth"), left
    assert left[0].stat().st_size > 0 and _epoch(tmp_path) == 2
    (tmp_path / ".results.json.swp").write_text("an editor's")
    assert launch(tmp_path)[0] == 0 and check_whole(tmp_path) == []
    (tmp_path / ".results.json.swp").unlink()  # not ours, and not touched
    check_same(tmp_path, reference)


def test_a_shared_warm_up_survives_kills(launch, tmp_path):
    """Between a run's checkpoint and the copies kept for others, and in a run that takes them over."""
    first, second = tmp_path / "first", tmp_path / "second"
    code, printed = launch(first, {"event": "make warmup.pth"}, "--keep-warmup")
    assert code == -signal.SIGKILL and _epoch(first) == 1, printed
    assert launch(first, None, "--keep-warmup", "--resume")[0] == 0
    for event in ("made last.pth", "replaced last.pth"):
        code, printed = launch(second, {"event": event}, "--warmup-from", str(first), "--resume")
        assert code == -signal.SIGKILL, printed
        check_whole(second)
    assert launch(second, None, "--warmup-from", str(first), "--resume")[0] == 0
    (first / "checkpoints" / "warmup.pth").unlink()
    check_same(second, first)


def test_the_comparison_would_see_one_changed_bit(reference, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(reference, changed)
    check_same(changed, reference)
    path = changed / "checkpoints" / "last.pth"
    state = torch.load(path, weights_only=True)
    alpha = state["model_state_dict"]["layer2.0.relu.quantizer.alpha"]
    alpha.copy_(torch.nextafter(alpha, torch.tensor(torch.inf)))
    torch.save(state, path)
    with pytest.raises(AssertionError):
        check_same(changed, reference)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)archive|zip"):
        check_whole(changed)


def test_best_is_mended_after_a_kill_before_it(tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"epoch": 1}, path)
    folders.mend_best(path, {"epoch": 2, "weights": torch.ones(1)})
    assert torch.load(path, weights_only=True)["epoch"] == 2
    before = path.stat().st_mtime_ns, path.read_bytes()
    folders.mend_best(path, {"epoch": 2})
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_overwrite_leaves_nothing_of_the_old_run(launch, reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    assert launch(folder, {"event": "step"}, "--overwrite")[0] == -signal.SIGKILL
    assert [path for path in folder.rglob("*") if path.is_file()] == []  # not the old figures beside a new run


def test_results_without_their_checkpoints_are_not_replaced_by_accident(launch, reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    (folder / "checkpoints" / "last.pth").unlink()
    before = (folder / "results.json").read_bytes()
    code, printed = launch(folder)
    assert code == 2 and "holds results.json of a run, and no last.pth" in printed and "--overwrite" in printed
    assert (folder / "results.json").read_bytes() == before
    (folder / "results.json").unlink()
    code, printed = launch(folder, None, "--seed", "42")
    assert code == 2 and "holds best.pth of a run, and no last.pth" in printed
    assert launch(folder, {"event": "step"})[0] == -signal.SIGKILL  # --resume: as after a kill before last.pth
    assert not (folder / "checkpoints" / "best.pth").exists()


def test_two_runs_never_share_a_folder(launch, tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    temporary = tmp_path / f".last.pth.{os.getpid()}.tmp"  # being written by the other run
    temporary.touch()
    code, printed = launch(tmp_path)
    assert code == 2 and f"--output-dir {tmp_path}: another run is writing there" in printed
    assert temporary.exists()
    os.close(handle)


# Signals


def test_sigterm_and_ctrl_c_end_a_run_cleanly_and_change_no_bit(launch, reference, tmp_path):
    moments = [
        ("SIGTERM", "step", 2, None),
        ("SIGINT", "half last.pth", 1, None),
        ("SIGTERM", "half last.pth", 2, 1),
        ("SIGINT", "step", STEPS + 1, 2),
    ]
    for name, event, count, epoch in moments:
        code, printed = launch(tmp_path, {"event": event, "count": count, "then": name})
        assert code == {"SIGTERM": 143, "SIGINT": 130}[name], printed
        assert "Traceback" not in printed and "Error" not in printed
        why = {"SIGTERM": "stopped by SIGTERM", "SIGINT": "interrupted"}[name]
        assert printed.endswith(f"\n{why}: the same command with --resume goes on after the last whole epoch\n")
        assert check_whole(tmp_path) == []
        assert (_epoch(tmp_path) if (tmp_path / "checkpoints" / "last.pth").exists() else None) == epoch
    assert launch(tmp_path)[0] == 0
    check_same(tmp_path, reference)


SIGNALS = """
    import os, signal, sys, time
    sys.path.insert(0, {experiments!r})
    from cifar10 import signals
    try:
        with signals.stopping():
            try:
                {inside}
            finally:
                {finally_}
    except KeyboardInterrupt as stop:
        print(*signals.message(stop))
"""


def _signals(inside: str, finally_: str = "pass", before: str = "") -> tuple[int, str]:
    code = before + textwrap.dedent(SIGNALS).format(
        experiments=str(ROOT / "experiments"), inside=inside, finally_=finally_
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def test_a_second_signal_ends_the_process_at_once():
    send = "os.kill(os.getpid(), signal.{}); time.sleep(20)"
    for first in ("SIGINT", "SIGTERM"):
        assert _signals(send.format(first), send.format("SIGTERM")) == (-signal.SIGTERM, "")


def test_signals_that_were_ignored_stay_ignored():
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert _signals("os.kill(os.getpid(), signal.SIGINT); print('on')", before=ignored) == (0, "on\n")
    code, printed = _signals("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", before=ignored)
    assert printed.startswith("stopped by SIGTERM: ") and printed.endswith(" 143\n") and code == 0


# Disks that are full, folders that cannot be written to


def test_a_full_disk_is_named_with_its_remedy_and_changes_no_bit(launch, reference, tmp_path):
    size = (reference / "checkpoints" / "last.pth").stat().st_size
    moments = [
        ({"event": "write last.pth", "then": "ENOSPC"}, "last.pth: No space left on device", "free some space"),
        ({"event": "fsync best.pth", "then": "ENOSPC"}, "best.pth: No space left on device", "free some space"),
        ({"event": "write histograms.json", "count": 1000, "then": "EDQUOT"}, "histograms.json: ", "of your quota"),
        ({"event": "make results.json", "then": "ENOSPC"}, "results.json: No space left on device", "free some space"),
        ({"limit": size // 2}, "last.pth: File too large", "ulimit -f"),
    ]
    for moment, what, remedy in moments:
        code, printed = launch(tmp_path, moment)
        last = printed.splitlines()[-1]
        assert code == 3 and last.startswith("error: cannot write ") and "Traceback" not in printed, printed
        assert what in last and remedy in last and "--resume goes on after the last whole epoch" in last
        assert check_whole(tmp_path) == []
    assert launch(tmp_path)[0] == 0
    check_same(tmp_path, reference)


def test_a_disk_that_is_really_full(launch, reference, tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    size = (reference / "checkpoints" / "last.pth").stat().st_size
    code, printed = launch(disk, {"disk": size * 3 // 2, "at": str(disk), "copy": str(copy)})
    if code == NOT_ALLOWED:
        pytest.skip("this machine does not let us mount a disk (it takes root)")
    assert code == 3 and "best.pth: No space left on device" in printed.splitlines()[-1], printed
    assert check_whole(copy) == [] and _epoch(copy) == 1 and not (copy / "results.json").exists()
    assert launch(copy)[0] == 0
    check_same(copy, reference)


def test_folders_that_cannot_be_written_to(launch, reference, tmp_path):
    new, begun = tmp_path / "new", tmp_path / "begun"
    new.mkdir(mode=0o555)
    code, printed = launch(new, {"unprivileged": True})
    assert code == 2 and f"--output-dir {new}: {new} cannot be written; name a folder that you may" in printed
    assert not list(new.iterdir())
    inside = begun / "checkpoints"
    inside.mkdir(parents=True)
    plan = {"unprivileged": True, "event": "step", "count": STEPS + 1, "then": "read-only", "at": str(inside)}
    code, printed = launch(begun, plan)  # read-only in the second epoch
    assert code == 3 and re.search("cannot write .*last.pth: Permission denied.*make its folder writable", printed)
    code, printed = launch(begun, {"unprivileged": True})  # and now it is seen before anything is computed
    assert code == 2 and f"{inside} cannot be written" in printed
    inside.chmod(0o755)
    assert check_whole(begun) == [] and _epoch(begun) == 1
    assert launch(begun)[0] == 0
    check_same(begun, reference)


# The long form

SEED, KILLS = 20261122, 30
LONG = [*FLAGS, "--qat-epochs", "6", "--warmup-epochs", "2"]


def _moments(choose: random.Random) -> list[dict]:
    """30 moments: shares of the whole run's processor time, and counted events within writes."""
    writes = [
        {"event": f"{stage} {name}", "count": choose.randint(1, 600 if "json" in name and stage in pieces else 2)}
        for pieces in [("write", "half")]
        for name in ("last.pth", "results.json")
        for stage in ("made", *pieces, "fsync", "replace", "replaced")
    ]
    writes += [{"event": event} for event in ("half best.pth", "replaced best.pth", "half histograms.json")]
    moments = writes + [{"share": choose.random()} for _ in range(KILLS - len(writes))]
    choose.shuffle(moments)
    return moments


@pytest.mark.slow
def test_thirty_kills_change_no_bit(server, tmp_path):
    reference, log = tmp_path / "reference", tmp_path / "log"
    code, seconds = server.run(log, {"small": True}, SCRIPT, [*LONG, "--output-dir", str(reference)])
    assert code == 0 and check_whole(reference) == []
    choose = random.Random(SEED)
    waiting, kills, rounds = _moments(choose), 0, 1
    while waiting:
        folder = tmp_path / f"run{rounds}"
        flags = [*LONG, "--resume", "--output-dir", str(folder)]
        moment = waiting.pop(0)
        plan = {"cpu": moment["share"] * seconds} if "share" in moment else moment
        code, _ = server.run(log, {"small": True, **plan}, SCRIPT, flags)
        assert code in (0, -signal.SIGKILL), log.read_text()
        left = check_whole(folder) if folder.exists() else []
        assert len(left) <= 1, left  # the next run removes what this one left
        if code == 0:  # it came to its end before the moment, which a later run gets
            assert left == []
            check_same(folder, reference)
            rounds += 1
            if "share" in moment:  # or a run that is quicker than the first would never be killed
                moment["share"] *= 0.8
            waiting.insert(choose.randrange(len(waiting) + 1), moment)
            continue
        kills += 1
        when = f"{moment['event']}, time {moment.get('count', 1)}" if "event" in moment else f"{plan['cpu']:.2f} s"
        last = folder / "checkpoints" / "last.pth"
        print(f"kill {kills:2}, run {rounds}: {when}; then {_epoch(folder) if last.exists() else 0} epochs are whole, "
              f"left behind: {', '.join(path.name.rsplit('.', 2)[0][1:] for path in left) or 'nothing'}")  # fmt: skip
    assert server.run(log, {"small": True}, SCRIPT, [*LONG, "--resume", "--output-dir", str(folder)])[0] == 0
    assert check_whole(folder) == [] and kills == KILLS
    check_same(folder, reference)
    print(f"{kills} kills in {rounds} runs of 6 epochs; each ended with the weights, optimizer, alphas, history and "
          "figures of the uninterrupted one, bit for bit")  # fmt: skip


@pytest.mark.slow
def test_a_kill_and_a_full_disk_while_the_report_is_written(launch, tmp_path):
    """Of the network and with the report that a user gets."""
    moments = [("write losses.png", "ENOSPC"), ("half alphas.png", "SIGKILL"), ("write report.html", "EDQUOT"),
               ("half report.html", "SIGKILL")]  # fmt: skip
    for event, then in moments:
        code, printed = launch(tmp_path, {"event": event, "then": then, "small": False})
        name = event.split()[1]
        if then == "SIGKILL":
            (left,) = check_whole(tmp_path)
            assert code == -signal.SIGKILL and left.name.startswith(f".{name}.")
        else:
            assert code == 3 and f"cannot write {tmp_path}" in printed and f"{name}: " in printed.splitlines()[-1]
            assert check_whole(tmp_path) == []
    assert launch(tmp_path, {"small": False})[0] == 0 and check_whole(tmp_path) == []
    assert (tmp_path / "report.html").exists() and len(list((tmp_path / "plots").iterdir())) == 5
