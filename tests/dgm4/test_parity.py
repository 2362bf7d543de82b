"""The networks against the numbers that the published code gives for the same weights."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

OUTPUTS, INTERMEDIATES = 2e-5, 1e-4

pytestmark = pytest.mark.base


@pytest.fixture(scope="module")
def traced(base):
    """Answers of the network, and every call's output of the modules that the golden files slice."""
    model, calls = base.model, defaultdict(list)
    layers = model.text_encoder.bert.encoder.layer
    watched = {
        "vision": model.visual_encoder,
        "text": layers[model.config.fusion_start - 1].output,
        "fusion": layers[-1].output,
        "cross": model.it_cross_attn,
        "aggregated": model.aggregator,
        "box": model.bbox_head,
    }
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, key=key: calls[key].append(out))
        for key, module in watched.items()
    ]
    inputs = {k: torch.from_numpy(v) for k, v in base.golden.inputs.items()}
    with torch.inference_mode():
        answers = model(**inputs)
    for hook in hooks:
        hook.remove()
    return answers, calls


def test_outputs_are_the_published_ones(base, traced, outputs_apart):
    worst = outputs_apart(traced[0]._asdict(), base.golden)
    assert len(worst) == (5 if base.name == "asap" else 4)
    assert max(worst.values()) <= OUTPUTS, worst


def test_only_asap_has_a_map(base, traced):
    assert (traced[0].attention_map is not None) == (base.name == "asap")


def test_intermediates_are_the_published_ones(base, traced):
    calls, golden = traced[1], base.golden.arrays
    got = {
        "image_embeds": calls["vision"][0][0][:, :4, :16],
        "text_embeds": calls["text"][0][:, :4, :16],
        "fusion_hidden": calls["fusion"][0][:, :4, :16],
        "it_cross_attn": calls["cross"][0][:, :4, :16],
        "local_feat_aggr": calls["aggregated"][0][:, 0, :16],
    }
    if base.name == "cals":
        got |= {
            "image_embeds_c": calls["vision"][0][1][:, :4, :16],
            "coarse_coord": calls["box"][0].sigmoid(),
            "local_feat_aggr_refined": calls["aggregated"][1][:, 0, :16],
        }
    answers = {"logits_real_fake", "logits_multicls", "box", "logits_tok", "attention_map"}
    assert got.keys() == golden.keys() - answers
    worst = {key: float(np.abs(value.numpy() - golden[key]).max()) for key, value in got.items()}
    assert max(worst.values()) <= INTERMEDIATES, worst


def test_every_branch_runs_as_often_as_published(base, traced):
    passes = 2 if base.name == "cals" else 1
    calls = traced[1]
    assert {key: len(calls[key]) for key in ("cross", "aggregated", "box")} == dict.fromkeys(
        ("cross", "aggregated", "box"), passes
    )
    assert len(calls["fusion"]) == 1, "BERT's fusion layers run once, not again for the token logits"
