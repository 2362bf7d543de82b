"""The demo that ships with the package: trained tiny networks, their vocabulary, their record, one sample.

They were trained on the sample set (`dgm4 data make`) by the recipes beside them; `python -m benchmarks.demo`
does it again. They show the way from training to serving; they are no detector of real manipulations. A
bundle of ASAP is ready beside them: `Predictor("demo:asap")`. Needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, InputError, quoted
from engine.registry import NETWORKS

_HERE = Path(__file__).resolve().parent
DEMO = _HERE / "demo"
RECIPES = _HERE / "recipes"
RECORD, SAMPLE = DEMO / "demo.json", DEMO / "sample.jpg"


def demo_checkpoint(name: str) -> Path:
    """Return the weights of the trained tiny network `name`, float16 safetensors.

    Raises InputError for an unknown network, CheckpointError where the file is not installed.
    """
    if name not in NETWORKS:
        raise InputError(f"unknown network {quoted(name)}: expected one of {', '.join(NETWORKS)}")
    path = DEMO / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: the demo weights are not there; install the whole package")
    return path


def demo_record() -> dict[str, Any]:
    """Return how the demo was trained and what it reaches on the sample set's test split, by network.

    Raises CheckpointError where the record is not installed.
    """
    try:
        record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{RECORD}: the demo's record is not there: {error.strerror}") from error
    return record


def demo_of(weights: str | None) -> str | None:
    """Return the network whose demo weights have this SHA-256 (hexadecimal), None for any others."""
    networks = demo_record()["networks"]
    return next((name for name in networks if networks[name]["sha256"] == weights), None)


def demo_sample() -> tuple[Path, str]:
    """Return an image of the sample set's test split and its caption; both are manipulated."""
    return SAMPLE, str(demo_record()["sample"]["text"])
