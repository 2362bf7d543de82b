"""PMMD's files: refine alone, both stages joined, other names for the same, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from checkpoints import drawn_once, save, training_copies, whole_file

import dgm4
from engine.errors import CheckpointError
from export.cli import main


@functools.cache
def small(name):
    config = dgm4.model_config(name, "tiny")
    shape = {"vision_depth": 1, "text_depth": 2, "fusion_start": 1, "vocabulary": 30, "positions": 16}
    if name == "pmmd":
        shape |= {"locate_vision_depth": 1, "locate_text_depth": 1}
    return replace(config, **shape, image_size=64, guidance_widths=(4, 4, 8), width=24)


def below(state, prefix):
    return {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}


@pytest.fixture
def files():
    """What the published code writes of each stage, dead modules included."""
    state = drawn_once(small("pmmd"))
    dead = ("fch.fc_global", "tch.fc_global")
    refine = training_copies(below(state, "refine")) | {f"{x}.weight": torch.ones(2, 2) for x in dead}
    dead = (
        "bbox_head_intra.0",
        "bbox_head_cross_step1.3",
        "dfp.self_attention_modal.out_proj",
        "dfp.ffn_modal.2",
        "text_encoder.classifier.0",
        "text_encoder.bert.encoder.layer.12.crossattention.self.query",
    )
    locate = training_copies(below(state, "locate")) | {f"{x}.weight": torch.ones(2, 2) for x in dead}
    locate |= {
        "cls_token_local_e": torch.ones(1, 1, 24),
        "cls_token_local_e_2": torch.ones(1, 1, 24),
        "dfp.positional_encoding": torch.ones(1, 32, 24),
        "text_encoder.FocalLoss_TMG.alpha": torch.ones(2),
        "vision_encoder.blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
        "vision_encoder_f.blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
    }
    return {"refine": refine, "locate": locate}


def renamed(state, names):
    """A state with other first names."""
    for ours, theirs in names.items():
        state = {
            theirs + k.removeprefix(ours) if k == ours or k.startswith(f"{ours}.") else k: v
            for k, v in state.items()
        }
    return state


def assert_loaded(model, want):
    got = model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.parametrize("guidance", ["gem", "MIG", "LIG"])
def test_refine_alone(files, guidance, tmp_path):
    path = save(tmp_path / "refine.pth", whole_file(renamed(files["refine"], {"gem": guidance})))
    found = dgm4.read_checkpoint(path)
    assert found.layout == "pmmd_refine"
    assert "types read from cls_head" in found.note
    assert ("read as gem" in found.note) == (guidance != "gem")
    want = below(drawn_once(small("pmmd")), "refine")
    assert_loaded(dgm4.load_checkpoint(path, config=small("pmmd_refine")), want)


def test_where_both_names_are_there_the_published_one_is_taken(files, tmp_path):
    state = files["refine"]
    twice = state | {k.replace("gem.", "MIG."): v + 1 for k, v in state.items() if k.startswith("gem.")}
    path = save(tmp_path / "refine.pth", twice)
    want = below(drawn_once(small("pmmd")), "refine")
    assert_loaded(dgm4.load_checkpoint(path, config=small("pmmd_refine")), want)
    assert "MIG.conv_net.0.bias" in dgm4.read_checkpoint(path).note
    assert "left out beside gem.conv_net.0.bias" in dgm4.read_checkpoint(path).note


@pytest.mark.parametrize("order", [("refine", "locate"), ("locate", "refine")])
@pytest.mark.parametrize("names", ["published", "compiled"])
def test_both_stages_joined(files, order, names, tmp_path, capsys):
    if names == "compiled":
        parts = {"cross_attention": "", "self_attention": "", "ffn": ""}
        theirs = {"query_modal": "Qf", "query_cross": "Qc", "positional_encoding": "positional_encoding"}
        theirs |= {
            f"{p}_{long}": f"{p}_{long[0].replace('m', 'f')}" for p in parts for long in ("modal", "cross")
        }
        files["locate"] = renamed(files["locate"], {f"dfp.{k}": f"dimd.{v}" for k, v in theirs.items()})
    paths = [save(tmp_path / f"{stage}.pth", whole_file(files[stage])) for stage in order]
    out = tmp_path / "pmmd.safetensors"
    assert main(["convert", str(paths[0]), str(out), "--join", str(paths[1])]) == 0
    assert dgm4.read_checkpoint(out).layout == "pmmd"
    assert ("dimd read as dfp" in dgm4.read_checkpoint(out).note) == (names == "compiled")
    assert_loaded(dgm4.load_checkpoint(out, config=small("pmmd")), drawn_once(small("pmmd")))


def test_locate_alone_is_a_part(files, tmp_path):
    path = save(tmp_path / "locate.pth", files["locate"])
    with pytest.raises(
        CheckpointError, match=r"all of PMMD in one file, .* dgm4 convert FILE OUT --join FILE"
    ):
        dgm4.load_checkpoint(path)
    path = save(tmp_path / "refine.pth", files["refine"])
    with pytest.raises(CheckpointError, match=r"all of PMMD in one file"):
        dgm4.load_checkpoint(path, model="pmmd")


def test_what_cannot_be_joined(files, tmp_path, capsys):
    paths = [str(save(tmp_path / f"{i}.pth", files["refine"])) for i in range(2)]
    assert main(["convert", paths[0], str(tmp_path / "out.safetensors"), "--join", paths[1]]) == 1
    error = capsys.readouterr().err
    assert "expected the files of PMMD (locate and refine), got pmmd_refine and pmmd_refine" in error


def test_types_of_samm_are_refused(files, tmp_path):
    for leaf in ("weight", "bias"):
        files["refine"][f"cls_head.6.{leaf}"] = files["refine"][f"cls_head.6.{leaf}"][:3]
    files["refine"]["visual_encoder.cls_token"] = torch.ones(1, 1, 128)  # the width tells the size
    path = save(tmp_path / "refine.pth", files["refine"])
    with pytest.raises(
        CheckpointError, match=r"refine\.pth: expected the 4 manipulation types .* got 3 .* SAMM"
    ):
        dgm4.load_checkpoint(path)
