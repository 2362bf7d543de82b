"""Checkpoints of a run: the released layout, with what an exact resume needs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm4.config import ModelConfig
from dgm4.saving import save_pickle
from dgm4.state import read_content
from dgm4.training.trainee import Trainee
from engine.errors import CheckpointError
from engine.files import replacing

_POSITION_IDS = "bert.embeddings.position_ids"
_NEEDED = {"model", "optimizer", "lr_scheduler", "scaler", "config", "epoch", "progress", "random"}
_ENCODERS = ("visual_encoder", "visual_encoder_m")


def released_state(trainee: Trainee) -> dict[str, Tensor]:
    """The trainee's tensors under the keys of a released checkpoint, modules that are never called included.

    Those are zeros, and BERT's position ids are counted out: the published loaders are strict about both.
    """
    state = {name.removeprefix("network."): value for name, value in trainee.state_dict().items()}
    config = trainee.network.config
    for tower in ("text_encoder", "text_encoder_m"):
        state[f"{tower}.{_POSITION_IDS}"] = torch.arange(config.positions)[None]
    if config.name == "cals":
        for name, shape in _uncalled(config).items():
            whole = name.endswith("num_batches_tracked")
            # One number in the file and in memory, where base size would take 0.7 GB.
            zeros = torch.zeros((), dtype=torch.int64 if whole else torch.float32).expand(shape)
            state |= {f"{encoder}.{name}": zeros for encoder in _ENCODERS}
    return state


def _uncalled(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Modules of CALS's visual encoder that are built and never called: name -> shape."""
    width, hidden = config.width, config.mlp_ratio * config.width
    shapes: dict[str, tuple[int, ...]] = {
        "CoordConv.coord_conv.weight": (width, 5, 3, 3),
        "CoordConv.coord_conv.bias": (width,),
        "usam_pre.weight": (1, 1, 3, 3),
        "usam_pre.weight2": (1, 1, 1, 1),
        "usam_pre.bn.num_batches_tracked": (),
    }
    shapes |= {f"usam_pre.bn.{n}": (1,) for n in ("weight", "bias", "running_mean", "running_var")}
    block: dict[str, tuple[int, ...]] = {
        "mha.in_proj_weight": (3 * width, width),
        "mha.in_proj_bias": (3 * width,),
        "mha.out_proj.weight": (width, width),
        "mha.out_proj.bias": (width,),
        "ffn.0.weight": (hidden, width),
        "ffn.0.bias": (hidden,),
        "ffn.2.weight": (width, hidden),
        "ffn.2.bias": (width,),
    }
    block |= {f"layer_norm{i}.{n}": (width,) for i in (1, 2) for n in ("weight", "bias")}
    shapes |= {f"{name}.{part}": shape for name in ("MHA1", "MHA3") for part, shape in block.items()}
    for name in ("fl1_mlp", "fl2_mlp"):
        pixels = (config.image_size + 2) ** 2
        shapes |= {f"{name}.mlp.0.weight": (512, pixels), f"{name}.mlp.0.bias": (512,)}
        shapes |= {f"{name}.mlp.2.weight": (width, 512), f"{name}.mlp.2.bias": (width,)}
    return shapes


def load_released(trainee: Trainee, state: dict[str, Tensor]) -> None:
    """Load what `released_state` gave back into the trainee; raises CheckpointError for what does not fit."""
    expected = {name: (name.removeprefix("network."), value) for name, value in trainee.state_dict().items()}
    wrong = [key for key, value in expected.values() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise CheckpointError(
            f"expected the {len(expected)} tensors of a training run of {trainee.network.config.name} "
            f"({trainee.network.config.size}); {len(wrong)} are missing or misshapen: {', '.join(wrong[:5])}"
        )
    trainee.load_state_dict({name: state[key] for name, (key, _) in expected.items()})


def write_snapshot(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` holds the old one or the whole new one; raises OSError."""
    with replacing(path, only_writer=True) as partial:
        save_pickle(content, partial)


def read_snapshot(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run to go on with; raises CheckpointError where it is none."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, so there is no run to go on with; start one anew")
    content = read_content(path)
    missing = _NEEDED - content.keys() if isinstance(content, dict) else _NEEDED
    if missing:
        raise CheckpointError(
            f"{path}: expected a checkpoint of a run of this project, it lacks {', '.join(sorted(missing))}; "
            "it serves as an initialisation only (--init)"
        )
    return content
