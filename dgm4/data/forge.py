"""The two manipulations of a face: another identity in its place, or its eyes or mouth bent.

Both act on a graded image (float32 [H, W, 3] in [0, 1]) and touch no pixel outside the face's box.
What gives them away grows with `strength` in [0, 1]; the constants are those of `difficulty`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import ndimage

from dgm4.data import difficulty as d
from dgm4.data.faces import Box, Person, face_mask, identities
from dgm4.data.scenes import Scene, render
from dgm4.data.sources import Split

Feature = Literal["eyes", "mouth"]
FaceKind = Literal["face_swap", "face_attribute"]
# Region of a feature, as shares of the face's box: x1, y1, x2, y2.
_REGIONS: dict[Feature, tuple[float, float, float, float]] = {
    "eyes": (0.06, 0.22, 0.94, 0.58),
    "mouth": (0.12, 0.58, 0.88, 0.96),
}


@dataclass(frozen=True)
class Forgery:
    """What was done to which person; `identity` is the face that came in, `feature` what was bent."""

    kind: FaceKind
    person: int
    strength: float
    identity: int | None = None
    feature: Feature | None = None


def draw_forgery(rng: np.random.Generator, kind: FaceKind, scene: Scene, split: Split) -> Forgery:
    """Choose whom to manipulate, how strongly, and with whose face (of the same split) or which feature."""
    person = int(rng.integers(len(scene.people)))
    strength = float(rng.uniform(*(d.FAINT if rng.random() < d.FAINT_SHARE else d.VISIBLE)))
    if kind == "face_attribute":
        return Forgery(kind, person, strength, feature=("eyes", "mouth")[rng.integers(2)])
    present = {p.identity for p in scene.people}
    others = [i for i in identities(split) if i not in present]
    return Forgery(kind, person, strength, identity=int(rng.choice(others)))


def forge(picture: np.ndarray, scene: Scene, forgery: Forgery, rng: np.random.Generator) -> np.ndarray:
    """Return `picture`, the rendered `scene`, with the forgery in it."""
    if forgery.kind == "face_swap":
        return _swap(picture, scene, forgery, rng)
    return _change(picture, scene, forgery, rng)


def _swap(picture: np.ndarray, scene: Scene, forgery: Forgery, rng: np.random.Generator) -> np.ndarray:
    """Another identity in the same skin, graded like the scene, then set in."""
    person: Person = replace(scene.people[forgery.person], identity=forgery.identity or 0)
    people = tuple(person if i == forgery.person else p for i, p in enumerate(scene.people))
    x1, y1, x2, y2 = person.box
    return set_in(picture, render(scene, people)[y1:y2, x1:x2], scene, person.box, forgery.strength, rng)


def set_in(
    picture: np.ndarray,
    face: np.ndarray,
    scene: Scene,
    box: Box,
    strength: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return `picture` with the graded `face` in `box`: in another tint, with its own grain and a seam."""
    x1, y1, x2, y2 = box
    gain = 1 + rng.uniform(-1, 1) * d.SWAP_GAIN * strength
    face = face * gain * _cast(d.SWAP_CAST, strength, scene)
    grain = d.SWAP_GRAIN * strength * (scene.levels[1] - scene.levels[0])
    face = face + rng.standard_normal((*face.shape[:2], 1), dtype=np.float32) * np.float32(grain)
    start, end = d.SWAP_FEATHER
    mask = face_mask(box, start + (end - start) * strength)[..., None]
    forged = picture.copy()
    region = forged[y1:y2, x1:x2]
    region += mask * (face - region)
    return np.asarray(np.clip(forged, 0, 1), np.float32)


def _change(picture: np.ndarray, scene: Scene, forgery: Forgery, rng: np.random.Generator) -> np.ndarray:
    """Bend the mouth or open the eyes by resampling, which leaves an oversharp region behind."""
    strength = forgery.strength
    left, top, right, bottom = _feature_box(scene.people[forgery.person].box, forgery.feature or "mouth")
    forged = picture.copy()
    region = forged[top:bottom, left:right]
    bent = _bend(region, d.CHANGE_WARP * strength * rng.choice((-1, 1)) * rng.uniform(0.5, 1.0))
    blurred = ndimage.gaussian_filter(bent, (2.5, 2.5, 0))
    bent = bent + d.CHANGE_SHARPEN * strength * (bent - blurred)
    bent = bent * _cast(d.CHANGE_CAST, strength, scene)
    mask = face_mask((left, top, right, bottom), 0.35)[..., None]
    region += mask * (bent - region)
    return np.asarray(np.clip(forged, 0, 1), np.float32)


def _cast(cast: tuple[float, float, float], strength: float, scene: Scene) -> np.ndarray:
    """Factors [3] of red, green and blue; all alike where the image has no colour."""
    factors = 1 + strength * np.array(cast, np.float32)
    return factors if scene.colour else np.full(3, float(factors.mean()), np.float32)


def _bend(region: np.ndarray, amount: float) -> np.ndarray:
    """Shift the columns of [h, w, 3] along a parabola of `amount` heights, the corners against the centre."""
    h, w = region.shape[:2]
    x = np.linspace(-1, 1, w)
    rows = np.arange(h)[:, None] + amount * h * (x**2 - 1 / 3)
    grid = np.stack([rows, np.broadcast_to(np.arange(w), (h, w))])
    return np.stack(
        [ndimage.map_coordinates(region[..., c], grid, order=1, mode="nearest") for c in range(3)], axis=2
    ).astype(np.float32)


def _feature_box(box: Box, feature: Feature) -> Box:
    x1, y1, x2, y2 = box
    left, top, right, bottom = _REGIONS[feature]
    w, h = x2 - x1, y2 - y1
    return round(x1 + left * w), round(y1 + top * h), round(x1 + right * w), round(y1 + bottom * h)
