"""Shapes of the networks, published and small."""

from __future__ import annotations

from engine.errors import InputError, quoted
from engine.registry import NAMES, NETWORKS, SIZES
from engine.registry.config import BERT_EPS, TORCH_EPS, TYPES, VIT_EPS, NetworkConfig

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


def model_config(name: str, size: str = "base") -> ModelConfig:
    """Return the published shape ("base") or the small one with the same code ("tiny").

    Raises InputError for a name that does not exist, or a size that this network does not have.
    """
    if name not in NETWORKS:
        raise InputError(f"unknown network {quoted(name)}: expected one of {', '.join(NETWORKS)}")
    sizes = NETWORKS[name].sizes
    if size not in sizes:
        raise InputError(f"unknown size {quoted(size)} of {name}: expected one of {', '.join(sizes)}")
    return sizes[size]
