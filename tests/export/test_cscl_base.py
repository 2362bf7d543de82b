"""CSCL at base size against the numbers that the published code gives for the same weights, pair by pair."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dgm4
from engine.network.model import InferenceModel

OUTPUTS = 2e-5
GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.base


@pytest.fixture(scope="module")
def cscl(golden_inputs):
    """Inputs, golden arrays by name, and both forms of the network over the same tensors."""
    with np.load(GOLDEN / "golden_cscl.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    inputs = golden_inputs(
        *(meta[key] for key in ("seed", "batch", "tokens", "lengths")), first=meta["first"]
    )
    model = dgm4.seeded_model("cscl")
    yield SimpleNamespace(
        inputs={key: torch.from_numpy(array) for key, array in inputs.items()},
        arrays=arrays,
        published=model,
        rewritten=InferenceModel.from_released(model.state_dict(), model.config),
    )
    del model
    gc.collect()


def distances(got, cscl):
    """Largest difference from each golden array; of words, over those that there are."""
    words = cscl.inputs["attention_mask"].numpy()[:, 1:] == 1
    apart = {key: np.abs(value.numpy() - cscl.arrays[key]) for key, value in got.items()}
    return {key: float((x[words] if key == "text_scores" else x).max()) for key, x in apart.items()}


def answers(output):
    """By the golden names; a word's score is the exponential of its first logit."""
    return {
        "logits_real_fake": output.logits_real_fake,
        "logits_multicls": output.logits_multicls,
        "output_coord": output.box,
        "image_scores": output.patch_scores,
        "text_scores": output.logits_tok[..., 0].exp(),
    }


def test_all_that_the_published_form_computes(cscl):
    """Outputs and values in between; the caption of four words, fewer than the neighbours, is among them."""
    model, calls = cscl.published, {}
    watched = {
        "image_encoder": model.meter.vit_model.visual,
        "text_encoder": model.meter.text_transformer,
        "image_correlated": model.img_intra_model.correlation_model,
        "text_correlated": model.text_intra_model.correlation_model,
    }
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, key=key: calls.setdefault(key, out))
        for key, module in watched.items()
    ]
    with torch.inference_mode():
        trace = model.trace(**cscl.inputs)
    for hook in hooks:
        hook.remove()
    streams = {
        **calls,
        **dict(zip(("image_feats", "text_feats"), trace.tokens, strict=True)),
        **dict(zip(("image_intra", "text_intra"), trace.intra, strict=True)),
    }
    got = answers(trace.output) | {key: x[:, :4, :16] for key, x in streams.items()}
    got |= {
        "box_before_rule": trace.box,
        "cls_feats": trace.pooled[:, ::96],
        "fusion_token": trace.cls[:, :16],
        "image_similarity": trace.similarity[0][:, :8, :8],
        "text_similarity": trace.similarity[1][:, :4, :4],
        "image_aggr": trace.feature[0][:, :16],
        "text_aggr": trace.feature[1][:, :16],
    }
    targets = {key for key in cscl.arrays if not key.startswith(("batch.", "f64."))}
    assert got.keys() == targets - {"logits_tok"}
    worst = distances(got, cscl)
    assert max(worst.values()) <= OUTPUTS, worst
    padding = trace.scores[1][cscl.inputs["attention_mask"][:, 1:] == 0]
    assert set(padding.tolist()) == {0.5}


def test_the_rewritten_form(cscl):
    with torch.inference_mode():
        output = cscl.rewritten(**cscl.inputs)
    worst = distances(answers(output), cscl)
    assert max(worst.values()) <= OUTPUTS, worst
    assert not output.box[0].any(), "the box of a pair without a face type"
    assert output.box[1:].all()
