"""What an export says of itself: the manifest of the bundle that it writes."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from engine import __version__
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD
from engine.manifest import (
    Accuracy,
    EngineEntry,
    Limits,
    Manifest,
    ModelInfo,
    Preprocess,
    TensorSpec,
    Thresholds,
    Verification,
)
from engine.packages import version_of
from engine.registry import network_of
from engine.registry.config import TYPES, NetworkConfig
from engine.registry.record import Tensor
from export.bundle.licences import licence_of
from export.options import ExportOptions
from export.stages import Calibrated, Lowered, Source

MAX_WORDS = 50
LONGEST_CAPTION = 127  # 128 with the [SEP] that the networks never see
THRESHOLD = 0.5
_PACKAGES = ("torch", "onnx", "onnxruntime", "numpy", "tokenizers")


def describe_export(
    options: ExportOptions,
    source: Source,
    calibrated: Calibrated | None,
    lowered: Lowered,
    engines: Sequence[EngineEntry] = (),
    accuracy: Sequence[Accuracy] = (),
) -> Manifest:
    """The manifest of the bundle, without the files, which are still to be hashed."""
    config, checks = source.config, (source.rewrite, *lowered.checks)
    network = network_of(config)
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelInfo(config.name, config.size, config),
        weights=replace(source.weights, licence=licence_of(source.weights.kind, options.licence)),
        precision=options.precision,
        preprocess=Preprocess(
            image_size=config.image_size,
            patch_size=config.patch_size,
            resample="bicubic",
            mean=CLIP_MEAN,
            std=CLIP_STD,
            max_words=MAX_WORDS,
            max_tokens=min(LONGEST_CAPTION, options.max_tokens),
            min_tokens=network.tokenizer.min_tokens,
        ),
        inputs=_tensors(config, network.inputs),
        outputs=_tensors(config, network.outputs),
        limits=Limits(options.max_batch, options.max_tokens),
        types=TYPES,
        thresholds=Thresholds(**dict.fromkeys(("manipulated", *TYPES, "words"), THRESHOLD)),
        engines=tuple(engines),
        versions={
            "python": platform.python_version(),
            "dgm4": __version__,
            **{name: version_of(name) or "not installed" for name in _PACKAGES},
        },
        verification=tuple(Verification(**difference.to_dict()) for difference in checks),
        files={},
        accuracy=tuple(accuracy),
        float32_layers=lowered.float_layers,
        kept_layers=lowered.keep,
        calibration=None if calibrated is None else calibrated.record,
        vocabulary=source.vocabulary,
    )


def _tensors(config: NetworkConfig, tensors: Iterable[Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(x.name, x.dtype, x.shape_of(config)) for x in tensors)
