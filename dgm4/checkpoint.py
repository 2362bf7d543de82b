"""Reading the checkpoints that the three papers' code writes, and ALBEF's, strictly.

A file holds {"model": state, ...} or the state itself. What inference never reads (momentum towers,
queues, projections, dead modules) is left out; every other key has to be there, with its shape.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dgm4.config import ModelConfig
from dgm4.model import Detector, build
from dgm4.state import State, find_state, some
from engine.errors import CheckpointError
from engine.registry import NETWORKS
from engine.registry.record import DEAD, Keys

log = logging.getLogger(__name__)

ALBEF = "albef"
_ALBEF = Keys(marks=("visual_encoder.",), dead=DEAD | {"itm_head", "text_encoder.cls"})
_WHOLE = "give the whole state_dict() under the published names"
_SHAPES = "other shapes need a record of their own: docs/add-a-network.md"
_LARGEST_WEIGHT = 1e8  # a flipped bit of a float's exponent makes 1e30 and more; no training does


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's live tensors under the released names, float32.

    `layout` is the network whose names the file carries, or "albef", an initialisation without heads.
    `note` says which of several states of the file this is, or is empty; `vocabulary` is the SHA-256 of the
    word pieces that the network was trained with (`dgm4.tokenizer.vocabulary_digest`), where it is recorded.
    """

    path: Path
    layout: str
    state: State
    note: str = ""
    vocabulary: str | None = None


def _recognise(path: Path, keys: set[str]) -> str:
    """Tell the layout from the keys alone: a network, "network/part", or ALBEF."""
    known = {name: network.keys for name, network in NETWORKS.items()}
    for name, network in NETWORKS.items():
        parts = network.keys.parts.items()
        known |= {f"{name}/{part}": x for part, x in parts if x not in known.values()}
    marked = {name: x for name, x in known.items() if any(key.startswith(x.marks) for key in keys)}
    extended = {name for x in marked.values() for name in x.extends}
    found = [name for name in marked if name not in extended]
    if len(found) == 1:
        return found[0]
    if not found and all(
        any(k.startswith(f"{x}.") for k in keys) for x in ("visual_encoder", "text_encoder")
    ):
        return ALBEF
    titles = ", ".join(network.title for network in NETWORKS.values())
    got = f"those of {' and '.join(found)} at once" if found else some(sorted(keys))
    shared = [n.title for n in NETWORKS.values() if keys & {n.keys.width, n.keys.words}]
    if shared and not found:
        got = f"a part of {' or '.join(shared)} ({got}); {_WHOLE}"
    raise CheckpointError(
        f"{path}: expected the keys of {titles} or ALBEF (visual_encoder.*, text_encoder.*, ...), got {got}"
    )


def _is_dead(key: str, dead: frozenset[str]) -> bool:
    names = key.split(".")
    first = names[0]
    momentum = first.endswith("_m") and first != "itm_head_m"
    return (
        momentum
        or first.endswith("_queue")
        or any(".".join(names[:depth]) in dead for depth in range(1, len(names) + 1))
        or key.endswith((".position_ids", ".num_batches_tracked"))
    )


def _rename(key: str, renamed: Mapping[str, str]) -> str:
    for theirs, ours in renamed.items():
        if key == theirs or key.startswith(f"{theirs}."):
            return ours + key.removeprefix(theirs)
    return key


def _live(state: State, keys: Keys, notes: list[str]) -> State:
    """What inference reads, under the names read here; adds to `notes` what a choice was made of."""
    if keys.parts:
        live = {k: v for k, v in state.items() if k.partition(".")[0] not in keys.parts}
        for name, part in keys.parts.items():
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            live |= {start + k: v for k, v in _live(own, part, notes).items()}
        return live
    notes += [text for start, text in keys.remarks.items() if any(k.startswith(start) for k in state)]
    live = {k: v for k, v in state.items() if not _is_dead(_rename(k, keys.renamed), keys.dead)}
    names = {k: _rename(k, keys.renamed) for k in live}
    if left := sorted(k for k, name in names.items() if name != k and name in live):
        notes.append(f"{some(left)} left out beside {some([names[k] for k in left])}")
    return {name: live[k] for k, name in names.items() if name == k or name not in live}


def read_checkpoint(path: str | Path, layout: str | None = None) -> Checkpoint:
    """Read a .pth or .safetensors file and keep what inference reads, as float32.

    The layout is read off the keys unless given. Raises CheckpointError for a file that is missing,
    damaged, no checkpoint, or a pickle that would run code.
    """
    path = Path(path)
    state, place, others, vocabulary = find_state(path)
    layout, _, part = (layout or _recognise(path, set(state))).partition("/")
    keys = _ALBEF if layout == ALBEF else NETWORKS[layout].keys
    if part or (keys.parts and not any(key.startswith(keys.marks) for key in state)):
        raise CheckpointError(
            f"{path}: expected all of {NETWORKS[layout].title} in one file, got a part of it; join the "
            f"files of {' and '.join(keys.parts)}: dgm4 convert FILE OUT --join FILE"
        )
    notes = [f"the state {place}, beside {', '.join(others)}"] if others else []
    live = _live(state, keys, notes)
    live = {k: v.float() if v.is_floating_point() else v for k, v in live.items()}
    return Checkpoint(path, layout, live, "; ".join(notes), vocabulary)


def join_states(states: Mapping[Path, State]) -> State:
    """Join the files of a network whose parts are published apart, the names of each under its part's.

    Raises CheckpointError for files that are not, together, all parts of one network.
    """
    found = {path: _recognise(path, set(state)) for path, state in states.items()}
    for name, network in NETWORKS.items():
        parts = network.keys.parts
        # A part is a network of its own, or one that is known as this one's part.
        names = {
            part: {f"{name}/{part}", *(n for n, x in NETWORKS.items() if x.keys is parts[part])}
            for part in parts
        }
        joined = {part: path for part in parts for path in states if found[path] in names[part]}
        if parts and len(joined) == len(parts) == len(states):
            return {f"{part}.{k}": v for part, path in joined.items() for k, v in states[path].items()}
    apart = [f"{n.title} ({' and '.join(n.keys.parts)})" for n in NETWORKS.values() if n.keys.parts]
    raise CheckpointError(
        f"{' and '.join(map(str, states))}: expected the files of {', '.join(apart)}, "
        f"got {' and '.join(found.values())}"
    )


def _config_of(checkpoint: Checkpoint, name: str) -> ModelConfig:
    """The known size whose width the checkpoint has, with what else its tensors tell.

    That is the vocabulary, the text positions, the convolutions of CAFormer and the image resolution, but for
    an initialisation, which is brought to the network's own.
    """
    keys, state = NETWORKS[name].keys, checkpoint.state
    if keys.width not in state:
        raise CheckpointError(f"{checkpoint.path}: expected the key {keys.width}, which is missing; {_WHOLE}")
    width = state[keys.width].shape[-1]
    configs = {config.width: config for config in NETWORKS[name].sizes.values()}
    if width not in configs:
        sizes = ", ".join(f"{w} ({c.size})" for w, c in configs.items())
        raise CheckpointError(
            f"{checkpoint.path}: expected the width {sizes}, got {width} in {keys.width}; {_SHAPES}"
        )
    config, grid = configs[width], grid_of(state, keys.image_positions)
    told = {"vocabulary": keys.words, "positions": keys.text_positions}
    fields: dict[str, Any] = {field: len(state[key]) for field, key in told.items() if key in state}
    if grid is not None and checkpoint.layout != ALBEF:
        fields["image_size"] = grid * config.patch_size
    try:
        fields |= keys.shape({key: tuple(x.shape) for key, x in state.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    return replace(config, **fields)


def grid_of(state: Mapping[str, Tensor], key: str = _ALBEF.image_positions) -> int | None:
    """Patches along one side by the image's position embeddings; None where they are no square grid."""
    positions = state.get(key)
    if positions is None or positions.dim() not in (2, 3):
        return None
    rows = positions.shape[-2]
    side = isqrt(max(rows - 1, 0))
    return side if side and side * side + 1 == rows else None


def resample_positions(state: State, config: ModelConfig) -> State:
    """Bring the position embeddings [1, 1+G*G, D] of an initialisation to the network's grid; tell the log.

    Only before a training: a trained network is right at the resolution of its training alone.
    """
    side = grid_of(state)
    if side is None or side == config.grid:
        return state  # where there is no square grid the strict check names the shape
    grids = (side, side, config.grid, config.grid)
    log.warning("the image's positions of a %d x %d grid are resampled to %d x %d", *grids)
    positions = state[_ALBEF.image_positions]
    cls, patches = positions[:, :1], positions[:, 1:]
    field = patches.transpose(1, 2).unflatten(2, (side, side))
    field = F.interpolate(field, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
    return {**state, _ALBEF.image_positions: torch.cat([cls, field.flatten(2).transpose(1, 2)], dim=1)}


def encoder_keys(names: set[str]) -> set[str]:
    """What ALBEF brings: both encoders, without the classifier and without CALS's additions."""
    own = ("visual_encoder.Conv.", "visual_encoder.Scales.", "visual_encoder.MHA2.")
    encoders = ("visual_encoder.", "text_encoder.bert.")
    return {n for n in names if n.startswith(encoders) and not n.startswith(own)}


def _check(checkpoint: Checkpoint, expected: State, config: ModelConfig, found: str) -> None:
    """Compare names, shapes and values with what the network expects; raise one error that names all.

    `found` is the layout that the file's keys tell.
    """
    state = checkpoint.state
    problems, remedy = [], "fetch it again, or take an earlier one of the training"
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"{len(missing)} missing ({some(missing)})")
    if extra := sorted(state.keys() - expected.keys()):
        problems.append(f"{len(extra)} unexpected ({some(extra)})")
    common = sorted(expected.keys() & state.keys())
    misshapen = [
        f"{k}: expected {list(expected[k].shape)}, got {list(state[k].shape)}"
        for k in common
        if expected[k].shape != state[k].shape
    ]
    if missing or extra or misshapen:
        remedy = _WHOLE if missing or extra else _SHAPES
        if found not in (checkpoint.layout, ALBEF):
            remedy = f"its keys are those of {NETWORKS[found].title}: leave model and config out"
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen ({some(misshapen)})")
    if foreign := [f"{k}: {state[k].dtype}" for k in common if not state[k].is_floating_point()]:
        problems.append(f"{len(foreign)} without floating values ({some(foreign)})")
    if not problems and (bad := [k for k in common if not state[k].isfinite().all()]):
        problems.append(f"{len(bad)} with NaN or infinity ({some(bad)})")
    if not problems and (bad := [k for k in common if state[k].abs().amax() > _LARGEST_WEIGHT]):
        problems.append(
            f"{len(bad)} with values beyond {_LARGEST_WEIGHT:.0e}, as damage makes them ({some(bad)})"
        )
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: expected the {len(expected)} live tensors of {config.name} ({config.size}), "
            f"got {'; '.join(problems)}; {remedy}"
        )


def load_checkpoint(
    path: str | Path, model: str | None = None, config: ModelConfig | None = None
) -> Detector:
    """Load a released checkpoint into its network, in evaluation mode, float32, on the CPU.

    Which network it is, and its size, is read off the keys; `model` overrides the name and `config` the
    shape. The image resolution is that of the position embeddings. An ALBEF file initialises both encoders of
    `model`, its positions interpolated (bicubic) where its grid is another, and leaves the heads as drawn.
    Raises CheckpointError, naming what was expected and what came, for a missing, extra or misshapen key and
    for a file that is no checkpoint.
    """
    if model is not None and model not in NETWORKS:
        raise CheckpointError(f"unknown network {model!r}: expected one of {', '.join(NETWORKS)}")
    return load_state(read_checkpoint(path), model, config)


def load_state(
    checkpoint: Checkpoint, model: str | None = None, config: ModelConfig | None = None
) -> Detector:
    """Load what `read_checkpoint` returned; see `load_checkpoint`."""
    if checkpoint.layout == ALBEF and model is None and config is None:
        raise CheckpointError(
            f"{checkpoint.path}: is an ALBEF initialisation, which fits any network: expected model= as one "
            f"of {', '.join(NETWORKS)}"
        )
    found, named = checkpoint.layout, model or (config.name if config else checkpoint.layout)
    if checkpoint.layout not in (named, ALBEF):
        checkpoint = read_checkpoint(checkpoint.path, named)
    config = config or _config_of(checkpoint, named)
    network = build(config)
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    if checkpoint.layout == ALBEF:
        checkpoint = replace(checkpoint, state=resample_positions(checkpoint.state, config))
        expected = {k: expected[k] for k in encoder_keys(set(expected))}
        log.warning("%s initialises the encoders only; the heads of %s are untrained", checkpoint.path, named)
    _check(checkpoint, expected, config, found)
    network.load_state_dict(checkpoint.state, strict=False, assign=False)
    return network.eval()
