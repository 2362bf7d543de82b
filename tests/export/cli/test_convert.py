"""`dgm4 convert`: a checkpoint's tensors alone, whatever stands beside them."""

from __future__ import annotations

import types

import pytest
import safetensors.torch
import torch

from export import cli

STATE = {"visual_encoder.cls_token": torch.ones(2), "itm_head.0.weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture
def checkpoint(tmp_path):
    shared = {"visual_encoder.zeros": torch.zeros(()).expand(4)}  # memory that safetensors would refuse
    wrapped = {f"_orig_mod.{name}": value for name, value in (STATE | shared).items()}
    ema = {name: value + 1 for name, value in STATE.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": wrapped, "model_ema": ema, "args": types.SimpleNamespace(lr=1)}, path)
    return path


@pytest.mark.parametrize(
    ("flags", "added", "line"),
    [
        ([], 0, "3 tensors of the state model,"),
        (["--state", "model_ema"], 1, "2 tensors of the state model_ema,"),
    ],
)
def test_tensors_are_taken_by_the_networks_own_names(
    flags, added, line, checkpoint, tmp_path, capsys, caplog
):
    out = tmp_path / "tensors.safetensors"
    assert cli.main(["convert", str(checkpoint), str(out), *flags]) == 0
    taken = safetensors.torch.load_file(out)
    assert all(torch.equal(taken[name], value + added) for name, value in STATE.items())
    assert line in capsys.readouterr().out
    assert "types.SimpleNamespace were not read" in caplog.text


def test_a_state_that_is_not_there_exits_with_1(checkpoint, tmp_path, capsys):
    arguments = ["convert", str(checkpoint), str(tmp_path / "t.safetensors"), "--state", "ema"]
    assert cli.main(arguments) == 1
    assert "expected one of its states (model, model_ema), got 'ema'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_another_suffix_is_a_usage_error(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(checkpoint), str(tmp_path / "t.pth")])
    assert caught.value.code == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err


def test_an_export_names_the_way(checkpoint, tmp_path, capsys):
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b")]) == 1
    err = capsys.readouterr().err
    assert "it asks for types.SimpleNamespace, which could run code" in err
    assert f"dgm4 convert {checkpoint} checkpoint.safetensors reads its tensors alone" in err
