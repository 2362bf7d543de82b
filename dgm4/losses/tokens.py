"""Classification losses: the pair (BIC, IED), its manipulation types (MLC) and its tokens (TMG).

Source: HAMMER, "Detecting and Grounding Multi-Modal Media Manipulation" (CVPR 2023), whose code uses
neither class weights nor label smoothing; ASAP, arXiv:2412.12718, for IED.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dgm4.losses.precision import upcast

IGNORED = -100  # label of a padded token


def bic(logits: Tensor, fake: Tensor) -> Tensor:
    """Binary classification of the pair: mean over B of -log softmax(logits)[fake].

    logits [B, 2] (index 1 = manipulated), fake [B] int64 (1 = manipulated); a scalar.
    """
    return F.cross_entropy(upcast(logits), fake.long())


def ied(logits: Tensor, fake: Tensor) -> Tensor:
    """ASAP's explanation classifier: `bic` of a head of its own on the explanation of the image.

    logits [B, 2] of `itm_head_m`, which reads what `itm_head` reads with the explanation in the caption's
    place: the [CLS] of the explanation fused with the image, plus UtilsB times the feature aggregated
    from the image that cross-attends to the explanation. fake [B] is the label of the pair.
    """
    return bic(logits, fake)


def mlc(logits: Tensor, types: Tensor) -> Tensor:
    """Multi-label classification: mean over B and the four types of the binary cross-entropy with logits.

    logits [B, 4] and types [B, 4] (1 = applied, the order of `dgm4.config.TYPES`); a scalar.
    """
    logits = upcast(logits)
    return F.binary_cross_entropy_with_logits(logits, types.to(logits.dtype))


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values where valid; zero, still part of the graph, where nothing is."""
    return values[valid].sum() / valid.sum().clamp(min=1)


def tmg(logits: Tensor, labels: Tensor, logits_m: Tensor | None = None, alpha: float = 0.4) -> Tensor:
    """Token grounding: (1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(logits_m)).

    logits [B, N-1, 2] (index 1 = manipulated), labels [B, N-1] int64 (1, 0, or -100 for padding). Both terms
    are means over the valid tokens of the whole batch, zero if there are none. `logits_m` [B, N-1, 2] are
    those of the momentum towers and get no gradient. Without them alpha does not matter and the first term
    stands alone: so CALS trains, and HAMMER and ASAP without token momentum.
    """
    valid = labels != IGNORED
    log_p = F.log_softmax(upcast(logits), dim=-1)
    true = labels.clamp(min=0).unsqueeze(-1)
    hard = _masked_mean(-log_p.gather(-1, true).squeeze(-1), valid)
    if logits_m is None:
        return hard
    soft_labels = F.softmax(upcast(logits_m.detach()), dim=-1)
    soft = _masked_mean(-(soft_labels * log_p).sum(-1), valid)
    return (1 - alpha) * hard + alpha * soft
