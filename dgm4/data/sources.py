"""The photographs of the sample set: files that ship inside packages' wheels, nothing downloaded."""

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
        "astronaut.png",
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
    "test": ("coins.png", "grass.png", "rocket.jpg", "text.png"),
}
# Photographs of no split, by name: the package that ships each and its path there. They tell how often a
# demo calls a genuine photograph manipulated.
ASIDE: dict[str, tuple[str, str]] = {
    "grace_hopper.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "china.jpg": ("sklearn", "datasets/images/china.jpg"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg"),
    "aero.npz": ("pywt", "data/aero.npz"),
    "ascent.npz": ("pywt", "data/ascent.npz"),
}
# (x1, y1, x2, y2) in pixels of the file: the face of the one person who looks at the camera.
FACES: dict[str, tuple[int, int, int, int]] = {
    "astronaut.png": (180, 62, 276, 192),
    "grace_hopper.jpg": (184, 136, 352, 340),
}
_WHEELS = {
    "skimage": "scikit-image>=0.25",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "pywt": "PyWavelets",
}
_LONGEST = 700  # pixels; larger photographs are shrunk when read


@lru_cache(maxsize=len(_WHEELS))
def _folder(package: str) -> Path:
    """The folder of an installed package, found without importing it; raises BackendError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(
            f"the sample set is made of photographs that ship with {package}, which is not installed: "
            f"pip install '{_WHEELS[package]}'"
        )
    return Path(spec.submodule_search_locations[0])


def data_file(name: str) -> Path:
    """Path of a photograph of scikit-image's data or of `ASIDE`; raises BackendError where it is missing."""
    package, inside = ASIDE.get(name, ("skimage", f"data/{name}"))
    path = _folder(package) / inside
    if not path.is_file():
        raise BackendError(f"{path} is missing; it ships with {package}: reinstall {_WHEELS[package]}")
    return path


@lru_cache(maxsize=32)
def photo(name: str) -> Image.Image:
    """A photograph as RGB, at most 700 pixels along a side."""
    path = data_file(name)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            picture = Image.fromarray(arrays["data"]).convert("RGB")
    else:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BICUBIC)
    return picture


def luma(picture: np.ndarray) -> np.ndarray:
    """Brightness [..., 1] of [..., 3], ITU-R BT.601 weights."""
    return np.asarray(picture @ np.array([[0.299], [0.587], [0.114]], np.float32))
