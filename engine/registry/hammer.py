"""HAMMER: "Detecting and Grounding Multi-Modal Media Manipulation" (CVPR 2023)."""

from __future__ import annotations

from engine.registry.config import BASE_SHAPE, TINY_SHAPE, FusionConfig
from engine.registry.record import DEAD, Keys, Network

BASE = FusionConfig.like(BASE_SHAPE, name="hammer", fusion_start=6, projection=256)
TINY = FusionConfig.like(TINY_SHAPE, name="hammer", fusion_start=2, projection=64)
NETWORK = Network(
    name="hammer",
    title="HAMMER",
    source=str(__doc__),
    licence="S-Lab License 1.0, non-commercial",
    sizes={"base": BASE, "tiny": TINY},
    keys=Keys(marks=("it_cross_attn.", "bbox_head.", "cls_token_local"), dead=DEAD),
    parameters={"base": 227_859_468, "tiny": 2_713_868},
    gflop=(56.1, 61.3),
    trainable=True,
)
