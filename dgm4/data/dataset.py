"""Pairs as the networks read them: a torch data set over annotated samples, and its batches.

Images and captions go through the engine's own preprocessing, so that what is trained on and what is
served agree bit for bit. The one augmentation is the published horizontal flip.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dgm4.config import TYPES
from dgm4.data.annotations import Box, Problem, Sample
from dgm4.data.labels import encode, label_tokens, normalize_box
from engine.errors import InputError, quoted
from engine.inputs.preprocess import ImageOptions, decode_image, normalize_image, resize_image
from engine.inputs.text import CaptionTokenizer

log = logging.getLogger(__name__)

IGNORED = -100  # the label of padding; torch's cross-entropy leaves it out
MIN_TOKENS = 2  # [CLS] and one more, so that every batch has a word's column
_FLIP_PROBABILITY = 0.5
# Boxes refer to the image as it is stored: the published loader knows no EXIF orientation.
_AS_STORED = ImageOptions(apply_orientation=False)


class Item(NamedTuple):
    """One sample: `image` float32 [3, S, S], `input_ids` int64 [n], `token_labels` int64 [n - 1].

    `fake` is 0 or 1, `types` float32 [4], `box` float32 [4] (see `Batch`), `position` that in the
    samples; the ids of the side-car texts int64 [m], None without side-cars.
    """

    image: Tensor
    input_ids: Tensor
    token_labels: Tensor
    fake: int
    types: Tensor
    box: Tensor
    position: int
    caption_ids: Tensor | None = None
    explanation_ids: Tensor | None = None


class Batch(NamedTuple):
    """B samples, texts padded with zeros to the longest.

    image [B, 3, S, S] float32, normalised; input_ids and attention_mask [B, N] int64, [CLS] first and no
    [SEP]; fake [B] int64; types [B, 4] float32 in the order of TYPES; box [B, 4] float32, (cx, cy, w, h) in
    [0, 1], zeros where there is none; token_labels [B, N - 1] int64, 1 fake, 0 genuine, -100 padding;
    indices [B] int64, positions in the samples. The side-cars' ids and masks are [B, M] int64 or None.
    """

    image: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    fake: Tensor
    types: Tensor
    box: Tensor
    token_labels: Tensor
    indices: Tensor
    caption_ids: Tensor | None = None
    caption_mask: Tensor | None = None
    explanation_ids: Tensor | None = None
    explanation_mask: Tensor | None = None


class PairDataset(Dataset[Item]):
    """Annotated samples as network inputs and labels.

    With `flip`, half of the images are mirrored, drawn from (seed, epoch, index) alone. With `cache`, the
    process that reads an image keeps it resized, `image_size`**2 * 3 bytes each: without workers every
    image is decoded once, with workers once in each. `captions` and `explanations` map a sample's `image`
    to a text; the caption stands in for a missing entry, as published, and `missing` counts these.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: CaptionTokenizer,
        image_size: int = 256,
        flip: bool = False,
        seed: int = 0,
        cache: bool = False,
        captions: Mapping[str, str] | None = None,
        explanations: Mapping[str, str] | None = None,
    ):
        if image_size < 1 or seed < 0:
            raise InputError(f"expected image_size >= 1 and seed >= 0, got {image_size} and {seed}")
        self.samples = samples
        self.image_size, self.flip, self.seed = image_size, flip, seed
        self.captions, self.explanations = captions, explanations
        self._tokenizer = tokenizer
        self._pictures: dict[Path, tuple[np.ndarray, tuple[int, int]]] | None = {} if cache else None
        # In shared memory: workers that outlive an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.missing = _count_missing(samples, {"captions": captions, "explanations": explanations})

    def set_epoch(self, epoch: int) -> None:
        """Choose the flips of `epoch` (from 0), also for workers that are running."""
        if epoch < 0:
            raise InputError(f"expected an epoch >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Return one sample; raises InputError, naming id and file, where its image or box is unusable."""
        sample = self.samples[index]
        index %= len(self.samples)
        rgb, (width, height) = self._picture(sample)
        box = normalize_box(sample, width, height)
        if self.flip and self._is_flipped(index):
            rgb, box = rgb[:, ::-1], box and flip_box(box)
        ids, labels = label_tokens(sample, self._tokenizer)
        return Item(
            image=torch.from_numpy(normalize_image(Image.fromarray(np.ascontiguousarray(rgb)))),
            input_ids=torch.from_numpy(ids),
            token_labels=torch.from_numpy(labels),
            fake=int(sample.manipulated),
            types=torch.tensor([float(name in sample.types) for name in TYPES]),
            box=torch.tensor(box or (0.0,) * 4, dtype=torch.float32),
            position=index,
            caption_ids=self._side_text(self.captions, sample),
            explanation_ids=self._side_text(self.explanations, sample),
        )

    def read(self, index: int) -> Item | Problem:
        """Return one sample, or what is wrong with its image or box."""
        try:
            return self[index]
        except InputError as error:
            sample = self.samples[index]
            return Problem(sample.picture, sample.id, str(error), "picture_unreadable")

    def _is_flipped(self, index: int) -> bool:
        random = np.random.default_rng((self.seed, int(self._epoch), index))
        return bool(random.random() < _FLIP_PROBABILITY)

    def _picture(self, sample: Sample) -> tuple[np.ndarray, tuple[int, int]]:
        """The resized image, uint8 [S, S, 3], and the stored one's (width, height)."""
        if self._pictures is None:
            return _read_picture(sample, self.image_size)
        if sample.picture not in self._pictures:
            self._pictures[sample.picture] = _read_picture(sample, self.image_size)
        return self._pictures[sample.picture]

    def _side_text(self, texts: Mapping[str, str] | None, sample: Sample) -> Tensor | None:
        if texts is None:
            return None
        tokens, _ = encode(texts.get(sample.image, sample.text), self._tokenizer)
        return torch.from_numpy(tokens.ids)


def flip_box(box: Box) -> Box:
    """Mirror (cx, cy, w, h), fractions of the image, from left to right."""
    cx, cy, w, h = box
    return 1 - cx, cy, w, h


def read_sidecar(path: str | Path) -> dict[str, str]:
    """Read a side-car file {image: text}, whose keys are paths as annotated.

    Raises InputError where the file cannot be opened or is no such JSON in UTF-8.
    """
    path = Path(path)
    try:
        texts = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the side-car: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or numbers and nesting past reason
        raise InputError(f"{path}: expected JSON in UTF-8: {error}") from error
    if not isinstance(texts, dict):
        raise InputError(f"{path}: expected an object {{image: text}}, got {type(texts).__name__}")
    for image, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{path}: expected a text for {quoted(image)}, got {type(text).__name__}")
    return texts


def collate(items: Sequence[Item]) -> Batch:
    """Make a batch of at least one item; its texts are padded at the end, to at least MIN_TOKENS."""
    input_ids, attention_mask = _pad([item.input_ids for item in items])
    caption_ids, caption_mask = _pad_side_texts([item.caption_ids for item in items])
    explanation_ids, explanation_mask = _pad_side_texts([item.explanation_ids for item in items])
    token_labels = torch.full((len(items), input_ids.shape[1] - 1), IGNORED)
    for row, item in zip(token_labels, items, strict=True):
        row[: len(item.token_labels)] = item.token_labels
    return Batch(
        image=torch.stack([item.image for item in items]),
        input_ids=input_ids,
        attention_mask=attention_mask,
        fake=torch.tensor([item.fake for item in items]),
        types=torch.stack([item.types for item in items]),
        box=torch.stack([item.box for item in items]),
        token_labels=token_labels,
        indices=torch.tensor([item.position for item in items]),
        caption_ids=caption_ids,
        caption_mask=caption_mask,
        explanation_ids=explanation_ids,
        explanation_mask=explanation_mask,
    )


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad ids to the longest; return them and their mask, int64 [B, N]."""
    ids = torch.zeros((len(rows), max(MIN_TOKENS, *map(len, rows))), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def _pad_side_texts(rows: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    present = [row for row in rows if row is not None]
    return _pad(present) if present else (None, None)


def _read_picture(sample: Sample, image_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    rgb = decode_image(sample.picture, name=f"sample {sample.id}", options=_AS_STORED).rgb
    return np.asarray(resize_image(rgb, image_size)), rgb.size


def _count_missing(
    samples: Sequence[Sample], sidecars: Mapping[str, Mapping[str, str] | None]
) -> dict[str, int]:
    """Count the samples without an entry, for every side-car that is given, and log them."""
    missing = {
        name: sum(sample.image not in texts for sample in samples)
        for name, texts in sidecars.items()
        if texts is not None
    }
    for name, count in missing.items():
        if count:
            log.warning(
                "%s: %d of %d samples have no text; their caption stands in", name, count, len(samples)
            )
    return missing
