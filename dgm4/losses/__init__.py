"""Training objectives of HAMMER, ASAP and CALS as pure functions, and their published weights."""

from dgm4.losses.alignment import csam
from dgm4.losses.boxes import box_giou, box_l1
from dgm4.losses.contrastive import enqueue, lma, mac, momentum_update
from dgm4.losses.maps import guidance_targets, mgca, patch_labels, pmm
from dgm4.losses.tokens import bic, ied, mlc, tmg

_COMMON = {"bic": 1.0, "tmg": 1.0, "mlc": 1.0}
# Factors of the losses of these names, from the training configurations that the papers' authors released.
# CALS's box weights hold for the coarse and for the refined box.
WEIGHTS: dict[str, dict[str, float]] = {
    "hammer": {**_COMMON, "mac": 0.1, "box_l1": 0.1, "box_giou": 0.1},
    "asap": {
        **_COMMON,
        "mac": 0.1,
        "lma": 0.1,
        "box_l1": 0.1,
        "box_giou": 0.1,
        "mgca": 0.1,
        "ied": 0.1,
        "pmm": 0.01,
    },
    "cals": {**_COMMON, "csam": 0.1, "box_l1": 0.2, "box_giou": 0.2},
}

__all__ = [
    "WEIGHTS",
    "bic",
    "box_giou",
    "box_l1",
    "csam",
    "enqueue",
    "guidance_targets",
    "ied",
    "lma",
    "mac",
    "mgca",
    "mlc",
    "momentum_update",
    "patch_labels",
    "pmm",
    "tmg",
]
