"""The CPU kernels' copies for AVX-512, AVX2 and the baseline give the same bits, each in a process of its own."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qbr.kernels import build

ISAS = ["baseline", "avx2", "avx512"]


def digest() -> str:
    """Of every result of every op, over all ways to quantize, dtypes and the awkward shapes and values."""
    from cases import DTYPES, SHAPES, SPECS
    from test_parity import run

    sha = hashlib.sha256()
    for case in SPECS:
        for shape in (s for s in SHAPES if case.fits(s.size)):
            x, alpha, grad = case.inputs(shape.size)
            for poison in (False, True):
                if poison and x.numel() > 600:
                    x.view(-1)[[3, 77, 599]] = torch.tensor([float("inf"), float("-inf"), float("nan")])
                for dtype in DTYPES.values() if shape.name in ("63", "conv") else [torch.float32]:
                    results = run("native", "cpu", case, shape.make(x.flatten().to(dtype)), alpha, shape.make(
                        grad.flatten().to(dtype)))  # fmt: skip
                    for name in sorted(results):
                        t = results[name]
                        sha.update(t.isnan().contiguous().numpy().tobytes())
                        sha.update(t.nan_to_num(0.0).double().contiguous().numpy().tobytes())
    return sha.hexdigest()


def run_with(code: str, **variables: str) -> subprocess.CompletedProcess:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **variables, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def digest_with(**variables: str) -> str:
    done = run_with("import test_instruction_sets; print(test_instruction_sets.digest())", **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-1]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 has several copies")
def test_same_bits():
    from test_parity import load

    load("native", "cpu")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    present = [isa for isa in ISAS if build.needs(isa) <= flags]
    digests = {isa: digest_with(QBR_CPU_ISA=isa) for isa in present}
    assert len(present) > 1 and len(set(digests.values())) == 1, digests


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fills memory by a variable of glibc")
def test_what_fresh_memory_holds_does_not_matter():
    """So every output is written, and nothing that was not."""
    from test_parity import load

    load("native", "cpu")
    tunables = "glibc.malloc.tcache_count=0"  # what is taken from there is not filled
    digests = {digest_with(GLIBC_TUNABLES=tunables, MALLOC_PERTURB_=fill) for fill in ("85", "170")}
    assert len(digests) == 1


def test_a_name_that_is_none():
    from test_parity import load

    load("native", "cpu")
    code = "import torch, qbr; qbr.functional.fake_quantize(torch.ones(3), 1.0, qbr.QuantSpec(2))"
    done = run_with(code, QBR_CPU_ISA="sse9")
    assert done.returncode != 0 and "QBR_CPU_ISA=sse9: expected baseline, avx2 or avx512" in done.stderr
