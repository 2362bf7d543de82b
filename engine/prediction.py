"""The Prediction: a Result that can be drawn as an image or as HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass

from PIL import Image

from engine.inputs.preprocess import ImageInput
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
        """Draw the card: verdict, types, caption, and the image clean and with the heat map and the box.

        The heat map and the words' marks are left out on a pair that is not manipulated, the box where no
        face type is detected. `image` replaces the stored thumbnail, `font` (a TrueType file) the built-in
        one, which has little more than ASCII; letters that it lacks are drawn with an installed font, and
        those that no font has are named on the card and in the log.
        Saves to `path` if given. Raises InputError for an unreadable `image` and for a `path` that is not an
        image file's, OSError where writing it or reading `font` fails.
        """
        from engine.render import check_plot_path, draw_card

        if path is not None:
            check_plot_path(path)
        card = draw_card(self, image, font)
        if path is not None:
            card.save(path)
        return card

    def to_html(self, image: ImageInput | None = None) -> str:
        """Return the card as a self-contained HTML fragment: images as data URIs, no script, all escaped.

        Raises InputError for an unreadable `image`, which replaces the stored thumbnail.
        """
        from engine.markup import write_fragment

        return write_fragment(self, image)
