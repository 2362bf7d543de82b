"""The published weights name losses that exist, with the published values."""

from __future__ import annotations

import dgm4.losses
from dgm4.losses import WEIGHTS
from engine.registry import TRAINABLE

SHARED = {"bic", "box_l1", "box_giou", "tmg", "mlc"}


def test_every_network_weighs_losses_that_exist():
    assert tuple(WEIGHTS) == TRAINABLE
    assert set(WEIGHTS["hammer"]) == SHARED | {"mac"}
    assert set(WEIGHTS["asap"]) == SHARED | {"mac", "lma", "mgca", "ied", "pmm"}
    assert set(WEIGHTS["cals"]) == SHARED | {"csam"}
    assert all(callable(getattr(dgm4.losses, name)) for weights in WEIGHTS.values() for name in weights)


def test_published_totals():
    """With every loss at 1; of ASAP 0.1 (1 + 1) + 1 + 0.1 + 0.1 + 1 + 1 + 0.1 (1 + 1 + 0.1)."""
    totals = {name: round(sum(weights.values()), 9) for name, weights in WEIGHTS.items()}
    assert totals == {"hammer": 3.3, "asap": 3.61, "cals": 3.5}
