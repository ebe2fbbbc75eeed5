"""benchmarks/gpu.py: what a second call repeats, what one device's result says of another, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The script with other stages: a command that leaves a line in "ran", and {second}.
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import gpu
gpu.stages = lambda out, device, data: dict(
    build=[[gpu.PY, "-c", "import sys; open(sys.argv[1], 'a').write('first ')", str(out / "ran")],
           [gpu.PY, "-c", {second!r}, str(out / "ran")]],
    more=[[gpu.PY, "-c", "pass"]],
    fails=[[gpu.PY, "-c", "import sys; open(sys.argv[1], 'a').write('fails '); sys.exit(3)", str(out / "ran")],
           [gpu.PY, "-c", "import sys; open(sys.argv[1], 'a').write('next ')", str(out / "ran")]],
    last=[[gpu.PY, "-c", "import sys; open(sys.argv[1], 'a').write('last ')", str(out / "ran")]],
)
if {limit}:
    gpu.LIMIT = {limit}
gpu.main()
"""


def command(tmp_path: Path, second: str, *flags: str, limit: float = 0) -> list[str]:
    code = SCRIPT.format(folder=str(ROOT / "benchmarks"), second=second, limit=limit)
    flags = flags if "--only" in flags else (*flags, "--only", "build", "more")
    return [sys.executable, "-c", code, "--output", str(tmp_path), *flags]


def call(tmp_path: Path, second: str, *flags: str, **environment: str) -> tuple[int, dict, str]:
    """The exit code, stages.json, and the words in "ran"."""
    done = subprocess.run(
        command(tmp_path, second, *flags), env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, json.loads((tmp_path / "stages.json").read_text()), (tmp_path / "ran").read_text()


FAILS, WORKS = "raise SystemExit(7)", "import sys; open(sys.argv[1], 'a').write('second ')"


def test_commands_that_ended_well_are_not_repeated(tmp_path):
    code, record, ran = call(tmp_path, FAILS)
    assert (code, record["build"]["status"], ran) == (1, "failed: exit [7]", "first ")
    assert "more" not in record  # nothing is run after a build that failed
    code, record, ran = call(tmp_path, FAILS)
    assert ran == "first " and record["build"]["status"] == "failed: exit [7]"
    code, record, ran = call(tmp_path, WORKS)
    assert (code, ran) == (0, "first second ") and record["build"]["status"] == record["more"]["status"] == "ok"
    assert call(tmp_path, WORKS)[2] == ran


def test_killed_within_a_stage_it_keeps_the_commands_that_had_ended(tmp_path):
    code, record, _ = call(tmp_path, "import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    assert (code, record["build"]["status"], len(record["build"]["done"])) == (-signal.SIGKILL, "not ended", 1)
    assert call(tmp_path, WORKS)[2] == "first second "


@pytest.mark.parametrize("flags, environment", [(["--device", "cpu"], {}), ([], {"QBR_COMMIT": "another"})])
def test_another_device_or_commit_is_another_result(tmp_path, flags, environment):
    assert call(tmp_path, WORKS)[2] == "first second "
    code, record, ran = call(tmp_path, WORKS, *flags, **environment)
    assert (code, ran) == (0, "first second first second ")
    assert record["build"]["device"] == (flags or ["", "cuda"])[1]
    assert record["build"]["commit"] == environment.get("QBR_COMMIT", record["build"]["commit"])


def test_what_failed_waits_for_what_was_not_tried(tmp_path):
    code, record, ran = call(tmp_path, WORKS, "--only", "build", "fails")
    assert (code, ran) == (1, "first second fails next ")
    code, record, ran = call(tmp_path, WORKS, "--only", "build", "fails", "last")
    assert (code, ran) == (1, "first second fails next last fails ")
    assert record["fails"]["status"] == "failed: exit [3]" and record["last"]["status"] == "ok"


def test_a_command_that_hangs_has_failed(tmp_path):
    arguments = command(tmp_path, "import time; time.sleep(600)", limit=0.5)
    assert subprocess.run(arguments, capture_output=True, timeout=60).returncode == 1
    record = json.loads((tmp_path / "stages.json").read_text())["build"]
    assert record["status"] == "failed: exit [124]" and len(record["done"]) == 1


def test_a_machine_without_git(tmp_path):
    assert call(tmp_path, WORKS, PATH="/nowhere")[1]["build"]["commit"] == "unknown"


def test_sigterm_ends_what_was_started(tmp_path):
    waits = "import os, sys, time; open(sys.argv[1] + '.pid', 'w').write(f'{os.getpid()} '); time.sleep(600)"
    process = subprocess.Popen(command(tmp_path, waits), stdout=subprocess.DEVNULL)
    pid = tmp_path / "ran.pid"
    while not (pid.exists() and pid.read_text().endswith(" ")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_command_over_its_limit_may_tell_what_it_has_found(tmp_path):
    """As pytest does, which writes its report after Ctrl-C, and not after SIGTERM."""
    tells = (
        "import sys, time\n"
        "try: time.sleep(600)\n"
        "except KeyboardInterrupt: open(sys.argv[1], 'a').write('found ')\n"
        "sys.exit(2)"
    )
    done = subprocess.run(command(tmp_path, tells, limit=2), capture_output=True, timeout=60)
    assert done.returncode and (tmp_path / "ran").read_text() == "first found "


def test_the_files_for_a_gpu_are_those_with_tests_for_one():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    asked = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    printed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout
    found = {line.partition("::")[0] for line in printed.splitlines() if "::" in line}
    assert len(found) > 5 and found <= set(gpu.gpu_files())


def test_a_folder_that_holds_no_images_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "images").mkdir()
    arguments = command(tmp_path, WORKS, "--data", str(tmp_path / "images"))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "images: empty" in done.stderr and not (tmp_path / "ran").exists()
