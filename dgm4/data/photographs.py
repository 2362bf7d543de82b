"""Photographs as a camera or an editor leaves them: cropped, mirrored, recoloured, grainy, compressed.

Nothing is painted into them. Where one shows a face whole, that face is the scene's person, so that a
forgery can take its place or bend it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dgm4.data import difficulty as d
from dgm4.data.faces import Box, Person
from dgm4.data.scenes import SIZES, Crop, Scene, background, draw_crop, luma, render
from dgm4.data.sources import FACES, PHOTOS, Split, photo

_SHADE = 0.95  # brightness of the skin that is seen, as a factor of the lit skin's


def draw_photograph(rng: np.random.Generator, split: Split, portrait: bool = False) -> Scene:
    """Draw one of the split's photographs; with `portrait` one whose face is whole, if the split has any."""
    portraits = tuple(name for name in PHOTOS[split] if name in FACES)
    names = portraits if portraits and (portrait or rng.random() < d.PORTRAIT_SHARE) else PHOTOS[split]
    return take(rng, names[rng.integers(len(names))], whole_face=portrait and bool(portraits))


def has_portraits(split: Split) -> bool:
    """Whether a photograph of `split` shows a face."""
    return any(name in FACES for name in PHOTOS[split])


def take(rng: np.random.Generator, name: str, whole_face: bool = False) -> Scene:
    """Draw what a camera and an editor make of the photograph `name`; `whole_face` keeps its face whole."""
    size = SIZES[rng.integers(len(SIZES))]
    source = photo(name).size
    scene = Scene(
        kind="photograph",
        photo=name,
        crop=draw_crop(rng, source, size, d.PORTRAIT_CROP, _face(name))
        if whole_face
        else draw_crop(rng, source, size, d.PHOTOGRAPH_CROP),
        mirrored=bool(rng.random() < 0.5),
        upended=False,
        channels=(0, 1, 2),
        size=size,
        light="bright",
        tone="plain",
        colour=bool(rng.random() >= d.PHOTOGRAPH_GREY_SHARE),
        fog=False,
        near=None,
        side=None,
        people=(),
        levels=(rng.uniform(0, 0.06), rng.uniform(*d.PHOTOGRAPH_GAIN)),
        fog_share=0.0,
        grain=rng.uniform(*d.PHOTOGRAPH_GRAIN),
        saturation=rng.uniform(*d.PHOTOGRAPH_SATURATION),
        balance=(rng.uniform(*d.PHOTOGRAPH_BALANCE), 1.0, rng.uniform(*d.PHOTOGRAPH_BALANCE)),
        quality=int(rng.integers(*d.JPEG_QUALITY)),
    )
    bright = bool(luma(render(scene)).mean() > 0.45)
    return replace(scene, light="bright" if bright else "dark", people=_people(scene))


def _face(name: str) -> Crop:
    """The face of a portrait as shares of the photograph's sides."""
    x1, y1, x2, y2 = FACES[name]
    width, height = photo(name).size
    return x1 / width, y1 / height, x2 / width, y2 / height


def _people(scene: Scene) -> tuple[Person, ...]:
    """The person whose face the photograph shows whole, in the skin that is seen there."""
    if scene.photo not in FACES:
        return ()
    face, crop = _face(scene.photo), scene.crop
    if face[0] < crop[0] or face[1] < crop[1] or face[2] > crop[2] or face[3] > crop[3]:
        return ()
    box = _box_in_crop(scene, face)
    x1, y1, x2, y2 = box
    dx, dy = (x2 - x1) // 4, (y2 - y1) // 4
    seen = background(scene)[y1 + dy : y2 - dy, x1 + dx : x2 - dx].mean((0, 1)) / _SHADE
    skin = tuple(float(x) for x in seen)
    return (Person(None, box, skin, skin, skin),)


def _box_in_crop(scene: Scene, face: Crop) -> Box:
    """Where `face`, in shares of the photograph's sides, lies in the image, in pixels."""
    left, top, right, bottom = scene.crop
    columns = sorted(
        1 - share if scene.mirrored else share
        for share in ((face[0] - left) / (right - left), (face[2] - left) / (right - left))
    )
    rows = ((face[1] - top) / (bottom - top), (face[3] - top) / (bottom - top))
    width, height = scene.size
    return (
        round(columns[0] * width),
        round(rows[0] * height),
        round(columns[1] * width),
        round(rows[1] * height),
    )
