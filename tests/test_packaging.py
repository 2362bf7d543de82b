"""The wheel: its files, with a compiler and without, and that it lives beside Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import csv
import email
import io
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import dgm4
import engine
from engine.packages import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dgm4", "engine", "export", "kernels")
BUILD = "import setuptools.build_meta as backend; backend.build_wheel({!r})"
NO_COMPILER = {"CC": "false", "CXX": "false"}
COMPILED = (".cpp", ".h", ".so")  # sources, and what a build in place has left
USE = """
import sys
import numpy as np
from PIL import Image
from engine import _native
from engine.inputs.network_input import network_input
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, resize_image
rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
got = network_input(rgb, 64, CLIP_MEAN, CLIP_STD)
assert np.array_equal(got, normalize_image(resize_image(rgb, 64)))
assert sys.argv[1] in _native.__file__
print(_native.describe())
"""
# As the wheel on PyPI is made: a regular package whose own modules have some names of ours one level deeper.
THEIRS = {
    "kernels/__init__.py": "from kernels.load import get_kernel\n",
    "kernels/load.py": "def get_kernel():\n    return 'theirs'\n",
    "kernels/benchmarks/__init__.py": "",
    "kernels/benchmarks/attention.py": "",
    "kernels-0.17.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n",
    "kernels-0.17.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
THEIR_USE = "from kernels import get_kernel; assert get_kernel() == 'theirs'"
OUR_USE = "from importlib.util import find_spec as f; assert f('kernels.attention') and f('kernels.onnx')"


def build(source, out, **variables):
    """Build a wheel from a copy of the sources; the wheel and what setup.py said."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-c", BUILD.format(str(out))]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True, text=True)
    (made,) = out.glob("*.whl")
    return made, [line for line in done.stderr.splitlines() if line.startswith("dgm4: ")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Our wheel as it is made without a compiler, and what was said of that."""
    return build(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"), **NO_COMPILER)


@pytest.fixture
def wheel(built):
    return built[0]


def use(wheel, folder):
    """Unpack a wheel, prepare an image with it, and return what it says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-c", USE, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_a_compiler_one_line_says_so_and_pillow_does_the_work(built, tmp_path):
    wheel, said = built
    assert len(said) == 1 and said[0].endswith("Pillow and NumPy prepare images instead")
    assert use(wheel, tmp_path).startswith("Pillow and NumPy (No module named")


@pytest.mark.skipif(find_spec("pybind11") is None, reason="needs pybind11")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_with_a_compiler_the_wheel_holds_the_extension(tmp_path):
    folders = [tmp_path / name for name in ("source", "out", "unpacked")]
    for folder in folders:
        folder.mkdir()
    made, said = build(*folders[:2])
    assert said == [] and "none-any" not in made.name
    compiled = [name for name in zipfile.ZipFile(made).namelist() if name.endswith(COMPILED)]
    assert len(compiled) == 1 and compiled[0].startswith("engine/_native/_resample.")
    assert use(made, folders[2]).startswith("compiled, ")


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in COMPILED
    }
    assert names == files
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "kernels/__init__.py" not in names


def test_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        folder = f"dgm4-{engine.__version__}.dist-info"
        metadata = email.message_from_string(archive.read(f"{folder}/METADATA").decode())
        held = set(archive.namelist())
    assert (metadata["Name"], metadata["Version"]) == ("dgm4", dgm4.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE"} <= held
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in required) == [
        "jinja2",
        "numpy",
        "pillow",
        "tokenizers",
        "tqdm",
    ]
    extras = {"cpu", "gpu", "openvino", "torch", "trt", "rtx", "export", "train"}
    assert extras | set(EXTRAS.values()) <= set(metadata.get_all("Provides-Extra"))


def imported():
    """Top-level names of the modules that our packages import anywhere."""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            if isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def test_every_library_is_required_or_has_an_extra():
    """An installation without it can be told which. torch for CUDA brings Triton, clients their own."""
    base = {"jinja2", "markupsafe", "numpy", "PIL", "tokenizers", "tqdm"}  # jinja2 brings markupsafe
    others = {
        "triton",
        "tritonclient",
        "triton_python_backend_utils",
    }  # the last is in a server's processes alone
    assert set(imported()) - sys.stdlib_module_names - set(PACKAGES) - base - others <= set(EXTRAS)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A small wheel of the name and layout of Hugging Face's."""
    made = tmp_path_factory.mktemp("theirs") / "kernels-0.17.2-py3-none-any.whl"
    record = io.StringIO()
    csv.writer(record).writerows([[name, "", ""] for name in (*THEIRS, "kernels-0.17.2.dist-info/RECORD")])
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in {**THEIRS, "kernels-0.17.2.dist-info/RECORD": record.getvalue()}.items():
            archive.writestr(name, text)
    return made


@pytest.fixture
def pip(tmp_path):
    """pip on a fresh environment without any package; `pip.works(code)` tells whether code runs there."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(verb, *options):
        command = [sys.executable, "-m", "pip", "--python", python, "-q", verb, *options]
        subprocess.run(command, env=variables, check=True, capture_output=True)

    def works(code):
        command = [python, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=False)
        return done.returncode == 0

    run.works = works
    return run


INSTALL = ("install", "--no-index", "--no-deps", "--no-compile")


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_kernels_work_and_either_can_be_removed(wheel, theirs, pip, ours_first):
    for made in (wheel, theirs) if ours_first else (theirs, wheel):
        pip(*INSTALL, made)
    assert pip.works(THEIR_USE)
    assert pip.works(OUR_USE)
    pip("uninstall", "-y", "kernels" if ours_first else "dgm4")
    assert (pip.works(THEIR_USE), pip.works(OUR_USE)) == ((False, True) if ours_first else (True, False))


def test_a_clone_finds_its_kernels_beside_theirs(theirs, tmp_path):
    """Theirs is a regular package in another folder, which hides ours from Python's own search."""
    with zipfile.ZipFile(theirs) as archive:
        archive.extractall(tmp_path)
    code = f"{THEIR_USE}\nimport engine\n{OUR_USE}"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)
