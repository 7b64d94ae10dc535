"""Builds the C++ extensions with CMake; everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXTENSIONS = ("kdflow._ring", "kdflow_kernels._rows")


class CMakeBuild(build_ext):
    """Runs CMake and Ninja, a target for each extension; needs neither CUDA nor torch."""

    def build_extension(self, ext: Extension) -> None:
        library_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        # It names the cmake and ninja of an isolated build, which are gone in the next one.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        target = ext.name.rpartition(".")[2]
        subprocess.run([*configure, f"-DKDFLOW{target.upper()}_DIR={library_dir}"], check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "--target", target], check=True)


setup(ext_modules=[Extension(name, sources=[]) for name in EXTENSIONS], cmdclass={"build_ext": CMakeBuild})
