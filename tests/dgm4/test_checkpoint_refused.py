"""Files that are no checkpoint, and pickles that would run code, are refused by name."""

from __future__ import annotations

import ast
import builtins
import functools
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import dgm4
from engine.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def an_image():
    return b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8


def a_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


FOREIGN = {
    "empty": lambda: b"",
    "text": lambda: b"this is no checkpoint\n" * 50,
    "image": an_image,
    "zip": a_zip,
    "json": lambda: b'{"model": {}}',
    "zeros": lambda: bytes(5000),
    "pickled list": lambda: pickle.dumps([1, 2, 3], protocol=2),
    "pickled dict": lambda: pickle.dumps({"model": {"a": 1}}, protocol=2),
    "html": lambda: b"<!DOCTYPE html><html><body>Sign in to download</body></html>",
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(kind, suffix, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    path.write_bytes(FOREIGN[kind]())
    told = "but the file is empty" if kind == "empty" else "checkpoint"
    with pytest.raises(CheckpointError, match=told):
        dgm4.load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{}, [], {"model": {}}, {"model": None}, torch.ones(3), {"model": {"a": 1}}, 5]
)
def test_a_torch_file_without_a_state_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="expected a state of named tensors"):
        dgm4.load_checkpoint(tmp_path / "other.pth")


def test_another_network_is_refused(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    with pytest.raises(
        CheckpointError, match=r"expected the keys of HAMMER, ASAP, CALS, .* or ALBEF .* got layer1\.0"
    ):
        dgm4.load_checkpoint(tmp_path / "resnet.pth")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, message in ((tmp_path / "absent.pth", "no such file"), (tmp_path, "is not a file")):
        with pytest.raises(CheckpointError, match=message):
            dgm4.load_checkpoint(path)


class Gadget:
    """A pickle that calls `function` with `arguments` when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class StateGadget:
    """One that calls through __setstate__ of a foreign class."""

    def __reduce__(self):
        return (functools.partial, (os.mkdir,), (os.mkdir, (), {}, {}))


def gadgets(marker):
    """Kinds of attack; each would make the folder `marker` if it ran."""
    code = f"__import__('os').mkdir({marker!r})"
    make = Gadget(os.mkdir, marker)
    return {
        "os.system": Gadget(os.system, f"mkdir {marker}"),
        "os.mkdir": make,
        "exec": Gadget(builtins.exec, code),
        "eval": Gadget(builtins.eval, code),
        "subprocess": Gadget(subprocess.call, ["mkdir", marker]),
        "partial": Gadget(functools.partial, os.mkdir, marker),
        "getattr": Gadget(builtins.getattr, Path, "mkdir"),
        "import": Gadget(builtins.__import__, "os"),
        "pathlib": Gadget(Path.mkdir, Path(marker)),
        "setstate": StateGadget(),
        "torch.load": Gadget(torch.load, marker),
        "numpy.load": Gadget(np.load, marker),
        "nested": {"model": {"a": [({"b": make},)]}},
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("kind", gadgets("unused"))
def test_a_pickle_that_would_run_code_is_refused(kind, form, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "gadget.pth"
    gadget = gadgets(str(marker))[kind]
    if form == "pickle":
        path.write_bytes(pickle.dumps(gadget, protocol=2))
    else:
        content = {"model": {"itm_head.0.weight": torch.ones(2, 2)}, "extra": gadget}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="could run code") as caught:
        dgm4.load_checkpoint(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_torch_load_of_the_project_is_safe():
    """weights_only=True, spelled out, wherever torch.load is called."""
    calls = []
    for folder in ("dgm4", "kernels", "export", "engine", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load",
                    "torch.jit.load",
                )
                if named:
                    calls.append((path.name, {k.arg: ast.unparse(k.value) for k in node.keywords}))
    assert calls
    assert [name for name, keywords in calls if keywords.get("weights_only") != "True"] == []


def test_no_module_unpickles_otherwise():
    """pickle.load and its kin run code."""
    found = []
    for folder in ("dgm4", "kernels", "export", "engine"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(
                    ("pickle.", "joblib.", "dill.")
                ):
                    found.append(path.name)
    assert found == []
