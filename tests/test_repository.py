"""Rules of this repository that a machine can check: lazy imports, one-way imports, one name per room, file lengths."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from qbr import kernels, ops

ROOT = Path(__file__).resolve().parents[1]
# Each module imports only from the lines above it.
LAYERS = [
    ["qbr.spec", "qbr.whole", "qbr.saved", "qbr.patterns", "qbr.fork_lock"],
    ["qbr.kernels.build"],
    ["qbr.kernels.library_cache"],
    ["qbr.kernels.triton_kernels"],
    ["qbr.kernels.triton_shared"],
    ["qbr.kernels.triton_bins"],
    ["qbr.kernels.triton_finalize"],
    ["qbr.kernels.triton_list_kernels"],
    ["qbr.kernels.reference", "qbr.kernels.native", "qbr.kernels.triton_backend"],
    ["qbr.kernels.aot"],
    ["qbr.kernels.foreach"],
    ["qbr.kernels.triton_lists"],
    ["qbr.kernels"],
    ["qbr.arguments", "qbr.first_order", "qbr.sketch"],
    ["qbr.ops"],
    ["qbr.functional"],
    ["qbr.metrics"],
    ["qbr.distributed"],
    ["qbr.grouping", "qbr.step_guard"],
    ["qbr.quantizer_state"],
    ["qbr.quantizers"],
    ["qbr.calls"],
    ["qbr.layers"],
    ["qbr.regularizer"],
    ["qbr.schedules", "qbr.freezing", "qbr.monitor", "qbr.layer_summary", "qbr.writers", "qbr.optimizer_groups"],
    ["qbr.alpha_control"],
    ["qbr.side_effects", "qbr.stand_ins"],
    ["qbr.tracing"],
    ["qbr.traced_forward", "qbr.value_states"],
    ["qbr.discovery", "qbr.graph_modules"],
    ["qbr.config", "qbr.running"],
    ["qbr.observed"],
    ["qbr.plan_warnings"],
    ["qbr.plan"],
    ["qbr.prepare"],
    ["qbr.calibrate", "qbr.convert"],
    ["qbr.compat"],
    ["qbr.export.optional", "qbr.export.bits", "qbr.export.files"],
    ["qbr.export.codes"],
    ["qbr.export.lowering", "qbr.export.packed"],
    ["qbr.export.onnx", "qbr.export.runtime", "qbr.export.predecessor"],
    ["qbr.export.inspect"],
    ["qbr.export"],
    ["qbr"],
    ["qbr.__main__"],
]


def test_import_touches_neither_cuda_nor_triton_nor_a_compiler():
    code = (
        "import sys, subprocess, torch; before = set(sys.modules); subprocess.Popen = None\n"
        "import qbr\n"
        "new = set(sys.modules) - before\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'torchvision', 'matplotlib', 'sympy', 'onnx', 'onnxruntime', 'onnxscript', 'safetensors'}\n"
        "assert not heavy & {m.split('.')[0] for m in new}, heavy & {m.split('.')[0] for m in new}\n"
        "assert 'torch._dynamo' not in new\n"
        "assert 'qbr.kernels.triton_backend' not in new and 'qbr.kernels.native' not in new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def _level(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if module in layer), None)


def test_imports_run_one_way():
    for path in sorted((ROOT / "qbr").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        mine = _level(name)
        assert mine is not None, f"{name} has no place in LAYERS"
        for node in ast.walk(ast.parse(path.read_text())):
            imported = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qbr":
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                imported = [f if _level(f) is not None else node.module for f in full]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names if alias.name.split(".")[0] == "qbr"]
            for other in imported:
                # The backends' own error type lives in the table's module.
                if other == "qbr.kernels" and name.startswith("qbr.kernels."):
                    continue
                assert _level(other) is not None and _level(other) < mine, f"{name} imports {other}"


@pytest.mark.parametrize("backend", [name for name in kernels.MODULES if name != "native"])
def test_every_op_has_its_function_in_every_python_backend(backend):
    path = ROOT / (kernels.MODULES[backend].replace(".", "/") + ".py")
    defined = {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
    assert not ops.SCHEMAS.keys() - defined


def test_files_stay_short_and_say_what_they_hold():
    folders = ("qbr", "csrc", "benchmarks", "experiments", "examples", "tests")
    for path in [p for folder in folders for p in (ROOT / folder).rglob("*")]:
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh") and "build" not in path.parts:
            lines = path.read_text().splitlines()
            assert len(lines) <= 450, f"{path.relative_to(ROOT)}: {len(lines)} lines"
            assert not lines or lines[0].startswith(('"""', "//", "#!", "# ")), f"{path.relative_to(ROOT)} has no head"
