"""Weights drawn from a seed: every tensor a function of its name, its shape and the seed.

They stand in for trained ones where numbers have to be comparable and no checkpoint is at hand: parity
tests, benchmarks, the untrained demo. Unlike torch's initialisation no tensor is zero or one throughout,
so that every path of a network shows in its answer.
"""

from __future__ import annotations

import zlib
from math import prod

import numpy as np
import torch

from dgm4.model import Detector, create_model
from engine.inputs.options import check_count
from engine.registry import NETWORKS

_SPREAD = 1.5  # a matrix keeps the scale of its input through norm and activation
# Layers that end a residual branch. Where a branch outweighs its stream all words become alike.
RESIDUAL = tuple(
    f"{layer}.weight"
    for layer in (
        *("out_proj", "output.dense", "c_proj", "FFN.2", "attn.proj", "mlp.fc2"),
        *("aggregator_mlp.6", "aggregator_mlp_2.6"),
    )
)
_COUNTERS = ("num_batches_tracked", "queue_ptr")
_TOKENS = (
    "cls_token",
    "pos_embed",
    *(f"cls_token_local{step}" for step in ("", "_e", "_L", "_L_2")),
    "query_modal",
    "query_cross",
    "cls_token_cross",
    "cls_token_feat",
)
# Scales of a branch; and the bias of the face types that CSCL's box hangs on, so that it comes out both ways.
_RAISED = ("gamma_1", "gamma_2", "cls_head_img.6.bias")


def draw(name: str, shape: tuple[int, ...], seed: int, residual: float = _SPREAD) -> np.ndarray:
    """Return the tensor of a checkpoint's entry `name`: float32, or int64 zeros for a counter.

    `residual` scales the matrices that end a residual branch; with 0.225 the words of a caption answer apart.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _COUNTERS:
        return np.zeros(shape, np.int64)
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    z = np.asarray(generator.standard_normal(shape, dtype=np.float32))
    if leaf == "running_var":
        return 0.5 + np.abs(z)
    if leaf == "running_mean":
        return 0.1 * z
    if leaf in _TOKENS:
        return 0.2 * z
    if name.endswith(_RAISED):
        return np.float32(0.3) + np.float32(0.1) * z
    if not shape:
        return np.asarray(np.float32(0.5) + np.float32(0.1) * z)
    if len(shape) == 1:
        return 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    if "embeddings" in name:
        return 0.5 * z
    spread = residual if name.endswith(RESIDUAL) else _SPREAD
    return z * np.float32(spread / np.sqrt(prod(shape[1:])))


def seeded_model(name: str, size: str = "base", seed: int = 1) -> Detector:
    """Build a network with drawn weights, in evaluation mode, float32; see `dgm4.create_model`.

    Raises InputError for a seed that is no integer from 0.
    """
    check_count("seed", seed, least=0)
    with torch.device("meta"):
        model = create_model(name, size)
    gain = NETWORKS[name].residual
    state = {k: torch.from_numpy(draw(k, tuple(v.shape), seed, gain)) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()
