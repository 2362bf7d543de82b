"""What a bundle says of itself: the fields of its manifest."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from dgm4.config import TYPES, ModelConfig
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD
from export.graph.trace import outputs_of
from export.stages import Run

MAX_WORDS, MIN_TOKENS = 50, 2
LONGEST_CAPTION = 127  # 128 with the [SEP] that the networks never see
THRESHOLD = 0.5


def manifest_fields(
    run: Run,
    config: ModelConfig,
    weights: dict[str, Any],
    engines: Sequence[dict[str, Any]] = (),
    accuracy: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Everything of the manifest but the hashes."""
    options = run.options
    return {
        "format": "dgm4-bundle",
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {"name": config.name, "size": config.size, "config": config.to_dict()},
        "weights": weights,
        "precision": options.precision,
        "preprocess": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "resample": "bicubic",
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "max_words": MAX_WORDS,
            "max_tokens": min(LONGEST_CAPTION, options.max_tokens),
            "min_tokens": MIN_TOKENS,
        },
        **_tensors(config),
        "limits": {"max_batch": options.max_batch, "max_tokens": options.max_tokens},
        "types": list(TYPES),
        "thresholds": {"manipulated": THRESHOLD, "types": THRESHOLD, "words": THRESHOLD},
        "engines": list(engines),
        "versions": {"python": platform.python_version(), **_versions()},
        "verification": [difference.to_dict() for difference in run.verification],
        "accuracy": list(accuracy),
        "float32_layers": run.float_layers,
        "kept_layers": run.kept,
        **({} if run.calibration is None else {"calibration": dict(run.calibration)}),
    }


def _tensors(config: ModelConfig) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs as the manifest declares them."""
    picture = ["batch", 3, config.image_size, config.image_size]
    shapes: dict[str, list[int | str]] = {
        "logits_real_fake": ["batch", 2],
        "logits_multicls": ["batch", len(TYPES)],
        "box": ["batch", 4],
        "logits_tok": ["batch", "tokens - 1", 2],
        "attention_map": ["batch", "tokens", config.image_tokens],
    }
    text = [
        {"name": n, "dtype": "int64", "shape": ["batch", "tokens"]} for n in ("input_ids", "attention_mask")
    ]
    return {
        "inputs": [{"name": "image", "dtype": "float32", "shape": picture}, *text],
        "outputs": [{"name": n, "dtype": "float32", "shape": shapes[n]} for n in outputs_of(config)],
    }


def _versions() -> dict[str, str]:
    packages = ("dgm4", "torch", "onnx", "onnxruntime", "numpy", "tokenizers")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # the tree is run in place
    return found
