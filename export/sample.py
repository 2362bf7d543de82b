"""The image and caption that a finished export is tried on."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dgm4.shipped import demo_of, demo_record, demo_sample

_SAMPLE_PACKAGE, _SAMPLE = "scikit-image", "astronaut.png"
SAMPLE_CAPTION = "Astronaut Eileen Collins smiles in front of the flag and a model of the shuttle"


@dataclass(frozen=True)
class Sample:
    """A pair to try a bundle on; `truth` says in one line what was done to it, where that is known."""

    image: Path
    caption: str
    truth: str | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The whole image in pixels, for a network that judges a given box."""
        with Image.open(self.image) as image:
            return (0, 0, *image.size)


def choose_sample(weights: str | None) -> Sample | None:
    """The demo's pair for the demo's weights (by SHA-256), else a photograph, or None without it."""
    if demo_of(weights) is not None:
        image, caption = demo_sample()
        truth = demo_record()["sample"]
        words = " ".join(truth["words"])
        return Sample(image, caption, f"{truth['fake_cls']}, box {truth['box']}, words: {words}")
    photograph = sample_photograph()
    return None if photograph is None else Sample(photograph, SAMPLE_CAPTION)


def sample_photograph() -> Path | None:
    """A photograph that ships in a package, or None where that is not installed."""
    try:
        files = importlib.metadata.files(_SAMPLE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == _SAMPLE]
    return paths[0] if paths and paths[0].is_file() else None
