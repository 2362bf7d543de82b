"""Captions from a small grammar, and the two manipulations of a caption.

A genuine caption tells facts of its scene (light, tone, colour, fog, side, number of people, distance) in
a news style, with filler words, one person's name, and mood words that fit the light: cheerful ones in
bright images, gloomy ones in dark images. A caption is a list of words, each with its role.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dgm4.data import vocabulary as v
from dgm4.data.difficulty import FLIP_ALL_SHARE, MOOD_WORDS
from dgm4.data.scenes import Scene
from dgm4.data.subjects import SUBJECTS

Role = Literal["filler", "name", "mood", "fact"]
Pairs = tuple[tuple[str, str], ...]

# Sentence frames by the number of their mood slots: {f} feeling, {j} judgement, {e} event, {m} emotion;
# {n} the name, {v} what the person does, {p} a place, {c} the facts, {t} a title.
_FRAMES: dict[int, tuple[str, ...]] = {
    1: (
        "{t} {n} {v} at {p} {c} after the {e}",
        "a {f} {n} {v} near {p} {c}",
        "{n} {v} {c} on a {j} day at {p}",
        "there was {m} at {p} as {n} {v} {c}",
    ),
    2: (
        "a {f} {n} {v} at {p} {c} after the {e}",
        "{t} {n} {v} {c} after a {j} {e} near {p}",
        "{n} was {f} at {p} {c} and spoke of {m}",
        "it was a {j} day of {m} for {n} at {p} {c}",
        "with {m} in the air {t} {n} {v} {c} on a {j} day",
        "{c} {n} {v} at {p} and looks {f} after the {e}",
    ),
    3: (
        "a {f} {n} {v} at {p} {c} after a {j} {e}",
        "{n} looks {f} {c} at {p} as the {e} brings {m} to the town",
        "{c} {t} {n} {v} and is {f} about the {j} {e}",
        "the {e} at {p} brings {m} to {n} who is {f} {c}",
    ),
}
# Frames of scenes without people.
_EMPTY_FRAMES: dict[int, tuple[str, ...]] = {
    1: ("{p} {c} after the {e}", "there was {m} at {p} {c}", "a view of {p} {c} on a {j} day"),
    2: (
        "a {j} {e} at {p} {c}",
        "{c} there was {m} near {p} after the {e}",
        "it was a {j} day of {m} at {p} {c}",
    ),
    3: ("{p} {c} after a {j} {e} that brings {m}", "{c} {p} saw a {j} {e} and {m} in the town"),
}
_SLOTS: dict[str, Pairs] = {"f": v.FEELINGS, "j": v.JUDGEMENTS, "e": v.EVENTS, "m": v.EMOTIONS}
# How often a fact is told, by its value or, under None, whatever its value.
_SAID_SHARE: dict[tuple[str, object], float] = {
    ("light", None): 0.9,
    ("tone", None): 0.6,
    ("colour", False): 0.9,
    ("colour", True): 0.15,
    ("fog", True): 0.85,
    ("fog", False): 0.1,
    ("side", None): 0.55,
    ("count", None): 0.6,
    ("near", None): 0.35,
}
_MOST_FACTS = 4


@dataclass(frozen=True)
class Word:
    """One cleaned word (no punctuation, lower case but for names) and what it is for."""

    text: str
    role: Role


Caption = tuple[Word, ...]


def write_caption(rng: np.random.Generator, scene: Scene) -> Caption:
    """A caption that is true of `scene`, with one to three mood words."""
    slots = int(rng.choice(list(MOOD_WORDS), p=list(MOOD_WORDS.values())))
    frame = str(rng.choice((_FRAMES if scene.people else _EMPTY_FRAMES)[slots]))
    facts = draw_facts(rng, scene)
    words: list[Word] = []
    for part in re.split(r"\s+", frame):
        words += _fill(rng, part, scene, facts)
    return tuple(words)


def _fill(rng: np.random.Generator, part: str, scene: Scene, facts: list[str]) -> list[Word]:
    """The words that stand for one part of a frame."""
    slot = part.strip("{}") if part.startswith("{") else None
    if slot in _SLOTS:
        pair = _SLOTS[slot][rng.integers(len(_SLOTS[slot]))]
        return [Word(pair[0] if scene.cheerful else pair[1], "mood")]
    if slot == "n":
        return [Word(str(rng.choice(v.FIRST_NAMES)), "name"), Word(str(rng.choice(v.LAST_NAMES)), "name")]
    if slot == "c":
        return [Word(w, "fact") for fact in facts for w in fact.split()]
    lists = {"v": v.VERBS, "p": v.PLACES, "t": v.TITLES}
    text = str(rng.choice(lists[slot])) if slot else part
    return [Word(w, "filler") for w in text.split()]


def draw_facts(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Up to four phrases, each true of `scene`, at least one of them, in random order."""
    said = []
    for fact in v.FACTS:
        value = value_of(scene, fact)
        phrases = v.FACTS[fact].get(value, ())
        if phrases and rng.random() < _SAID_SHARE.get((fact, value), _SAID_SHARE.get((fact, None), 0.0)):
            said.append(phrases)
    chosen = said[:_MOST_FACTS] or [v.FACTS["light"][scene.light]]
    facts = [str(rng.choice(phrases)) for phrases in chosen]
    return [facts[i] for i in rng.permutation(len(facts))]


def value_of(scene: Scene, fact: str) -> object:
    """What `scene` says on one of the facts of `vocabulary.FACTS`."""
    if fact == "side":
        return "aside" if scene.side in ("left", "right") else scene.side
    return len(scene.people) if fact == "count" else getattr(scene, fact)


def false_facts(caption: Caption, scene: Scene) -> list[str]:
    """The facts on which `caption` says something that is not so in `scene`, "mood" among them."""
    text = f" {' '.join(plain(caption))} "
    wrong = []
    for fact, phrases in v.FACTS.items():
        value = value_of(scene, fact)
        said = {known for known, ways in phrases.items() if any(f" {way} " in text for way in ways)}
        if said - {value}:
            wrong.append(fact)
    fitting = {pair[not scene.cheerful] for pairs in _SLOTS.values() for pair in pairs}
    if any(word.role == "mood" and word.text not in fitting for word in caption):
        wrong.append("mood")
    return wrong


def plain(caption: Caption) -> list[str]:
    """The words as the data set's cleaning leaves them."""
    return [word.text.lower() for word in caption]


def spell(caption: Caption) -> str:
    """The caption as an editor would print it: a capital first, a full stop last."""
    text = " ".join(word.text for word in caption)
    return text[0].upper() + text[1:] + "."


def flip_moods(rng: np.random.Generator, caption: Caption) -> tuple[Caption, list[int]]:
    """Turn one mood word or all of them into their opposites; return the caption and the words' indices."""
    moods = [i for i, word in enumerate(caption) if word.role == "mood"]
    if rng.random() >= FLIP_ALL_SHARE:
        moods = [int(rng.choice(moods))]
    flipped = [Word(v.PARTNER[w.text], w.role) if i in moods else w for i, w in enumerate(caption)]
    return tuple(flipped), moods


def swap_caption(own: Caption, donor: Caption) -> tuple[Caption, list[int]]:
    """Replace `own` by `donor` under the name of `own`; return the caption and the indices of new words.

    As in the published annotations, words that the new caption shares with the old one, in order, are
    not marked; neither is the name. A shared word is one of the longest matching blocks of both.
    """
    names = iter([word for word in own if word.role == "name"])
    swapped = tuple(next(names) if word.role == "name" else word for word in donor)
    old, new = plain(own), plain(swapped)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    unchanged = {i for block in matcher.get_matching_blocks() for i in range(block.b, block.b + block.size)}
    return swapped, [i for i, w in enumerate(swapped) if i not in unchanged and w.role != "name"]


def describe(scene: Scene) -> str:
    """A neutral and true description of the image, as a captioning model might give it."""
    if scene.kind == "photograph":
        return f"A picture of {SUBJECTS[scene.photo][0][0]}."
    people = ("an empty place", "one person", "two people", "three people")[len(scene.people)]
    side = f" {v.FACTS['side'][value_of(scene, 'side')][0]}" if scene.side else ""
    colour = f"in {scene.tone} colors" if scene.tone != "plain" else "in color"
    parts = [
        f"A {scene.light} picture {colour if scene.colour else 'in black and white'}",
        f"of {people}{side}",
        *([] if scene.near is None else ["close to the camera" if scene.near else "at a distance"]),
        *(["in fog"] if scene.fog else []),
    ]
    return " ".join(parts) + "."
