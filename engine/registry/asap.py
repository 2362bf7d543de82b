"""ASAP, arXiv:2412.12718 (CVPR 2025)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.registry import hammer
from engine.registry.record import ANSWERS, DEAD, HeatMap, Keys, Network, Tensor


def read_map(scores: np.ndarray, grid: int) -> np.ndarray:
    """Mean over the words of sigmoid of MGCA's raw scores [n, 1 + grid * grid], as float32 [grid, grid].

    The image's and the text's [CLS] are dropped; a text of [CLS] alone has only that row.
    """
    rows = (scores[1:] if len(scores) > 1 else scores)[:, 1:]
    powers = np.exp(-np.abs(rows))  # a sigmoid that cannot overflow
    shares = np.where(rows >= 0, 1.0, powers) / (1.0 + powers)
    return shares.mean(axis=0).reshape(grid, grid).astype(np.float32)


NETWORK = Network(
    name="asap",
    title="ASAP",
    source=str(__doc__),
    licence="not stated",
    sizes={size: replace(config, name="asap") for size, config in hammer.NETWORK.sizes.items()},
    keys=Keys(
        marks=("UtilsB", "UtilsC", "it_cross_attn.selfatten."),
        extends=("hammer",),
        dead=DEAD | {"patch_head", "itm_head_m"},
    ),
    parameters={"base": 230_221_838, "tiny": 2_779_918},
    gflop=(57.5, 62.7),
    trainable=True,
    outputs=(
        *ANSWERS,
        Tensor(
            "attention_map",
            "float32",
            ("batch", "tokens", "image_tokens"),
            "how strongly each token points at the image as a whole and at each patch, row by row from the "
            "top left; the heat map is the mean over the words of its sigmoid",
            HeatMap(read_map, "patch evidence"),
        ),
    ),
)
