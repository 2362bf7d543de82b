"""A long list with odd lines, and what `dgm4 score` needs to answer it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from engine import Bundle
from engine.scoring import Work
from engine.scoring.worker import manifest_digest

PAIRS = 30
MISSING, BROKEN = 7, 11  # lines: an image that is not there, and no JSON


@pytest.fixture
def long_list(tmp_path, bundle):
    """.path of JSON lines beside their images, and .work(out, **more) on a tiny bundle."""
    folder = tmp_path / "list"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
    lines = [
        json.dumps({"id": {"n": n}, "image": f"{n % 3}.png", "caption": f"The man {n}, é"})
        for n in range(PAIRS)
    ]
    lines[MISSING - 1] = json.dumps({"image": "missing.png", "caption": 'Says "error": no'})
    lines[BROKEN - 1] = "no JSON"
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    tiny = Bundle.open(bundle("asap", "fp32").path)

    def work(out="out", **more):
        fields = {"bundle": str(tiny.path), "digest": manifest_digest(tiny), "source": path, "batch": 4}
        return Work(**{**fields, "out": tmp_path / out, "threads": 1, **more})

    return SimpleNamespace(path=path, bundle=tiny.path, work=work)
