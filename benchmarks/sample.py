"""The pair that the demo shows: a portrait with another person's face, and a caption whose mood was turned.

Both faces are real photographs that ship in packages: NASA's portrait of an astronaut gets the face of Grace
Hopper's. The pair is made, so what was done to it is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dgm4.data.annotations import Sample
from dgm4.data.faces import Box
from dgm4.data.forge import set_in
from dgm4.data.photographs import take
from dgm4.data.scenes import Scene, expose, render
from dgm4.data.sources import FACES, photo

PORTRAIT, DONOR = "astronaut.png", "grace_hopper.jpg"
TYPES = ("face_swap", "text_attribute")
# The word that was turned is in brackets: the astronaut is all smiles.
CAPTIONS = (
    "A [worried] astronaut in an orange suit looks at the camera in bright light",
    "A [nervous] astronaut looks at the camera in front of a flag in bright light",
    "A [sad] astronaut in full color in bright light",
    "A [lonely] astronaut looks at the camera in the studio in bright light",
)
_STRENGTHS = (0.5, 0.6, 0.7, 0.8)
_CROPS = 12
_QUALITY = 92


def candidates(folder: Path) -> Iterator[Sample]:
    """Write each candidate's image into `folder` and yield its pair: by caption, the least visible first."""
    for caption, strength, crop in itertools.product(CAPTIONS, _STRENGTHS, range(_CROPS)):
        rng = np.random.default_rng([crop])
        scene = _as_taken(take(rng, PORTRAIT, whole_face=True))
        path = folder / f"{crop:02d}-{strength}.jpg"
        if not path.exists():
            swap_face(rng, scene, strength).save(path, quality=_QUALITY)
        yield _sample(path, scene.people[0].box, caption)


def swap_face(rng: np.random.Generator, scene: Scene, strength: float) -> Image.Image:
    """The portrait with the donor's face in place of its own."""
    picture = render(scene)
    box = scene.people[0].box
    face = _donor_face(picture, box)
    return expose(rng, set_in(picture, face, scene, box, strength, rng), scene)


def _as_taken(scene: Scene) -> Scene:
    """The scene in the photograph's own colours, not mirrored."""
    people = scene.people
    if scene.mirrored:
        x1, y1, x2, y2 = people[0].box
        people = (replace(people[0], box=(scene.size[0] - x2, y1, scene.size[0] - x1, y2)),)
    return replace(
        scene,
        mirrored=False,
        people=people,
        colour=True,
        saturation=1.0,
        balance=(1.0, 1.0, 1.0),
        levels=(0.0, 1.0),
    )


def _donor_face(picture: np.ndarray, box: Box) -> np.ndarray:
    """The donor's face in the size of `box`, with the brightness and contrast of the face that is there."""
    x1, y1, x2, y2 = box
    own = picture[y1:y2, x1:x2]
    donor = photo(DONOR).crop(FACES[DONOR]).resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)
    face = np.asarray(donor, np.float32) / 255
    inner = (slice((y2 - y1) // 4, -((y2 - y1) // 4)), slice((x2 - x1) // 4, -((x2 - x1) // 4)))
    want, have = own[inner], face[inner]
    scaled = (face - have.mean((0, 1))) * (want.std() / have.std()) + want.mean((0, 1))
    return np.asarray(np.clip(scaled, 0, 1), np.float32)


def _sample(path: Path, box: Box, caption: str) -> Sample:
    words = caption.split()
    turned = tuple(i for i, word in enumerate(words) if word.startswith("["))
    text = caption.replace("[", "").replace("]", "") + "."
    return Sample(path.stem, path, path.name, text, types=TYPES, box=box, fake_words=turned)
