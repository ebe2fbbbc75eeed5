"""The builder of the native extension: finds torch's headers and the compilers, compiles csrc/, links one library.

It imports neither torch nor qbr: setup.py loads it by path, in pip's isolated build too, and library_cache.py calls it
at first use where no built library lies in the package. LibTorch's stable ABI makes one library serve every torch from
2.11 on, CPU-only builds included, and every Python.

Environment:
    QBR_BUILD=0   build nothing, at install or at first use (what is built already is still used)
    QBR_CUDA=0    leave the CUDA part out;  QBR_CUDA=1: insist on it, beside a CPU-only torch too
    CXX           the C++ compiler;  CUDA_HOME: the CUDA toolkit
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)
LIBRARY = "qbr_native.so"
RECORD = "qbr_native.json"

_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of 2.10, which 2.11's headers hold in full
_CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
_PREFIX_FLAG = "-ffile-prefix-map={}=csrc"  # messages name the sources as csrc/..., wherever they were compiled
# Contraction would move codes across ties; errno and traps keep loops with divisions and comparisons scalar.
_LOOP_FLAGS = ("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
# csrc/cpu.cpp asks the machine for the same.
_AVX2 = ("-mavx2", "-mfma", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_X86 = platform.machine() in ("x86_64", "AMD64")
_LOOPS = {"baseline": (), "avx2": _AVX2, "avx512": _AVX512} if _X86 else {"baseline": ()}  # named as in cpu_loops.h
# A100 and its kin, H100, and PTX for what comes after.
_ARCHS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")
_NVCC_FLAGS = ("-std=c++17", "--threads=0", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# nvcc gives names to a shell, in double quotes at best, the folder that it runs in among them: these mean themselves.
_PLAIN = re.compile(r"[\w@%+=:,./ -]*")


class CannotBuild(RuntimeError):
    """Something that building needs is missing; the message says what, and how to get it."""


class BuildFailed(RuntimeError):
    """What was asked for could not be built; of a compiler's failure the message ends with its output."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, read from its files."""

    root: Path
    version: str
    cuda: str | None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = re.match(r"(\d+)\.(\d+)", self.version).groups()
        return int(major), int(minor)


@dataclass(frozen=True)
class Built:
    """A built library and what is known of it."""

    path: Path
    sources: str
    cuda: bool
    why_no_cuda: str | None

    @classmethod
    def read(cls, directory: Path) -> Built | None:
        path = directory / LIBRARY
        try:
            return cls(path, **json.loads((directory / RECORD).read_text())) if path.exists() else None
        except (FileNotFoundError, ValueError, TypeError):  # none, or a damaged record: to be built anew
            return None


# ---- finding -------------------------------------------------------------------------------------------------------


def source_dir() -> Path | None:
    """csrc/: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next((d for d in (package / "csrc", package.parent / "csrc") if (d / "bindings.cpp").exists()), None)


@functools.cache
def find_torch() -> Torch | None:
    """The torch of this interpreter, not imported; also from inside pip's isolated build, whose own path hides it."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    paths = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]
    roots += [Path(p) / "torch" for p in paths if p]
    for root in roots:
        version_file = root / "version.py"
        if not version_file.exists():
            continue
        values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *(.+)$", version_file.read_text(), re.MULTILINE))
        cuda = values.get("cuda", "None").strip("'\"")
        return Torch(root, values["__version__"].strip("'\""), None if cuda == "None" else cuda)
    return None


def find_compiler() -> list[str] | None:
    """The C++ compiler's command."""
    if os.environ.get("CXX"):
        try:
            command = shlex.split(os.environ["CXX"])
        except ValueError:  # a quote without its other half
            return None
        return command if command and shutil.which(command[0]) else None
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def why_no_cuda(torch: Torch | None, sources: Path, device: bool = True) -> str | None:
    """Why a CUDA part is not wanted, whatever compilers there are; ``device``: there may be one to use it."""
    wish = os.environ.get("QBR_CUDA", "")
    if wish == "0":
        return "QBR_CUDA=0 leaves it out"
    if not (sources / "cuda.cu").exists():
        return "csrc/cuda.cu is absent"
    if wish != "1" and (torch is None or torch.cuda is None):
        return "torch is a CPU-only build (QBR_CUDA=1 builds it nevertheless)"
    if wish != "1" and not device:
        return "torch sees no CUDA device (QBR_CUDA=1 builds it nevertheless)"
    return None


def cuda_plan(torch: Torch | None, sources: Path, device: bool = True) -> tuple[str | None, str | None]:
    """(nvcc, None) where a CUDA part is to be built, else (None, why not); ``device`` as in why_no_cuda."""
    why, nvcc = why_no_cuda(torch, sources, device), find_nvcc()
    if why is not None:
        return None, why
    if nvcc is None:
        why = "no nvcc: put a CUDA toolkit's nvcc on the PATH or set CUDA_HOME"
        if os.environ.get("QBR_CUDA") == "1":
            raise BuildFailed(f"QBR_CUDA=1, but {why}")
    return nvcc, why


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where the toolkit's libraries lie; nvcc itself tells, since the nvcc on the PATH may be a wrapper."""
    with tempfile.TemporaryDirectory() as tmp:
        probe = Path(tmp) / "probe.cu"
        probe.touch()
        done = _run([nvcc, "--dryrun", "-c", str(probe), "-o", str(probe.with_suffix(".o"))])
    line = re.search(r"^#\$ LIBRARIES=(.*)$", done.output, re.MULTILINE)
    return [word for word in shlex.split(line.group(1)) if word.startswith("-L")] if line else []


def sources_hash(sources: Path, cuda: bool) -> str:
    """Identifies the sources and how they are compiled; a library with another hash is out of date."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        if path.is_file() and (cuda or not path.name.startswith("cuda")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    flags = (_TARGET, _CXX_FLAGS, _PREFIX_FLAG, _LOOP_FLAGS, _LOOPS, *((_ARCHS, _NVCC_FLAGS) if cuda else ()))
    digest.update(repr(flags).encode())
    return digest.hexdigest()[:16]


def needs(isa: str) -> set[str]:
    """What /proc/cpuinfo's flags have where a copy of the CPU's loops runs."""
    return {flag.removeprefix("-m") for flag in _LOOPS[isa] if "=" not in flag}


# ---- building ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to build with what."""

    sources: Path
    torch: Torch
    compiler: list[str]
    nvcc: str | None
    why_no_cuda: str | None


def plan(sources: Path | None = None, device: bool = True) -> Plan:
    """Everything a build needs; ``device`` as in cuda_plan.

    Raises:
        CannotBuild: naming what is missing and how to get it. BuildFailed: QBR_CUDA=1 without nvcc.
    """
    sources = sources or source_dir()
    if sources is None:
        raise CannotBuild("the sources (csrc/) are not in this installation: reinstall qbr")
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the native backend is built on Linux only, not on {sys.platform}")
    torch = find_torch()
    if torch is None or not (torch.root / "include/torch/csrc/stable/library.h").exists():
        raise CannotBuild("torch's C++ headers were not found beside this Python: install torch>=2.11 from a wheel")
    if torch.release < MIN_TORCH:
        raise CannotBuild(f"torch {torch.version} is too old: install torch>={'.'.join(map(str, MIN_TORCH))}")
    compiler = find_compiler()
    if compiler is None:
        named = f"CXX={os.environ['CXX']!r} is not there" if os.environ.get("CXX") else "none of c++, g++, clang++"
        raise CannotBuild(f"no C++ compiler ({named}): install g++ 10 or clang++ 12 or later, or set CXX")
    return Plan(sources, torch, compiler, *cuda_plan(torch, sources, device))


@dataclass(frozen=True)
class _Done:
    command: list[str]
    returncode: int
    output: str

    @property
    def log(self) -> str:
        return f"$ {shlex.join(self.command)}\n{self.output[-4000:]}"


def _run(command: list[str], **where) -> _Done:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, text=True, errors="replace", **streams, **where)
        return _Done(command, done.returncode, done.stdout)
    except OSError as error:
        return _Done(command, 127, str(error))


def _compile_commands(p: Plan, out: Path, with_cuda: bool) -> dict[str, list[str]]:
    """{object name: command}, but for cuda's, which is _compile_cuda's."""
    cxx = [*p.compiler, *_CXX_FLAGS, _PREFIX_FLAG.format(p.sources)]
    torch = [_TARGET, "-isystem", str(p.torch.root / "include")]
    commands = {
        "bindings": [*cxx, *torch, *(["-DQBR_WITH_CUDA"] if with_cuda else []), str(p.sources / "bindings.cpp")],
        "cpu": [*cxx, *torch, *(["-DQBR_X86_LOOPS"] if _X86 else []), str(p.sources / "cpu.cpp")],
    }
    for isa, flags in _LOOPS.items():
        name = f"loops_{isa}"
        commands[name] = [*cxx, *_LOOP_FLAGS, *flags, f"-DQBR_ISA={name}", str(p.sources / "cpu_loops.cpp")]
    return {name: [*command, "-c", "-o", str(out / f"{name}.o")] for name, command in commands.items()}


def _compile_cuda(p: Plan, out: Path) -> _Done:
    """cuda.o in ``out``; compiled in a folder of a plain name, since nvcc has a shell read names."""
    archs = [word for arch in _ARCHS for word in ("-gencode", arch)]
    cxx = next((word for word in p.compiler if Path(word).name not in ("ccache", "sccache", "distcc")), p.compiler[0])
    nvcc, host = (os.path.abspath(name) if os.sep in name else name for name in (p.nvcc, cxx))
    command = [nvcc, *_NVCC_FLAGS, "-ccbin", host, *archs, "csrc/cuda.cu", "-c", "-o", "cuda.o"]
    with tempfile.TemporaryDirectory(prefix="qbr-build-", dir=out if _PLAIN.fullmatch(str(out)) else "/tmp") as folder:
        odd = next((name for name in (nvcc, host, folder) if not _PLAIN.fullmatch(name)), None)
        if odd is not None:
            return _Done(command, 126, f"nvcc would have a shell read the name {odd!r}: use another path")
        shutil.copytree(p.sources, Path(folder, "csrc"))
        done = _run(command, cwd=folder, env={**os.environ, "TMPDIR": folder})
        if done.returncode == 0:
            shutil.move(Path(folder, "cuda.o"), out / "cuda.o")
    return done


def _run_each(commands: dict[str, list[str]]) -> dict[str, _Done]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(commands, pool.map(_run, commands.values())))


def _compile(p: Plan, out: Path, with_cuda: bool) -> dict[str, _Done]:
    with ThreadPoolExecutor(1) as beside:
        cuda = {"cuda": beside.submit(_compile_cuda, p, out)} if with_cuda else {}
        return _run_each(_compile_commands(p, out, with_cuda)) | {name: each.result() for name, each in cuda.items()}


def build(p: Plan, directory: Path) -> Built:
    """Compile and link into ``directory``, which exists.

    Raises:
        BuildFailed: with the end of the compiler's output. A failed nvcc leaves a library without its CUDA part
            that says so, unless QBR_CUDA=1 insists.
    """
    with_cuda, why_no_cuda = p.nvcc is not None, p.why_no_cuda
    with tempfile.TemporaryDirectory(prefix="qbr-build-", dir=directory) as tmp:
        out = Path(tmp)
        done = _compile(p, out, with_cuda)
        if with_cuda and done["cuda"].returncode != 0:
            if os.environ.get("QBR_CUDA") == "1":
                raise BuildFailed(f"nvcc failed on csrc/cuda.cu\n{done['cuda'].log}")
            with_cuda, why_no_cuda = False, f"nvcc failed (QBR_CUDA=1 tries again)\n{done.pop('cuda').log}"
            done["bindings"] = _run(_compile_commands(p, out, False)["bindings"])
        for name, result in done.items():
            if result.returncode != 0:
                raise BuildFailed(f"the native extension did not compile ({name})\n{result.log}")
        objects = [str(out / f"{name}.o") for name in done]
        torch_libs = [f"-L{p.torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        # The static runtime loads beside any torch, and needs no toolkit where the library is used.
        cuda_libs = [*cuda_library_dirs(p.nvcc), "-lcudart_static", "-ldl", "-lrt", "-lpthread"] if with_cuda else []
        target = ["-shared", "-s", "-Wl,--exclude-libs,ALL", "-o", str(out / LIBRARY)]
        linked = _run([*p.compiler, *target, *objects, *torch_libs, *cuda_libs])
        if linked.returncode != 0:
            raise BuildFailed(f"the native extension did not link\n{linked.log}")
        record = {"sources": sources_hash(p.sources, with_cuda), "cuda": with_cuda, "why_no_cuda": why_no_cuda}
        shutil.copy(out / LIBRARY, directory / LIBRARY)
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return Built(directory / LIBRARY, **record)
