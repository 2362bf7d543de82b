"""HAMMER: "Detecting and Grounding Multi-Modal Media Manipulation" (CVPR 2023)."""

from __future__ import annotations

from dataclasses import replace

from engine.registry.config import FusionConfig
from engine.registry.record import DEAD, Keys, Network

BASE = FusionConfig(
    name="hammer",
    size="base",
    width=768,
    heads=12,
    vision_depth=12,
    text_depth=12,
    mlp_ratio=4,
    image_size=256,
    patch_size=16,
    vocabulary=30522,
    positions=512,
    fusion_start=6,
    projection=256,
)
TINY = replace(
    BASE,
    size="tiny",
    width=128,
    heads=2,
    vision_depth=4,
    text_depth=4,
    vocabulary=2048,
    fusion_start=2,
    projection=64,
)
NETWORK = Network(
    name="hammer",
    title="HAMMER",
    source=str(__doc__),
    licence="S-Lab License 1.0, non-commercial",
    sizes={"base": BASE, "tiny": TINY},
    keys=Keys(marks=("it_cross_attn.", "bbox_head.", "cls_token_local"), dead=DEAD),
    parameters={"base": 227_859_468, "tiny": 2_713_868},
    gflop=(56.1, 61.3),
)
