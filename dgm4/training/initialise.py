"""What a network starts from: DeiT for the visual encoder, ALBEF or a checkpoint for the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dgm4.checkpoint import encoder_keys, load_state, read_checkpoint, resample_positions
from dgm4.state import read_state
from dgm4.training.trainee import Trainee
from engine.errors import BackendError, CheckpointError, InputError, quoted

TIMM = "timm:"
_CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "dist_token")
# Trained, not read by inference: the projections, the temperature, two heads of ASAP.
_BESIDE = ("vision_proj.", "text_proj.", "temp", "patch_head.", "itm_head_m.")
_OURS = ("Conv.", "MHA2.")  # CALS's additions to the ViT


@dataclass(frozen=True)
class Initialisation:
    """`weights` is a released checkpoint or ALBEF's; `vision` a DeiT file, or "timm:NAME"."""

    weights: Path | None = None
    vision: str | None = None


def start_from(trainee: Trainee, initialisation: Initialisation) -> None:
    """Load the initial weights and make the momentum towers equal to them.

    Raises CheckpointError, naming the keys, where a file does not fit.
    """
    if initialisation.weights is not None:
        _load_weights(trainee, initialisation.weights)
    if initialisation.vision is not None:
        _load_vision(trainee, initialisation.vision)
    trainee.copy_momentum()


def _load_weights(trainee: Trainee, path: Path) -> None:
    """Load a checkpoint of this network, or ALBEF's two encoders, and what it has beside the network."""
    network = trainee.network
    checkpoint = read_checkpoint(path)
    checkpoint = replace(checkpoint, state=resample_positions(checkpoint.state, network.config))
    loaded = load_state(checkpoint, network.config.name, network.config).state_dict()
    brought = encoder_keys(set(loaded)) if checkpoint.layout == "albef" else set(loaded)
    network.load_state_dict({name: loaded[name] for name in brought}, strict=False)
    state, current = read_state(path), trainee.state_dict()
    beside = {name: state[name] for name in current if name.startswith(_BESIDE) and name in state}
    wrong = [
        f"{name}: expected {list(current[name].shape)}, got {list(value.shape)}"
        for name, value in beside.items()
        if value.shape != current[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{path}: {len(wrong)} misshapen ({', '.join(wrong[:5])})")
    trainee.load_state_dict(beside, strict=False)


def _load_vision(trainee: Trainee, source: str) -> None:
    """Load a ViT of timm's names, positions brought to our grid; its classifier is left out."""
    state = _timm_state(source.removeprefix(TIMM)) if source.startswith(TIMM) else read_state(Path(source))
    prefix = "visual_encoder."
    config, encoder = trainee.network.config, trainee.network.visual_encoder
    weights = resample_positions(
        {prefix + name: x.float() for name, x in state.items() if not name.startswith(_CLASSIFIER)}, config
    )
    expected = {name: prefix + name for name in encoder.state_dict() if not name.startswith(_OURS)}
    wrong = [
        full
        for name, full in expected.items()
        if full not in weights or weights[full].shape != encoder.state_dict()[name].shape
    ]
    extra = sorted(set(weights) - set(expected.values()))
    if wrong or extra:
        raise CheckpointError(
            f"{source}: expected the {len(expected)} tensors of a ViT of width {config.width} and depth "
            f"{config.vision_depth}; missing or misshapen: {', '.join(wrong[:5]) or 'none'}; unexpected: "
            f"{', '.join(extra[:5]) or 'none'}"
        )
    encoder.load_state_dict({name: weights[full] for name, full in expected.items()}, strict=False)


def _timm_state(name: str) -> dict[str, Tensor]:
    """Weights that timm has, or fetches, for the model `name`."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of torch
        raise BackendError(f"the weights {TIMM}{name} need timm, which cannot be loaded: {error}") from error
    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm raises what its hub, its registry and the network raise
        raise InputError(f"timm has no weights for {quoted(name)}: {error}") from error
    return state
