"""Shapes of the three networks, as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

ModelName = Literal["hammer", "asap", "cals"]
MODEL_NAMES: tuple[ModelName, ...] = ("hammer", "asap", "cals")

BERT_EPS = 1e-12
VIT_EPS = 1e-6
TORCH_EPS = 1e-5  # the default of torch, which every other norm of the published code keeps
BERT_MASK = -10000.0  # added to the scores of padded tokens; not -inf, which matters for a fully masked row

TYPES = ("face_swap", "face_attribute", "text_swap", "text_attribute")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one network. Depths are layers, widths are channels, `image_size` is pixels.

    `caformer_kernels` are the sides of CAFormer's convolutions, one a branch: 5 as published, (5, 3, 1) for
    three scales.
    """

    name: ModelName
    size: str
    width: int = 768
    heads: int = 12
    vision_depth: int = 12
    text_depth: int = 12
    fusion_start: int = 6
    mlp_ratio: int = 4
    image_size: int = 256
    patch_size: int = 16
    vocabulary: int = 30522
    positions: int = 512
    projection: int = 256
    caformer_start: int = 8
    caformer_heads: int = 8
    caformer_kernels: tuple[int, ...] = (5,)
    guidance_widths: tuple[int, int, int] = (64, 128, 256)
    dropout: float = 0.1  # in the text encoder while training, as in BERT

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Patches and the image's [CLS]."""
        return self.grid**2 + 1

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Rebuild a config from `to_dict`."""
        known: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()}
        return cls(**known)


_TINY = ModelConfig(
    name="hammer",
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
_SIZES = {"base": ModelConfig(name="hammer", size="base"), "tiny": _TINY}
SIZES = tuple(_SIZES)


def model_config(name: str, size: str = "base") -> ModelConfig:
    """Return the published shape ("base") or the small one with the same code ("tiny").

    Raises ValueError for a name or a size that does not exist.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown network {name!r}: expected one of {', '.join(MODEL_NAMES)}")
    if size not in _SIZES:
        raise ValueError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    return replace(_SIZES[size], name=name)
