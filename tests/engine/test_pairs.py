"""Pairs in every form: mappings, one image with many captions, a caption or an image that is absent."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from engine import ImageOptions, InputError, NumericalError, Predictor
from engine.errors import BundleError

CAPTION = "The President's well-known friend, Obama, speaks!"
FACES, TEXTS = ("face_swap", "face_attribute"), ("text_swap", "text_attribute")


def codes(prediction):
    return [warning.partition(":")[0] for warning in prediction.warnings]


def test_a_predictor_can_be_called(predictor, photo):
    assert predictor(photo, CAPTION) == predictor.predict(photo, CAPTION)


def test_captions_may_be_an_array(predictor, photo):
    captions = np.array([CAPTION, "x"])
    assert predictor.predict_captions(photo, captions) == predictor.predict_captions(photo, [CAPTION, "x"])
    assert predictor.predict_captions(photo, captions[:0]) == []


# Mappings


def test_a_mapping_is_a_pair(predictor, photo):
    expected = predictor.predict(photo, CAPTION)
    for pair in (
        {"image": photo, "caption": CAPTION},
        {"image": photo, "text": CAPTION, "id": 5},
        {"image": photo, "caption": CAPTION, "text": "another"},
    ):
        assert predictor.predict_batch([pair]) == [expected]
        assert list(predictor.stream(iter([pair, (photo, CAPTION)]))) == [expected] * 2


@pytest.mark.parametrize(
    "pair", [{}, {"image": "a.jpg"}, {"caption": "a"}, {"picture": "a.jpg", "text": "a"}]
)
def test_a_mapping_without_both_names_is_refused(predictor, pair):
    expected = r'item 0: expected a pair \(image, caption\) or {"image": ..., "caption": ...}, got the names'
    with pytest.raises(InputError, match=expected):
        predictor.predict_batch([pair])


# One image, many captions


def test_captions_of_one_image_get_their_own_answers(predictor, photo):
    captions = ["obama " * (i + 1) for i in range(9)]
    expected = predictor.predict_batch([(photo, caption) for caption in captions])
    got = predictor.predict_captions(photo, captions)
    assert got == expected
    assert all(np.array_equal(a.heatmap, b.heatmap) for a, b in zip(got, expected, strict=True))
    assert got[0].thumbnail.size == photo.size
    assert predictor.predict_captions(photo, captions, batch_size=2) == expected
    assert predictor.predict_captions(photo, []) == []


def test_the_image_is_read_and_prepared_once(predictor, photo, encode, monkeypatch):
    """From a file object, which has nothing more to give afterwards."""
    seen, sent = io.BytesIO(encode(photo, "PNG")), []
    submit = predictor._backend.submit
    monkeypatch.setattr(
        predictor._backend, "submit", lambda images, text: sent.append(len(images)) or submit(images, text)
    )
    got = predictor.predict_captions(seen, ["obama", "speaks", "in", "person", "well"])
    assert len(got) == 5
    assert sent == [1, 1]
    assert seen.tell() == len(seen.getvalue())
    assert sum(p.timing["decode"] for p in got) == pytest.approx(5 * got[0].timing["decode"])


def test_failed_captions_are_named_and_can_be_returned(predictor, photo):
    captions = ["a", 3, "poison", "b"]
    got = predictor.predict_captions(photo, captions, on_error="return")
    assert [type(result) for result in got[1:3]] == [InputError, NumericalError]
    assert str(got[1]).startswith("caption 1: expected a caption as str")
    assert str(got[2]).startswith("caption 2: ")
    assert got[3] == predictor.predict(photo, "b")
    with pytest.raises(InputError, match="caption 1: "):
        predictor.predict_captions(photo, captions)
    with pytest.raises(InputError, match="no such file"):
        predictor.predict_captions("nowhere.jpg", captions, on_error="return")
    for wrong in ("a caption", None, 5, iter([])):
        with pytest.raises(InputError, match="expected a list of captions, got"):
            predictor.predict_captions(photo, wrong)
    with pytest.raises(InputError, match="on_error"):
        predictor.predict_captions(photo, ["a"], on_error="skip")


@pytest.mark.parametrize("name", ["hammer", "asap", "cals"])
def test_torch_looks_at_the_image_of_many_captions_once(bundle, name, photo, monkeypatch):
    pytest.importorskip("torch")
    captions = ["a man", "a man and a woman speak", "a dog"]
    with Predictor(bundle(name, "fp32").path, backend="torch", device="cpu", threads=1) as predictor:
        expected = predictor.predict_batch([(photo, caption) for caption in captions])
        model, seen = predictor._backend._network._model, []
        see = model.see
        monkeypatch.setattr(model, "see", lambda image: seen.append(len(image)) or see(image))
        got = predictor.predict_captions(photo, captions)
    assert seen == [1]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        assert list(ours.types.values()) == pytest.approx(list(theirs.types.values()), abs=1e-5)
        assert ours.box == pytest.approx(theirs.box, abs=1e-3)
        assert [w.score for w in ours.words] == pytest.approx([w.score for w in theirs.words], abs=1e-5)


# What is absent


def test_without_a_caption_the_image_is_judged_alone(predictor, photo):
    got, empty = predictor.predict(photo, None), predictor.predict(photo, "")
    assert got.manipulated is got.score is got.heatmap is None
    assert [got.types[kind] for kind in FACES] == [empty.types[kind] for kind in FACES]
    assert [got.types[kind] for kind in TEXTS] == [None, None]
    assert (got.box, got.size, got.words, got.caption) == (empty.box, photo.size, (), "")
    assert set(got.detected) == set(empty.detected) & set(FACES)
    assert codes(got) == ["no_caption"]


def test_without_an_image_the_caption_is_judged_alone(predictor, bundle_dir, photo, monkeypatch):
    feeds = []
    run = predictor._backend.run
    monkeypatch.setattr(predictor._backend, "run", lambda x: feeds.append(x) or run(x))
    got = predictor.predict(None, CAPTION)
    assert np.abs(feeds[0]["image"]).max() < 0.01, "the mean colour of the training images"
    assert got.manipulated is got.score is got.heatmap is got.box is got.size is got.thumbnail is None
    assert [got.types[kind] for kind in FACES] == [None, None]
    assert all(0 <= got.types[kind] <= 1 for kind in TEXTS)
    assert [word.text for word in got.words] == [
        word.text for word in predictor.predict(photo, CAPTION).words
    ]
    assert codes(got) == ["no_image"]
    assert codes(predictor.predict(None, "...")) == ["no_image", "empty_text"]


def test_absent_parts_come_in_batches_beside_whole_pairs(predictor, photo):
    pairs = [(photo, CAPTION), (photo, None), {"image": None, "caption": CAPTION}, (None, None)]
    whole, image, caption, error = predictor.predict_batch(pairs, on_error="return")
    assert whole == predictor.predict(photo, CAPTION)
    assert (image, caption) == (predictor.predict(photo, None), predictor.predict(None, CAPTION))
    assert "item 3: expected an image or a caption, got neither" in str(error)
    assert predictor.predict_captions(photo, [None, CAPTION]) == [image, whole]
    assert predictor.predict_captions(None, [CAPTION]) == [caption]


@pytest.mark.parametrize("pair", [("photo", None), (None, CAPTION)])
def test_a_partial_answer_is_shown(predictor, photo, pair):
    prediction = predictor.predict(photo if pair[0] else None, pair[1])
    assert repr(prediction).startswith("Prediction(no verdict")
    json.loads(prediction.to_json())
    assert prediction.plot().width > 100
    assert prediction._repr_html_().count("<") > 5


# Captions that the network cannot read


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u10d2\u10d0\u10db\u10d0 \U0001f600",
            ["unknown_words: 3 of 3 are"],
        ),
        ("obama \U0001f600 speaks", ["unknown_words: 1 of 3 are"]),
        ("obama speaks", []),
    ],
)
def test_words_that_the_network_cannot_read_are_counted(predictor, photo, caption, expected):
    warnings = predictor.predict(photo, caption).warnings
    assert [warning.partition(" not")[0] for warning in warnings] == expected


# Numbers, switches and processes


def test_numbers_of_any_library_are_numbers(bundle_dir, photo):
    options = ImageOptions(
        max_bytes=np.int64(10**6), max_pixels=np.int32(10**6), background=(np.uint8(1), 0, 0)
    )
    thresholds = {"manipulated": np.float32(0.5), "types": np.float64(0.25), "words": np.int64(1)}
    with Predictor(
        bundle_dir, threads=np.int64(1), thumbnail=np.uint8(8), image_options=options, thresholds=thresholds
    ) as predictor:
        predictor.warm_up([(np.int64(1), np.int32(24))])
        (prediction,) = predictor.predict_batch([(photo, "obama")], batch_size=np.int8(3))
    assert json.loads(prediction.to_json())["thresholds"]["face_swap"] == 0.25
    assert all(type(value) is float for value in prediction.thresholds.values())


def test_a_host_that_makes_errors_of_underflows_gets_its_answer(bundle_copy, predictor, photo):
    expected = predictor.predict(photo, "z" * 90)
    with np.errstate(all="raise"):
        assert predictor.predict(photo, "z" * 90) == expected


def test_a_predictor_goes_to_a_spawned_process(bundle_dir, photo, monkeypatch):
    """By its path and options, in whatever directory that process is."""
    monkeypatch.chdir(bundle_dir.parent)
    options = {
        "thresholds": {"manipulated": 0.9},
        "thumbnail": 8,
        "image_options": ImageOptions(max_bytes=9**9),
    }
    with Predictor(bundle_dir.name, threads=1, **options) as predictor:
        expected = predictor.predict(photo, CAPTION)
        monkeypatch.chdir("/")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            got = pool.submit(predictor.predict, photo, CAPTION).result(timeout=120)
    assert got == expected
    assert max(got.thumbnail.size) == 8
    assert got.thresholds["manipulated"] == 0.9


def test_a_predictor_is_pickled_with_its_bundle(bundle_copy, manifest_template, write_manifest):
    with Predictor(bundle_copy, threads=1) as predictor:
        data = pickle.dumps(predictor)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert repr(again) == repr(predictor)
    write_manifest(bundle_copy, manifest_template() | {"created": "2027-01-01T00:00:00Z"})
    with pytest.raises(BundleError, match="holds another bundle than when it was pickled"):
        pickle.loads(data)
