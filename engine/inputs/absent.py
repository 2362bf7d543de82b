"""A pair whose caption or image is None or says nothing, and the warning that its answer carries."""

from __future__ import annotations

from typing import Literal

Absent = Literal["", "caption", "image", "words"]
WARNINGS: dict[Absent, tuple[str, ...]] = {
    "": (),
    "caption": (
        "no_caption: the box and the face types are those for an empty caption, on which the network was "
        "never trained; nothing else is answered",
    ),
    "image": (
        "no_image: the words and the text types are those for a plain grey image, on which the network was "
        "never trained; nothing else is answered",
    ),
    "words": (
        "no_words: this network compares the image with the words, and the caption holds none; the verdict "
        "alone is answered",
    ),
}
