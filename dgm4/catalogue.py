"""The networks that this package knows: their sizes, and what of them ships. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dgm4.config import MODEL_NAMES, SIZES
from dgm4.shipped import demo_record
from engine.shipped import shipped_bundles

_PARAMETERS = {
    ("hammer", "base"): 227_859_468,
    ("hammer", "tiny"): 2_713_868,
    ("asap", "base"): 230_221_838,
    ("asap", "tiny"): 2_779_918,
    ("cals", "base"): 235_861_455,
    ("cals", "tiny"): 2_971_775,
}


@dataclass(frozen=True)
class ModelEntry:
    """A network at one size.

    parameters: how many it has at inference. weights: "demo" where weights ship, trained on made images; None
    where you bring a checkpoint. bundle: the name of a ready bundle for `Predictor`, None without one.
    """

    name: str
    size: str
    parameters: int
    weights: str | None
    bundle: str | None


def list_models() -> list[ModelEntry]:
    """Return every network at every size, by name.

    >>> [entry.bundle for entry in list_models() if entry.bundle]
    ['demo:asap']

    Raises CheckpointError where the demo's record is not installed.
    """
    demos, ready = demo_record()["networks"], shipped_bundles()
    return [
        ModelEntry(
            name=name,
            size=size,
            parameters=_PARAMETERS[name, size],
            weights="demo" if size == "tiny" and name in demos else None,
            bundle=f"demo:{name}" if size == "tiny" and f"demo:{name}" in ready else None,
        )
        for name in MODEL_NAMES
        for size in SIZES
    ]
