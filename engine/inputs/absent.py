"""A pair whose caption or image is None, and the warning that its answer carries."""

from __future__ import annotations

from typing import Literal

Absent = Literal["", "caption", "image"]
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
}
