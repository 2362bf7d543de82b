"""Networks with further inputs and choices, calibrated: the whole export, and what its bundle answers."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from engine import Bundle, backends
from export.graph.trace import example_inputs
from export.options import ExportOptions
from export.pipeline import export_bundle

MOST = 0.15  # RMS of the difference over that of the reference: the export's own bound


@pytest.mark.parametrize("name", ["cscl", "pmmd_refine"])
def test_int8_with_scales_of_calibration_pairs(name, annotated, tiny, tmp_path):
    """A box of the whole image stands in where the network reads one and annotations have none."""
    data = annotated(8)
    shutil.copyfile(data / "metadata" / "test.json", data / "metadata" / "train.json")
    options = ExportOptions(
        tmp_path / "bundle", model=name, size="tiny", precision="int8", engine=False, calibration=data
    )
    export_bundle(options, lambda stage: None)
    opened, model = Bundle.open(options.out), tiny(name)
    assert opened.manifest.calibration.pairs == 8
    inputs = example_inputs(model.config, 4, 17, seed=99)
    got = backends.create("ort", opened).run({key: x.numpy() for key, x in inputs.items()})
    with torch.inference_mode():
        want = model(**inputs)._asdict()
    for key, value in got.items():
        reference = want[key].numpy()
        error = np.sqrt(((value - reference) ** 2).mean())
        assert 0 <= error <= MOST * np.sqrt((reference**2).mean()), key
