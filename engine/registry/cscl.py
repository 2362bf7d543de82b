"""CSCL: its shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from engine.network.config import LARGEST_CAPTION, _Layers, _Pixels, _Width
from engine.schema import Record, matching, one_of, whole


@dataclass(frozen=True, kw_only=True)
class CsclConfig(Record):
    """Shape of CSCL. Depths are layers, widths are channels, `image_size` is pixels.

    `fusion_depth` is the layers of each stream, `intra_depth` and `intra_hidden` those of the contextual
    encoders and the width of their feed-forward, `consistency_widths` the layers of the encoder whose
    outputs are compared, `neighbour_heads` those of attention over chosen patches or words, and
    `image_neighbours` and `text_neighbours` how many are chosen.
    """

    name: Annotated[str, one_of("cscl")] = "cscl"
    size: Annotated[str, matching(r"[\w.-]{1,64}", "a name")]
    width: _Width
    heads: _Width
    vision_depth: _Layers
    text_depth: _Layers
    mlp_ratio: _Layers
    image_size: _Pixels
    patch_size: _Pixels
    vocabulary: Annotated[int, whole(1, 4_000_000)]
    positions: Annotated[int, whole(1, LARGEST_CAPTION)]
    fusion_depth: _Layers
    intra_depth: _Layers
    intra_hidden: _Width
    consistency_widths: tuple[_Width, _Width, _Width]
    neighbour_heads: _Width
    image_neighbours: _Width
    text_neighbours: _Width

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Patches and the image's [CLS]."""
        return self.grid**2 + 1

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        for name in ("heads", "neighbour_heads"):
            if self.width % getattr(self, name):
                yield name, f"a divisor of width {self.width}", getattr(self, name)
        if self.image_neighbours > self.grid**2:
            yield "image_neighbours", f"at most the {self.grid**2} patches", self.image_neighbours


BASE = CsclConfig(
    size="base",
    width=768,
    heads=12,
    vision_depth=11,
    text_depth=12,
    mlp_ratio=4,
    image_size=256,
    patch_size=16,
    vocabulary=50265,
    positions=512,
    fusion_depth=6,
    intra_depth=3,
    intra_hidden=1024,
    consistency_widths=(256, 128, 64),
    neighbour_heads=4,
    image_neighbours=16,
    text_neighbours=8,
)
TINY = CsclConfig(
    size="tiny",
    width=128,
    heads=2,
    vision_depth=3,
    text_depth=2,
    mlp_ratio=4,
    image_size=256,
    patch_size=16,
    vocabulary=2048,
    positions=512,
    fusion_depth=2,
    intra_depth=2,
    intra_hidden=192,
    consistency_widths=(64, 32, 16),
    neighbour_heads=2,
    image_neighbours=16,
    text_neighbours=8,
)
