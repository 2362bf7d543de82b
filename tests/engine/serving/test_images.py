"""The Dockerfiles: linted, and in step with pyproject.toml. No engine builds them here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = ("Dockerfile", "Dockerfile.gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(name):
    """The instructions of a Dockerfile, in order: (word, the rest of the line)."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def arguments(name, word):
    return [rest for found, rest in instructions(name) if found == word]


@pytest.mark.parametrize("name", FILES)
def test_it_is_linted(name):
    if not HADOLINT.is_file():
        pytest.skip("needs hadolint (the extra `test`)")
    done = subprocess.run([HADOLINT, ROOT / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", FILES)
def test_it_installs_what_the_project_states(name):
    (command,) = arguments(name, "RUN")
    words = shlex.split(command)
    extras = re.fullmatch(r"\.\[(.+)\]", words[-1])[1].split(",")
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys() and "serve" in extras
    assert words[words.index("-c") + 1] == "constraints.txt"
    copied = {word for rest in arguments(name, "COPY") if "--from" not in rest for word in rest.split()[:-1]}
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    licences = set(PROJECT["project"]["license-files"])
    needed = {"pyproject.toml", "setup.py", "constraints.txt", PROJECT["project"]["readme"]}
    assert copied == packages | licences | needed
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied
    assert all((ROOT / each).exists() for each in copied)


@pytest.mark.parametrize("name", FILES)
def test_it_runs_as_nobody_on_a_pinned_base(name):
    bases = [rest.split()[0] for rest in arguments(name, "FROM")]
    assert all(re.fullmatch(r"python:3\.\d+(-slim)?-\w+", base) for base in bases)
    minor = int(bases[0].split(".")[1].partition("-")[0])
    assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["project"]["classifiers"]
    assert [rest.partition(":")[0] for rest in arguments(name, "USER")] == ["10001"]
    assert arguments(name, "ADD") == []


@pytest.mark.parametrize("name", FILES)
def test_its_command_and_its_probe(name):
    from export.cli.app import make_parser

    (entry,), (command,) = arguments(name, "ENTRYPOINT"), arguments(name, "CMD")
    program, *words = json.loads(entry) + json.loads(command)
    options = make_parser().parse_args(words)
    assert program == "dgm4" and options.host == "0.0.0.0"
    (probe,) = arguments(name, "HEALTHCHECK")
    code = json.loads(probe.partition("CMD ")[2])
    assert f":{options.port}/readyz" in code[-1] and code[:2] == ["python", "-c"]
    compile(code[-1], "probe", "exec")
    (port,) = arguments(name, "EXPOSE")
    assert int(port) == options.port
