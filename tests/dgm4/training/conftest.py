"""A data folder of sixteen pairs, the smallest networks with every part, and short runs of both."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import shape
from PIL import Image

from dgm4.tokenizer import DEMO_VOCABULARY, build_tokenizer
from dgm4.training import trainer as module
from dgm4.training.options import TrainOptions
from dgm4.training.trainer import Place, Trainer
from engine.inputs.text import CaptionTokenizer

PIECES, SIZE = 2048, 64
KINDS = ("orig", "face_swap", "text_swap", "face_attribute&text_attribute")


def shrink(name, size="tiny"):
    """Every part of a network, at 64 pixels and two blocks."""
    return shape(
        name,
        width=32,
        heads=2,
        vision_depth=2,
        text_depth=2,
        fusion_start=1,
        positions=64,
        projection=16,
        image_size=SIZE,
        patch_size=16,
        caformer_start=1,
        guidance_widths=(4, 4, 8),
    )


def record(number, kind):
    image = f"DGM4/{'origin' if kind == 'orig' else 'manipulation'}/{number}.png"
    return {
        "id": number,
        "image": image,
        "text": f"the man in a red car number {number} was happy",
        "fake_cls": kind,
        "fake_image_box": [8, 4, 24, 20] if "face" in kind else [],
        "fake_text_pos": [9] if "text" in kind else [],
    }


def write_folder(folder, pairs, sidecars=True):
    """A data folder in the published layout, every class in turn; all captions have the same length."""
    random = np.random.default_rng(0)
    for name in ("metadata", "origin", "manipulation"):
        (folder / name).mkdir(parents=True)
    records = [record(i, KINDS[i % 4]) for i in range(10, 10 + pairs)]
    for each in records:
        pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / each["image"].removeprefix("DGM4/"))
    for split, part in (("train", records), ("val", records[:4]), ("test", records[:4])):
        (folder / "metadata" / f"{split}.json").write_text(json.dumps(part))
    if sidecars:
        for name in ("captions", "explanations"):
            texts = {each["image"]: f"{name} of {each['text']}" for each in records}
            (folder / "metadata" / f"{name}.json").write_text(json.dumps(texts))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "set", 16)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Write another folder: count of pairs, with side-cars or without."""
    return lambda pairs, sidecars=True: write_folder(tmp_path_factory.mktemp("data") / "set", pairs, sidecars)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer(DEMO_VOCABULARY, PIECES).save(str(path))
    return CaptionTokenizer(path)


@pytest.fixture(scope="session")
def config_of():
    return shrink


@pytest.fixture
def small(monkeypatch):
    """Let the trainer build the smallest networks; changes to their shape may be given."""

    def use(**changes):
        monkeypatch.setattr(module, "model_config", lambda name, size: replace(shrink(name), **changes))

    use()
    return use


@pytest.fixture
def options():
    """A recipe of two epochs with four updates each, in two steps of two pairs."""
    return TrainOptions(
        size="tiny", epochs=2, batch=2, accumulate=2, lr=1e-3, lr_vision=5e-4, warmup_epochs=0.5, queue=24
    )


@pytest.fixture
def make(small, data, tokenizer):
    """Make a trainer: recipe, folder for its output, and what else `Place` takes."""

    def trainer(options, out, initialisation=None, **place):
        where = Place(**{"data": data, "out": out, "device": "cpu", "progress": False, **place})
        return Trainer(options, where, tokenizer, PIECES, initialisation)

    return trainer
