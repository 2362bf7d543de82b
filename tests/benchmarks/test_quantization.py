"""The comparison of quantisations: the README's figures, and planted outliers, which are none in float32."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quantization import METHODS, NETWORKS, OUTPUTS, plant, table
from export.graph.parity import EXACT, check, compare, torch_answers
from export.graph.rewrite import rewrite

ROOT = Path(__file__).resolve().parents[2]
RECORDS = json.loads((ROOT / "benchmarks/results/quantization-cpu.json").read_text())["records"]


def logits_error(precision, method, smooth, networks):
    """In percent, as the README has it."""
    wanted = [(network, precision, method, smooth) for network in networks]
    found = [
        100 * np.sqrt(np.mean([x["errors"][name] ** 2 for name in OUTPUTS if name != "pred_box"]))
        for x in RECORDS
        if (x["network"], x["precision"], x["method"], x["smooth"]) in wanted
    ]
    assert len(found) == len(networks)
    return f"{np.mean(found):.2f} %"


def test_the_readme_says_what_was_measured():
    text = " ".join((ROOT / "README.md").read_text().split())
    text = text[text.index("Ways to static scales") : text.index("The tests, in the same clone")]
    *demo, outliers = NETWORKS
    figures = [logits_error(p, method, "off", demo) for p, methods in METHODS.items() for method in methods]
    figures += [logits_error(p, "minmax", "auto", demo) for p in METHODS]
    figures += [logits_error(p, "minmax", s, [outliers]) for p in METHODS for s in ("off", "auto")]
    said = re.findall(r"\d\.\d\d %", text)
    assert said == figures
    failed = {(x["network"], x["precision"], x["method"], x["smooth"]) for x in RECORDS if x["gate"]}
    assert failed == {(outliers, "int8", "minmax", "off")}
    assert {(x["calibration"]["pairs"], x["pairs"]) for x in RECORDS} == {(512, 800)}
    assert len(table(RECORDS).splitlines()) == 2 + len(RECORDS) == 42


def test_planted_outliers_are_none_in_float32(tiny):
    sound, planted = rewrite(tiny("asap")), plant(rewrite(tiny("asap")))
    answers = [torch_answers(model, model.config) for model in (sound, planted)]
    check(compare("planted", "sound", *answers, EXACT))
    norm = sound.vision.blocks[0].norm1.weight
    assert planted.vision.blocks[0].norm1.weight[0] == pytest.approx(30 * norm[0])
