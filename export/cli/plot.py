"""Draw a prediction into a file that appears whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from engine import Prediction
from engine.errors import InputError
from export.output import write_whole


def save_plot(prediction: Prediction, path: Path, besides: str = "; choose another place") -> None:
    """Draw; raises InputError, whose message ends with `besides`, where the file cannot be written."""
    content = io.BytesIO()
    prediction.plot().save(content, format=Image.registered_extensions()[path.suffix.lower()])
    try:
        write_whole(path, content.getvalue(), "--plot")
    except InputError as error:
        raise InputError(f"{error}{besides}") from error
