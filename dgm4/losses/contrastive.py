"""Contrastive losses with momentum towers and queues: MAC and LMA.

B pairs, P channels of the projection, K columns of a queue. Features are [B, P], L2-normalised, one row a
pair; a name ending in `_m` comes from the momentum towers and gets no gradient. Queues are [P, K], one
column a past momentum feature, as released checkpoints store them.

Sources: HAMMER (CVPR 2023), after ALBEF (arXiv:2107.07651) and MoCo (arXiv:1911.05722); ASAP
(arXiv:2412.12718).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from dgm4.losses.precision import upcast

TEMPERATURE = 0.07  # where the learnt temperature starts
TEMPERATURE_RANGE = (0.001, 0.5)  # what it is clamped to before every step
ALPHA = 0.4  # share of the momentum targets, reached linearly over the first epoch
DECAY = 0.995
QUEUE_SIZE = 65536


@torch.no_grad()
def enqueue(queue: Tensor, pointer: int, features: Tensor) -> int:
    """Write features [B, P] over the oldest columns of queue [P, K], in place; return the next pointer.

    Wraps round where K is no multiple of B; of more than K features the last K stay.
    """
    size = queue.shape[1]
    end = pointer + len(features)
    newest = features[-size:]
    columns = torch.arange(end - len(newest), end, device=queue.device) % size
    queue[:, columns] = newest.T.to(queue.dtype)
    return end % size


@torch.no_grad()
def momentum_update(online: Iterable[Tensor], momentum: Iterable[Tensor], decay: float = DECAY) -> None:
    """momentum <- decay * momentum + (1 - decay) * online, in place, parameter by parameter.

    The published code does so before each forward pass, and leaves buffers (CALS's BatchNorm) alone.
    Raises ValueError where one has more parameters than the other.
    """
    for parameter, average in zip(online, momentum, strict=True):
        average.mul_(decay).add_(parameter, alpha=1 - decay)


def _keys(features_m: Tensor, queue: Tensor) -> Tensor:
    """Momentum features of the batch, then the queue, as columns [P, B+K]; key i is the partner of row i."""
    return torch.cat([upcast(features_m).T, upcast(queue)], dim=1).detach()


def _logits(query: Tensor, keys: Tensor, temperature: float | Tensor) -> Tensor:
    """Cosines over the temperature, [B, B+K], in full precision even under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return upcast(query) @ keys / temperature


def _across(
    query: Tensor, query_m: Tensor, keys: Tensor, matched: Tensor, temperature: float | Tensor, alpha: float
) -> Tensor:
    """One direction between modalities: mean over B of the cross-entropy with the soft targets.

    Target of row i: alpha softmax(query_m_i keys / temperature) + (1 - alpha) [matched_i] one-hot(i).
    """
    with torch.no_grad():
        targets = alpha * _logits(query_m, keys, temperature).softmax(-1)
        targets.diagonal().add_((1 - alpha) * matched.to(targets.dtype))
    return -(targets * _logits(query, keys, temperature).log_softmax(-1)).sum(-1).mean()


def _within(query: Tensor, keys: Tensor, temperature: float | Tensor) -> Tensor:
    """One modality with itself: every row's own momentum feature is its positive, manipulated or not."""
    positives = torch.arange(len(query), device=query.device)
    return F.cross_entropy(_logits(query, keys, temperature), positives)


def mac(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    pristine: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    alpha: float = ALPHA,
) -> Tensor:
    """HAMMER's manipulation-aware contrastive loss: the mean of four cross-entropies over B+K keys.

    image -> text, text -> image: targets alpha softmax(momentum similarities) + (1 - alpha) one-hot of the
    own pair, the one-hot only for `pristine` [B] (bool). As published, a manipulated pair keeps its momentum
    part, so its targets sum to alpha. image -> image, text -> text: one-hot for every pair. The gradient
    reaches image, text and the temperature (a tensor if learnt). Enqueue the momentum features afterwards.
    """
    image_keys, text_keys = _keys(image_m, image_queue), _keys(text_m, text_queue)
    terms = (
        _across(image, image_m, text_keys, pristine, temperature, alpha),
        _across(text, text_m, image_keys, pristine, temperature, alpha),
        _within(image, image_keys, temperature),
        _within(text, text_keys, temperature),
    )
    return torch.stack(terms).mean()


def lma(
    image: Tensor,
    caption: Tensor,
    explanation: Tensor,
    image_m: Tensor,
    caption_m: Tensor,
    explanation_m: Tensor,
    image_queue: Tensor,
    cap_queue: Tensor,
    prom_queue: Tensor,
    pristine: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    alpha: float = ALPHA,
) -> Tensor:
    """ASAP's large-model-assisted alignment: the mean of six cross-entropies built as in `mac`.

    `caption` is the text feature of what a multimodal model wrote about the image, `explanation` of what a
    language model made of both; same text tower and projection as the news text, queues of their own. Image
    and caption match in every pair, image and explanation only in `pristine` [B] ones; either text also has
    the term with itself, the image's is in `mac`. The published code takes the momentum targets of
    image -> explanation from the similarities of explanation -> image, whose columns are other pairs;
    here they are its own.
    """
    images, captions = _keys(image_m, image_queue), _keys(caption_m, cap_queue)
    explanations = _keys(explanation_m, prom_queue)
    always = torch.ones_like(pristine)
    terms = (
        _across(image, image_m, captions, always, temperature, alpha),
        _across(caption, caption_m, images, always, temperature, alpha),
        _within(caption, captions, temperature),
        _across(image, image_m, explanations, pristine, temperature, alpha),
        _across(explanation, explanation_m, images, pristine, temperature, alpha),
        _within(explanation, explanations, temperature),
    )
    return torch.stack(terms).mean()
