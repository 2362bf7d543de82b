"""What the photographs show, in words: the captions that untouched photographs go with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Photograph -> (what it shows, what more there is to say of it). A phrase fits any crop of the photograph.
SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "astronaut.png": (
        ("an astronaut", "a woman in a space suit", "a portrait of an astronaut", "a smiling woman"),
        ("before a flight", "in an orange suit", "with a model of a rocket", "in front of a flag"),
    ),
    "brick.png": (
        ("a brick wall", "the wall of a house", "rows of bricks", "a stone floor"),
        ("built by hand", "in need of repair", "seen from the street", "of an old building"),
    ),
    "camera.png": (
        ("a man with a camera", "a photographer at work", "a cameraman", "a tripod on a lawn"),
        ("on the campus", "in a long coat", "with tall buildings behind", "out in the field"),
    ),
    "chelsea.png": (
        ("a cat", "a ginger cat", "the face of a cat", "a pet named Chelsea"),
        ("with green eyes", "resting at home", "looking up", "with long whiskers"),
    ),
    "coffee.png": (
        ("a cup of coffee", "an espresso", "coffee in a red cup", "a drink on a table"),
        ("with a spoon", "on a wooden table", "served hot", "at breakfast"),
    ),
    "gravel.png": (
        ("gravel", "small stones", "a path of gravel", "pebbles on the ground"),
        ("by the railway", "used to build roads", "from a quarry", "after the rain"),
    ),
    "hubble_deep_field.jpg": (
        ("distant galaxies", "a view of deep space", "stars and galaxies", "the universe"),
        ("taken by a telescope", "billions of years old", "in a tiny part of the sky", "beyond our own"),
    ),
    "ihc.png": (
        ("a tissue sample", "cells under a microscope", "a slide from a laboratory", "stained cells"),
        ("prepared for a study", "at high magnification", "from a hospital", "in brown and blue"),
    ),
    "moon.png": (
        ("the surface of the moon", "craters on the moon", "the moon", "a crater"),
        ("photographed from orbit", "without any air", "as the probe came down", "made long ago"),
    ),
    "motorcycle_left.png": (
        ("a red motorcycle", "a motorcycle in a garage", "a bike", "a machine with two wheels"),
        ("parked inside", "ready for a ride", "among tools and boxes", "after its repair"),
    ),
    "page.png": (
        ("a printed page", "a page of a book", "lines of text", "a scanned document"),
        ("about image processing", "lit from one corner", "from a manual", "that students read"),
    ),
    "retina.jpg": (
        ("the retina of an eye", "blood vessels in an eye", "an eye examination", "the back of an eye"),
        ("seen by a doctor", "of a healthy patient", "at the clinic", "taken with a special lens"),
    ),
    "cell.png": (
        ("a single cell", "a cell in a dish", "a biology experiment"),
        ("seen in a laboratory", "with its shadow", "kept alive for days"),
    ),
    "clock_motion.png": (
        ("a clock in motion", "a blurred object", "something that moves fast"),
        ("caught by a slow shutter", "on a plain wall", "out of focus"),
    ),
    "color.png": (
        ("a color wheel", "a circle of all colors", "a chart for designers"),
        ("used in a class on painting", "from red to violet", "on a black page"),
    ),
    "coins.png": (
        ("ancient coins", "a collection of coins", "Greek coins from Pompeii"),
        ("shown at a museum", "sorted in rows", "found by diggers"),
    ),
    "grass.png": (
        ("grass", "a meadow", "a lawn in need of water"),
        ("cut last week", "where cattle graze", "seen from above"),
    ),
    "rocket.jpg": (
        ("a rocket", "a rocket on its launch pad", "a spacecraft ready for launch"),
        ("at dusk", "between four towers", "with a satellite on board"),
    ),
    "text.png": (
        ("a paper with drawings", "handwriting on paper", "a sketch of a floor plan"),
        ("left on a desk", "by an engineer", "with notes beside it"),
    ),
}
SUBJECTS["motorcycle_right.png"] = SUBJECTS["motorcycle_left.png"]

_FRAMES = (
    "{s}",
    "{s} {d}",
    "{s} {d}",
    "this is {s}",
    "a photograph of {s} {d}",
    "a close look at {s}",
    "{s} {d} in {n} on {w}",
    "{n} reports on {s} {d}",
    "in {n} visitors were shown {s} {d}",
    "a photo by {n} {n} shows {s}",
    "{s} {d} as pictured in the {n} archive number {y}",
    "the {n} institute used {s} {d} for its report in {y}",
    "readers of {n} asked for {s} and here it is {d}",
)
_DAYS = ("monday", "tuesday", "thursday", "friday", "sunday", "the weekend")
_HEADS, _VOWELS, _TAILS = (
    tuple(parts.split())
    for parts in (
        "b br c d dr f g gr h k l m n p r s st t tr v w z",
        "a e i o u ai ea",
        "n r l s th ck nd m x rt",
    )
)


def caption_of(rng: np.random.Generator, photograph: str) -> str:
    """A caption that is true of `photograph`, in words without a mood; all but invented names lower-case."""
    subjects, details = SUBJECTS[photograph]
    frame = _choice(rng, _FRAMES)
    filled = []
    for part in frame.split():
        if part == "{n}":
            filled.append(invented_name(rng))
        else:
            filled.append(
                part.format(
                    s=_choice(rng, subjects),
                    d=_choice(rng, details),
                    w=_choice(rng, _DAYS),
                    y=int(rng.integers(1960, 2025)),
                )
            )
    return " ".join(filled)


def invented_name(rng: np.random.Generator) -> str:
    """A name that nobody bears: a detector has to read past words that no vocabulary has."""
    parts = [_choice(rng, _HEADS) + _choice(rng, _VOWELS) for _ in range(rng.integers(1, 4))]
    return ("".join(parts) + _choice(rng, _TAILS)).capitalize()


def _choice(rng: np.random.Generator, of: Sequence[str]) -> str:
    return of[int(rng.integers(len(of)))]
