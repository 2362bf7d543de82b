"""Networks with further inputs and choices, calibrated: the whole export, and what its bundle answers."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from engine import Predictor
from export.options import ExportOptions
from export.pipeline import export_bundle

MOST = 0.05  # of a probability


@pytest.mark.parametrize("name", ["cscl", "pmmd_refine"])
def test_int8_with_scales_of_calibration_pairs(name, annotated, bundle, tmp_path):
    """A box of the whole image stands in where the network reads one and annotations have none."""
    data = annotated(8)
    shutil.copyfile(data / "metadata" / "test.json", data / "metadata" / "train.json")
    options = ExportOptions(
        tmp_path / "bundle", model=name, size="tiny", precision="int8", engine=False, calibration=data
    )
    export_bundle(options, lambda stage: None)
    pairs = []
    for record in json.loads((data / "metadata" / "test.json").read_text()):
        image = Image.open(data / record["image"].removeprefix("DGM4/"))
        pairs.append((image, record["text"], *([(0, 0, *image.size)] if name == "pmmd_refine" else [])))
    with (
        Predictor(options.out, backend="ort") as rounded,
        Predictor(bundle(name, "fp32").path, backend="ort") as exact,
    ):
        assert rounded.manifest.calibration.pairs == 8
        for ours, theirs in zip(rounded.predict_batch(pairs), exact.predict_batch(pairs), strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=MOST)
            assert ours.types == pytest.approx(theirs.types, abs=MOST)
            assert [w.score for w in ours.words] == pytest.approx([w.score for w in theirs.words], abs=MOST)
