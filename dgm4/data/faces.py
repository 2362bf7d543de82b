"""Faces and the people who wear them, drawn from the grey patches that ship with scikit-image.

`lfw_subset.npy` holds 200 patches of 25x25, of which the first 100 are aligned faces (Labeled Faces in
the Wild). Images are float32 [H, W, 3] in [0, 1]; boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from dgm4.data.difficulty import GENUINE_FEATHER
from dgm4.data.sources import Split, data_file

Box = tuple[int, int, int, int]

# Every identity belongs to one split. The shuffle keeps the splits alike; it is part of the format.
_FACES = 100
_SHARES = {"train": slice(0, 70), "val": slice(70, 80), "test": slice(80, 100)}
_PATCH_WIDTH, _PATCH_HEIGHT = 1.16, 1.05  # the patch reaches a little beyond the face's box
_DARK_SKIN, _LIGHT_SKIN = np.array([0.46, 0.32, 0.25]), np.array([0.86, 0.68, 0.58])
_FACE_MEAN, _FACE_SPREAD = 0.95, 0.20  # of the patch's brightness, as a factor of the skin's


@dataclass(frozen=True)
class Person:
    """One person in an image: whose face, where it is, and the colours of skin, hair and clothes.

    The identity is None for the face that a photograph shows itself.
    """

    identity: int | None
    box: Box
    skin: tuple[float, ...]
    hair: tuple[float, ...]
    clothes: tuple[float, ...]


@lru_cache(maxsize=3)
def identities(split: Split) -> tuple[int, ...]:
    """Rows of `lfw_subset.npy` whose faces belong to `split`; the splits share none."""
    order = np.random.default_rng(25).permutation(_FACES)
    return tuple(sorted(int(i) for i in order[_SHARES[split]]))


@lru_cache(maxsize=1)
def _patches() -> np.ndarray:
    """Faces [100, 25, 25] float32 with mean 0 and standard deviation 1 within the face."""
    patches = np.load(data_file("lfw_subset.npy"), allow_pickle=False)[:_FACES].astype(np.float32)
    inside = patches[:, 3:22, 5:20].reshape(_FACES, -1)
    mean, spread = inside.mean(1)[:, None, None], inside.std(1)[:, None, None]
    return np.asarray(np.clip((patches - mean) / spread, -2.5, 2.5), np.float32)


def draw_person(rng: np.random.Generator, identity: int, box: Box) -> Person:
    """Give the face of `identity` at `box` a skin, hair and clothes."""
    skin = _DARK_SKIN + (_LIGHT_SKIN - _DARK_SKIN) * rng.beta(2.0, 1.2)
    hair = rng.uniform(0.05, 0.45) * np.array([1.0, 0.85, 0.7])
    clothes = rng.uniform(0.12, 0.6) * (1 + rng.uniform(-0.3, 0.3) * np.array([1.0, 0.0, -1.0]))
    return Person(identity, box, *(tuple(float(c) for c in colour) for colour in (skin, hair, clothes)))


def paint_person(picture: np.ndarray, person: Person) -> None:
    """Paint shoulders, neck, hair, head and face into `picture`, in place, with soft edges."""
    x1, y1, x2, y2 = person.box
    w, h, cx, cy = x2 - x1, y2 - y1, (x1 + x2) / 2, (y1 + y2) / 2
    skin = np.array(person.skin, np.float32)
    _paint_ellipse(picture, (cx, y2 + 1.85 * h), (1.25 * w, 1.70 * h), np.array(person.clothes), 0.05)
    _paint_ellipse(picture, (cx, y2 + 0.02 * h), (0.31 * w, 0.30 * h), 0.75 * skin, 0.15)
    _paint_ellipse(picture, (cx, cy - 0.16 * h), (0.58 * w, 0.47 * h), np.array(person.hair), 0.15)
    _paint_ellipse(picture, (cx, cy), (0.5 * w, 0.5 * h), 0.88 * skin, 0.15)
    paint_face(picture, person, GENUINE_FEATHER)


def paint_face(picture: np.ndarray, person: Person, feather: float) -> None:
    """Blend the face of `person` into its box, in place; the mask fades over the last `feather` radii."""
    x1, y1, x2, y2 = person.box
    texture = face_texture(person)
    mask = face_mask(person.box, feather)[..., None]
    region = picture[y1:y2, x1:x2]
    region += mask * (texture - region)


def face_texture(person: Person) -> np.ndarray:
    """The face in its skin's colour, [y2 - y1, x2 - x1, 3]."""
    x1, y1, x2, y2 = person.box
    w, h = x2 - x1, y2 - y1
    if person.identity is None:
        raise ValueError("the face of a photograph is not painted")
    patch = Image.fromarray(_patches()[person.identity])
    grown_w, grown_h = round(_PATCH_WIDTH * w), round(_PATCH_HEIGHT * h)
    grown = np.asarray(patch.resize((grown_w, grown_h), Image.Resampling.BICUBIC))
    left, top = (grown_w - w) // 2, (grown_h - h) // 2
    shade = _FACE_MEAN + _FACE_SPREAD * grown[top : top + h, left : left + w, None]
    return np.asarray(np.clip(shade * np.array(person.skin, np.float32), 0, 1), np.float32)


def face_mask(box: Box, feather: float) -> np.ndarray:
    """Elliptical mask [y2 - y1, x2 - x1] that touches the box: 1 inside, 0 at the edge, float32."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    return _ellipse((h, w), ((w - 1) / 2, (h - 1) / 2), (w / 2, h / 2), feather)


def _ellipse(
    shape: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float], feather: float
) -> np.ndarray:
    y = (np.arange(shape[0], dtype=np.float32) - centre[1]) / radii[1]
    x = (np.arange(shape[1], dtype=np.float32) - centre[0]) / radii[0]
    distance = np.sqrt(y[:, None] ** 2 + x[None, :] ** 2)
    fade = np.clip((1 - distance) / feather, 0, 1)
    return np.asarray(fade * fade * (3 - 2 * fade), np.float32)


def _paint_ellipse(
    picture: np.ndarray,
    centre: tuple[float, float],
    radii: tuple[float, float],
    colour: np.ndarray,
    feather: float,
) -> None:
    left, right = (int(np.clip(centre[0] + s * radii[0], 0, picture.shape[1])) for s in (-1, 1))
    top, bottom = (int(np.clip(centre[1] + s * radii[1], 0, picture.shape[0])) for s in (-1, 1))
    if right <= left or bottom <= top:
        return
    shape = (bottom - top, right - left)
    mask = _ellipse(shape, (centre[0] - left, centre[1] - top), radii, feather)[..., None]
    # Light falls from above: a flat colour would look cut out of paper.
    shade = np.linspace(1.15, 0.85, shape[0], dtype=np.float32)[:, None, None]
    region = picture[top:bottom, left:right]
    region += mask * (np.clip(shade * colour.astype(np.float32), 0, 1) - region)
