"""The networks that this package knows: their sizes, and what of them ships. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dgm4.shipped import demo_record
from engine.registry import NETWORKS
from engine.shipped import shipped_bundles

# Of the weights that ship or are drawn; the published ones' are as their authors state them.
_OWN_LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class ModelEntry:
    """A network at one size.

    parameters: how many it has at inference. weights: "demo" where weights ship, trained on made images;
    "drawn" where none of this size were ever published, so that the export draws them; None where you bring a
    checkpoint. licence: that of these weights, else of the published ones. bundle:
    the name of a ready bundle for `Predictor`, None without one.
    """

    name: str
    size: str
    parameters: int
    weights: str | None
    licence: str
    bundle: str | None


def list_models() -> list[ModelEntry]:
    """Return every network at each of its sizes, by name.

    Examples:
        >>> [entry.bundle for entry in list_models() if entry.bundle]
        ['demo:asap']

    Raises CheckpointError where the demo's record is not installed.
    """
    demos, ready = demo_record()["networks"], shipped_bundles()
    entries = []
    for network, size in [(x, size) for x in NETWORKS.values() for size in x.sizes]:
        name = network.name
        shipped, bundle = size == "tiny" and name in demos, f"demo:{name}"
        weights = "demo" if shipped else None if size == "base" else "drawn"
        entries.append(
            ModelEntry(
                name=name,
                size=size,
                parameters=network.parameters[size],
                weights=weights,
                licence=network.licence if weights is None else _OWN_LICENCE,
                bundle=bundle if shipped and bundle in ready else None,
            )
        )
    return entries
