"""The weights that stand in for trained ones are the same everywhere, for ever."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

import dgm4
from dgm4.seeded import draw

# CRC-32 of the bytes, from the script that made the golden files.
PUBLISHED = [
    ("cls_token_local", (1, 1, 8), 2859029537),
    ("itm_head.0.weight", (16, 8), 2104536734),
    ("itm_head.1.weight", (16,), 3261682068),
    ("itm_head.0.bias", (16,), 154880112),
    ("text_encoder.bert.embeddings.word_embeddings.weight", (10, 8), 500788036),
    ("visual_encoder.Conv.bn2.running_var", (8,), 2982318618),
    ("visual_encoder.Conv.bn2.running_mean", (8,), 3837001967),
    ("UtilsB", (), 3437781033),
    ("visual_encoder.patch_embed.proj.weight", (8, 3, 4, 4), 872762674),
    ("visual_encoder.Conv.bn2.num_batches_tracked", (), 1696784233),
]


@pytest.mark.parametrize(("key", "shape", "crc"), PUBLISHED)
def test_tensors_are_those_of_the_golden_files(key, shape, crc):
    tensor = draw(key, shape, 1)
    assert tensor.shape == shape
    assert tensor.dtype == (np.int64 if key.endswith("tracked") else np.float32)
    assert zlib.crc32(tensor.tobytes()) == crc


def test_seed_and_name_both_count():
    first = draw("itm_head.0.weight", (4, 4), 1)
    assert not np.array_equal(first, draw("itm_head.0.weight", (4, 4), 2))
    assert not np.array_equal(first, draw("cls_head.0.weight", (4, 4), 1))


@pytest.mark.parametrize("seed", [-1, "x", 1.5])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(dgm4.InputError, match="seed: expected an integer of at least 0, got"):
        dgm4.seeded_model("asap", "tiny", seed)


def test_model_is_ready_to_answer(name):
    model = dgm4.seeded_model(name, "tiny")
    assert not model.training
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    again = dgm4.seeded_model(name, "tiny").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert all(p.float().std() > 0 for p in model.parameters() if p.numel() > 1), "a constant hides a path"
