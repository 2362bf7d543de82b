"""What an image shows, drawn at random, and the image itself before anybody tampers with it.

A `Scene` is the truth that captions are written from: light, tone, colour, fog, how many people, how
near, and on which side. Everything but the crop is visible in any photograph, so that a detector which
learned on some photographs can read it in others. Images are float32 [H, W, 3] in [0, 1].

There are three kinds: "composed", people painted into a graded photograph; "view", a graded photograph
without people; "photograph" (`dgm4.data.photographs`), one as a camera or an editor leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from dgm4.data.difficulty import FAR, GENUINE_FEATHER, GRAIN, JPEG_QUALITY, NEAR, SATURATION
from dgm4.data.faces import Box, Person, draw_person, identities, paint_face, paint_person
from dgm4.data.sources import PHOTOS, Split, luma, photo

Light = Literal["bright", "dark"]
Tone = Literal["warm", "cold", "plain"]
Side = Literal["left", "middle", "right"]
Kind = Literal["composed", "view", "photograph"]
Crop = tuple[float, float, float, float]

SIZES = ((256, 256), (320, 256), (288, 256), (256, 288), (256, 320))  # width, height
_FACE_ASPECT = 0.80  # width / height of a face's box
_COLUMNS: dict[Side, tuple[float, float]] = {"left": (0.2, 0.3), "middle": (0.45, 0.55), "right": (0.7, 0.8)}
_GAINS: dict[Tone, tuple[float, float, float]] = {
    "warm": (1.15, 1.0, 0.76),
    "cold": (0.80, 0.98, 1.18),
    "plain": (1.0, 1.0, 1.0),
}


@dataclass(frozen=True)
class Scene:
    """The truth about one image. `side` is None unless one painted person is in it, `near` without any.

    crop: (x1, y1, x2, y2) as shares of the photograph's sides; channels: which of its red, green and blue
    stand for which, so that few photographs make many backgrounds; size: (width, height) in pixels; levels:
    what black and white of the ungraded image become; fog_share: how much of the image fog hides;
    saturation and balance: factors of the colours' strength and of each channel; quality: of the JPEG file.
    """

    kind: Kind
    photo: str
    crop: Crop
    mirrored: bool
    upended: bool
    channels: tuple[int, ...]
    size: tuple[int, int]
    light: Light
    tone: Tone
    colour: bool
    fog: bool
    near: bool | None
    side: Side | None
    people: tuple[Person, ...]
    levels: tuple[float, float]
    fog_share: float
    grain: float
    quality: int
    saturation: float = SATURATION
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def cheerful(self) -> bool:
        """Whether the mood words of a true caption are the cheerful ones: in bright light they are."""
        return self.light == "bright"


def draw_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draw a scene from the photographs and identities of `split`."""
    bright = rng.random() < 0.5
    colour = rng.random() < 0.8
    plain = not colour or rng.random() < 0.3
    fog = rng.random() < 0.2
    size = SIZES[rng.integers(len(SIZES))]
    near = rng.random() < 0.5
    count = int(rng.choice(3, p=(0.55, 0.35, 0.10))) + 1
    side: Side = ("left", "middle", "right")[rng.integers(3)]
    name = PHOTOS[split][rng.integers(len(PHOTOS[split]))]
    return Scene(
        kind="composed",
        photo=name,
        crop=draw_crop(rng, photo(name).size, size, 0.6),
        mirrored=bool(rng.random() < 0.5),
        upended=bool(rng.random() < 0.5),
        channels=tuple(int(i) for i in rng.permutation(3)),
        size=size,
        light="bright" if bright else "dark",
        # Warm light is bright and cold light dark, so that tone, light and mood always agree.
        tone="plain" if plain else "warm" if bright else "cold",
        colour=colour,
        fog=fog,
        near=near and count < 3,
        side=side if count == 1 else None,
        people=_draw_people(rng, split, size, near and count < 3, side, count),
        levels=_draw_levels(rng, bright),
        fog_share=rng.uniform(0.40, 0.55) if fog else 0.0,
        grain=rng.uniform(*GRAIN),
        quality=int(rng.integers(*JPEG_QUALITY)),
    )


def draw_view(rng: np.random.Generator, split: Split) -> Scene:
    """Draw a scene without people."""
    return replace(draw_scene(rng, split), kind="view", people=(), near=None, side=None)


def _draw_levels(rng: np.random.Generator, bright: bool) -> tuple[float, float]:
    if bright:
        return rng.uniform(0.18, 0.30), rng.uniform(0.94, 1.06)
    return rng.uniform(0.01, 0.05), rng.uniform(0.44, 0.58)


def draw_crop(
    rng: np.random.Generator,
    have: tuple[int, int],
    want: tuple[int, int],
    smallest: float,
    around: Crop = (1.0, 1.0, 0.0, 0.0),
) -> Crop:
    """A window with the aspect of `want` (width, height), somewhere in a photograph of size `have`.

    It is at least `smallest` of the largest such window, and has `around` inside, which must fit.
    """
    scale = min(have[0] / want[0], have[1] / want[1]) * rng.uniform(smallest, 1.0)
    w, h = want[0] * scale / have[0], want[1] * scale / have[1]
    x = rng.uniform(max(0, around[2] - w), min(1 - w, around[0]))
    y = rng.uniform(max(0, around[3] - h), min(1 - h, around[1]))
    return x, y, x + w, y + h


def _draw_people(
    rng: np.random.Generator, split: Split, size: tuple[int, int], near: bool, side: Side, count: int
) -> tuple[Person, ...]:
    columns: dict[int, tuple[Side, ...]] = {1: (side,), 2: ("left", "right"), 3: ("left", "middle", "right")}
    chosen = rng.choice(identities(split), count, replace=False)
    people = []
    for identity, column in zip(chosen, columns[count], strict=True):
        box = _draw_box(rng, size, near, column)
        people.append(draw_person(rng, int(identity), box))
    return tuple(people)


def _draw_box(rng: np.random.Generator, size: tuple[int, int], near: bool, side: Side) -> Box:
    """A face's box inside the image, at the given side, in its upper half."""
    height = rng.uniform(*(NEAR if near else FAR))
    h, w = round(height), round(_FACE_ASPECT * height)
    cx, cy = size[0] * rng.uniform(*_COLUMNS[side]), size[1] * rng.uniform(0.34, 0.50)
    x1 = int(np.clip(round(cx - w / 2), 4, size[0] - 4 - w))
    y1 = int(np.clip(round(cy - h / 2), 8, size[1] - 8 - h))
    return x1, y1, x1 + w, y1 + h


def side_of(scene: Scene, person: Person) -> Side:
    """The third of the image in which a person's face is."""
    share = (person.box[0] + person.box[2]) / 2 / scene.size[0]
    return "left" if share < 0.4 else "right" if share > 0.6 else "middle"


def render(scene: Scene, people: tuple[Person, ...] | None = None) -> np.ndarray:
    """The graded image of `scene` without grain; `people` stand in for the scene's own."""
    picture = background(scene)
    for person in scene.people if people is None else people:
        if scene.kind == "composed":
            paint_person(picture, person)
        elif person.identity is not None:
            paint_face(picture, person, GENUINE_FEATHER)
    return grade(picture, scene)


def background(scene: Scene) -> np.ndarray:
    """The crop; unless it is a photograph, with the mean and spread of brightness that every crop gets.

    The grading sets the light.
    """
    source = photo(scene.photo)
    x1, y1, x2, y2 = scene.crop
    window = (x1 * source.width, y1 * source.height, x2 * source.width, y2 * source.height)
    image = source.resize(scene.size, Image.Resampling.BICUBIC, box=window)
    picture = np.asarray(image, np.float32) / 255
    if scene.mirrored:
        picture = picture[:, ::-1]
    if scene.upended:
        picture = picture[::-1]
    picture = picture[..., list(scene.channels)]
    grey = luma(picture)
    picture = grey + scene.saturation * (picture - grey)
    if scene.kind == "photograph":
        return np.asarray(np.clip(picture, 0, 1), np.float32)
    factor = 0.17 / max(float(grey.std()), 0.06)
    # White balance: each channel has the same mean, so that a cast can be seen against it.
    return np.asarray(np.clip((picture - picture.mean((0, 1))) * factor + 0.5, 0, 1), np.float32)


def grade(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Give an image the light, tone, colour and fog of `scene`; each pixel by itself."""
    low, high = scene.levels
    graded = low + (high - low) * picture
    if not scene.colour:
        graded = np.repeat(luma(graded), 3, axis=2)
    graded = graded * np.array(_GAINS[scene.tone], np.float32) * np.array(scene.balance, np.float32)
    if scene.fog:
        veil = low + 0.72 * (high - low)
        graded = graded + scene.fog_share * (veil - graded)
    return np.asarray(np.clip(graded, 0, 1), np.float32)


def expose(rng: np.random.Generator, picture: np.ndarray, scene: Scene) -> Image.Image:
    """The 8-bit image of a graded one, with the camera's grain over all of it."""
    picture = picture + draw_grain(rng, scene)
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def draw_grain(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """The camera's grain [H, W, 1], the same in all channels."""
    width, height = scene.size
    return rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(scene.grain)
