"""One pair of the sample set: a scene, its caption, and what was done to either.

Everything about a pair follows from (seed, split, index), whatever else is made before or beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from dgm4.config import TYPES
from dgm4.data.difficulty import SAME_LIGHT_DONOR_SHARE
from dgm4.data.forge import FaceKind, Forgery, draw_forgery, forge
from dgm4.data.grammar import (
    Caption,
    Word,
    describe,
    false_facts,
    flip_moods,
    spell,
    swap_caption,
    write_caption,
)
from dgm4.data.photographs import draw_photograph, has_portraits
from dgm4.data.scenes import Kind, Scene, draw_scene, draw_view, expose, render, side_of
from dgm4.data.sources import SPLITS, Split
from dgm4.data.subjects import caption_of

TextKind = Literal["text_swap", "text_attribute"]
FACE_KINDS: tuple[FaceKind, ...] = get_args(FaceKind)
TEXT_KINDS: tuple[TextKind, ...] = get_args(TextKind)

# Every run of so many pairs holds these kinds and classes: half of the pairs are not manipulated. Photographs
# with a caption of their own are, but for a portrait's face, always genuine.
_FAKE_CLASSES = (*((t,) for t in TYPES), *((f, t) for f in FACE_KINDS for t in TEXT_KINDS))
_BLOCK: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    *(("composed", types) for types in (*_FAKE_CLASSES, *4 * ((),))),
    *(("view", types) for types in (*((t,) for t in TEXT_KINDS), *2 * ((),))),
    *(("photograph", types) for types in (*((t,) for t in FACE_KINDS), *6 * ((),))),
)
_FALSE_FACTS_OF_A_DONOR = 2
_DONOR_TRIES = 64


@dataclass(frozen=True)
class Pair:
    """What a pair is, before its image is painted. `fake_words` index the cleaned caption's words."""

    seed: int
    split: Split
    index: int
    scene: Scene
    types: tuple[str, ...]
    caption: Caption
    fake_words: tuple[int, ...]
    forgery: Forgery | None

    @property
    def fake_cls(self) -> str:
        """The class as annotations spell it."""
        return "&".join(self.types) or "orig"

    @property
    def box(self) -> list[int]:
        """The manipulated face (x1, y1, x2, y2) in pixels, or nothing."""
        return [] if self.forgery is None else list(self.scene.people[self.forgery.person].box)

    @property
    def image(self) -> str:
        """Path of the image as annotations write it."""
        folder = f"manipulation/{self.forgery.kind}" if self.forgery else "origin/sample"
        return f"DGM4/{folder}/{self.split}/{self.index:06d}.jpg"

    def record(self, number: int) -> dict[str, Any]:
        """The pair as one record of an annotation file."""
        return {
            "id": number,
            "image": self.image,
            "text": spell(self.caption),
            "fake_cls": self.fake_cls,
            "fake_image_box": self.box,
            "fake_text_pos": list(self.fake_words),
            "mtcnn_boxes": [list(person.box) for person in self.scene.people],
        }


def stream(seed: int, split: Split, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one pair for one purpose, independent of all others."""
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def plan(seed: int, split: Split, index: int) -> tuple[Kind, tuple[str, ...]]:
    """The kind of a pair's scene and its manipulations, as `_BLOCK` has them.

    Where the split shows no photograph of a face, people are composed for a manipulated one.
    """
    block, place = divmod(index, len(_BLOCK))
    kind, types = _BLOCK[stream(seed, split, block, 0).permutation(len(_BLOCK))[place]]
    return ("composed" if kind == "photograph" and types and not has_portraits(split) else kind), types


@lru_cache(maxsize=20000)
def genuine(
    seed: int, split: Split, index: int, kind: Kind = "composed", portrait: bool = False
) -> tuple[Scene, Caption]:
    """A scene of `kind` with the numbers of a pair, and its caption, before any manipulation.

    With `portrait` a photograph shows a face whole.
    """
    rng = stream(seed, split, index, 1)
    if kind == "photograph":
        scene = draw_photograph(rng, split, portrait)
        words = caption_of(rng, scene.photo).split()
        return scene, tuple(Word(word, "filler") for word in words)
    scene = draw_scene(rng, split) if kind == "composed" else draw_view(rng, split)
    return scene, write_caption(rng, scene)


def draw_pair(seed: int, split: Split, index: int, count: int) -> Pair:
    """Draw pair `index` of the `count` pairs of `split`."""
    kind, types = plan(seed, split, index)
    scene, caption = genuine(seed, split, index, kind, portrait=kind == "photograph" and bool(types))
    rng = stream(seed, split, index, 2)
    words: list[int] = []
    if "text_swap" in types:
        caption, words = swap_caption(caption, _donor(rng, scene, seed, split, index, count))
    elif "text_attribute" in types:
        caption, words = flip_moods(rng, caption)
    kinds = [kind for kind in FACE_KINDS if kind in types]
    forgery = draw_forgery(rng, kinds[0], scene, split) if kinds else None
    return Pair(seed, split, index, scene, types, caption, tuple(words), forgery)


def _donor(
    rng: np.random.Generator, scene: Scene, seed: int, split: Split, index: int, count: int
) -> Caption:
    """The genuine caption of another image that is false of `scene`, mostly in its light and mood.

    Where so few pairs are at hand that none of those tried is, the one with the most false facts.
    """
    wanted = rng.random() < SAME_LIGHT_DONOR_SHARE
    best: Caption = ()
    most = -1
    for _ in range(_DONOR_TRIES):
        place = int((index + 1 + rng.integers(max(count - 1, 1))) % count)
        other, caption = genuine(seed, split, place, scene.kind)
        wrong = len(false_facts(caption, scene))
        if (other.light == scene.light) == wanted and wrong >= _FALSE_FACTS_OF_A_DONOR:
            return caption
        if wrong > most:
            best, most = caption, wrong
    return best


def paint(pair: Pair) -> Image.Image:
    """The image of a pair, RGB, with the forgery in it and the camera's grain over all of it."""
    picture = render(pair.scene)
    if pair.forgery is not None:
        picture = forge(picture, pair.scene, pair.forgery, stream(pair.seed, pair.split, pair.index, 3))
    return expose(stream(pair.seed, pair.split, pair.index, 4), picture, pair.scene)


def description(pair: Pair) -> str:
    """The side-car caption: what the image shows, whatever the pair's caption says."""
    return describe(pair.scene)


def explanation(pair: Pair) -> str:
    """The side-car explanation: why the pair is manipulated, or that nothing speaks for it."""
    parts = [_explain_face(pair), _explain_text(pair)]
    said = " and ".join(part for part in parts if part)
    if said:
        return said[0].upper() + said[1:] + "."
    return (
        f"No face shows a seam or a bent feature and the caption fits the {pair.scene.light} picture: "
        "the pair is genuine."
    )


def _explain_face(pair: Pair) -> str:
    if pair.forgery is None:
        return ""
    side = side_of(pair.scene, pair.scene.people[pair.forgery.person])
    trace = "visible" if pair.forgery.strength >= 0.5 else "faint"
    where = "in the middle" if side == "middle" else "at the side"
    if pair.forgery.kind == "face_swap":
        return f"the face {where} has a {trace} seam and another grain than the picture"
    return f"there are {trace} traces of bending at the {pair.forgery.feature} of the face {where}"


def _explain_text(pair: Pair) -> str:
    words = [pair.caption[i].text for i in pair.fake_words]
    if "text_swap" in pair.types:
        return f"the caption belongs to another picture: this one is a {describe(pair.scene)[2:-1]}"
    if "text_attribute" in pair.types:
        moods = " and ".join(f"'{word}'" for word in words)
        return f"the mood of {moods} is against the {pair.scene.light} light"
    return ""
