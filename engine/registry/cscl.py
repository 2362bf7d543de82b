"""CSCL: contextual-semantic consistency learning for multimodal manipulation (CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.registry.config import BASE_SHAPE, TINY_SHAPE, Layers, NetworkConfig, Width
from engine.registry.record import ANSWERS, BYTE_BPE, HeatMap, Keys, Network, Tensor

FIRST_POSITION = 2  # RoBERTa's row of the first token
_TEXT_POSITIONS = "meter.text_transformer.embeddings.position_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class CsclConfig(NetworkConfig):
    """Shape of CSCL.

    `fusion_depth` is the layers of each stream, `intra_depth` and `intra_hidden` those of the contextual
    encoders and the width of their feed-forward, `consistency_widths` the layers of the encoder whose
    outputs are compared, `neighbour_heads` those of attention over chosen patches or words, and
    `image_neighbours` and `text_neighbours` how many are chosen.
    """

    divisors = (*NetworkConfig.divisors, "neighbour_heads")

    fusion_depth: Layers
    intra_depth: Layers
    intra_hidden: Width
    consistency_widths: tuple[Width, Width, Width]
    neighbour_heads: Width
    image_neighbours: Width
    text_neighbours: Width

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        yield from super().problems()
        if self.image_neighbours > self.patches:
            yield "image_neighbours", f"at most the {self.patches} patches", self.image_neighbours


def read_scores(scores: np.ndarray, grid: int) -> np.ndarray:
    """How far each patch [P] disagrees with the caption, 1 less its score, as float32 [grid, grid]."""
    return (1 - scores).reshape(grid, grid).astype(np.float32)


BASE = CsclConfig.like(
    BASE_SHAPE,
    name="cscl",
    vision_depth=11,
    vocabulary=50265,
    fusion_depth=6,
    intra_depth=3,
    intra_hidden=1024,
    consistency_widths=(256, 128, 64),
    neighbour_heads=4,
    image_neighbours=16,
    text_neighbours=8,
)
TINY = CsclConfig.like(
    TINY_SHAPE,
    name="cscl",
    vision_depth=3,
    text_depth=2,
    fusion_depth=2,
    intra_depth=2,
    intra_hidden=192,
    consistency_widths=(128, 64, 64),
    neighbour_heads=2,
    image_neighbours=16,
    text_neighbours=8,
)


def _positions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The longest caption, since RoBERTa's table begins with two rows that no token has."""
    rows = shapes.get(_TEXT_POSITIONS)
    return {} if rows is None else {"positions": rows[0] - FIRST_POSITION}


NETWORK = Network(
    name="cscl",
    title="CSCL",
    source=str(__doc__),
    licence="MIT",
    sizes={"base": BASE, "tiny": TINY},
    keys=Keys(
        marks=("img_intra_model.",),
        extends=("hammer",),
        dead=frozenset(
            {
                *("meter.vit_model.positional_embedding", "meter.vit_model.ln_final"),
                "meter.text_transformer.pooler",
                *("img_extra_model.consist_encoder_cross", "text_extra_model.consist_encoder_cross"),
            }
        ),
        words="meter.text_transformer.embeddings.word_embeddings.weight",
        text_positions=_TEXT_POSITIONS,
        image_positions="meter.vit_model.visual.positional_embedding",
        width="meter.vit_model.visual.class_embedding",
        shape=_positions,
    ),
    parameters={"base": 460_810_506, "tiny": 6_458_250},
    gflop=(101.6, 111.2),
    outputs=(
        *ANSWERS,
        Tensor(
            "patch_scores",
            "float32",
            ("batch", "patches"),
            "how far each patch agrees with the caption, 0 to 1, row by row from the top left; the heat map "
            "is 1 less it",
            HeatMap(read_scores, "disagreement with the caption"),
            jumps=True,
        ),
    ),
    tokenizer=replace(BYTE_BPE, min_tokens=1 + BASE.text_neighbours),
    compares=True,
    residual=0.225,  # with more all tokens are alike, and the choice of neighbours is one of rounding
)
