import pytest
import torch

import dgm4
from benchmarks.published import Published, PublishedPackedAttention
from dgm4.layers import PackedAttention
from dgm4.text import BertAttention
from dgm4.vision import SelfAttention
from export.graph.trace import example_inputs


@pytest.mark.parametrize("name", dgm4.MODEL_NAMES)
def test_the_baseline_answers_as_the_network(name):
    model = dgm4.seeded_model(name, "tiny").double()
    inputs = example_inputs(model.config, 3, 12)
    inputs["image"] = inputs["image"].double()
    with torch.inference_mode():
        expected = model(**inputs)
        answered = Published(model)(**inputs)
    for want, got in zip(expected, answered, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", dgm4.MODEL_NAMES)
def test_every_attention_is_spelled_out(name):
    model = dgm4.seeded_model(name, "tiny")
    packed = [type(module) for module in model.modules()].count(PackedAttention)
    kinds = [type(module) for module in Published(model).modules()]
    assert PackedAttention not in kinds
    assert SelfAttention not in kinds
    assert BertAttention not in kinds
    assert kinds.count(PublishedPackedAttention) == kinds.count(torch.nn.MultiheadAttention) == packed


def test_bert_runs_twice(monkeypatch):
    model = dgm4.seeded_model("hammer", "tiny")
    calls = []
    bert = model.text_encoder.bert
    original = bert.fuse
    monkeypatch.setattr(bert, "fuse", lambda *args: calls.append(1) or original(*args))
    with torch.inference_mode():
        Published(model)(**example_inputs(model.config, 1, 4))
    assert len(calls) == 2


def test_the_model_stays_as_it_is():
    model = dgm4.seeded_model("cals", "tiny")
    kinds = [type(module) for module in model.modules()]
    published = Published(model)
    weights = {x.data_ptr() for x in model.parameters()}
    assert {x.data_ptr() for x in published.parameters()} <= weights, "no weight is copied"
    published.half()
    assert [type(module) for module in model.modules()] == kinds
    assert {x.dtype for x in model.parameters()} == {torch.float32}
