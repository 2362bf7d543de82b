"""The comparator: figures by hand, NaN never passes, and the message has both sides."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.errors import VerificationError
from export.evaluation.reference import TorchNetwork
from export.graph import parity
from export.graph.parity import ABSOLUTE, CASES, EXACT, FP16, INT8, RELATIVE, Tolerance, check, compare


def pair(shift, name="box"):
    reference = [
        {"box": np.full((1, 4), 2.0), "logits": np.ones((1, 2))},
        {"box": np.full((2, 4), 2.0), "logits": np.ones((2, 2))},
    ]
    candidate = [{key: value.copy() for key, value in case.items()} for case in reference]
    candidate[1][name][0, 0] += shift
    return reference, candidate


def test_figures_by_hand():
    difference = compare("onnx", "rewrite", *pair(0.6), EXACT)
    assert difference.max == pytest.approx(0.6)
    assert difference.rms == pytest.approx(0.6 / np.sqrt(18))
    assert difference.relative == pytest.approx(0.6 / np.sqrt(12) / 2)
    assert (difference.worst, difference.stage, difference.against) == ("box", "onnx", "rewrite")


def test_equal_answers_pass():
    difference = compare("onnx", "rewrite", *pair(0.0), Tolerance(ABSOLUTE, 0.0))
    assert difference.passed
    assert check(difference) is difference


@pytest.mark.parametrize(("kind", "bound"), [(ABSOLUTE, 0.6), (RELATIVE, 0.6 / np.sqrt(12) / 2)])
def test_the_bound_is_that_of_its_kind(kind, bound):
    assert compare("s", "r", *pair(0.6), Tolerance(kind, bound * 1.001)).passed
    assert not compare("s", "r", *pair(0.6), Tolerance(kind, bound * 0.999)).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [ABSOLUTE, RELATIVE])
@pytest.mark.parametrize("output", ["box", "logits"])
def test_a_value_that_is_not_finite_never_passes(value, kind, output):
    difference = compare("s", "r", *pair(value, output), Tolerance(kind, 1e30))
    assert not difference.passed
    assert difference.worst == output
    with pytest.raises(VerificationError):
        check(difference)


def test_a_reference_of_zeros_passes_only_for_zeros():
    zeros = [{"box": np.zeros((1, 4))}]
    assert not compare("s", "r", zeros, [{"box": np.full((1, 4), 1e-9)}], FP16).passed


def test_the_message_has_both_sides():
    with pytest.raises(VerificationError) as caught:
        check(compare("onnx", "rewrite", *pair(0.6), EXACT))
    message = str(caught.value)
    for part in ("'onnx'", "'rewrite'", "0.0001", "0.6", "box", "no bundle was written"):
        assert part in message
    assert caught.value.exit_code == 3


def test_a_missing_output_is_an_error():
    reference, candidate = pair(0.0)
    del candidate[1]["box"]
    with pytest.raises(KeyError, match="box"):
        compare("s", "r", reference, candidate, EXACT)


def test_bounds():
    """Changing one is a decision, not a repair."""
    assert (EXACT.kind, EXACT.value) == (ABSOLUTE, 1e-4)
    assert (FP16.kind, FP16.value) == (RELATIVE, 2e-2)
    assert (INT8.kind, INT8.value) == (RELATIVE, 1.5e-1)


def test_cases_cover_the_smallest_padding_and_the_longest_caption(tiny):
    inputs = parity.case_inputs(tiny("hammer").config)
    assert tuple(x["input_ids"].shape for x in inputs) == CASES
    assert {batch for batch, _ in CASES} >= {1, 2}
    assert min(tokens for _, tokens in CASES) == 2
    assert any((x["attention_mask"] == 0).any() for x in inputs)


def test_both_runners_agree(exported):
    graph = exported("asap")
    config = graph.model.config
    difference = compare(
        "onnx",
        "torch",
        parity.torch_outputs(graph.model, config),
        parity.onnx_outputs(graph.path, config),
        EXACT,
    )
    assert difference.passed
    assert json.loads(json.dumps(difference.to_dict()))["kind"] == ABSOLUTE


def test_references_are_full_float32_whatever_the_host_asks_for(tiny):
    """What others are compared with; the host's autocast stands for all its settings of precision."""
    model = tiny("hammer")
    (feeds,) = parity.case_inputs(model.config, [(1, 4)])
    reference = TorchNetwork(model)
    arrays = {name: x.numpy() for name, x in feeds.items()}
    want = parity.torch_outputs(model, model.config, feeds=[feeds])[0], reference.run(arrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = parity.torch_outputs(model, model.config, feeds=[feeds])[0], reference.run(arrays)
    for one, other in zip(want, got, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
