"""Draw a prediction into a file that appears whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from engine import Prediction
from export.output import write_whole


def save_plot(prediction: Prediction, path: Path, option: str = "--plot", instead: str = "") -> None:
    """Draw; raises InputError where the file cannot be written; `instead` is as for `writing`."""
    content = io.BytesIO()
    prediction.plot().save(content, format=Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, content.getvalue(), option, instead)
