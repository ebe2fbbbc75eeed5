"""What the code here may not do with files and strings from outside, read from its sources; and what builds run.

SECURITY.md says what is promised. Files that attack: test_experiment_refusals.py (checkpoints), test_data.py (pickles,
images), test_export_predecessor.py, test_export_packed.py and test_export_onnx.py.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from qbr import kernels
from qbr.kernels import build, library_cache, native

ROOT = Path(__file__).resolve().parents[1]
# Calls that run code, or may, out of a file or a string.
FORBIDDEN = {
    *(f"{module}.{name}" for module in ("pickle", "_pickle", "marshal", "dill", "cloudpickle", "joblib")
      for name in ("load", "loads", "Unpickler")),
    "shelve.open", "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load",
    "torch.serialization.add_safe_globals", "torch.serialization.safe_globals", "builtins.eval", "builtins.exec",
    "builtins.compile", "builtins.__import__", "importlib.import_module", "runpy.run_path", "runpy.run_module",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pty.spawn", "tempfile.mktemp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "torch.ops.load_library",
    "torch.classes.load_library", "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline",
    "ctypes.CDLL", "ctypes.cdll.LoadLibrary", "code.interact",
    *(f"os.{kind}{end}" for kind in ("exec", "spawn") for end in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
}  # fmt: skip
# Every one that there is, and why it may be.
ALLOWED = {
    ("qbr/config.py", "torch.serialization.add_safe_globals"): "of QATConfig, which only holds plain values",
    ("qbr/freezing.py", "torch.serialization.add_safe_globals"): "of Freeze, the same",
    ("qbr/export/predecessor.py", "torch.serialization.safe_globals"): "a Namespace is read as _Values: no methods",
    ("qbr/export/optional.py", "importlib.import_module"): "names of optional packages, all written in qbr",
    ("qbr/kernels/__init__.py", "importlib.import_module"): "names of backends, all written in qbr",
    ("qbr/kernels/triton_backend.py", "importlib.import_module"): "names of the modules of kernels, all written in qbr",
    ("qbr/kernels/native.py", "torch.ops.load_library"): "the built extension, from the package or the private cache",
    ("qbr/__main__.py", "importlib.import_module"): "--model MODULE:FUNCTION names the user's own code",
    ("qbr/traced_forward.py", "importlib.import_module"): "a module that a forward uses, in a copy of the whole model",
    ("qbr/traced_forward.py", "builtins.exec"): "source that torch.fx generated of the user's own forward",
    ("qbr/traced_forward.py", "builtins.compile"): "the same",
    ("experiments/cifar10/checkpoints.py", "torch.serialization.safe_globals"): "a Namespace only holds values",
    ("experiments/cifar10/data.py", "pickle.Unpickler"): "the restricted one: NumPy arrays and nothing else",
    ("experiments/cifar10/device.py", "ctypes.CDLL"): "None: libc, which is loaded already",
    ("benchmarks/sanitize.py", "torch.ops.load_library"): "--library names a build of the user's own",
    ("docs/drop_in.md", "torch.serialization.safe_globals"): "of argparse.Namespace, which only holds values",
    ("tests/test_compat.py", "torch.serialization.safe_globals"): "the same",
    ("tests/ranks.py", "torch.load of anything"): "what the test's own processes saved",
    ("tests/test_ecosystem.py", "torch.load of anything"): "a whole model that the test saved in memory",
    ("tests/test_convert.py", "torch.load of anything"): "the same",
    ("tests/test_export_predecessor.py", "torch.load of anything"): "torch's defaults, which are what it checks",
    ("tests/test_examples.py", "runpy.run_path"): "the examples of this repository",
}  # fmt: skip
# In tests, what a test itself made is unpickled, and what this repository holds is run.
IN_TESTS = {
    "pickle.load",
    "pickle.loads",
    "builtins.exec",
    "builtins.compile",
    "importlib.import_module",
    "ctypes.CDLL",
}


def findings(source: str) -> list[tuple[int, str]]:
    """[(line, what)] of the forbidden calls and loads in a source."""
    tree = ast.parse(source)
    names = {name: f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = _dotted(node, names)
            if name in FORBIDDEN:
                found.append((node.lineno, name))
        if isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in _in_call(node, _dotted(node.func, names))]
    return found


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """The full name that an expression such as ``np.load`` stands for."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, names)
        return base and f"{base}.{node.attr}"
    return None


def _in_call(node: ast.Call, name: str | None):
    words = {keyword.arg: keyword.value for keyword in node.keywords}

    def says(word: str, value: bool) -> bool:
        return isinstance(words.get(word), ast.Constant) and words[word].value is value

    if name == "torch.load" and not says("weights_only", True):
        yield "torch.load of anything"
    if name == "numpy.load" and not says("allow_pickle", False):
        yield "numpy.load of pickles"
    if "shell" in words and not says("shell", False):
        yield "shell=True"


def sources() -> dict[str, str]:
    """{path: text} of every Python file in the repository."""
    skipped = {".git", "build", "dist", "runs", "data", "__pycache__"}
    paths = {path.relative_to(ROOT): path for path in sorted(ROOT.rglob("*.py"))}
    return {path.as_posix(): whole.read_text() for path, whole in paths.items()
            if not any(part in skipped or part.startswith(".venv") for part in path.parts)}  # fmt: skip


def pages() -> dict[str, list[str]]:
    """{path: the Python examples} of every page."""
    paths = {path.relative_to(ROOT): path for path in sorted(ROOT.rglob("*.md"))}
    return {path.as_posix(): re.findall(r"```python\n(.*?)```", whole.read_text(), re.DOTALL)
            for path, whole in paths.items() if not path.parts[0].startswith(".")}  # fmt: skip


def test_every_promise_names_a_test_that_is_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_nothing_from_outside_is_run():
    seen, wrong = set(), []
    texts = [*sources().items(), *((path, example) for path, examples in pages().items() for example in examples)]
    assert len(texts) > 100
    for path, text in texts:
        for line, what in findings(text):
            if (path, what) in ALLOWED:
                seen.add((path, what))
            elif not (path.startswith("tests/") and what in IN_TESTS):
                wrong.append(f"{path}:{line}: {what}")
    assert not wrong, "\n".join(wrong)
    assert seen == set(ALLOWED), f"no longer there, to be taken off the list: {set(ALLOWED) - seen}"


@pytest.mark.parametrize("source, what", [
    ("import torch\ntorch.load(f)", "torch.load of anything"),
    ("import torch as t\nt.load(f, weights_only=False)", "torch.load of anything"),
    ("import torch\ntorch.load(f, weights_only=safe)", "torch.load of anything"),
    ("import torch\ntorch.load(f, **how)", "torch.load of anything"),
    ("from torch import load\nload(f)", "torch.load of anything"),
    ("import pickle\npickle.loads(b)", "pickle.loads"),
    ("from pickle import load as read\nread(f)", "pickle.load"),
    ("import pickle\nclass U(pickle.Unpickler): pass", "pickle.Unpickler"),
    ("import numpy as np\nnp.load(f)", "numpy.load of pickles"),
    ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load of pickles"),
    ("eval(text)", "builtins.eval"),
    ("run = exec", "builtins.exec"),
    ("import os\nos.system(text)", "os.system"),
    ("from os import popen\npopen(text)", "os.popen"),
    ("import subprocess\nsubprocess.run(text, shell=True)", "shell=True"),
    ("import subprocess as s\ns.Popen(text, shell=flag)", "shell=True"),
    ("import yaml\nyaml.load(f)", "yaml.load"),
    ("import torch\ntorch.ops.load_library(path)", "torch.ops.load_library"),
])  # fmt: skip
def test_the_check_finds(source, what):
    assert what in [found for _, found in findings(source)]


def test_the_check_lets_the_safe_forms_be():
    safe = """
import pickle, subprocess, numpy as np, torch
torch.load(f, map_location="cpu", weights_only=True)
np.load(f, allow_pickle=False)
subprocess.run([compiler, path], shell=False)
pickle.dumps(x)
model.eval()
"""
    assert findings(safe) == []


# Building: names go to the compilers as they are, and what is loaded lies where nobody else can write

HOSTILE = "a b'\"$(touch ran1)`touch ran2`;touch ran3;&|<>*?"  # every character that a shell takes for more than a name
needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None or not sys.platform.startswith("linux"), reason="needs a C++ compiler on Linux"
)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder of such a name, which is where all that qbr may write to and read from lies; the working folder too."""
    folder = tmp_path / HOSTILE
    (folder / "csrc").mkdir(parents=True)
    for name in ("bindings.cpp", "cpu.cpp", "cpu_loops.cpp"):
        (folder / "csrc" / name).write_text("// nothing\n")
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(folder))
    for name in ("CXX", "CUDA_HOME", "QBR_CUDA", "QBR_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)  # so that TMPDIR is read again
    monkeypatch.chdir(folder)
    return folder


def _ran(tmp_path: Path) -> list[Path]:
    return [*tmp_path.rglob("ran?"), *Path("/tmp").glob("ran?")]


@needs_compiler
def test_names_that_a_shell_would_run_are_names(hostile, tmp_path):
    cache = library_cache.cache_dir()
    assert cache == hostile / "qbr"
    built = library_cache.build_cached(hostile / "csrc", cache)
    assert built.path.is_relative_to(cache) and built.path.stat().st_size > 0
    assert library_cache.find_cached(hostile / "csrc", cache) == built
    assert not _ran(tmp_path)
    subprocess.run(["sh", "-c", f'echo "{HOSTILE[6:]}"'], cwd=hostile, capture_output=True, check=False)
    assert _ran(tmp_path)  # a shell would have


@needs_compiler
@pytest.mark.parametrize(
    "cxx",
    [
        f"c++ {HOSTILE}",
        HOSTILE,
        "c++;touch ran1",
        "$(touch ran1)",
        "`touch ran1`",
        "'",
        " ",
        "c++ '$(touch ran1)' ';touch ran2'",
    ],
)
def test_a_hostile_compiler_name_runs_nothing(cxx, hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises((build.CannotBuild, build.BuildFailed)) as error:
        library_cache.build_cached(hostile / "csrc", library_cache.cache_dir())
    assert "CXX=" in str(error.value) or "$ c++ " in str(error.value)  # the name that is wrong, or the command
    assert not _ran(tmp_path)


NVCC = """#!/bin/sh
if [ "$1" = --dryrun ]; then echo "#\\$ LIBRARIES= -L$(dirname "$0")"; exit; fi
sh -c "true \\"$PWD\\" $* \\"$TMPDIR\\"" && c++ -x c++ -c -o cuda.o /dev/null
"""


@needs_compiler
def test_nvcc_is_given_no_name_that_its_shell_would_run(hostile, tmp_path):
    """A stand-in for nvcc, which has a shell read the folder that it runs in and its arguments, as nvcc does."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    (tmp_path / "libcudart_static.a").write_text("!<arch>\n")
    (hostile / "csrc" / "cuda.cu").touch()
    plan = dataclasses.replace(build.plan(hostile / "csrc"), nvcc=str(nvcc), why_no_cuda=None)
    built = build.build(plan, library_cache.cache_dir())
    assert built.cuda and not _ran(tmp_path), built.why_no_cuda
    odd = hostile / "nvcc"
    odd.symlink_to(nvcc)
    refused = build.build(dataclasses.replace(plan, nvcc=str(odd)), library_cache.cache_dir())
    assert not refused.cuda and "nvcc would have a shell read the name" in refused.why_no_cuda
    assert not _ran(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qbr"


def _elsewhere(cache: Path) -> None:
    (cache.parent / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to(cache.parent / "elsewhere")


def _dangling(cache: Path) -> None:
    cache.symlink_to(cache.parent / "nowhere")


def _open_to(mode: int):
    def make(cache: Path) -> None:
        cache.mkdir()
        cache.chmod(mode)

    return make


@pytest.mark.parametrize("make, problem", [
    (_elsewhere, "is a symbolic link"), (_dangling, "is a symbolic link"), (Path.touch, "is not what qbr made"),
    (_open_to(0o777), r"can be written to by others \(mode 777\)"), (_open_to(0o1777), "can be written to by others"),
    (_open_to(0o770), r"can be written to by others \(mode 770\)"),
])  # fmt: skip
def test_a_cache_that_others_can_write_to_is_refused(make, problem, cache):
    make(cache)
    with pytest.raises(library_cache.UnsafeDirectory, match=f"{cache} {problem}.*remove it, or set XDG_CACHE_HOME"):
        library_cache.cache_dir()


def test_somebody_else_s_cache_is_refused(cache, monkeypatch):
    assert library_cache.cache_dir() == cache and stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(library_cache.UnsafeDirectory, match="belongs to user"):
        library_cache.cache_dir()


def test_nothing_is_loaded_from_an_unsafe_cache(cache, monkeypatch):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_broken", None)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    cache.mkdir()
    target = cache / library_cache._key(build.source_dir(), build.find_torch(), native._device())
    target.mkdir()
    (target / build.LIBRARY).write_bytes(b"not to be loaded")
    record = {"sources": build.sources_hash(build.source_dir(), False), "cuda": False, "why_no_cuda": ""}
    (target / build.RECORD).write_text(json.dumps(record))
    for path in (cache, target):
        path.chmod(0o777)
        with pytest.raises(library_cache.UnsafeDirectory, match="written to by others"):
            native.load("cpu")
        path.chmod(0o700)
        native._broken = None
    (target / build.LIBRARY).rename(cache / "other.so")
    (target / build.LIBRARY).symlink_to(cache / "other.so")
    with pytest.raises(library_cache.UnsafeDirectory, match="qbr_native.so is a symbolic link"):
        native.load("cpu")
    assert loaded == []


def test_a_trap_in_the_temporary_directory_is_not_looked_at_where_the_home_can_be_written_to(cache, monkeypatch):
    (cache.parent / "tmp" / f"qbr-{os.getuid()}").mkdir(parents=True)
    (cache.parent / "tmp" / f"qbr-{os.getuid()}").chmod(0o777)
    monkeypatch.setattr(library_cache.tempfile, "gettempdir", lambda: str(cache.parent / "tmp"))
    assert library_cache.find_built(build.source_dir()) is None
    (cache.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "file"))  # nothing can be made there
    with pytest.raises(library_cache.UnsafeDirectory, match="written to by others"):
        library_cache.find_built(build.source_dir())


def test_auto_does_not_pass_over_an_unsafe_cache(cache, monkeypatch):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_broken", None)
    monkeypatch.setattr(kernels, "_resolved", {})
    _open_to(0o777)(cache)
    with pytest.raises(library_cache.UnsafeDirectory):
        kernels.resolve("auto", "cpu", torch.float32)


@needs_compiler
def test_what_a_killed_build_left_is_removed(hostile):
    cache = library_cache.cache_dir()
    target = library_cache.build_cached(hostile / "csrc", cache).path.parent
    shutil.rmtree(target)
    left = cache / f"{target.name}.killed"
    (left / "qbr-build-x").mkdir(parents=True)
    other = cache / "another-hash.building"
    other.mkdir()
    library_cache.build_cached(hostile / "csrc", cache)
    assert {path.name for path in cache.iterdir()} == {target.name, f"{target.name}.lock", other.name}
