"""Build entry point; pyproject.toml holds the metadata. Without the extension Pillow does its work."""

import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

FOLDER = "engine/_native"
OPTIONS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]


def absent(reason: str) -> None:
    """Say in one line what the installation goes without, and why."""
    sys.stderr.write(f"dgm4: built without {FOLDER}: {reason}; Pillow and NumPy prepare images instead\n")


class OptionalBuild(build_ext):
    """Builds the extension where that works."""

    def build_extension(self, ext: Extension) -> None:
        """Compile it, or say why not."""
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            absent(f"the C++ compiler failed, {type(error).__name__}")


def extensions() -> list[Extension]:
    """The extension; none where pybind11 is absent, as in a build without isolation."""
    try:
        import pybind11
    except ImportError as error:
        absent(str(error))
        return []
    sources = [f"{FOLDER}/{name}.cpp" for name in ("module", "passes", "resample")]
    return [
        Extension(
            "engine._native._resample",
            sources,
            include_dirs=[pybind11.get_include()],
            depends=[f"{FOLDER}/arrow.h", f"{FOLDER}/resample.h"],
            extra_compile_args=[] if platform.system() == "Windows" else OPTIONS,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
