from __future__ import annotations

import math

import pytest

from engine.errors import InputError
from engine.manifest import PRECISIONS
from export.evaluation.gate import GATED, GATES, check_gate

REFERENCE = {"AUC": 0.93, "mAP": 0.86, "IoUmean": 0.76, "text_F1": 0.71, "EER": 0.14}


def test_every_precision_of_a_bundle_has_a_gate():
    assert set(GATES) == set(PRECISIONS)
    assert {name: 100 * bound for name, bound in GATES.items()} == pytest.approx(
        {"fp32": 0.02, "fp16": 0.2, "bf16": 0.2, "int8": 1.0, "fp8": 1.0}
    )


@pytest.mark.parametrize("precision", GATES)
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_bound_passes_and_more_fails(precision, name, sign):
    bound = GATES[precision]
    near = {**REFERENCE, name: REFERENCE[name] + sign * bound}
    far = {**REFERENCE, name: REFERENCE[name] + sign * bound * 1.01}
    assert check_gate(precision, near, REFERENCE) == []
    (failure,) = check_gate(precision, far, REFERENCE)
    assert (failure.metric, failure.reference, failure.allowed) == (name, REFERENCE[name], bound)


def test_other_metrics_are_not_gated():
    assert check_gate("fp32", {**REFERENCE, "EER": 0.9}, REFERENCE) == []


def test_all_failures_are_named_in_percent():
    failures = check_gate("int8", dict.fromkeys(REFERENCE, 0.5), REFERENCE)
    assert [failure.metric for failure in failures] == list(GATED)
    assert str(failures[0]) == "AUC: expected within 1 % points of 93.00, got 50.00"


@pytest.mark.parametrize("side", ["metrics", "reference", "both"])
def test_what_is_undefined_does_not_pass(side):
    undefined = {**REFERENCE, "AUC": math.nan}
    metrics = REFERENCE if side == "reference" else undefined
    reference = REFERENCE if side == "metrics" else undefined
    (failure,) = check_gate("int8", metrics, reference)
    assert "AUC is undefined on these pairs" in str(failure)


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="expected one of fp32, fp16, bf16, int8, fp8, got 'int4'"):
        check_gate("int4", REFERENCE, REFERENCE)
