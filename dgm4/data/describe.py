"""The side-car texts that ASAP trains with: a caption of every image, an explanation of every pair.

ASAP (arXiv 2412.12718, large-model-assisted alignment) lets a multimodal language model caption the image,
and a language model explain the pair. Here any local models do. The explaining model reads the news caption
and the image's caption, never the labels. A side-car has one text for an image, so of several pairs with
one image the first is explained. One run at a time may write a folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dgm4.data.annotations import Sample, read_split
from dgm4.data.dataset import read_sidecar
from engine.errors import InputError
from engine.files import replacing
from engine.inputs.preprocess import decode_image
from engine.inputs.text import clean_caption, read_caption

log = logging.getLogger(__name__)

CAPTIONS, EXPLANATIONS = "captions.json", "explanations.json"
# {news} is the caption of the pair, {image} what the captioner wrote.
EXPLANATION_PROMPT = (
    "A news photograph was published with a caption.\n"
    "Caption: {news}\n"
    "What the photograph shows: {picture}\n"
    "In one or two short sentences, say whether the caption fits the photograph, and name the people, "
    "actions or feelings on which they agree or differ."
)
# For an image without a caption of its own.
NEWS_PROMPT = (
    "A news photograph was published with a caption.\n"
    "Caption: {news}\n"
    "In one or two short sentences, say who and what the photograph must show, and which feelings, for the "
    "caption to fit."
)
_PROMPT_WORDS = 50  # as many words as the networks read of a caption
_PROMPT_CHARACTERS = 600
_SMALLEST = 16  # pixels; image processors mistake a side of 1 or 3 for the channels

Caption = Callable[[Sequence[Image.Image]], list[str]]
Answer = Callable[[Sequence[str]], list[str]]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Pace:
    """How a side-car is written: pairs a model reads at once, pairs between two saves, old texts redone."""

    batch: int = 8
    save_every: int = 1000
    redo: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for a count below 1."""
        if self.batch < 1 or self.save_every < 1:
            raise InputError(f"expected batch and save_every from 1, got {self.batch} and {self.save_every}")


@dataclass(frozen=True)
class Described:
    """Images by what became of their text: written now, kept from before, none as unreadable or empty."""

    written: int
    kept: int
    unreadable: int
    empty: int


def read_pictures(data: str | Path, splits: Iterable[str], limit: int | None = None) -> list[Sample]:
    """The first sample of every image of the splits, in their order, at most `limit`; the files stay shut.

    Raises InputError as `read_split` does.
    """
    first: dict[str, Sample] = {}
    pairs = 0
    for split in splits:
        for sample in read_split(data, split, check_pictures=False).samples:
            first.setdefault(sample.image, sample)
            pairs += 1
    if pairs > len(first):
        log.warning("%d pairs share %d pictures; the first pair of a picture is explained", pairs, len(first))
    return list(first.values())[:limit]


def write_captions(
    data: str | Path,
    samples: Sequence[Sample],
    captioner: Caption,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Described:
    """Caption the samples' images into DATA/metadata/captions.json.

    Texts that the file already has are kept unless `pace.redo`. An image that cannot be read is logged and
    left out, as is an empty text. The file is replaced whole, every `pace.save_every` images and at the
    end, which an exception or Ctrl-C also is. `progress` is called with the images done. Raises InputError
    where the file is no side-car.
    """

    def describe(batch: Sequence[Sample]) -> dict[str, str | None]:
        read = {sample.image: _read(sample) for sample in batch}
        pictures = {image: picture for image, picture in read.items() if picture is not None}
        texts = dict(zip(pictures, captioner(list(pictures.values())), strict=True))
        return {image: texts.get(image) for image in read}

    return _fill(_sidecar(data, CAPTIONS), samples, describe, pace or Pace(), progress)


def write_explanations(
    data: str | Path,
    samples: Sequence[Sample],
    instructor: Answer,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Described:
    """Explain the samples' pairs into DATA/metadata/explanations.json.

    The images' captions are those of captions.json; where there is none the news caption stands alone.
    Everything else is as for `write_captions`.
    """
    path = _sidecar(data, CAPTIONS)
    captions: Mapping[str, str] = read_sidecar(path) if path.exists() else {}
    alone = sum(sample.image not in captions for sample in samples)
    if alone:
        log.warning("%d of %d pictures have no caption in %s", alone, len(samples), path)

    def describe(batch: Sequence[Sample]) -> dict[str, str | None]:
        prompts = [explanation_prompt(sample.text, captions.get(sample.image)) for sample in batch]
        return dict(zip((sample.image for sample in batch), instructor(prompts), strict=True))

    return _fill(_sidecar(data, EXPLANATIONS), samples, describe, pace or Pace(), progress)


def explanation_prompt(news: str, picture: str | None) -> str:
    """What the explaining model reads: the first 50 words of the news caption, and of the image's."""
    if not picture:
        return NEWS_PROMPT.format(news=_cut(news))
    return EXPLANATION_PROMPT.format(news=_cut(news), picture=_cut(picture))


def _cut(text: str) -> str:
    """One line of at most 50 words and 600 characters, the words as written."""
    text = " ".join(read_caption(text)[0].split())
    spans = clean_caption(text, _PROMPT_WORDS).spans
    return text[: spans[-1].end if spans else 0][:_PROMPT_CHARACTERS]


def _sidecar(data: str | Path, name: str) -> Path:
    return Path(data) / "metadata" / name


def _read(sample: Sample) -> Image.Image | None:
    """A sample's image, or None with a line in the log."""
    try:
        rgb = decode_image(sample.picture, name=str(sample.picture)).rgb
    except InputError as error:
        log.warning("left out: %s", error)
        return None
    width, height = (max(side, _SMALLEST) for side in rgb.size)
    return rgb if (width, height) == rgb.size else rgb.resize((width, height))


def _fill(
    path: Path,
    samples: Sequence[Sample],
    describe: Callable[[Sequence[Sample]], dict[str, str | None]],
    pace: Pace,
    progress: Progress | None,
) -> Described:
    """Add the texts of the samples to a side-car; None is for an unreadable image."""
    texts = read_sidecar(path) if path.exists() else {}
    todo = [sample for sample in samples if pace.redo or sample.image not in texts]
    results: dict[str, str | None] = {}
    unsaved = 0
    advance = progress or (lambda done: None)
    advance(len(samples) - len(todo))
    try:
        for batch in _batches(todo, pace.batch):
            described = describe(batch)
            results |= described
            texts |= {image: text for image, text in described.items() if text}
            unsaved += len(batch)
            if unsaved >= pace.save_every:
                _save(path, texts)
                unsaved = 0
            advance(len(batch))
    finally:
        if unsaved and texts:
            _save(path, texts)
    counts = Described(
        written=sum(bool(text) for text in results.values()),
        kept=len(samples) - len(todo),
        unreadable=sum(text is None for text in results.values()),
        empty=sum(text == "" for text in results.values()),
    )
    if counts.unreadable or counts.empty:
        log.warning("%s: %d unreadable pictures, %d empty texts", path, counts.unreadable, counts.empty)
    return counts


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _save(path: Path, texts: Mapping[str, str]) -> None:
    """Write a side-car so that `path` holds the old file or the whole new one."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")
