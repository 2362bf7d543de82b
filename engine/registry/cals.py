"""CALS: "Multimodal Deepfake Detection via Coarse-Aware Localization Refinement and Semantic Alignment".

Pattern Recognition, 2025.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.registry import hammer
from engine.registry.config import FusionConfig, Kernel, Layers, Width
from engine.registry.record import DEAD, Keys, Network

_BRANCH_KEY = re.compile(r"visual_encoder\.(Conv|Scales\.\d+)\.conv\.weight")


@dataclass(frozen=True, kw_only=True)
class CalsConfig(FusionConfig):
    """Shape of CALS.

    `caformer_kernels` are the sides of CAFormer's convolutions, one a branch: 5 as published, (5, 3, 1) for
    three scales. `guidance_widths` are the channels of the convolutions over the coarse box.
    """

    divisors = (*FusionConfig.divisors, "caformer_heads")
    dropped = frozenset()

    caformer_start: Layers
    caformer_heads: Width
    caformer_kernels: tuple[Kernel, ...] = (5,)  # missing in bundles written before there were several
    guidance_widths: tuple[Width, Width, Width]

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        yield from super().problems()
        if self.caformer_start >= self.vision_depth:
            yield "caformer_start", f"less than vision_depth {self.vision_depth}", self.caformer_start
        if not self.caformer_kernels:
            yield "caformer_kernels", "at least one integer", []


def _kernels(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sides of CAFormer's convolutions."""
    kernels = tuple(shapes[key][-1] for key in sorted(shapes) if _BRANCH_KEY.fullmatch(key))
    return {"caformer_kernels": kernels} if kernels else {}


NETWORK = Network(
    name="cals",
    title="CALS",
    source=str(__doc__),
    licence="not stated",
    sizes={
        "base": CalsConfig.like(
            hammer.BASE, name="cals", caformer_start=8, caformer_heads=8, guidance_widths=(64, 128, 256)
        ),
        "tiny": CalsConfig.like(
            hammer.TINY, name="cals", caformer_start=2, caformer_heads=2, guidance_widths=(16, 32, 64)
        ),
    },
    keys=Keys(
        marks=("visual_encoder.Conv.", "CARA.", "cls_token_local_e"),
        extends=("hammer", "pmmd_refine"),  # which has LIG too
        dead=DEAD
        | {f"visual_encoder.{m}" for m in ("CoordConv", "usam_pre", "MHA1", "MHA3", "fl1_mlp", "fl2_mlp")}
        | {"text_encoder_f_1", "bbox_head_f", "bbox_head_c", "cls_head_A", "dimd", "psil"},
        renamed={"MIG": "LIG", "CARA": "fch"},  # in the only released weights
        shape=_kernels,
    ),
    parameters={"base": 235_861_455, "tiny": 2_971_775},
    gflop=(79.0, 84.2),
    trainable=True,
)
