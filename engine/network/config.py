"""NetworkConfig: the dimensions of a network, as recorded in a bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.fields import Fields

NAMES = ("hammer", "asap", "cals")

_LISTS = ("guidance_widths", "caformer_kernels")

BERT_EPS = 1e-12
VIT_EPS = 1e-6
TORCH_EPS = 1e-5  # the default of torch, which all other norms of the published code use


@dataclass(frozen=True)
class NetworkConfig:
    """The part of a model's configuration that inference needs.

    Depths are layers, widths are channels, `image_size` and `patch_size` are pixels.
    """

    name: str
    width: int
    heads: int
    vision_depth: int
    text_depth: int
    fusion_start: int
    mlp_ratio: int
    image_size: int
    patch_size: int
    vocabulary: int
    positions: int
    caformer_start: int
    caformer_heads: int
    guidance_widths: tuple[int, int, int]
    caformer_kernels: tuple[int, ...] = (5,)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Patches and the image's [CLS]."""
        return self.grid**2 + 1

    @property
    def has_map(self) -> bool:
        """Whether the network outputs the attention map of MGCA."""
        return self.name == "asap"

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any]) -> NetworkConfig:
        """Read `model.config` of a manifest; other fields are ignored.

        Raises BundleError that names the field at fault.
        """
        fields = Fields(dict(raw), "model.config")
        name = fields.choice("name", NAMES)
        rest = [key for key in cls.__dataclass_fields__ if key not in ("name", *_LISTS)]
        sizes = {key: fields.integer(key) for key in rest}
        one, two, three = _integers(fields, "guidance_widths", 3)
        # Absent before there were several.
        kernels = _integers(fields, "caformer_kernels") if "caformer_kernels" in raw else (5,)
        config = cls(name=name, guidance_widths=(one, two, three), caformer_kernels=kernels, **sizes)
        _check(config, fields)
        return config


def _integers(fields: Fields, name: str, count: int | None = None) -> tuple[int, ...]:
    """A list of integers above 0, `count` of them or at least one."""
    values = fields.value(name)
    wrong = not isinstance(values, list) or not all(type(x) is int and x > 0 for x in values)
    if wrong or not (len(values) == count if count else values):
        fields.fail(name, f"a list of {'three' if count else 'some'} integers >= 1")
    return tuple(values)


def _check(config: NetworkConfig, fields: Fields) -> None:
    """Check what one field says about another."""
    for name in ("heads", "caformer_heads"):
        if config.width % getattr(config, name):
            fields.fail(name, f"a divisor of width {config.width}")
    if config.image_size % config.patch_size:
        fields.fail("patch_size", f"a divisor of image_size {config.image_size}")
    if config.fusion_start >= config.text_depth:
        fields.fail("fusion_start", f"less than text_depth {config.text_depth}")
    if config.name == "cals" and config.caformer_start >= config.vision_depth:
        fields.fail("caformer_start", f"less than vision_depth {config.vision_depth}")
