"""`import dgm4` without torch: what serving needs is there, the rest says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dgm4
import engine

ABSENT = ("onnx", "onnxruntime", "safetensors", "skimage", "torch", "transformers")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"


def run_without(code):
    """Run code in a process without the packages of the extras: exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_everything_of_the_engine_is_at_the_top():
    assert set(engine.__all__) <= set(dgm4.__all__)
    assert all(getattr(dgm4, name) is getattr(engine, name) for name in engine.__all__)
    assert dgm4.__version__ == engine.__version__


def test_every_name_is_there():
    assert all(hasattr(dgm4, name) for name in dgm4.__all__)
    assert set(dgm4.__all__) <= set(dir(dgm4))
    with pytest.raises(AttributeError, match="module 'dgm4' has no attribute 'absent'"):
        dgm4.absent  # noqa: B018


def test_the_import_needs_no_torch():
    code = (
        "import dgm4; from dgm4 import InputError, Predictor; print(dgm4.model_config('asap', 'tiny').size)"
    )
    assert run_without(code) == (0, "tiny\n", "")


@pytest.mark.parametrize("name", ["create_model", "load_checkpoint", "seeded_model"])
def test_what_needs_torch_names_the_command(name):
    code, _, told = run_without(f"from dgm4 import {name}")
    assert code == 1
    last = told.splitlines()[-1]
    assert last.startswith(f"engine.errors.BackendError: dgm4.{name} needs ")
    assert last.endswith(': pip install "dgm4[export]"')


def test_every_verb_names_the_command(tmp_path):
    """One line and the exit code 4, not a traceback."""
    folder = str(tmp_path)
    verbs = [
        ["export", "--out", f"{folder}/b"],
        ["evaluate", folder, "--data", folder],
        ["train", "--data", folder, "--out", f"{folder}/run"],
        ["pretrain", "--data", folder, "--out", f"{folder}/v.safetensors"],
        ["data", "describe", "--data", folder, "--captioner", folder],
    ]
    code, told, err = run_without(f"from export.cli import main\nfor verb in {verbs}: print(main(verb))")
    assert code == 0, err
    assert told.split() == ["4"] * len(verbs)
    assert len(err.splitlines()) == len(verbs)
    assert all('pip install "dgm4[' in line for line in err.splitlines())
