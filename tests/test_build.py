"""The builder: what it finds, where it builds, and what it says when something is missing, broken or built twice.

Most tests build stub sources, which compile in no time; the real library is looked at where it is built already.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qbr.kernels import BackendUnavailable, build, library_cache, native

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None or not sys.platform.startswith("linux"), reason="needs a C++ compiler on Linux"
)


@pytest.fixture
def stubs(tmp_path) -> Path:
    """Sources with the names of the real ones and nothing in them."""
    directory = tmp_path / "csrc"
    directory.mkdir()
    for name in ("bindings.cpp", "cpu.cpp", "cpu_loops.cpp"):
        (directory / name).write_text("// nothing\n")
    return directory


@pytest.fixture
def cache(tmp_path) -> Path:
    directory = tmp_path / "cache"
    directory.mkdir()
    return directory


@pytest.fixture
def fresh_native(monkeypatch, tmp_path, stubs):
    """The native backend as in a new process, with an empty cache and stub sources."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_broken", None)
    monkeypatch.setattr(build, "source_dir", lambda: stubs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QBR_BUILD", raising=False)
    monkeypatch.delenv("QBR_CUDA", raising=False)
    return native


def test_finds_torch_without_importing_it():
    found = build.find_torch()
    assert found.version == torch.__version__ and found.cuda == torch.version.cuda
    assert (found.root / "include/torch/csrc/stable/library.h").exists()
    code = (  # as setup.py has it
        "import runpy, sys; sys.modules['builder'] = type(sys)('builder')\n"
        f"build = runpy.run_path({str(ROOT / 'qbr/kernels/build.py')!r}, run_name='builder')\n"
        "print(build['find_torch']().version); assert not {'torch', 'qbr'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == torch.__version__


def test_a_missing_compiler_is_told_with_its_remedy(fresh_native, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler .*'/nowhere/c\+\+'.*install"):
        fresh_native.load("cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler .*install"):
        fresh_native.load("cpu")


def test_nothing_is_built_where_that_is_forbidden(fresh_native, monkeypatch, tmp_path):
    monkeypatch.setenv("QBR_BUILD", "0")
    with pytest.raises(BackendUnavailable, match="QBR_BUILD=0"):
        fresh_native.load("cpu")
    assert not (tmp_path / "home").exists()


def test_an_old_torch_and_missing_headers_are_told(stubs, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_torch", lambda: None)
    with pytest.raises(build.CannotBuild, match="headers were not found"):
        build.plan(stubs)
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setattr(build, "find_torch", lambda: build.Torch(tmp_path / "torch", "2.9.1+cpu", None))
    with pytest.raises(build.CannotBuild, match=r"torch 2\.9\.1\+cpu is too old: install torch>=2\.11"):
        build.plan(stubs)


def test_cuda_is_planned_beside_a_cuda_torch_or_on_demand(stubs, monkeypatch):
    cpu_torch, cuda_torch = build.Torch(Path("t"), "2.13.0+cpu", None), build.Torch(Path("t"), "2.13.0", "13.0")
    monkeypatch.delenv("QBR_CUDA", raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    assert build.cuda_plan(cuda_torch, stubs) == (None, "csrc/cuda.cu is absent")
    (stubs / "cuda.cu").touch()
    assert build.cuda_plan(cuda_torch, stubs) == ("nvcc", None)
    assert "CPU-only" in build.cuda_plan(cpu_torch, stubs)[1]
    monkeypatch.setenv("QBR_CUDA", "1")
    assert build.cuda_plan(cpu_torch, stubs) == ("nvcc", None)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildFailed, match="CUDA_HOME"):
        build.cuda_plan(cuda_torch, stubs)
    monkeypatch.setenv("QBR_CUDA", "0")
    assert "QBR_CUDA=0" in build.cuda_plan(cuda_torch, stubs)[1]


@needs_compiler
def test_a_broken_source_raises_the_compilers_words(fresh_native, stubs):
    (stubs / "cpu.cpp").write_text("this_is_no_type x;\n")
    with pytest.raises(RuntimeError, match="did not compile.*(?s:.*)this_is_no_type") as first:
        fresh_native.load("cpu")
    assert not isinstance(first.value, BackendUnavailable)  # "auto" must pass it on
    with pytest.raises(RuntimeError) as second:
        fresh_native.load("cpu")
    assert second.value is first.value  # and is not kept waiting for it twice
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "qbr"
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_a_full_disk_is_not_tried_again(fresh_native, monkeypatch):
    tries = []

    def full():
        tries.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fresh_native, "_find_or_build", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            fresh_native.load("cpu")
    assert len(tries) == 1


@needs_compiler
def test_a_failed_nvcc_leaves_the_cpu_part_and_says_so(stubs, cache, tmp_path, monkeypatch):
    monkeypatch.delenv("QBR_CUDA", raising=False)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    nvcc.chmod(0o755)
    (stubs / "cuda.cu").touch()
    plan = dataclasses.replace(build.plan(stubs), nvcc=str(nvcc), why_no_cuda=None)
    built = build.build(plan, cache)
    assert built.path.exists() and not built.cuda
    assert "nvcc failed" in built.why_no_cuda and "unsupported GNU version" in built.why_no_cuda
    assert build.Built.read(cache) == built
    monkeypatch.setenv("QBR_CUDA", "1")
    with pytest.raises(build.BuildFailed, match="unsupported GNU version"):
        build.build(plan, cache)


def _fake_nvcc(folder: Path, body: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{body}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@needs_compiler
def test_insisting_on_cuda_is_not_met_by_what_failed_before(stubs, cache, tmp_path, monkeypatch):
    torch_ = dataclasses.replace(build.find_torch(), cuda="13.0")
    monkeypatch.setattr(build, "find_torch", lambda: torch_)
    monkeypatch.setattr(build, "find_nvcc", lambda: _fake_nvcc(tmp_path, "echo unsupported GNU version; exit 1"))
    monkeypatch.delenv("QBR_CUDA", raising=False)
    (stubs / "cuda.cu").touch()
    built = library_cache.build_cached(stubs, cache)
    assert not built.cuda and "QBR_CUDA=1 tries again" in built.why_no_cuda
    assert library_cache.find_cached(stubs, cache) == built
    monkeypatch.setenv("QBR_CUDA", "1")
    assert library_cache.find_cached(stubs, cache) is None
    with pytest.raises(build.BuildFailed, match="unsupported GNU version"):
        library_cache.build_cached(stubs, cache)
    monkeypatch.delenv("QBR_CUDA")
    assert library_cache.find_cached(stubs, cache) == built


@needs_compiler
def test_why_there_is_no_cuda_part_is_told_as_it_is_now(stubs, cache, monkeypatch):
    torch_ = dataclasses.replace(build.find_torch(), cuda="13.0")
    monkeypatch.setattr(build, "find_torch", lambda: torch_)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.delenv("QBR_CUDA", raising=False)
    (stubs / "cuda.cu").touch()
    assert "sees no CUDA device" in library_cache.build_cached(stubs, cache, device=False).why_no_cuda
    assert "no nvcc: put" in library_cache.find_cached(stubs, cache, device=True).why_no_cuda


@needs_compiler
@pytest.mark.parametrize("wish", ["", "1"])
def test_a_cuda_part_is_found_after_its_nvcc_has_gone(stubs, cache, monkeypatch, wish):
    torch_ = dataclasses.replace(build.find_torch(), cuda="13.0")
    monkeypatch.setattr(build, "find_torch", lambda: torch_)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("QBR_CUDA", wish)
    (stubs / "cuda.cu").touch()
    target = cache / library_cache._key(stubs, torch_, True)
    target.mkdir(mode=0o700, parents=True)
    (target / build.LIBRARY).touch(mode=0o600)
    record = {"sources": build.sources_hash(stubs, True), "cuda": True, "why_no_cuda": None}
    (target / build.RECORD).write_text(json.dumps(record))
    assert library_cache.find_cached(stubs, cache) == build.Built(target / build.LIBRARY, **record)


def _no_build(monkeypatch, cache):
    monkeypatch.setenv("QBR_BUILD", "0")


def _no_compiler(monkeypatch, cache):
    monkeypatch.setenv("CXX", "/nowhere/c++")


def _unsafe_cache(monkeypatch, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)


@pytest.mark.parametrize("hinder, why", [
    (_no_build, "QBR_BUILD=0 forbids it"), (_no_compiler, "no C.. compiler"), (_unsafe_cache, "written to by others"),
])  # fmt: skip
def test_a_packaged_library_serves_where_one_with_cuda_cannot_be_built(fresh_native, stubs, tmp_path, monkeypatch,
                                                                      hinder, why):  # fmt: skip
    """Installed beside a CPU-only torch, used beside a CUDA build with nvcc."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / build.LIBRARY).touch()
    (stubs / "cuda.cu").touch()
    record = {"sources": build.sources_hash(stubs, False), "cuda": False, "why_no_cuda": "no nvcc"}
    (tmp_path / "package" / build.RECORD).write_text(json.dumps(record))
    torch_ = dataclasses.replace(build.find_torch(), cuda="13.0")
    monkeypatch.setattr(fresh_native, "__file__", str(tmp_path / "package" / "native.py"))
    monkeypatch.setattr(fresh_native, "_device", lambda: True)
    monkeypatch.setattr(build, "find_torch", lambda: torch_)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    hinder(monkeypatch, tmp_path / "home" / "qbr")
    found = fresh_native._find_or_build()
    assert found.path == tmp_path / "package" / build.LIBRARY and re.search(why, found.why_no_cuda)
    monkeypatch.setenv("QBR_CUDA", "1")
    with pytest.raises(RuntimeError, match=why):
        fresh_native._find_or_build()


def test_insisting_on_cuda_without_nvcc_is_not_passed_over(fresh_native, monkeypatch):
    monkeypatch.setenv("QBR_CUDA", "1")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    (build.source_dir() / "cuda.cu").touch()
    with pytest.raises(RuntimeError, match="QBR_CUDA=1, but no nvcc") as error:
        fresh_native.load("cpu")
    assert not isinstance(error.value, BackendUnavailable)


def test_nvcc_s_host_compiler_is_no_wrapper(stubs, tmp_path, monkeypatch):
    (stubs / "cuda.cu").touch()
    nvcc = _fake_nvcc(tmp_path, 'echo "$@"; exit 1')
    plan = build.Plan(stubs, build.find_torch(), ["/usr/bin/ccache", "g++-13"], nvcc, None)
    assert "-ccbin g++-13 " in build._compile_cuda(plan, tmp_path).output


@needs_compiler
@pytest.mark.parametrize("record", ["", "{", "[]", '{"sources": "x"}', '{"sources": 1, "more": 2}', "\xff"])
def test_a_damaged_record_is_no_library(stubs, cache, record, capfd):
    built = library_cache.build_cached(stubs, cache)
    (built.path.parent / build.RECORD).write_bytes(record.encode("latin1"))
    assert library_cache.find_cached(stubs, cache) is None
    assert library_cache.build_cached(stubs, cache) == built and capfd.readouterr().err.count("building") == 2


@needs_compiler
def test_two_processes_build_once(stubs, cache):
    code = (
        "from pathlib import Path; from qbr.kernels import library_cache\n"
        f"print(library_cache.build_cached(Path({str(stubs)!r}), Path({str(cache)!r})).path)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] and Path(results[0][0].strip()).exists()
    assert sum("building" in err for _, err in results) == 1  # one builds, the other waits
    assert sum(p.is_dir() for p in cache.iterdir()) == 1


@needs_compiler
def test_two_threads_build_once(fresh_native, capfd):
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(fresh_native.load, "cpu") for _ in range(2)]:
            each.result()
    assert fresh_native.status().path.exists() and capfd.readouterr().err.count("building") == 1


def test_the_cache_is_ours_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    directory = library_cache.cache_dir()
    assert directory == tmp_path / "qbr" and stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_written_to_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(library_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert library_cache.cache_dir() == tmp_path / "tmp" / f"qbr-{os.getuid()}"


def test_the_library_changes_with_its_sources(stubs):
    before = build.sources_hash(stubs, cuda=False)
    (stubs / "cuda.cu").write_text("// a kernel\n")
    assert build.sources_hash(stubs, cuda=False) == before != build.sources_hash(stubs, cuda=True)
    (stubs / "cpu.cpp").write_text("// something else\n")
    assert build.sources_hash(stubs, cuda=False) != before


@needs_compiler
def test_the_real_library_needs_no_python():
    native.load("cpu")
    built = native.status()
    assert built.path.exists() and built.cuda == (built.why_no_cuda is None)
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-D", "-C", str(built.path)], check=True, capture_output=True, text=True).stdout
    names = [line.split(maxsplit=1)[-1] for line in symbols.splitlines()]
    assert any("torch_library_impl" in name for name in names)
    assert not [name for name in names if "Py" in name or "c10::" in name or "at::" in name]


def test_without_a_build_the_wheel_is_pure_and_brings_the_sources(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
        pytest.skip("needs setuptools 70.1")
    for name in ("qbr", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('out')"]
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "QBR_BUILD": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("qbr-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"qbr/csrc/bindings.cpp", "qbr/csrc/kernels.h", "qbr/kernels/README.md"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
