"""Both stages of PMMD at base size against the numbers that the published code gives for the same weights."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dgm4
from dgm4.models.pmmd import Locate
from dgm4.models.pmmd_refine import Published as Refine
from dgm4.seeded import draw
from engine.network.model import InferenceModel
from engine.network.models import pmmd
from engine.network.released import Released

OUTPUTS, INTERMEDIATES = 2e-5, 1e-4
GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.base


def drawn_boxes(seed, batch):
    """The formula of the boxes that refine's golden numbers were made with."""
    random = np.random.Generator(np.random.PCG64([seed, 8]))
    centre, size = random.uniform(0.25, 0.75, (batch, 2)), random.uniform(0.1, 0.5, (batch, 2))
    return np.concatenate([centre, size], 1).astype(np.float32)


def load(name, golden_inputs):
    with np.load(GOLDEN / f"golden_{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    inputs = golden_inputs(*(meta[key] for key in ("seed", "batch", "tokens", "lengths")))
    if "box_given" in arrays:
        inputs["box_given"] = drawn_boxes(meta["seed"], meta["batch"])
        assert np.array_equal(arrays.pop("box_given"), inputs["box_given"])
    inputs = {key: torch.from_numpy(array) for key, array in inputs.items()}
    return SimpleNamespace(inputs=inputs, arrays=arrays, residual=meta["residual"])


def filled(build, residual):
    with torch.device("meta"):
        model = build()
    state = {k: torch.from_numpy(draw(k, tuple(v.shape), 1, residual)) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def recorded(model, inputs, watched):
    """The answer, and every call's output of the modules in `watched`."""
    calls = {key: [] for key in watched}
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, key=key: calls[key].append(out))
        for key, module in watched.items()
    ]
    with torch.inference_mode():
        answer = model(**inputs)
    for hook in hooks:
        hook.remove()
    return answer, calls


def corner(tokens):
    return tokens[:, :4, :16]


def worst(got, golden):
    return {key: float(np.abs(value.numpy() - golden[key]).max()) for key, value in got.items()}


@pytest.fixture(scope="module")
def refine(golden_inputs):
    golden = load("pmmd_refine", golden_inputs)
    yield SimpleNamespace(
        model=filled(lambda: Refine(dgm4.model_config("pmmd_refine")), golden.residual), golden=golden
    )
    gc.collect()


@pytest.fixture(scope="module")
def locate(golden_inputs):
    golden = load("pmmd_locate", golden_inputs)
    yield SimpleNamespace(
        model=filled(lambda: Locate(dgm4.model_config("pmmd")), golden.residual), golden=golden
    )
    gc.collect()


def assert_refine(answer, golden):
    valid = golden.inputs["attention_mask"].numpy()[:, 1:] == 1
    got = answer._asdict() | {"output_coord": answer.box}
    for name in ("logits_real_fake", "logits_multicls", "output_coord", "logits_tok"):
        apart = np.abs(got[name].numpy() - golden.arrays[name])
        assert (apart[valid] if name == "logits_tok" else apart).max() <= OUTPUTS, name


def test_refine_is_the_published_one(refine):
    model, golden = refine.model, refine.golden
    layers = model.text_encoder.bert.encoder.layer
    watched = {
        "vision": model.visual_encoder,
        "guidance": model.gem,
        "text": layers[model.config.fusion_start - 1].output,
        "fusion": layers[-1].output,
        "cross": model.it_cross_attn,
        "aggregated": model.aggregator,
    }
    answer, calls = recorded(model, golden.inputs, watched)
    assert_refine(answer, golden)
    got = {
        "image_embeds": corner(calls["vision"][0][0]),
        "guidance": corner(calls["guidance"][0]),
        "text_embeds": corner(calls["text"][0]),
        "fusion_hidden": corner(calls["fusion"][0]),
        "token_hidden": corner(calls["fusion"][1]),
        "it_cross_attn": corner(calls["cross"][0]),
        "local_feat_aggr": calls["aggregated"][0][:, 0, :16],
    }
    apart = worst(got, golden.arrays)
    assert max(apart.values()) <= INTERMEDIATES, apart


def test_refine_rewritten_is_the_published_one(refine):
    model = InferenceModel.from_released(refine.model.state_dict(), refine.model.config)
    with torch.inference_mode():
        assert_refine(model(**refine.golden.inputs), refine.golden)


def test_locate_is_the_published_one(locate):
    model, golden = locate.model, locate.golden
    watched = {
        "vision": model.vision_encoder,
        "other": model.vision_encoder_f,
        "text": model.text_encoder.bert.encoder.layer[-1].output,
        "dual": model.dfp,
        "aggregated": model.aggregator,
        "box1": model.bbox_head,
        "box2": model.bbox_head_cross_step2,
    }
    box, calls = recorded(model, golden.inputs, watched)
    apart = worst({"output_coord": box}, golden.arrays)
    assert max(apart.values()) <= OUTPUTS, apart
    got = {
        "box_step1": calls["box1"][0].sigmoid(),
        "box_step2": calls["box2"][0].sigmoid(),
        "image_embeds": corner(calls["vision"][0]),
        "image_embeds_f": corner(calls["other"][0]),
        "text_embeds": corner(calls["text"][0]),
        "dual_feature": calls["dual"][0][:, :16],
        **{f"aggregated_step{i + 1}": x[:, 0, :16] for i, x in enumerate(calls["aggregated"])},
    }
    assert got.keys() == golden.arrays.keys() - {"output_coord"}
    apart = worst(got, golden.arrays)
    assert max(apart.values()) <= INTERMEDIATES, apart


def test_locate_rewritten_is_the_published_one(locate):
    config, golden = locate.model.config, locate.golden
    with torch.device("meta"):
        model = pmmd.Locate(config)
    model.load_state_dict(pmmd.fold_locate(Released(locate.model.state_dict()), config), assign=True)
    image, ids, mask = (golden.inputs[name] for name in ("image", "input_ids", "attention_mask"))
    with torch.inference_mode():
        box = model.eval().answer(*model.see(image), ids, mask.int())
    assert np.abs(box.numpy() - golden.arrays["output_coord"]).max() <= OUTPUTS
