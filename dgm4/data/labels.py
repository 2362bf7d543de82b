"""Labels of annotated pairs as arrays, and the outputs of a network joined to them. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dgm4.data.annotations import MAX_WORDS, Box, Sample, clip_box
from dgm4.metrics import TOKEN_PADDING, LabelledOutputs
from engine.errors import InputError
from engine.inputs.text import CaptionTokenizer, CleanCaption, Tokens, clean_caption, read_caption


def normalize_box(sample: Sample, width: int, height: int) -> Box | None:
    """Return a sample's box as (cx, cy, w, h) in [0, 1] of its image of `width` x `height` pixels.

    The networks' plain resize keeps these fractions. Raises InputError where the box leaves the image.
    """
    if sample.box is None:
        return None
    clipped = clip_box(sample.box, width, height)
    if clipped is None:
        raise InputError(
            f"sample {sample.id} ({sample.picture}): expected a box inside the picture of {width} x {height} "
            f"pixels, got {list(sample.box)}; correct the annotation or leave the sample out"
        )
    x1, y1, x2, y2 = clipped
    return (x1 + x2) / (2 * width), (y1 + y2) / (2 * height), (x2 - x1) / width, (y2 - y1) / height


def encode(text: str, tokenizer: CaptionTokenizer) -> tuple[Tokens, CleanCaption]:
    """Clean and tokenise a text as the engine does, cut to the words that annotations can name."""
    cleaned = clean_caption(read_caption(text)[0], MAX_WORDS)
    return tokenizer.encode(cleaned), cleaned


def label_tokens(sample: Sample, tokenizer: CaptionTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the caption's ids, int64 [n] with [CLS] first, and their labels without [CLS], int64 [n - 1].

    A word piece is 1 where its word is among the sample's fake words, else 0. Words that the tokenizer cuts
    off have no label.
    """
    tokens, cleaned = encode(sample.text, tokenizer)
    return tokens.ids, tokens.by_token(fake_words(sample, tokens, cleaned)).astype(np.int64)


def fake_words(sample: Sample, tokens: Tokens, cleaned: CleanCaption) -> np.ndarray:
    """Say of each of `tokens.words` whether it is annotated as fake, bool [words]."""
    annotated = annotated_positions(cleaned)
    return np.array([annotated[span.start] in sample.fake_words for span in tokens.words], dtype=bool)


def annotated_positions(cleaned: CleanCaption) -> dict[int, int]:
    """Map the start of each of the caption's spans to the index that annotations give its word.

    Annotations count words split on ' '; a tab or newline on its own makes two spans of one such word.
    """
    return {
        span.start: cleaned.text.count(" ", 0, start)
        for span, (start, _) in zip(cleaned.spans, cleaned.bounds, strict=True)
    }


def join_outputs(
    samples: Sequence[Sample],
    boxes: np.ndarray,
    token_labels: Sequence[np.ndarray],
    outputs: Sequence[Mapping[str, np.ndarray]],
) -> LabelledOutputs:
    """Join the outputs of batches of `samples`, in their order; tokens are padded to the longest of all.

    `boxes` are the true ones of all samples, as `LabelledOutputs` has them; of each batch there are the
    `token_labels` [b, n], padded with TOKEN_PADDING, and the `outputs` by name.
    """
    width = max(part.shape[1] for part in token_labels)
    labels = np.full((len(samples), width), TOKEN_PADDING)
    logits = np.zeros((len(samples), width, 2), dtype=np.float32)
    row = 0
    for part, output in zip(token_labels, outputs, strict=True):
        count, length = part.shape
        labels[row : row + count, :length] = part
        logits[row : row + count, :length] = output["logits_tok"]
        row += count
    return LabelledOutputs(
        labels=np.array([sample.fake_cls for sample in samples]),
        logits_real_fake=np.concatenate([part["logits_real_fake"] for part in outputs]),
        logits_multicls=np.concatenate([part["logits_multicls"] for part in outputs]),
        pred_box=np.concatenate([part["box"] for part in outputs]),
        true_box=boxes,
        # What a network says of padding depends on the batch.
        logits_tok=np.where(labels[..., None] == TOKEN_PADDING, 0, logits).astype(np.float32),
        token_labels=labels,
    )
