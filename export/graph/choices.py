"""Choices of a network: inputs on which no rounding decides them, and how many another precision changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.network.blocks import Choice
from engine.network.model import InferenceModel
from export.graph.parity import CASES, case_inputs

CLEAR = 1e-6  # of a score in [0, 1]; float32 moves those of drawn networks by some 2e-7
_DRAWS = 16  # of a pair, at most


def clear_inputs(
    network: InferenceModel, cases: Sequence[tuple[int, int]] = CASES
) -> tuple[list[dict[str, Tensor]], float]:
    """The inputs of `case_inputs` with pairs whose choices rounding does not decide, and the least margin.

    A pair whose margin, see `margins`, is below CLEAR is drawn anew. Of all draws the clearest stays, and for
    some networks that is below CLEAR too. For one that chooses nothing, which is not run, the margin is
    infinite and the inputs are those of `case_inputs`.
    """
    inputs = case_inputs(network.config, cases)
    if not _chooses(network):
        return inputs, math.inf
    least = []
    for number, case in enumerate(cases):
        gaps = margins(network, inputs[number])
        for draw in range(1, _DRAWS):
            if bool((gaps >= CLEAR).all()):
                break
            (other,) = case_inputs(network.config, [case], number + draw * len(cases))
            found = margins(network, other)
            better = (found > gaps) & (gaps < CLEAR)
            for name, rows in inputs[number].items():
                rows[better] = other[name][better]
            gaps = torch.where(better, found, gaps)
        least.append(gaps.min().item())
    return inputs, min(least)


def margins(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """How far, in any `Choice`, the last that is taken is from the first that is not, at least; [B].

    Infinite for a pair of which all are taken.
    """
    gaps = [torch.full((len(next(iter(inputs.values()))),), math.inf)]
    for count, scores in choice_scores(model, inputs):
        if scores.shape[-1] > count:
            last, first = scores.topk(count + 1).values[..., -2:].unbind(-1)
            gap = torch.where(first.isinf(), math.inf, last - first)
            gaps.append(gap.reshape(len(gap), -1).amin(1).float())
    return torch.stack(gaps).amin(0)


def choice_scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
    """Of each `Choice` twice, in the order of their calls: how many are taken, and of what scores [..., m].

    The largest are taken; scores whose smallest are taken are negative here. Those not valid are -inf.
    """
    found: list[tuple[int, Tensor]] = []

    def note(choice: Choice, given: tuple[Any, ...], _: object) -> None:
        valid = given[2] if len(given) > 2 else None
        for scores in (given[0], -given[1]):
            found.append(
                (choice.count, scores if valid is None else scores.masked_fill(valid == 0, -math.inf))
            )

    _run_noting(model, inputs, note)
    return found


def _chooses(model: nn.Module) -> bool:
    return any(isinstance(module, Choice) for module in model.modules())


def _run_noting(model: nn.Module, inputs: Mapping[str, Tensor], note: Any) -> None:
    """Run the model with `note` as a hook of each `Choice`."""
    hooks = [x.register_forward_hook(note) for x in model.modules() if isinstance(x, Choice)]
    with torch.inference_mode():
        model(**inputs)
    for hook in hooks:
        hook.remove()


def changed_choices(
    reference: nn.Module, candidate: nn.Module, feeds: Iterable[Mapping[str, Tensor]]
) -> tuple[int, int]:
    """Of all that `reference` chooses on `feeds`: how many `candidate` does not, and how many there are.

    Both are 0 for a network that chooses nothing, which is not run.
    """
    changed = total = 0
    if not _chooses(reference):
        return changed, total
    for inputs in feeds:
        for want, got in zip(chosen(reference, inputs), chosen(candidate, inputs), strict=True):
            changed += int((want & ~got).sum())
            total += int(want.sum())
    return changed, total


def chosen(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """A truth value for every one that each `Choice` could take, in the order of their calls."""
    found: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Any, ...], places: tuple[Tensor, Tensor]) -> None:
        valid = given[2] if len(given) > 2 else None
        for chosen in places:
            taken = torch.zeros_like(given[0], dtype=torch.bool).scatter(-1, chosen, True)
            found.append(taken if valid is None else taken & (valid != 0))

    _run_noting(model, inputs, note)
    return found
