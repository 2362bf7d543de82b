"""Ranges of activations: by hand, and where a range should be cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from export.quantization.ranges import BINS, Histogram, read_histograms, scales_of


def histogram(*parts):
    made = Histogram()
    for part in parts:
        made.add(torch.as_tensor(part))
    return made


def test_counts_survive_a_larger_value():
    """By hand: magnitudes 0 to 1023 in steps of one, and then 4000, which doubles the top twice."""
    made = histogram(-torch.arange(1024.0), [4000.0])
    assert made.peak == 4000
    assert made.top == 4 * 1023
    assert made.counts.sum() == 1025
    want, _ = np.histogram([*range(1024), 4000], BINS, (0, made.top))
    # A value on an edge may fall either way.
    assert np.abs(np.cumsum(made.counts) - np.cumsum(want)).max() <= 2


def test_the_largest_magnitude_is_exact():
    assert histogram([0.5, -3.25], [1.0]).range("minmax") == 3.25


def test_the_percentile_is_numpys():
    values = np.abs(np.random.default_rng(0).standard_normal(400_000)).astype(np.float32)
    made = histogram(values)
    assert made.range("percentile") == pytest.approx(np.percentile(values, 99.999), abs=2 * made.top / BINS)


def test_entropy_cuts_an_outlier_and_keeps_what_is_even():
    random = np.random.default_rng(1)
    normal = random.standard_normal(200_000).astype(np.float32)
    assert 2 < histogram(normal, [100.0]).range("entropy") < 20
    even = random.random(200_000, dtype=np.float32)
    assert histogram(even).range("entropy") > 0.95


def test_zeros_have_a_range():
    assert histogram(torch.zeros(4, 4)).range("minmax") > 0
    assert histogram(torch.zeros(4, 4)).range("entropy") > 0


def test_scales_are_ranges_at_the_largest_code():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).requires_grad_(False)
    model[0].weight[:] = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    batches = [{"input": torch.tensor([[1.0, 1.0]])}, {"input": torch.tensor([[-2.0, 1.5]])}]
    found = read_histograms(model, [("0", model[0]), ("1", model[1])], batches)
    assert scales_of(found, torch.int8) == {"0": 2 / 127, "1": pytest.approx(4.5 / 127)}
    assert scales_of(found, torch.float8_e4m3fn)["0"] == 2 / 448
    assert not model[0]._forward_pre_hooks
