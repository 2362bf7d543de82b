"""The photographs of the sample set: files that ship inside scikit-image's wheel, nothing downloaded."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from engine.errors import BackendError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Every photograph belongs to one split; both views of the motorcycle count as one.
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": (
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
        "retina.jpg",
    ),
    "val": ("cell.png", "clock_motion.png", "color.png"),
    "test": ("astronaut.png", "coins.png", "grass.png", "rocket.jpg", "text.png"),
}
_LONGEST = 700  # pixels; larger photographs are shrunk when read


@lru_cache(maxsize=1)
def _folder() -> Path:
    """The folder of scikit-image's data, found without importing it; raises BackendError."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(
            "the sample set is made of scikit-image's pictures, which is not installed: "
            "pip install -e '.[export]' in a clone of the project"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def data_file(name: str) -> Path:
    """Path of a file of scikit-image's data; raises BackendError where the wheel lacks it."""
    path = _folder() / name
    if not path.is_file():
        raise BackendError(
            f"{path} is missing; expected it in scikit-image's wheel: reinstall scikit-image>=0.25"
        )
    return path


@lru_cache(maxsize=32)
def photo(name: str) -> Image.Image:
    """A photograph as RGB, at most 700 pixels along a side."""
    with Image.open(data_file(name)) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BICUBIC)
    return picture


def luma(picture: np.ndarray) -> np.ndarray:
    """Brightness [..., 1] of [..., 3], ITU-R BT.601 weights."""
    return np.asarray(picture @ np.array([[0.299], [0.587], [0.114]], np.float32))
