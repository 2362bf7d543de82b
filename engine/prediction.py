"""The Prediction: a Result that can be drawn as an image or as HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass

from PIL import Image

from engine.inputs.sources import ImageInput
from engine.result import Result

_VERDICTS = {True: "manipulated", False: "not manipulated", None: "no verdict"}


@dataclass(frozen=True, kw_only=True)
class Prediction(Result):
    """The prediction for one image and its caption; the fields are those of `engine.result.Result`.

    A notebook shows it as `to_html` draws it.

    Examples:
        >>> from engine import Predictor
        >>> prediction = Predictor("my-bundle").predict("photo.jpg", "Obama speaks")
        >>> prediction
        Prediction(manipulated 0.59; 2 of 2 words)
        >>> prediction.manipulated, list(prediction.types)[0], prediction.words[0].text
        (True, 'face_swap', 'Obama')
    """

    def __repr__(self) -> str:
        head = _VERDICTS[self.manipulated] + (f" {self.score:.2f}" if self.score is not None else "")
        parts, found = [], self.detected if self.manipulated is not False else ()
        if found:
            head += ": " + ", ".join(f"{kind} {self.types[kind]:.2f}" for kind in found)
        if self.box is not None and any(kind.startswith("face") for kind in found):
            parts.append("box " + " ".join(f"{x:.0f}" for x in self.box))
        parts.append(f"{sum(word.manipulated for word in self.words)} of {len(self.words)} words")
        return f"{type(self).__name__}({'; '.join([head, *parts])})"

    def _repr_html_(self) -> str:
        return self.to_html()

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
        Saves to `path` if given. Raises InputError for an `image` or a `font` that cannot be read and for a
        `path` that is not an image file's, OSError where writing it fails.

        Examples:
            >>> from engine import Predictor
            >>> prediction = Predictor("my-bundle").predict("photo.jpg", "Obama speaks")
            >>> prediction.plot("card.png").mode
            'RGB'
        """
        from engine.cards.render import check_plot_path, draw_card

        if path is not None:
            check_plot_path(path)
        card = draw_card(self, image, font)
        if path is not None:
            card.save(path)
        return card

    def to_html(self, image: ImageInput | None = None) -> str:
        """Return the card as a self-contained HTML fragment: images as data URIs, no script, all escaped.

        Raises InputError for an unreadable `image`, which replaces the stored thumbnail.

        Examples:
            >>> from engine import Predictor
            >>> fragment = Predictor("my-bundle").predict("photo.jpg", "Obama speaks").to_html()
            >>> "data:image/" in fragment
            True
        """
        from engine.cards.markup import write_fragment

        return write_fragment(self, image)
