"""A network with what only training needs: projections, momentum towers, queues, and the sum of its losses.

B pairs, N tokens, P patches, D width. Sources: HAMMER (CVPR 2023), ASAP (arXiv:2412.12718), CALS (Pattern
Recognition 2025); the losses and their weights are those of `dgm4.losses`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4 import losses
from dgm4.data.dataset import Batch
from dgm4.layers import Head, padding_bias
from dgm4.losses.contrastive import ALPHA, QUEUE_SIZE, TEMPERATURE, TEMPERATURE_RANGE
from dgm4.model import Output, Trace, build
from dgm4.models.asap import Asap
from dgm4.models.cals import CAFormer
from dgm4.text import TextEncoder
from dgm4.vision import VisionTransformer
from engine.registry.config import FusionConfig

Terms = dict[str, Tensor]


class Features(NamedTuple):
    """Momentum features of a batch, each [B, projection], and the momentum tower's token logits."""

    image: Tensor
    text: Tensor
    caption: Tensor | None
    explanation: Tensor | None
    logits_tok: Tensor | None


def gather(features: Tensor) -> Tensor:
    """Features [B, C] of every process, [world * B, C]; those given where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return features
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features.contiguous())
    return torch.cat(parts)


class Trainee(nn.Module):
    """The online network and its momentum copy; `forward` gives the losses of a batch by name.

    `guidance` False leaves ASAP's MGCA loss out, `refinement` False CALS's refined box (GLRM): its answer is
    then the coarse box, while the network that `load_checkpoint` gives answers with the untrained refined
    one. `sampled` computes CAFormer's local features only where they are read. `queue` is the number of past
    momentum features that the contrastive losses compare with.
    """

    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        config: FusionConfig,
        queue: int = QUEUE_SIZE,
        guidance: bool = True,
        refinement: bool = True,
        sampled: bool = True,
    ) -> None:
        super().__init__()
        self.guidance, self.refinement = guidance, refinement
        self.network = build(config)
        self.vision_proj = nn.Linear(config.width, config.projection)
        self.text_proj = nn.Linear(config.width, config.projection)
        initialise(self)
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        self.queues = ["image_queue", "text_queue"]
        if isinstance(self.network, Asap):
            self.queues += ["cap_queue", "prom_queue"]
            self.patch_head = nn.Linear(config.width, 1)
            self.itm_head_m = Head(config.width, 2)  # of the explanations; no momentum copy for all its name
        for name in self.queues:
            self.register_buffer(name, F.normalize(torch.randn(config.projection, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        if isinstance(self.network.visual_encoder, CAFormer):
            self.network.visual_encoder.sampled = sampled
        self.copy_momentum()

    def copy_momentum(self) -> None:
        """Make the momentum towers equal to the online ones, as after an initialisation."""
        for name, module in self._pairs():
            momentum = copy.deepcopy(module).requires_grad_(False)
            self.add_module(f"{name}_m", momentum)

    def _pairs(self) -> list[tuple[str, nn.Module]]:
        network = self.network
        return [
            ("visual_encoder", network.visual_encoder),
            ("text_encoder", network.text_encoder),
            ("vision_proj", self.vision_proj),
            ("text_proj", self.text_proj),
        ]

    @torch.no_grad()
    def _update(self) -> None:
        """Clamp the temperature and move the momentum towers, as published before every forward pass."""
        self.temp.clamp_(*TEMPERATURE_RANGE)
        for name, module in self._pairs():
            losses.momentum_update(module.parameters(), getattr(self, f"{name}_m").parameters())

    def forward(self, batch: Batch, alpha: float = ALPHA) -> Terms:
        """Losses of a batch by name, unweighted scalars; updates momentum towers and queues.

        `alpha` is the share of the momentum towers in the soft targets.
        """
        self._update()
        network = self.network
        trace = network.trace(batch.image, batch.input_ids, batch.attention_mask)
        with torch.no_grad():
            momentum = self._momentum(batch)
        name = network.config.name
        terms = self._common(batch, trace, momentum, alpha)
        features = self._project(trace)
        contrast = losses.csam if name == "cals" else losses.mac
        terms["csam" if name == "cals" else "mac"] = contrast(
            *features,
            momentum.image,
            momentum.text,
            self.image_queue,
            self.text_queue,
            batch.fake == 0,
            self.temp,
            alpha,
        )
        if isinstance(network, Asap):
            terms |= self._asap(network, batch, trace, momentum, features[0], alpha)
        self._enqueue(momentum)
        return terms

    def predict(self, batch: Batch) -> Output:
        """Answers of the online network, with the coarse box where `refinement` is off."""
        trace = self.network.trace(batch.image, batch.input_ids, batch.attention_mask)
        return trace.output._replace(box=self._boxes(trace)[-1])

    def _boxes(self, trace: Trace) -> list[Tensor]:
        """Boxes that have a loss, the answer last."""
        coarse, box = trace.branch.coarse, trace.branch.box
        if coarse is None:
            return [box]
        return [coarse, box] if self.refinement else [coarse]

    def _common(self, batch: Batch, trace: Trace, momentum: Features, alpha: float) -> Terms:
        output, boxes = trace.output, self._boxes(trace)
        return {
            "bic": losses.bic(output.logits_real_fake, batch.fake),
            "mlc": losses.mlc(output.logits_multicls, batch.types),
            "tmg": losses.tmg(output.logits_tok, batch.token_labels, momentum.logits_tok, alpha),
            "box_l1": torch.stack([losses.box_l1(box, batch.box) for box in boxes]).sum(),
            "box_giou": torch.stack([losses.box_giou(box, batch.box) for box in boxes]).sum(),
        }

    def _project(self, trace: Trace) -> tuple[Tensor, Tensor]:
        image = F.normalize(self.vision_proj(trace.for_text[:, 0]).float(), dim=-1)
        return image, F.normalize(self.text_proj(trace.text[:, 0]).float(), dim=-1)

    def _momentum(self, batch: Batch) -> Features:
        vision = cast(VisionTransformer, self.visual_encoder_m)
        encoder = cast(TextEncoder, self.text_encoder_m)
        for_text, _ = vision(batch.image)
        text, bias = encoder.bert.encode_text(batch.input_ids, batch.attention_mask)
        logits = None
        if self.network.config.name != "cals":  # which computes the term and leaves it out
            fused, _ = encoder.bert.fuse(text, bias, for_text, False)
            logits = encoder.classifier(fused[:, 1:])
        project = cast(nn.Module, self.text_proj_m)
        return Features(
            F.normalize(cast(nn.Module, self.vision_proj_m)(for_text[:, 0]).float(), dim=-1),
            F.normalize(project(text[:, 0]).float(), dim=-1),
            _embed(encoder, project, batch.caption_ids, batch.caption_mask),
            _embed(encoder, project, batch.explanation_ids, batch.explanation_mask),
            logits,
        )

    def _asap(
        self, network: Asap, batch: Batch, trace: Trace, momentum: Features, image: Tensor, alpha: float
    ) -> Terms:
        """MGCA's and PMM's maps, and, where there are side-cars, LMA and IED."""
        aggregated = network.norm_layer_aggr(trace.branch.crossed[:, 1:])
        terms = {"pmm": losses.pmm(self.patch_head(aggregated)[..., 0], batch.box)}
        if self.guidance and trace.output.attention_map is not None:
            scores = trace.output.attention_map
            terms["mgca"] = losses.mgca(scores, batch.box, batch.token_labels, batch.attention_mask)
        if batch.explanation_ids is None or batch.explanation_mask is None:
            return terms
        if momentum.caption is None or momentum.explanation is None:
            return terms
        bert = network.text_encoder.bert
        text, bias = bert.encode_text(batch.explanation_ids, batch.explanation_mask)
        explanation = F.normalize(self.text_proj(text[:, 0]).float(), dim=-1)
        caption = _embed(network.text_encoder, self.text_proj, batch.caption_ids, batch.caption_mask)
        terms["lma"] = losses.lma(
            image,
            cast(Tensor, caption),
            explanation,
            momentum.image,
            momentum.caption,
            momentum.explanation,
            self.image_queue,
            cast(Tensor, self.cap_queue),
            cast(Tensor, self.prom_queue),
            batch.fake == 0,
            self.temp,
            alpha,
        )
        fused, _ = bert.fuse(text, bias, trace.for_text, False)
        key_bias = padding_bias(batch.explanation_mask, float("-inf"), text.dtype)
        crossed = network.cross(network.it_cross_attn, trace.for_image, text, key_bias)
        feature = network.aggregate(network.cls_token_local, crossed)
        terms["ied"] = losses.ied(self.itm_head_m(fused[:, 0] + network.UtilsB * feature), batch.fake)
        return terms

    def _enqueue(self, momentum: Features) -> None:
        start = int(self.queue_ptr)
        for name, features in zip(self.queues, momentum, strict=False):
            if features is not None:
                self.queue_ptr[0] = losses.enqueue(getattr(self, name), start, gather(features))


def _embed(
    encoder: TextEncoder, project: nn.Module, ids: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Normalised text features [B, projection] of ids [B, M]; None without them."""
    if ids is None or mask is None:
        return None
    text, _ = encoder.bert.encode_text(ids, mask)
    return F.normalize(project(text[:, 0]).float(), dim=-1)


def initialise(module: nn.Module) -> None:
    """Weights for training from nothing: Xavier for Linear, std 0.02 for embeddings, as BERT and ViT do."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
