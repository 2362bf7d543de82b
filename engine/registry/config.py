"""Shape of a network: what a checkpoint's training and a bundle's manifest record of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Self, cast

from engine.schema import NOTHING, Record, fail, matching, one_of, whole, within

TYPES = ("face_swap", "face_attribute", "text_swap", "text_attribute")

LARGEST_CAPTION = 8192  # tokens of one that any network may read
BERT_EPS = 1e-12
VIT_EPS = 1e-6
TORCH_EPS = 1e-5  # the default of torch, which all other norms of the published code use

_LARGEST_GRID = 128  # patches along a side: attention over their square is the largest thing in memory
Width = Annotated[int, whole(1, 16_384)]
Layers = Annotated[int, whole(1, 256)]
Kernel = Annotated[int, whole(1, 31)]
_Pixels = Annotated[int, whole(1, 4096)]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Record):
    """Shape of one network: what all have. Depths are layers, widths are channels, `image_size` is pixels.

    `size` is the name of the shape. A network's own class adds what only it has, and names in `dropped` the
    fields that older files have beside.
    """

    known: ClassVar[dict[str, type[NetworkConfig]]] = {}  # by the networks' names
    divisors: ClassVar[tuple[str, ...]] = ("heads",)  # numbers of heads, which divide the width
    dropped: ClassVar[frozenset[str]] = frozenset()

    name: str
    size: Annotated[str, matching(r"[\w.-]{1,64}", "a name")]
    width: Width
    heads: Width
    vision_depth: Layers
    text_depth: Layers
    mlp_ratio: Layers
    image_size: _Pixels
    patch_size: _Pixels
    vocabulary: Annotated[int, whole(1, 4_000_000)]
    positions: Annotated[int, whole(1, LARGEST_CAPTION)]

    @classmethod
    def like(cls, other: NetworkConfig, **own: Any) -> Self:
        """A config with the values of `other`, but for `own`; raises TypeError where a field is left open."""
        return cls(**vars(other) | own)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def image_tokens(self) -> int:
        """Patches and the image's [CLS]."""
        return self.patches + 1

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @classmethod
    def _chosen(cls, raw: dict[str, Any], path: str) -> type[Self]:
        """The class of the network that `raw` names."""
        choices = one_of(*cls.known)
        name = raw.get("name", NOTHING)
        if not isinstance(name, str) or not choices.passes(name):
            fail(f"{path}.name" if path else "name", choices.expected, name, cls.newer)
        return cast(type[Self], cls.known[name])

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Leave out the fields of other networks, which older files have."""
        own = {field.name for field in fields(cls)}
        return {name: value for name, value in raw.items() if name in own or name not in cls.dropped}

    @classmethod
    def from_fields(cls, raw: Mapping[str, Any]) -> NetworkConfig:
        """Read `model.config` of a manifest; raises BundleError that names the field at fault."""
        return cls.from_dict(dict(raw), "model.config")

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        for name in self.divisors:
            if self.width % getattr(self, name):
                yield name, f"a divisor of width {self.width}", getattr(self, name)
        if self.image_size % self.patch_size:
            yield "patch_size", f"a divisor of image_size {self.image_size}", self.patch_size
        if self.grid > _LARGEST_GRID:
            yield "image_size", f"at most {_LARGEST_GRID} patches of {self.patch_size}", self.image_size


# ViT-B/16 and BERT, which most networks have for encoders, and the same in a test's size.
BASE_SHAPE = NetworkConfig(
    name="",
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
)
TINY_SHAPE = replace(
    BASE_SHAPE, size="tiny", width=128, heads=2, vision_depth=4, text_depth=4, vocabulary=2048
)


@dataclass(frozen=True, kw_only=True)
class FusionConfig(NetworkConfig):
    """Of the networks on ALBEF: BERT's layers from `fusion_start` on read the image.

    `projection` and `dropout` (in the text encoder, as in BERT) are read in training alone.
    """

    dropped = frozenset({"caformer_start", "caformer_heads", "caformer_kernels", "guidance_widths"})

    fusion_start: Layers
    projection: Width
    dropout: Annotated[float, within(0, 1)] = 0.1

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        yield from super().problems()
        if self.fusion_start >= self.text_depth:
            yield "fusion_start", f"less than text_depth {self.text_depth}", self.fusion_start
