"""How often a network calls genuine photographs manipulated that training never saw.

The photographs are `dgm4.data.sources.ASIDE`, from other packages than those of the sample set; the captions
are by hand, in other words and forms than the set's. Each pair is another crop, mirrored or not, in other
colours and of another JPEG quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgm4.data.annotations import Sample
from dgm4.data.photographs import take
from dgm4.data.scenes import expose, render
from dgm4.metrics import LabelledOutputs

SEED = 1
PAIRS_EACH = 40
CAPTIONS: dict[str, tuple[str, ...]] = {
    "grace_hopper.jpg": (
        "Rear Admiral Grace Hopper in her Navy uniform",
        "Grace Hopper, a pioneer of computer programming, sits for her official portrait.",
        "The computer scientist who helped to develop COBOL, photographed by James S. Davis",
        "An elderly officer with glasses and a peaked cap looks into the camera",
        "Portrait of an American admiral beside the national flag, Washington, 1984",
        "A destroyer of the United States Navy was named after this mathematician.",
        "Woman wearing a dark uniform with rows of ribbons",
        "She joined the Naval Reserve during the Second World War and retired at 79.",
    ),
    "china.jpg": (
        "The Tower of Buddhist Incense at the Summer Palace in Beijing",
        "Tourists can climb the pagoda above Kunming Lake, which opens at 8 a.m.",
        "A Chinese temple with three storeys rises over trees and water",
        "View across the lake from Longevity Hill, China, August 2011",
        "The roofs of the historic tower have been restored, the park administration announced.",
        "Pagoda",
        "An octagonal building with red pillars and green tiles against a pale sky",
        "UNESCO lists the imperial garden northwest of the capital as a World Heritage Site",
    ),
    "flower.jpg": (
        "An orange dahlia in bloom",
        "Close-up of a dahlia flower in a botanical garden",
        "Gardeners expect the first blossoms in July, according to the horticultural society.",
        "The petals of a peach-coloured dahlia form a perfect spiral",
        "Plant photography: shallow depth of field with a dark green background",
        "Mexico's national flower, grown from tubers",
        "A single blossom, photographed in Oregon",
        "Visitors voted this variety the most popular of the exhibition",
    ),
    "aero.npz": (
        "Aerial photograph of farmland and a wooded valley",
        "Fields, tracks and hedges seen from an aircraft",
        "The survey plane took this picture above a rural road",
        "Map makers use such photographs to update the land register",
        "A river bed lined with trees runs between ploughed fields",
        "Black and white aerial view, scale about 1 to 5000",
        "Archaeologists look for crop marks from the air.",
        "The planned bypass would cross the meadows at the bottom, engineers said on Friday",
    ),
    "ascent.npz": (
        "Two people climb a steel staircase",
        "A hiker with a backpack on the stairs of an observation tower",
        "Visitors on their way up to the viewing platform",
        "The stairway was reopened after inspectors checked its bolts",
        "Metal steps and railings seen from below",
        "Black and white photograph of an outdoor staircase, public domain",
        "A child and an adult ascend; the tower is 40 metres high",
        "Industrial architecture, geometric composition of beams",
    ),
}


def genuine_pairs(folder: Path) -> list[Sample]:
    """Write the images into `folder`; return their pairs, none of them manipulated."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for place, name in enumerate(CAPTIONS):
        for index in range(PAIRS_EACH):
            rng = np.random.default_rng([SEED, place, index])
            scene = take(rng, name)
            path = folder / f"{Path(name).stem}-{index:02d}.jpg"
            expose(rng, render(scene), scene).save(path, quality=scene.quality)
            text = CAPTIONS[name][index % len(CAPTIONS[name])]
            samples.append(Sample(path.stem, path, path.name, text, types=(), box=None, fake_words=()))
    return samples


def false_alarms(samples: Sequence[Sample], answers: LabelledOutputs) -> dict[str, Any]:
    """How many genuine pairs are called manipulated at the threshold 0.5: in all and by photograph."""
    called = answers.logits_real_fake[:, 1] >= answers.logits_real_fake[:, 0]
    names = np.array([sample.id.rsplit("-", 1)[0] for sample in samples])
    by_photograph = {Path(name).stem: int(called[names == Path(name).stem].sum()) for name in CAPTIONS}
    return {
        "pairs": len(samples),
        "false_alarms": int(called.sum()),
        "rate": float(called.mean()),
        "by_photograph": by_photograph,
    }
