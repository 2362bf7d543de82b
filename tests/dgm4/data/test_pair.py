from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dgm4.data import vocabulary as v
from dgm4.data.difficulty import GRAIN
from dgm4.data.faces import face_mask, identities
from dgm4.data.forge import Forgery, draw_forgery, forge
from dgm4.data.grammar import Word, false_facts, flip_moods, plain, spell, swap_caption
from dgm4.data.pair import FACE_KINDS, draw_pair, genuine, paint, plan
from dgm4.data.photographs import take
from dgm4.data.scenes import draw_grain, render, side_of
from dgm4.data.sources import ASIDE, FACES, PHOTOS, SPLITS, data_file, luma, photo
from dgm4.data.subjects import SUBJECTS
from engine.inputs.text import clean_caption

COUNT = 200


@pytest.fixture(scope="module")
def pairs():
    return [draw_pair(7, split, index, COUNT) for split in SPLITS for index in range(120)]


def words(text, role="filler"):
    return tuple(Word(word, role) for word in text.split())


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def composed(pairs):
    return [pair for pair in pairs if pair.scene.kind == "composed"]


@pytest.fixture(scope="module")
def photographs(pairs):
    return [pair for pair in pairs if pair.scene.kind == "photograph"]


def test_splits_share_no_photograph_and_no_identity(pairs):
    used = [*ASIDE, *(name for names in PHOTOS.values() for name in names)]
    assert len(set(used)) == len(used)
    assert sorted(i for split in SPLITS for i in identities(split)) == list(range(100))
    for pair in pairs:
        used = {p.identity for p in pair.scene.people} - {None}
        if pair.forgery and pair.forgery.identity is not None:
            assert pair.forgery.identity not in used
            used.add(pair.forgery.identity)
        assert used <= set(identities(pair.split))
        assert pair.scene.photo in PHOTOS[pair.split]


def test_every_photograph_ships_with_the_wheel():
    names = [*ASIDE, *(name for names in PHOTOS.values() for name in names)]
    assert all(data_file(name).is_file() for name in names)
    # Boxes of faces are in pixels of the file, which is not shrunk when it is read.
    assert max(max(photo(name).size) for name in FACES) < 700


def test_a_pair_depends_on_its_own_numbers_alone():
    genuine.cache_clear()
    late = draw_pair(7, "train", 30, COUNT)
    genuine.cache_clear()
    for index in range(30):
        draw_pair(7, "train", index, COUNT)
    assert draw_pair(7, "train", 30, COUNT) == late
    assert np.array_equal(np.asarray(paint(late)), np.asarray(paint(late)))
    assert draw_pair(8, "train", 30, COUNT) != late


def test_half_of_24_pairs_are_manipulated():
    blocks = [[plan(1, "train", 24 * block + place) for place in range(24)] for block in range(3)]
    for block in blocks:
        for kind, manipulated, not_manipulated in (("composed", 8, 4), ("view", 2, 2), ("photograph", 2, 6)):
            types = [types for other, types in block if other == kind]
            assert len(set(types)) == manipulated + 1
            assert types.count(()) == not_manipulated
    assert blocks[0] != blocks[1]


def test_a_split_without_portraits_composes_the_people_that_are_manipulated():
    kinds = {
        plan(1, "test", index)[0] for index in range(48) if set(plan(1, "test", index)[1]) & set(FACE_KINDS)
    }
    assert kinds == {"composed"}


def test_genuine_captions_are_true(pairs):
    for pair in (pair for pair in pairs if pair.scene.kind != "photograph"):
        scene, caption = genuine(pair.seed, pair.split, pair.index, pair.scene.kind)
        assert scene == pair.scene
        assert false_facts(caption, scene) == []
        if "text_swap" not in pair.types and "text_attribute" not in pair.types:
            assert pair.caption == caption and pair.fake_words == ()


def test_false_facts_by_hand(pairs):
    scene = next(
        p.scene for p in pairs if p.scene.light == "bright" and p.scene.side == "left" and p.scene.near
    )
    scene = replace(scene, colour=True, tone="warm", fog=False)
    assert false_facts(words("John is at the side in bright light alone close to the camera"), scene) == []
    assert false_facts(words("John is in the middle in the dark"), scene) == ["light", "side"]
    assert false_facts(words("with a friend in cold colors in thick fog"), scene) == ["tone", "fog", "count"]
    assert false_facts(words("in black and white far from the camera"), scene) == ["colour", "near"]
    assert false_facts((Word("sad", "mood"), *words("in bright light")), scene) == ["mood"]
    assert false_facts((Word("happy", "mood"),), scene) == []


def test_a_photograph_has_a_caption_of_what_it_shows(photographs):
    assert set(SUBJECTS) == {name for names in PHOTOS.values() for name in names}
    moods = set(v.PARTNER)
    for pair in photographs:
        subjects, details = SUBJECTS[pair.scene.photo]
        text = " ".join(word.text for word in pair.caption)
        assert any(subject in text for subject in subjects)
        assert not moods & set(plain(pair.caption)) - set(" ".join((*subjects, *details)).split())
        assert pair.fake_words == ()


def test_views_and_most_photographs_are_without_people(pairs, photographs):
    assert not any(pair.scene.people for pair in pairs if pair.scene.kind == "view")
    shown = [pair for pair in photographs if pair.scene.people]
    assert {pair.scene.photo for pair in shown} <= set(FACES)
    assert {pair.types for pair in shown} == {(), ("face_swap",), ("face_attribute",)}
    assert all(pair.scene.people for pair in photographs if pair.types)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_face_of_a_photograph_is_where_its_box_says(mirrored):
    """The middle of the box has the colour of the middle of the face in the file."""
    scene = next(
        s for s in (take(rng(i), "astronaut.png", True) for i in range(20)) if s.mirrored == mirrored
    )
    plain_scene = replace(
        scene, colour=True, saturation=1.0, balance=(1.0, 1.0, 1.0), levels=(0.0, 1.0), grain=0.0
    )

    def middle(picture, box):
        x, y, dx, dy = (
            (box[0] + box[2]) // 2,
            (box[1] + box[3]) // 2,
            (box[2] - box[0]) // 8,
            (box[3] - box[1]) // 8,
        )
        return picture[y - dy : y + dy, x - dx : x + dx].mean((0, 1))

    shown = middle(render(plain_scene), plain_scene.people[0].box)
    original = middle(np.asarray(photo("astronaut.png")) / 255, FACES["astronaut.png"])
    assert np.allclose(shown, original, atol=0.03)


def test_the_record_is_what_the_picture_shows(composed):
    for pair in composed:
        scene = pair.scene
        boxes = [person.box for person in scene.people]
        heights = [y2 - y1 for _, y1, _, y2 in boxes]
        assert (min(heights) > 85) == scene.near and (max(heights) < 85) == (not scene.near)
        assert all(
            0 <= x1 < x2 <= scene.size[0] and 0 <= y1 < y2 <= scene.size[1] for x1, y1, x2, y2 in boxes
        )
        assert (scene.side is not None) == (len(boxes) == 1)
        if scene.side:
            assert side_of(scene, scene.people[0]) == scene.side
        assert scene.tone == "plain" or (scene.tone == "warm") == (scene.light == "bright")


def test_rendered_light_tone_and_colour_are_those_recorded(pairs):
    for pair in [pair for pair in pairs if pair.scene.kind != "photograph"][::6]:
        picture = render(pair.scene)
        mean = picture.mean((0, 1))
        assert (luma(picture).mean() > 0.45) == (pair.scene.light == "bright")
        if not pair.scene.colour:
            assert np.ptp(picture, axis=2).max() < 1e-6
        if pair.scene.tone != "plain":
            plain_mean = render(replace(pair.scene, tone="plain")).mean((0, 1))
            redder = mean[0] / mean[2] > plain_mean[0] / plain_mean[2]
            assert redder == (pair.scene.tone == "warm")


def test_flipped_words_are_the_marked_ones(pairs):
    for pair in (p for p in pairs if "text_attribute" in p.types):
        before = plain(genuine(pair.seed, pair.split, pair.index, pair.scene.kind)[1])
        after = plain(pair.caption)
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert changed == list(pair.fake_words) and changed
        assert all(v.PARTNER[before[i]] == after[i] for i in changed)
        assert false_facts(pair.caption, pair.scene) == ["mood"]


def test_swapped_captions_are_false_and_keep_the_name(pairs):
    for pair in (p for p in pairs if "text_swap" in p.types):
        own = genuine(pair.seed, pair.split, pair.index, pair.scene.kind)[1]
        names = [i for i, word in enumerate(pair.caption) if word.role == "name"]
        assert [pair.caption[i] for i in names] == [word for word in own if word.role == "name"]
        assert not set(names) & set(pair.fake_words)
        assert len(false_facts(pair.caption, pair.scene)) >= 2
        rest = [word for i, word in enumerate(plain(pair.caption)) if i not in pair.fake_words]
        assert in_order(rest, plain(own) + [])


def in_order(some, everything):
    """Whether the words not marked stand in the old caption in the same order, the name apart."""
    names = {n.lower() for n in v.FIRST_NAMES + v.LAST_NAMES}
    position = iter(w for w in everything if w not in names)
    return all(word in position for word in some if word not in names)


def test_a_swap_by_hand():
    own = (
        *words("a happy"),
        Word("Anna", "name"),
        Word("Bell", "name"),
        *words("waits at the park in bright light"),
    )
    donor = (Word("John", "name"), Word("Cook", "name"), *words("stands at the river in the dark"))
    swapped, marked = swap_caption(own, donor)
    assert spell(swapped) == "Anna Bell stands at the river in the dark."
    assert [plain(swapped)[i] for i in marked] == ["stands", "river", "the", "dark"]
    assert marked == [2, 5, 7, 8]


def test_a_flip_turns_one_or_all():
    caption = (Word("happy", "mood"), Word("John", "name"), Word("victory", "mood"))
    results = {tuple(plain(flip_moods(rng(seed), caption)[0])) for seed in range(40)}
    assert results == {("sad", "john", "defeat"), ("sad", "john", "victory"), ("happy", "john", "defeat")}


def test_words_are_those_of_the_cleaned_caption(pairs):
    for pair in pairs:
        cleaned = clean_caption(spell(pair.caption))
        assert cleaned.text.split(" ") == plain(pair.caption)
        assert len(plain(pair.caption)) <= 40


@pytest.mark.parametrize("kind", ["face_swap", "face_attribute"])
@pytest.mark.parametrize("index", range(6))
def test_forgeries_touch_their_box_alone(kind, index):
    scene, _ = genuine(2, "test", index)
    forgery = replace(draw_forgery(rng(index), kind, scene, "test"), strength=1.0)
    picture = render(scene)
    kept = picture.copy()
    forged = forge(picture, scene, forgery, rng(index))
    changed = np.abs(forged - picture).max(2)
    x1, y1, x2, y2 = scene.people[forgery.person].box
    inside = changed[y1:y2, x1:x2].copy()
    changed[y1:y2, x1:x2] = 0
    assert changed.max() == 0 and np.array_equal(picture, kept)
    # A swap changes most of the face, a bent feature a part of it.
    share = (inside > 1 / 255).mean()
    assert share > 0.5 if kind == "face_swap" else 0.05 < share < 0.35


def test_a_change_of_no_strength_changes_nothing():
    scene, _ = genuine(2, "test", 0)
    picture = render(scene)
    forged = forge(picture, scene, Forgery("face_attribute", 0, 0.0, feature="mouth"), rng())
    assert np.allclose(forged, picture, atol=1e-6)


def test_the_face_mask_touches_its_box():
    mask = face_mask((10, 20, 50, 80), 0.3)
    assert mask.shape == (60, 40)
    assert mask[30, 20] == 1 and mask[0, 0] == 0
    assert mask[30, 0] < 0.05 < mask[30, 5] and np.allclose(mask, mask[::-1, ::-1])


def test_grain_is_of_the_recorded_strength():
    scene, _ = genuine(2, "test", 0)
    assert draw_grain(rng(), scene).std() == pytest.approx(scene.grain, rel=0.02)
    assert GRAIN[0] <= scene.grain <= GRAIN[1]
