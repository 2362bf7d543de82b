"""Pretraining of a visual encoder that has no DeiT of its size, on what its patches show.

The published networks start from encoders pretrained on ImageNet; the tiny size has none. A linear layer on
each patch token says whether the patch overlaps the box of a swapped face, and of a changed one: the
binary cross-entropy teaches the encoder to see local traces. A second one tells, in the patches of such a
face, its box, so that a patch knows where it lies. A third one tells the patch's mean colour and the whole
image's: without it the encoder loses the light that captions speak of. All three layers are thrown away.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import model_config
from dgm4.data.annotations import read_split
from dgm4.data.dataset import Batch, PairDataset
from dgm4.losses.boxes import box_giou, box_l1
from dgm4.losses.maps import patch_mask
from dgm4.training.optimizer import make_schedule
from dgm4.training.options import TrainOptions
from dgm4.training.order import BatchOrder
from dgm4.training.outputs import to_device
from dgm4.training.reading import Unreadable, load, make_loader
from dgm4.training.snapshot import write_snapshot
from dgm4.training.trainee import initialise
from dgm4.vision import VisionTransformer
from engine.errors import InputError, NumericalError
from engine.inputs.text import CaptionTokenizer
from engine.progress import progress_bar

log = logging.getLogger(__name__)

BOX_WEIGHT = 0.1
COLOUR_WEIGHT = 0.1
FACE_TYPES = 2  # face swap and face attribute, the first two of TYPES
_WAVE_SHARE = 0.5  # amplitude of the first position embeddings; the default of 0.02 drowns in the patches'
_LONGEST_WAVE = 10000.0


def patch_targets(batch: Batch, grid: int) -> Tensor:
    """1 where a patch overlaps the box of a swapped, or of a changed, face; [B, grid^2, 2] float32."""
    inside = patch_mask(batch.box, grid).to(torch.float32)
    return inside[..., None] * batch.types[:, None, :FACE_TYPES]


def colour_targets(image: Tensor, grid: int) -> Tensor:
    """Mean colour of each patch, then of the whole image, as normalised; [B, grid^2, 6] float32."""
    patches = F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)
    return torch.cat([patches, patches.mean(1, keepdim=True).expand_as(patches)], dim=-1)


def wave_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column at width/4 frequencies, [1, grid^2, width] (arXiv:2111.06377)."""
    count = width // 4
    frequency = _LONGEST_WAVE ** -(torch.arange(count) / count)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[None]


class PatchTrainee(nn.Module):
    """A visual encoder and the linear layers that its patches are trained through."""

    def __init__(self, options: TrainOptions) -> None:
        super().__init__()
        config = model_config(options.model, options.size)
        self.grid = config.grid
        self.visual_encoder = VisionTransformer(config)
        self.faces = nn.Linear(config.width, FACE_TYPES)
        self.boxes = nn.Linear(config.width, 4)
        self.colours = nn.Linear(config.width, 2 * 3)
        initialise(self)
        with torch.no_grad():
            self.visual_encoder.pos_embed[:, 1:] = _WAVE_SHARE * wave_positions(config.grid, config.width)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        tokens, _ = self.visual_encoder(batch.image)
        patches = tokens[:, 1:]
        targets = patch_targets(batch, self.grid)
        faces = F.binary_cross_entropy_with_logits(self.faces(patches).float(), targets)
        colours = F.mse_loss(self.colours(patches).float(), colour_targets(batch.image, self.grid))
        return faces + BOX_WEIGHT * self._locate(patches, batch.box, targets) + COLOUR_WEIGHT * colours

    def _locate(self, patches: Tensor, box: Tensor, targets: Tensor) -> Tensor:
        """L1 and GIoU of what the patches of a manipulated face say of its box; 0 without such a face."""
        pair, patch = targets.amax(-1).nonzero(as_tuple=True)
        if len(pair) == 0:
            return patches.new_zeros(())
        told = self.boxes(patches[pair, patch]).float().sigmoid()
        return box_l1(told, box[pair]) + box_giou(told, box[pair])


def pretrain(
    options: TrainOptions,
    data: Path,
    out: Path,
    tokenizer: CaptionTokenizer,
    device: str = "cpu",
    cache: bool = True,
    progress: bool = True,
) -> float:
    """Train a ViT of `options.size` on the patches of the split "train"; return the last epoch's mean loss.

    Writes `out`, a state with timm's names that `--init-vision` reads. Of the options the rates of the visual
    encoder hold, batch, epochs, clip, precision (fp32 or bf16), seed and flip. Raises InputError for data
    that cannot be used, NumericalError where the loss is no longer finite.
    """
    if not out.resolve().parent.is_dir():
        raise InputError(f"{out}: its folder does not exist; create it, or choose another --out")
    samples = read_split(data, "train").usable(f"{data}, split train")
    size = model_config(options.model, options.size).image_size
    dataset = PairDataset(samples, tokenizer, size, options.flip, options.seed, cache)
    order = BatchOrder(len(samples), options.batch, options.seed)
    if order.whole == 0:
        raise InputError(f"{data}: {len(samples)} training pairs do not fill a batch of {options.batch}")
    torch.manual_seed(options.seed)
    trainee = PatchTrainee(options).to(device)
    optimizer = torch.optim.AdamW(trainee.parameters(), options.lr_vision, weight_decay=options.weight_decay)
    schedule = make_schedule(optimizer, options, options.epochs * order.whole)
    unreadable = Unreadable("train", len(samples))
    mean = float("nan")
    with progress_bar("pretrain", options.epochs * order.whole, "batches", progress) as bar:
        for epoch in range(options.epochs):
            dataset.set_epoch(epoch)
            order.seek(epoch)
            total = 0.0
            for batch, problems in load(make_loader(dataset, 0, order=order)):
                unreadable.add(problems)
                if batch is None:
                    raise InputError(f"{data}: no image of a whole batch can be read")
                loss = _update(trainee, batch, optimizer, options, device)
                schedule.step()
                total += loss
                bar.update()
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            mean = total / order.whole
            log.info("epoch %d of %d: loss %.4f", epoch + 1, options.epochs, mean)
            if not math.isfinite(mean):
                raise NumericalError(f"epoch {epoch + 1}: the loss is {mean}; lower lr_vision or set clip")
    write_snapshot(out, {"model": trainee.visual_encoder.cpu().state_dict()})
    return mean


def _update(
    trainee: PatchTrainee, batch: Batch, optimizer: torch.optim.Optimizer, options: TrainOptions, device: str
) -> float:
    """Take one step on a batch; return its loss."""
    with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
        loss = trainee(to_device(batch, torch.device(device)))
    optimizer.zero_grad()
    loss.backward()
    if options.clip:
        nn.utils.clip_grad_norm_(trainee.parameters(), options.clip)
    optimizer.step()
    return float(loss.detach())
