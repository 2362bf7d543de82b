from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch

from engine.errors import CheckpointError, InputError
from engine.manifest import manifest_digest
from export.cli import main
from export.evaluation import reference
from export.evaluation.evaluate import EvaluateOptions, evaluate

QUICK = {"repeats": 5, "threads": 1}


@pytest.fixture(scope="module")
def data(annotated):
    return annotated(5)


def test_without_a_reference_there_is_no_need_of_torch(bundle, annotated):
    code = (
        "import sys; from export.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'safetensors', 'onnx'} & sys.modules.keys()"
    )
    arguments = ["evaluate", bundle("asap", "fp32").path, "--data", annotated(3), "--reference", "none"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 pairs of test" in done.stdout


@pytest.fixture
def weightless(bundle, tmp_path):
    """A bundle without the weights of torch."""
    path = shutil.copytree(bundle("asap", "fp32").path, tmp_path / "bundle")
    (path / "model.safetensors").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    return path


def test_a_bundle_without_weights(weightless, bundle, data, capsys):
    arguments = ["evaluate", str(weightless), "--data", str(data), "--limit", "4"]
    assert main(arguments) == 0
    assert (
        "no reference: the bundle does not contain model.safetensors; give --checkpoint with what"
        in capsys.readouterr().out
    )
    assert main([*arguments, "--gate"]) == 1
    assert "give --checkpoint" in capsys.readouterr().err
    checkpoint = bundle("asap", "fp32").path / "model.safetensors"
    assert main([*arguments, "--checkpoint", str(checkpoint)]) == 0
    assert "is not the file that the bundle was made of" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_refused(bundle, data, tiny, tmp_path):
    checkpoint = tmp_path / "cals.safetensors"
    safetensors.torch.save_file(tiny("cals").state_dict(), checkpoint)
    with pytest.raises(CheckpointError):
        evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(checkpoint=checkpoint, **QUICK))


def test_a_checkpoint_without_trained_heads_is_refused(bundle, data, monkeypatch, tmp_path):
    fake = type("Checkpoint", (), {"layout": "albef"})
    monkeypatch.setattr(reference.dgm4, "read_checkpoint", lambda path: fake)
    with pytest.raises(InputError, match="ALBEF initialisation"):
        evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(checkpoint=tmp_path, **QUICK))


def test_the_demo_weights_are_found_for_the_demo_bundle(data):
    found = evaluate("demo:asap", data, EvaluateOptions(reference="required", **QUICK))
    assert found.comparison.source == "asap.safetensors"
    assert found.notes == ()
