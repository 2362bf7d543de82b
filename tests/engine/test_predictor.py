from __future__ import annotations

import itertools
import json
import multiprocessing
import threading
import time

import numpy as np
import pytest
from helpers import in_threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import Predictor
from engine.errors import BackendError, Dgm4Error, InputError, NumericalError

CAPTION = "The President's well-known friend, Obama, speaks!"


def test_image_options_of_another_kind_are_refused_at_once(bundle_dir):
    with pytest.raises(InputError, match="image_options: expected an engine.ImageOptions, got dict"):
        Predictor(bundle_dir, image_options={"max_bytes": 5})


@pytest.mark.parametrize("thumbnail", [-1, "x", True, 1.5])
def test_a_thumbnail_is_a_number_of_pixels(bundle_dir, thumbnail):
    with pytest.raises(InputError, match="thumbnail: expected an integer of at least 0, got"):
        Predictor(bundle_dir, thumbnail=thumbnail)


@pytest.mark.parametrize("pairs", [None, 5, "a.jpg"])
def test_a_stream_needs_an_iterable(predictor, pairs):
    with pytest.raises(InputError, match="expected an iterable of"):
        predictor.stream(pairs)


def test_numbers_of_numpy_are_numbers(predictor, photo, bundle_dir):
    assert len(list(predictor.stream([(photo, CAPTION)], batch_size=np.int64(1)))) == 1
    with Predictor(bundle_dir, thresholds={"manipulated": np.float32(0.5)}, thumbnail=np.int64(8)) as other:
        assert other.manifest.thresholds.manipulated == 0.5


def test_the_answer_is_the_networks(predictor, photo, expected_outputs, network_input):
    result = predictor.predict(photo, CAPTION)
    _, tokens = predictor._preparation._tokenizer(CAPTION)
    expected = expected_outputs(network_input(photo), tokens.ids)
    real, fake = np.exp(expected["logits_real_fake"])
    assert result.score == pytest.approx(fake / (real + fake), abs=1e-6)
    assert result.manipulated == (result.score >= 0.5)
    assert list(result.types) == ["face_swap", "face_attribute", "text_swap", "text_attribute"]
    assert list(result.types.values()) == pytest.approx(expected["box"].tolist(), abs=1e-6)
    assert [word.text for word in result.words] == [
        "The",
        "President's",
        "well",
        "known",
        "friend",
        "Obama",
        "speaks",
    ]
    assert all(CAPTION[word.start : word.end] == word.text for word in result.words)
    assert result.heatmap.shape == (16, 16)
    assert result.size == photo.size
    assert result.warnings == ()
    assert result.model == {
        "name": "asap",
        "size": "tiny",
        "precision": "fp32",
        "backend": "ort",
        "device": "cpu",
        "weights": "trained",
        "chosen": "the rule for a CPU; dgm4 bench --choose measures",
    }


def test_timing_adds_up(predictor, photo):
    timing = predictor.predict(photo, CAPTION).timing
    assert list(timing) == ["decode", "resize", "tokenize", "inference", "postprocess", "total"]
    assert timing["total"] == pytest.approx(sum(list(timing.values())[:-1]))
    assert all(value >= 0 for value in timing.values())


def test_batches_agree_with_single_answers(predictor, photo):
    pairs = [(photo.rotate(10 * i), " ".join(["obama speaks"] * (1 + i % 5))) for i in range(11)]
    single = [predictor.predict(*pair) for pair in pairs]
    for results in (
        predictor.predict_batch(pairs),
        predictor.predict_batch([image for image, _ in pairs], [caption for _, caption in pairs]),
        predictor.predict_batch(pairs, batch_size=3),
        list(predictor.stream(iter(pairs))),
        list(predictor.stream(iter(pairs), batch_size=1)),
    ):
        for result, expected in zip(results, single, strict=True):
            assert result.score == pytest.approx(expected.score, abs=1e-6)
            assert result.words == expected.words
            assert np.array_equal(result.heatmap, expected.heatmap)


def test_nothing_in_gives_nothing_out(predictor):
    assert predictor.predict_batch([]) == []
    assert predictor.predict_batch([], []) == []
    assert list(predictor.stream([])) == []


def test_unequal_lists_are_refused(predictor, photo):
    with pytest.raises(InputError) as caught:
        predictor.predict_batch([photo] * 3, ["a", "b"])
    assert str(caught.value) == "got 3 images but 2 captions; pass one caption for each image"
    with pytest.raises(InputError, match="got 1 image but 0 captions"):
        predictor.predict_batch([photo], [])


@pytest.mark.parametrize("pairs", ["ab", b"ab", {"a": 1}, None, 3, iter([])])
def test_single_values_in_a_lists_place_are_refused(predictor, photo, pairs):
    with pytest.raises(InputError, match="expected a list of .image, caption. pairs, got"):
        predictor.predict_batch(pairs)
    if pairs is not None:
        with pytest.raises(InputError, match="expected a list of captions, got"):
            predictor.predict_batch([photo], pairs)


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", "b", "c"), None, 3])
def test_what_is_no_pair_is_refused_by_index(predictor, photo, pair):
    with pytest.raises(InputError, match=r"item 1: expected a pair \(image, caption\) or .*, got"):
        predictor.predict_batch([(photo, "a"), pair])


def test_a_failed_item_raises_and_names_its_index(predictor, photo):
    pairs = [(photo, "a")] * 6 + [("nowhere.jpg", "b")]
    with pytest.raises(InputError, match=r"item 6 \('nowhere.jpg'\): no such file"):
        predictor.predict_batch(pairs)
    with pytest.raises(InputError, match="item 0: expected a caption as str"):
        predictor.predict_batch([(photo, 3)])
    with pytest.raises(InputError, match="^expected a caption as str"):
        predictor.predict(photo, 3)


def test_failed_items_can_be_returned_in_their_place(predictor, photo):
    pairs = [(photo, "a"), (b"broken", "b"), (photo, 3), (photo, "poison"), (photo, "e"), None]
    results = predictor.predict_batch(pairs, on_error="return")
    assert [type(result).__name__ for result in results] == [
        "Prediction",
        "InputError",
        "InputError",
        "NumericalError",
        "Prediction",
        "InputError",
    ]
    for index in (1, 2, 3, 5):
        assert str(results[index]).startswith(f"item {index}: ")
    assert results[0] == predictor.predict(photo, "a")


def test_a_batch_of_failures_alone(predictor):
    assert [type(r) for r in predictor.predict_batch([(b"x", "a")] * 9, on_error="return")] == [
        InputError
    ] * 9


def test_a_network_that_answers_nan_gives_no_score(predictor, photo):
    with pytest.raises(NumericalError, match="the pair: the network's logits_real_fake holds NaN"):
        predictor.predict(photo, "poison")


def test_a_stream_yields_what_came_before_a_failure(predictor, photo):
    stream = predictor.stream([(photo, "a"), (photo, "b"), (b"x", "c"), (photo, "d")])
    assert next(stream).caption == "a"
    assert next(stream).caption == "b"
    with pytest.raises(InputError, match="item 2"):
        next(stream)


def test_a_stream_is_lazy_and_endless(predictor, photo):
    taken = itertools.count()
    pairs = ((photo, f"caption {next(taken)}") for _ in itertools.count())
    stream = predictor.stream(pairs, batch_size=3)
    captions = [result.caption for result in itertools.islice(stream, 7)]
    assert captions == [f"caption {i}" for i in range(7)]
    assert next(taken) <= 12
    stream.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_an_error_of_the_users_iterable_comes_after_the_answers(predictor, photo, count):
    def pairs():
        yield from [(photo, f"obama {i}") for i in range(count)]
        raise RuntimeError("the user's own")

    answers = []
    with pytest.raises(RuntimeError, match="the user's own"):
        for answer in predictor.stream(pairs(), batch_size=2):
            answers.append(answer)  # what came before the error
    assert [answer.caption for answer in answers] == [f"obama {i}" for i in range(count)]


def test_a_slow_reader_holds_a_stream_back(predictor, photo):
    taken = itertools.count()
    stream = predictor.stream(((photo, f"obama {next(taken)}") for _ in itertools.count()), batch_size=3)
    for _ in range(4):
        next(stream)
    time.sleep(0.1)  # in which an unbounded one would read on
    assert next(taken) <= 9


@pytest.mark.parametrize("broken", [False, True])
def test_a_stream_that_is_stopped_leaves_no_thread(predictor, photo, monkeypatch, broken):
    prepared, prepare = [], predictor._preparation.pair

    def slow(*arguments, **named):
        time.sleep(0.01)
        prepared.append(arguments)
        return prepare(*arguments, **named)

    monkeypatch.setattr(predictor._preparation, "pair", slow)
    pairs = [(b"broken" if broken and i == 1 else photo, "obama") for i in range(400)]
    stream = predictor.stream(pairs, batch_size=4)
    next(stream)
    if broken:
        with pytest.raises(InputError, match="item 1"):
            next(stream)
    else:
        stream.close()
    assert len(prepared) <= 12
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("preprocess")] == []


@pytest.mark.parametrize(
    "options", [{"on_error": "skip"}, {"batch_size": 0}, {"batch_size": 1.5}, {"batch_size": True}]
)
def test_wrong_options_are_refused_at_once(predictor, options):
    with pytest.raises(InputError, match="expected"):
        predictor.stream([], **options)


def test_batches_stay_within_the_bundles_limit(bundle_dir, photo, monkeypatch):
    predictor = Predictor(bundle_dir, threads=1)
    sizes = []
    run = predictor._backend.run
    monkeypatch.setattr(
        predictor._backend, "run", lambda feeds: sizes.append(len(feeds["image"])) or run(feeds)
    )
    predictor.predict_batch([(photo, "a")] * 9, batch_size=100)
    assert sizes == [4, 4, 1]


def test_padding_follows_the_longest_caption_of_the_batch(bundle_dir, photo, monkeypatch):
    predictor = Predictor(bundle_dir, threads=1)
    seen = []
    run = predictor._backend.run
    monkeypatch.setattr(predictor._backend, "run", lambda feeds: seen.append(feeds) or run(feeds))
    predictor.predict_batch([(photo, ""), (photo, "obama speaks"), (photo, "obama")])
    predictor.predict(photo, "")
    assert seen[0]["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert (seen[0]["input_ids"] * (1 - seen[0]["attention_mask"])).sum() == 0
    assert seen[1]["attention_mask"].tolist() == [[1, 0]]
    assert [array.dtype for array in seen[0].values()] == [np.float32, np.int64, np.int64]


@pytest.mark.parametrize("caption", ["", "...", "\n"])
def test_empty_captions_are_answered(predictor, photo, caption):
    result = predictor.predict(photo, caption)
    assert result.words == ()
    assert [warning.split(":")[0] for warning in result.warnings] == ["empty_text"]
    json.loads(result.to_json())


@pytest.mark.parametrize(
    ("kind", "warning"),
    [
        ("drawn", "untrained_weights: the scores mean nothing (drawn from seed 1)"),
        ("demo", "demo_weights: trained on made images; the answers say nothing about real ones"),
        ("trained", None),
    ],
)
def test_weights_that_are_no_detector_warn_in_every_prediction(
    kind, warning, bundle_copy, manifest_template, write_manifest, photo, caplog
):
    manifest = manifest_template()
    manifest["weights"] = {"kind": kind, "source": "drawn from seed 1", "sha256": None}
    write_manifest(bundle_copy, manifest)
    expected = [] if warning is None else [warning]
    with Predictor(bundle_copy, threads=1) as predictor:
        assert [record.getMessage() for record in caplog.records] == expected
        for result in predictor.predict_batch([(photo, "a"), (photo, "")]):
            assert [x for x in result.warnings if "weights" in x] == expected
            assert json.loads(result.to_json())["model"]["weights"] == kind


def test_thumbnails_are_bounded_and_can_be_left_out(bundle_dir, predictor, photo):
    large = Image.new("RGB", (3000, 1500))
    assert predictor.predict(large, "a").thumbnail.size == (1024, 512)
    assert predictor.predict(photo, "a").thumbnail.size == photo.size
    assert Predictor(bundle_dir, threads=1, thumbnail=0).predict(photo, "a").thumbnail is None


def test_close(bundle_dir, photo):
    with Predictor(bundle_dir, threads=1) as predictor:
        predictor.warm_up()
        predictor.predict(photo, "a")
    with pytest.raises(BackendError, match="was closed"):
        predictor.predict(photo, "a")


def test_threads_share_a_predictor(predictor, photo):
    pairs = [(photo.rotate(30 * i), "obama " * (i + 1)) for i in range(4)]
    expected = [predictor.predict(*pair) for pair in pairs]
    wrong = []

    def work() -> None:
        for _ in range(10):
            wrong.extend(i for i, pair in enumerate(pairs) if predictor.predict(*pair) != expected[i])

    in_threads(work, 8)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_is_told_so(predictor, photo):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work() -> None:
        try:
            predictor.predict(photo, "a")
        except BackendError as error:
            queue.put(str(error))

    child = context.Process(target=work)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert "made before a fork" in queue.get()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    image=st.binary(max_size=40) | st.none() | st.text(max_size=10) | st.just(np.zeros((5, 5, 3), np.uint8)),
    caption=st.text(max_size=60) | st.binary(max_size=60) | st.none() | st.integers(),
)
def test_only_our_errors_come_out(predictor, image, caption):
    try:
        result = predictor.predict(image, caption)
    except Dgm4Error as error:
        assert str(error)
    else:
        json.loads(result.to_json())


@pytest.mark.parametrize("shapes", [(1, 48), [(1,)], [(0, 5)], [("a", 3)], [(1.5, 48)], None, [(True, 48)]])
def test_warm_up_wants_pairs_of_numbers(bundle_dir, shapes):
    with (
        Predictor(bundle_dir) as predictor,
        pytest.raises(InputError, match=r"shapes: expected \(pairs, tok"),
    ):
        predictor.warm_up(shapes)
