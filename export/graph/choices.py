"""How many choices of a network in lower precision are others than those of the network it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.network.blocks import Choice


def changed_choices(
    reference: nn.Module, candidate: nn.Module, feeds: Iterable[Mapping[str, Tensor]]
) -> tuple[int, int]:
    """Of all that `reference` chooses on `feeds`: how many `candidate` does not, and how many there are.

    Both are 0 for a network that chooses nothing, which is not run.
    """
    changed = total = 0
    if not any(isinstance(module, Choice) for module in reference.modules()):
        return changed, total
    for inputs in feeds:
        for want, got in zip(_chosen(reference, inputs), _chosen(candidate, inputs), strict=True):
            changed += int((want & ~got).sum())
            total += int(want.sum())
    return changed, total


def _chosen(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """A truth value for every one that each `Choice` could take, in the order of their calls."""
    found: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Any, ...], places: tuple[Tensor, Tensor]) -> None:
        valid = given[2] if len(given) > 2 else None
        for chosen in places:
            taken = torch.zeros_like(given[0], dtype=torch.bool).scatter(-1, chosen, True)
            found.append(taken if valid is None else taken & (valid != 0))

    hooks = [x.register_forward_hook(note) for x in model.modules() if isinstance(x, Choice)]
    with torch.inference_mode():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found
