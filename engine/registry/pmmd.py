"""PMMD: a box found by its first stage, locate, and judged with the pair by its second, refine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.registry import pmmd_refine
from engine.registry.config import Layers
from engine.registry.pmmd_refine import RefineConfig, check_types
from engine.registry.record import DEAD, Keys, Network

_BLOCKS, _TEXT_LAYERS = range(12), range(12, 18)


@dataclass(frozen=True, kw_only=True)
class PmmdConfig(RefineConfig):
    """Shape of PMMD: refine's, and the depths of locate's image encoders, which are two, and of its BERT."""

    locate_vision_depth: Layers
    locate_text_depth: Layers


LOCATE = Keys(
    marks=("vision_encoder_f.",),
    extends=("hammer", "cals", "pmmd_refine"),
    dead=DEAD
    | {"bbox_head_intra", "bbox_head_cross_step1", "cls_token_local_e", "cls_token_local_e_2"}
    | {f"dfp.{name}" for name in ("self_attention_modal", "ffn_modal", "positional_encoding")}
    | {"text_encoder.classifier", "text_encoder.FocalLoss_TMG"}
    | {f"text_encoder.bert.encoder.layer.{i}" for i in _TEXT_LAYERS}
    # Follows from the grid.
    | {
        f"{encoder}.blocks.{i}.attn.relative_position_index"
        for encoder in ("vision_encoder", "vision_encoder_f")
        for i in _BLOCKS
    },
    renamed={
        **pmmd_refine.NETWORK.keys.renamed,
        "dimd.Qf": "dfp.query_modal",
        "dimd.Qc": "dfp.query_cross",
        "dimd.cross_attention_f": "dfp.cross_attention_modal",
        "dimd.cross_attention_c": "dfp.cross_attention_cross",
        "dimd.self_attention_f": "dfp.self_attention_modal",
        "dimd.self_attention_c": "dfp.self_attention_cross",
        "dimd.ffn_f": "dfp.ffn_modal",
        "dimd.ffn_c": "dfp.ffn_cross",
        "dimd.positional_encoding": "dfp.positional_encoding",
    },
    remarks={"MIG.": "MIG read as gem", "LIG.": "LIG read as gem", "dimd.": "dimd read as dfp"},
)


def _check_types(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """As refine's."""
    return check_types({key.removeprefix("refine."): shape for key, shape in shapes.items()})


def _shape(size: str, vision_depth: int, text_depth: int) -> PmmdConfig:
    depths = {"locate_vision_depth": vision_depth, "locate_text_depth": text_depth}
    return PmmdConfig.like(pmmd_refine.NETWORK.sizes[size], name="pmmd", **depths)


NETWORK = Network(
    name="pmmd",
    title="PMMD",
    source="PMMD, github.com/zj-stu/PMMD",
    licence="not stated",
    sizes={"base": _shape("base", 12, 12), "tiny": _shape("tiny", 2, 3)},
    keys=Keys(
        marks=("locate.", "refine."),
        parts={"locate": LOCATE, "refine": pmmd_refine.NETWORK.keys},
        words="refine.text_encoder.bert.embeddings.word_embeddings.weight",
        text_positions="refine.text_encoder.bert.embeddings.position_embeddings.weight",
        image_positions="refine.visual_encoder.pos_embed",
        width="refine.visual_encoder.cls_token",
        shape=_check_types,
    ),
    parameters={"base": 526_621_464, "tiny": 5_203_224},
    gflop=(167.3, 179.9),
)
