"""Adds two things to what pyproject.toml says: csrc/ goes into the package, and the native extension is compiled.

It is compiled where torch's headers and a C++ compiler are found, by qbr/kernels/build.py and without importing
torch; elsewhere the package is pure Python, and builds the extension from its own csrc/ at first use. An editable
install compiles nothing: a checkout always builds at first use, so that the library fits the sources.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # pip does not look at build-system.requires with --no-build-isolation
    sys.exit("qbr: building needs setuptools 70.1 or newer here: pip install -U setuptools")

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_builder():
    """qbr/kernels/build.py by its path: importing it as qbr.kernels.build would import torch."""
    spec = importlib.util.spec_from_file_location("qbr_builder", ROOT / "qbr" / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def plan():
    """What to build with what, or None, said aloud, for a pure Python package."""
    try:
        if os.environ.get("QBR_BUILD") == "0":
            raise builder.CannotBuild("QBR_BUILD=0")
        return builder.plan(ROOT / "csrc")
    except builder.CannotBuild as missing:
        print(f"qbr: installing without the native extension ({missing}); it is built at first use", file=sys.stderr)
        return None


PLAN = plan()


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "qbr" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


class BuildExt(build_ext):
    def run(self):
        if not (self.editable_mode or self.inplace):
            directory = Path(self.build_lib) / "qbr" / "kernels"
            directory.mkdir(parents=True, exist_ok=True)
            builder.build(PLAN, directory)

    def get_outputs(self):
        directory = Path(self.build_lib) / "qbr" / "kernels"
        return [] if self.editable_mode else [str(directory / builder.LIBRARY), str(directory / builder.RECORD)]

    def get_output_mapping(self):
        return {}


class BdistWheel(bdist_wheel):
    def get_tag(self):
        """The library holds no Python symbols: one wheel per platform serves every Python."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PLAN else (python, abi, platform)


setup(
    ext_modules=[Extension("qbr.kernels.qbr_native", sources=[])] if PLAN else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
