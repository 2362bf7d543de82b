"""Shape of a network: what a checkpoint's training and a bundle's manifest record of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from engine.schema import Record, matching, one_of, whole, within

TYPES = ("face_swap", "face_attribute", "text_swap", "text_attribute")
NAMES = ("hammer", "asap", "cals")

LARGEST_CAPTION = 8192  # tokens of one that any network may read
BERT_EPS = 1e-12
VIT_EPS = 1e-6
TORCH_EPS = 1e-5  # the default of torch, which all other norms of the published code use

_LARGEST_GRID = 128  # patches along a side: attention over their square is the largest thing in memory
_Width = Annotated[int, whole(1, 16_384)]
_Layers = Annotated[int, whole(1, 256)]
_Pixels = Annotated[int, whole(1, 4096)]
_Kernel = Annotated[int, whole(1, 31)]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Record):
    """Shape of one network. Depths are layers, widths are channels, `image_size` is pixels.

    `caformer_kernels` are the sides of CAFormer's convolutions, one a branch: 5 as published, (5, 3, 1) for
    three scales. `size`, `projection` and `dropout` are read in training alone.
    """

    name: Annotated[str, one_of(*NAMES)]
    size: Annotated[str, matching(r"[\w.-]{1,64}", "a name")]
    width: _Width
    heads: _Width
    vision_depth: _Layers
    text_depth: _Layers
    fusion_start: _Layers
    mlp_ratio: _Layers
    image_size: _Pixels
    patch_size: _Pixels
    vocabulary: Annotated[int, whole(1, 4_000_000)]
    positions: Annotated[int, whole(1, LARGEST_CAPTION)]
    projection: _Width
    caformer_start: _Layers
    caformer_heads: _Width
    caformer_kernels: tuple[_Kernel, ...] = (5,)  # missing in bundles written before there were several
    guidance_widths: tuple[_Width, _Width, _Width]
    dropout: Annotated[float, within(0, 1)] = 0.1  # in the text encoder, as in BERT

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

    @property
    def has_map(self) -> bool:
        """Whether the network outputs the attention map of MGCA."""
        return self.name == "asap"

    def tensors(self) -> dict[str, tuple[str, tuple[int | str, ...]]]:
        """Type and shape of every tensor that a graph of the network may have, by name."""
        size = self.image_size
        return {
            "image": ("float32", ("batch", 3, size, size)),
            "input_ids": ("int64", ("batch", "tokens")),
            "attention_mask": ("int64", ("batch", "tokens")),
            "logits_real_fake": ("float32", ("batch", 2)),
            "logits_multicls": ("float32", ("batch", len(TYPES))),
            "box": ("float32", ("batch", 4)),
            "logits_tok": ("float32", ("batch", "tokens - 1", 2)),
            "attention_map": ("float32", ("batch", "tokens", self.image_tokens)),
        }

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any]) -> NetworkConfig:
        """Read `model.config` of a manifest; raises BundleError that names the field at fault."""
        return cls.from_dict(dict(raw), "model.config")

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        for name in ("heads", "caformer_heads"):
            if self.width % getattr(self, name):
                yield name, f"a divisor of width {self.width}", getattr(self, name)
        if self.image_size % self.patch_size:
            yield "patch_size", f"a divisor of image_size {self.image_size}", self.patch_size
        if self.grid > _LARGEST_GRID:
            yield "image_size", f"at most {_LARGEST_GRID} patches of {self.patch_size}", self.image_size
        if self.fusion_start >= self.text_depth:
            yield "fusion_start", f"less than text_depth {self.text_depth}", self.fusion_start
        if self.name == "cals" and self.caformer_start >= self.vision_depth:
            yield "caformer_start", f"less than vision_depth {self.vision_depth}", self.caformer_start
        if not self.caformer_kernels:
            yield "caformer_kernels", "at least one integer", []
