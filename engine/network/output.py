"""The outputs of a network, trained or rewritten for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Output(NamedTuple):
    """Outputs for B pairs with N tokens each, [CLS] included.

    logits_real_fake [B, 2] (index 1 = manipulated); logits_multicls [B, 4] (face swap, face attribute,
    text swap, text attribute); box [B, 4] as (cx, cy, w, h) in [0, 1]; logits_tok [B, N-1, 2] (index 1 =
    manipulated token); attention_map [B, N, 1+P], ASAP's MGCA scores before the softmax, else None;
    patch_scores [B, P], CSCL's agreement of the patches with the caption in [0, 1], else None.
    """

    logits_real_fake: Tensor
    logits_multicls: Tensor
    box: Tensor
    logits_tok: Tensor
    attention_map: Tensor | None = None
    patch_scores: Tensor | None = None

    def widened(self) -> Output:
        """The same in float32, or in float64 from a network that is, whatever a network's inner dtype."""
        out = torch.promote_types(self.logits_real_fake.dtype, torch.float32)
        return Output._make(None if x is None else x.to(out) for x in self)
