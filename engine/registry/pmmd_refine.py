"""PMMD's refine: PMMD's second stage alone, which judges a pair and a box that the caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.registry import hammer
from engine.registry.config import TYPES, FusionConfig, Width
from engine.registry.record import BOX_GIVEN, DEAD, PAIR, Keys, Network

_TYPES_KEY = "cls_head.6.bias"


@dataclass(frozen=True, kw_only=True)
class RefineConfig(FusionConfig):
    """Shape of PMMD's refine; `guidance_widths` are the channels of the convolutions over the given box."""

    dropped = frozenset()

    guidance_widths: tuple[Width, Width, Width]


def check_types(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """No further fields; raises CheckpointError for a checkpoint whose types are SAMM's."""
    count = shapes.get(_TYPES_KEY, (len(TYPES),))[0]
    if count != len(TYPES):
        raise CheckpointError(
            f"expected the {len(TYPES)} manipulation types of DGM4, got {count} in {_TYPES_KEY}; those of "
            "SAMM (face swap, face attribute, text) are not supported"
        )
    return {}


NETWORK = Network(
    name="pmmd_refine",
    title="PMMD refine",
    source="PMMD's second stage, github.com/zj-stu/PMMD",
    licence="not stated",
    sizes={
        "base": RefineConfig.like(hammer.BASE, name="pmmd_refine", guidance_widths=(64, 128, 256)),
        "tiny": RefineConfig.like(hammer.TINY, name="pmmd_refine", guidance_widths=(16, 32, 64)),
    },
    keys=Keys(
        marks=("gem.", "MIG.", "LIG."),
        extends=("hammer",),
        dead=DEAD | {"fch", "tch"},
        renamed={"MIG": "gem", "LIG": "gem"},
        remarks={
            "tch.": "types read from cls_head, as the published evaluation does, not from fch and tch",
            "MIG.": "MIG read as gem",
            "LIG.": "LIG read as gem",
        },
        shape=check_types,
    ),
    parameters={"base": 228_713_676, "tiny": 2_763_516},
    gflop=(63.9, 71.9),
    inputs=(*PAIR, BOX_GIVEN),
)
