"""Reading the checkpoints that the three papers' code writes, and ALBEF's, strictly.

A file holds {"model": state, ...} or the state itself. What inference never reads (momentum towers,
queues, projections, dead modules) is left out; every other key has to be there, with its shape.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from dgm4.config import MODEL_NAMES, SIZES, ModelConfig, model_config
from dgm4.model import Detector, build
from engine.errors import CheckpointError

log = logging.getLogger(__name__)

State = dict[str, Tensor]

# First name of a key (or `visual_encoder.<name>`) that inference never reads, by network.
_DEAD_EVERYWHERE = {"temp", "vision_proj", "text_proj", "queue_ptr"}
_DEAD = {
    "hammer": _DEAD_EVERYWHERE,
    "asap": _DEAD_EVERYWHERE | {"patch_head", "itm_head_m"},
    "cals": _DEAD_EVERYWHERE
    | {f"visual_encoder.{m}" for m in ("CoordConv", "usam_pre", "MHA1", "MHA3", "fl1_mlp", "fl2_mlp")}
    | {"text_encoder_f_1", "bbox_head_f", "bbox_head_c", "cls_head_A", "dimd", "psil"},
}
_DEAD_ALBEF = _DEAD_EVERYWHERE | {"itm_head", "text_encoder.cls"}
_RENAMED = {"MIG": "LIG", "CARA": "fch"}  # in the only released weights of CALS
_WORDS_KEY = "text_encoder.bert.embeddings.word_embeddings.weight"
_WIDTH_KEY = "visual_encoder.cls_token"
_BRANCH_KEY = re.compile(r"visual_encoder\.(Conv|Scales\.\d+)\.conv\.weight")
_POSITIONS_KEY = "visual_encoder.pos_embed"
_NAMED_AT_MOST = 5
_WRAPPERS = ("model", "state_dict")  # the papers' key, and that of training frameworks
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")

# What a scheduler's or an optimiser's state may hold beside tensors; none of it runs code.
_rebuild_scalar: Any = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    _rebuild_scalar,
    (_rebuild_scalar, "numpy.core.multiarray.scalar"),
]

# What reading a damaged or foreign file was seen to raise.
_READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    ImportError,
    AssertionError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's live tensors under the released names, float32.

    `layout` is the network whose names the file carries, or "albef", an initialisation without heads.
    """

    path: Path
    layout: str
    state: State


def _read_safetensors(path: Path) -> State:
    return safetensors.torch.load_file(path)


def _check_zip(path: Path) -> None:
    """torch writes a CRC for each tensor and never checks it; a flipped bit would load in silence."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged: the checksum of its entry {damaged} is wrong; fetch it again"
        )


def _read_pickle(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file unsafely; only the refused name is taken from it.
        refused = _REFUSED.search(str(error))
        wants = f"it asks for {refused[1]}, which could run code" if refused else "it is no pickle of tensors"
        raise CheckpointError(
            f"{path}: expected a checkpoint of plain tensors, but {wants}; convert a file you trust to "
            ".safetensors"
        ) from error


def read_content(path: Path) -> Any:
    """Read what a checkpoint file holds, on the CPU and without running code; raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except _READ_ERRORS as error:
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise CheckpointError(
            f"{path}: expected a .pth or .safetensors checkpoint, but it cannot be read ({reason}): it is "
            "damaged or something else"
        ) from error


def read_state(path: Path) -> State:
    """Read every tensor of a checkpoint file, under its own names; raises CheckpointError."""
    content = read_content(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = isinstance(content, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )
    if not tensors or not content:
        raise CheckpointError(
            f'{path}: expected a state of named tensors, or {{"model": state}}, got {_describe(content)}'
        )
    return {name.removeprefix("module."): value for name, value in content.items()}


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        foreign = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
        names = f"no tensors under {_some(foreign)}" if foreign else "no keys"
        return f"a {type(content).__name__} with {names}"
    return f"a {type(content).__name__}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _recognise(path: Path, keys: set[str]) -> str:
    """Tell the layout from the keys alone."""
    firsts = {key.split(".", 1)[0] for key in keys}
    if firsts & {"UtilsB", "UtilsC"} or any(k.startswith("it_cross_attn.selfatten.") for k in keys):
        return "asap"
    if firsts & {"LIG", "MIG", "fch", "CARA", "cls_token_local_e"}:
        return "cals"
    if firsts & {"it_cross_attn", "bbox_head", "cls_token_local"}:
        return "hammer"
    if {"visual_encoder", "text_encoder"} <= firsts:
        return "albef"
    raise CheckpointError(
        f"{path}: expected the keys of HAMMER, ASAP, CALS or ALBEF (visual_encoder.*, text_encoder.*, ...), "
        f"got {_some(sorted(keys))}"
    )


def _is_dead(key: str, dead: set[str]) -> bool:
    first, _, rest = key.partition(".")
    momentum = first.endswith("_m") and first != "itm_head_m"
    return (
        momentum
        or first.endswith("_queue")
        or first in dead
        or f"{first}.{rest.partition('.')[0]}" in dead
        or key.endswith((".position_ids", ".num_batches_tracked"))
    )


def _rename(key: str) -> str:
    first, dot, rest = key.partition(".")
    return _RENAMED.get(first, first) + dot + rest


def read_checkpoint(path: str | Path, layout: str | None = None) -> Checkpoint:
    """Read a .pth or .safetensors file and keep what inference reads, as float32.

    The layout is read off the keys unless given. Raises CheckpointError for a file that is missing,
    damaged, no checkpoint, or a pickle that would run code.
    """
    path = Path(path)
    state = read_state(path)
    layout = layout or _recognise(path, set(state))
    dead = _DEAD_ALBEF if layout == "albef" else _DEAD[layout]
    live = {_rename(k) if layout == "cals" else k: v for k, v in state.items() if not _is_dead(k, dead)}
    return Checkpoint(path, layout, {k: v.float() if v.is_floating_point() else v for k, v in live.items()})


def _config_of(checkpoint: Checkpoint, name: str) -> ModelConfig:
    """The known size whose width the checkpoint has; the small one has the vocabulary of its training."""
    if _WIDTH_KEY not in checkpoint.state:
        raise CheckpointError(f"{checkpoint.path}: expected the key {_WIDTH_KEY}, which is missing")
    width = checkpoint.state[_WIDTH_KEY].shape[-1]
    configs = {model_config(name, size).width: model_config(name, size) for size in SIZES}
    if width not in configs:
        sizes = ", ".join(f"{w} ({c.size})" for w, c in configs.items())
        raise CheckpointError(f"{checkpoint.path}: expected the width {sizes}, got {width} in {_WIDTH_KEY}")
    config, words = configs[width], checkpoint.state.get(_WORDS_KEY)
    if config.size == "tiny" and words is not None:
        config = replace(config, vocabulary=words.shape[0])
    branches = sorted(key for key in checkpoint.state if _BRANCH_KEY.fullmatch(key))
    kernels = [checkpoint.state[key].shape[-1] for key in branches]
    return replace(config, caformer_kernels=tuple(kernels)) if kernels else config


def resample_positions(state: State, config: ModelConfig) -> None:
    """Bring position embeddings [1, 1+G*G, D] of another grid to the network's, in place."""
    positions = state.get(_POSITIONS_KEY)
    if positions is None or positions.dim() != 3 or positions.shape[1] == config.image_tokens:
        return
    side = int(max(positions.shape[1] - 1, 0) ** 0.5)
    if side < 1 or side * side + 1 != positions.shape[1]:
        return  # no square grid: the strict check names the shape
    cls, patches = positions[:, :1], positions[:, 1:]
    field = patches.transpose(1, 2).unflatten(2, (side, side))
    field = F.interpolate(field, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
    state[_POSITIONS_KEY] = torch.cat([cls, field.flatten(2).transpose(1, 2)], dim=1)


def encoder_keys(names: set[str]) -> set[str]:
    """What ALBEF brings: both encoders, without the classifier and without CALS's additions."""
    own = ("visual_encoder.Conv.", "visual_encoder.Scales.", "visual_encoder.MHA2.")
    encoders = ("visual_encoder.", "text_encoder.bert.")
    return {n for n in names if n.startswith(encoders) and not n.startswith(own)}


def _check(checkpoint: Checkpoint, expected: State, config: ModelConfig) -> None:
    """Compare names, shapes and values with what the network expects; raise one error that names all."""
    state = checkpoint.state
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"{len(extra)} unexpected ({_some(extra)})")
    common = sorted(expected.keys() & state.keys())
    misshapen = [
        f"{k}: expected {list(expected[k].shape)}, got {list(state[k].shape)}"
        for k in common
        if expected[k].shape != state[k].shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen ({_some(misshapen)})")
    if foreign := [f"{k}: {state[k].dtype}" for k in common if not state[k].is_floating_point()]:
        problems.append(f"{len(foreign)} without floating values ({_some(foreign)})")
    if not problems and (bad := [k for k in common if not state[k].isfinite().all()]):
        problems.append(f"{len(bad)} with NaN or infinity ({_some(bad)})")
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: expected the {len(expected)} live tensors of {config.name} ({config.size}), "
            f"got {'; '.join(problems)}"
        )


def load_checkpoint(
    path: str | Path, model: str | None = None, config: ModelConfig | None = None
) -> Detector:
    """Load a released checkpoint into its network, in evaluation mode, float32, on the CPU.

    Which network it is, and its size, is read off the keys; `model` overrides the name and `config` the
    shape. An ALBEF file initialises both encoders of `model` and leaves its heads as drawn. Position
    embeddings of another grid are interpolated (bicubic). Raises CheckpointError, naming what was
    expected and what came, for a missing, extra or misshapen key and for a file that is no checkpoint.
    """
    if model is not None and model not in MODEL_NAMES:
        raise CheckpointError(f"unknown network {model!r}: expected one of {', '.join(MODEL_NAMES)}")
    return load_state(read_checkpoint(path), model, config)


def load_state(
    checkpoint: Checkpoint, model: str | None = None, config: ModelConfig | None = None
) -> Detector:
    """Load what `read_checkpoint` returned; see `load_checkpoint`."""
    if checkpoint.layout == "albef" and model is None and config is None:
        raise CheckpointError(
            f"{checkpoint.path}: is an ALBEF initialisation, which fits any network: expected model= as one "
            f"of {', '.join(MODEL_NAMES)}"
        )
    named = model or (config.name if config else checkpoint.layout)
    if checkpoint.layout not in (named, "albef"):
        checkpoint = read_checkpoint(checkpoint.path, named)
    config = config or _config_of(checkpoint, named)
    network = build(config)
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    resample_positions(checkpoint.state, config)
    if checkpoint.layout == "albef":
        expected = {k: expected[k] for k in encoder_keys(set(expected))}
        log.warning("%s initialises the encoders only; the heads of %s are untrained", checkpoint.path, named)
    _check(checkpoint, expected, config)
    network.load_state_dict(checkpoint.state, strict=False, assign=False)
    return network.eval()
