"""Under which licence the weights of a bundle are, and those of what they may derive from."""

from __future__ import annotations

from engine.manifest import NOT_STATED, Weights
from engine.registry import NETWORKS

OWN = "Apache-2.0"  # of this project, its demo weights and weights drawn from a formula
_TRAINED = (
    "Published HAMMER weights are for non-commercial use only, and so may be any weights trained on DGM4: "
    "commercial use needs its authors' permission unless your weights derive from neither."
)


def upstream() -> dict[str, str]:
    """The licences as their authors state them. A user who exports published weights must keep to them."""
    return {
        "DGM4 (data set)": "S-Lab License 1.0, non-commercial",
        **{f"{network.title} (code, weights)": network.licence for network in NETWORKS.values()},
        "ALBEF (code, weights)": "BSD-3-Clause",
        "DeiT (code, weights)": "Apache-2.0",
        "BERT (weights, vocabulary)": "Apache-2.0",
        "RoBERTa (weights, vocabulary)": "MIT",
        "CLIP, METER, BEiT v2 (code, weights)": "MIT",
    }


def licence_of(kind: str, stated: str | None) -> str:
    """Licence of weights of this kind ("trained", "demo" or "drawn"), which a user may have stated."""
    return stated or (NOT_STATED if kind == "trained" else OWN)


def licence_note(weights: Weights) -> str:
    """Markdown for a model card: the weights' licence, or where none is stated those of their sources."""
    text = f"Weights: {weights.licence}. Code of `dgm4`: {OWN}."
    if weights.kind != "trained" or weights.licence != NOT_STATED:
        return text
    lines = "\n".join(f"- {name}: {licence}" for name, licence in upstream().items())
    return f"{text} {_TRAINED}\n\n{lines}"
