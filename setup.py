"""Drives CMake for the extension `nla_engine._C`; everything else stands in pyproject.toml.

CMakeLists.txt is the only list of sources. The extension is optional: without a compiler the package installs
and imports without it (`nla_engine.extension` says what is slower). NLA_CUDA=1 demands the CUDA part, NLA_CUDA=0
leaves it out, NLA_CUDA_ARCH names the architectures to build for (as "89;90a"; default: the list in CMakeLists.txt).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("NLA_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"NLA_CUDA={cuda}: use 0 (without CUDA), 1 (CUDA demanded) or leave it unset")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        shutil.rmtree(
            build, ignore_errors=True
        )  # a stale cache may name tools of an environment that is gone
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNLA_OUTPUT_DIR={target.parent}", f"-DNLA_OUTPUT_NAME={target.name}", f"-DNLA_CUDA={cuda}",
        ]  # fmt: skip
        if arch := os.environ.get("NLA_CUDA_ARCH"):
            configure.append(f"-DNLA_CUDA_ARCH={arch}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if cuda == "1":
                raise SystemExit(
                    f"NLA_CUDA=1, but the extension with its CUDA part was not built: {error}"
                ) from error
            # setuptools turns this into a warning, because the extension is optional
            raise CompileError(
                f"nla_engine._C was not built, the package works without it, slower: {error}"
            ) from error


setup(ext_modules=[Extension("nla_engine._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
