"""CSCL's file as the published code writes it, its dead modules included, and files that are others'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import drawn_once, save, shape, whole_file

import dgm4
from dgm4.checkpoint import _is_dead
from engine.errors import CheckpointError
from engine.registry import NETWORKS

KEYS = Path(__file__).parents[1] / "golden" / "keys_cscl.json"


@pytest.fixture
def small():
    return shape(
        "cscl",
        **{"width": 24, "vision_depth": 1, "text_depth": 1, "fusion_depth": 1, "intra_depth": 1},
        **{"intra_hidden": 8, "consistency_widths": (8, 6, 4), "vocabulary": 30, "positions": 16},
    )


@pytest.fixture
def published(small):
    dead = ("meter.vit_model.ln_final", "meter.text_transformer.pooler.dense")
    dead += tuple(f"{x}_extra_model.consist_encoder_cross.{i}" for x in ("img", "text") for i in (0, 1, 3))
    extra = {f"{name}.{leaf}": torch.ones(4) for name in dead for leaf in ("weight", "bias")}
    extra["meter.vit_model.positional_embedding"] = torch.ones(77, 8)
    extra["meter.text_transformer.embeddings.position_ids"] = torch.arange(18)[None]
    return drawn_once(small) | extra


def test_names_and_shapes_are_the_published_ones():
    keys, config = NETWORKS["cscl"].keys, dgm4.model_config("cscl")
    live = {k: tuple(s) for k, s in json.loads(KEYS.read_text()) if not _is_dead(k, keys.dead)}
    with torch.device("meta"):
        state = dgm4.build(config).state_dict()
    assert {k: tuple(x.shape) for k, x in state.items()} == live


def test_the_published_file_is_read(published, small, tmp_path):
    path = save(tmp_path / "cscl.pth", whole_file(published))
    assert dgm4.read_checkpoint(path).layout == "cscl"
    got, want = dgm4.load_checkpoint(path, config=small).state_dict(), drawn_once(small)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_vocabulary_and_positions_are_read_off_the_file(tmp_path):
    """RoBERTa's table of positions begins with two rows that no token has."""
    small = shape("cscl", vocabulary=30, positions=20)
    path = save(tmp_path / "cscl.pth", drawn_once(small))
    found = dgm4.load_checkpoint(path).config
    assert (found.vocabulary, found.positions) == (30, 20)


METER = ("vit_model.visual.conv1", "text_transformer.embeddings.LayerNorm", "cross_modal_text_transform")
CLIP = ("visual.conv1", "visual.ln_pre", "transformer.resblocks.0.ln_1", "token_embedding", "ln_final")
X2_VLM = (
    "vision_encoder.blocks.0.norm1",
    "text_encoder.bert.embeddings.LayerNorm",
    "bbox_head.0",
    "itm_head.0",
)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(
            (*METER, "mlm_score.transform.dense"), "expected the keys of HAMMER, .*CSCL", id="METER"
        ),
        pytest.param(CLIP, "expected the keys of HAMMER, .*CSCL", id="CLIP"),
        pytest.param(X2_VLM, "expected", id="X2-VLM"),
    ],
)
def test_files_of_others_are_refused(names, message, tmp_path):
    path = save(tmp_path / "other.pth", {"model": {f"{name}.weight": torch.ones(4, 4) for name in names}})
    with pytest.raises(CheckpointError, match=message) as caught:
        dgm4.load_checkpoint(path)
    assert len(str(caught.value)) < 600


def test_a_file_without_a_branch_is_named(published, small, tmp_path):
    state = {k: v for k, v in published.items() if not k.startswith("text_extra_model.")}
    with pytest.raises(CheckpointError, match=r"missing \(text_extra_model\."):
        dgm4.load_checkpoint(save(tmp_path / "cscl.pth", state), config=small)


HALF = "meter."


@pytest.mark.parametrize("chosen", [lambda k: k.startswith(HALF), lambda k: "word_embeddings" in k])
def test_a_part_of_a_network_is_named(published, tmp_path, chosen):
    path = save(tmp_path / "meter.pth", {k: v for k, v in published.items() if chosen(k)})
    with pytest.raises(CheckpointError, match=r"got a part of CSCL \(meter\..*; give the whole state_dict"):
        dgm4.load_checkpoint(path)


def test_the_other_half_too(published, tmp_path):
    state = {k: v for k, v in published.items() if not k.startswith(HALF)}
    with pytest.raises(CheckpointError, match=r"key meter\..* which is missing; give the whole state_dict"):
        dgm4.load_checkpoint(save(tmp_path / "rest.pth", state))


def dropped(state):
    return {k: v for k, v in state.items() if k != "itm_head.0.weight"}


def renamed(state):
    return dropped(state) | {"itm_head.one.weight": state["itm_head.0.weight"]}


def misshapen(state):
    return state | {"itm_head.0.weight": state["itm_head.0.weight"][:-1]}


def infinite(state):
    return state | {"itm_head.0.weight": state["itm_head.0.weight"] / 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped, "1 missing (itm_head.0.weight); give the whole state_dict() under the published names"),
        (renamed, "(itm_head.one.weight); give the whole state_dict() under the published names"),
        (misshapen, "; other shapes need a record of their own: docs/add-a-network.md"),
        (infinite, "; fetch it again, or take an earlier one of the training"),
    ],
)
def test_a_changed_file_is_refused_with_a_remedy(published, small, tmp_path, change, message):
    path = save(tmp_path / "cscl.pth", change(published))
    with pytest.raises(CheckpointError) as caught:
        dgm4.load_checkpoint(path, config=small)
    assert str(caught.value).endswith(message)
