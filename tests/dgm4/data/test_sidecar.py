"""Side-cars: a text for each image, beside the annotations."""

from __future__ import annotations

import json
import re

import pytest

from dgm4.data.dataset import read_sidecar
from engine.errors import InputError


def test_a_side_car_is_read(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"DGM4/origin/1.jpg": "zwei Männer"}), encoding="utf-8")
    assert read_sidecar(path) == read_sidecar(str(path)) == {"DGM4/origin/1.jpg": "zwei Männer"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON in UTF-8"),
        (b'{"a": "\xff"}', "expected JSON in UTF-8"),
        (b"[" * 100_000, "expected JSON in UTF-8"),
        (b"[]", "expected an object {image: text}, got list"),
        (b'{"a": "b", "c": ["d"]}', "expected a text for 'c', got list"),
    ],
    ids=range(5),
)
def test_a_bad_side_car_is_an_error(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        read_sidecar(path)
    with pytest.raises(InputError, match="cannot read the side-car: No such file"):
        read_sidecar(tmp_path / "none.json")
