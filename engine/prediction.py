"""The Prediction: a Result that can be drawn as an image or as HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass

from PIL import Image

from engine.inputs.preprocess import ImageInput
from engine.markup import write_fragment
from engine.render import check_plot_path, draw_card
from engine.result import Result


@dataclass(frozen=True, kw_only=True)
class Prediction(Result):
    """The prediction for one image and its caption; the fields are those of `engine.result.Result`."""

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        image: ImageInput | None = None,
        font: str | os.PathLike[str] | None = None,
    ) -> Image.Image:
        """Draw the verdict, the types, the words and, on the image, the heat map and the box.

        The heat map is drawn only on a pair predicted as manipulated, the box only where a face type is
        detected besides. `image` replaces the stored thumbnail, `font` (a TrueType file) the built-in one,
        which has Latin letters only.
        Saves to `path` if given. Raises InputError for an unreadable `image` and for a `path` that is not an
        image file's, OSError where writing it or reading `font` fails.
        """
        if path is not None:
            check_plot_path(path)
        card = draw_card(self, image, font)
        if path is not None:
            card.save(path)
        return card

    def to_html(self, image: ImageInput | None = None) -> str:
        """Return a self-contained HTML fragment: the image as a data URI, the words marked, all escaped."""
        return write_fragment(self, image)
