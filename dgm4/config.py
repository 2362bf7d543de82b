"""Shapes of the three networks, published and small."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import InputError, quoted
from engine.network.config import BERT_EPS, NAMES, TORCH_EPS, TYPES, VIT_EPS, NetworkConfig

__all__ = [
    "BERT_EPS",
    "BERT_MASK",
    "MODEL_NAMES",
    "SIZES",
    "TORCH_EPS",
    "TYPES",
    "VIT_EPS",
    "ModelConfig",
    "model_config",
]

MODEL_NAMES = NAMES
ModelConfig = NetworkConfig  # training and serving read one record

BERT_MASK = -10000.0  # added to the scores of padded tokens; not -inf, which matters for a fully masked row

_BASE = ModelConfig(
    name="hammer",
    size="base",
    width=768,
    heads=12,
    vision_depth=12,
    text_depth=12,
    fusion_start=6,
    mlp_ratio=4,
    image_size=256,
    patch_size=16,
    vocabulary=30522,
    positions=512,
    projection=256,
    caformer_start=8,
    caformer_heads=8,
    guidance_widths=(64, 128, 256),
)
_TINY = replace(
    _BASE,
    size="tiny",
    width=128,
    heads=2,
    vision_depth=4,
    text_depth=4,
    fusion_start=2,
    vocabulary=2048,
    projection=64,
    caformer_start=2,
    caformer_heads=2,
    guidance_widths=(16, 32, 64),
)
_SIZES = {"base": _BASE, "tiny": _TINY}
SIZES = tuple(_SIZES)


def model_config(name: str, size: str = "base") -> ModelConfig:
    """Return the published shape ("base") or the small one with the same code ("tiny").

    Raises InputError for a name or a size that does not exist.
    """
    if name not in MODEL_NAMES:
        raise InputError(f"unknown network {quoted(name)}: expected one of {', '.join(MODEL_NAMES)}")
    if size not in _SIZES:
        raise InputError(f"unknown size {quoted(size)}: expected one of {', '.join(SIZES)}")
    return replace(_SIZES[size], name=name)
