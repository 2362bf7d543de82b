"""Runs through the TensorRT backend, on doubles that answer as ONNX Runtime does."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from functools import partial

import numpy as np
import pytest
from helpers import draw_feeds

from engine import Bundle, Predictor, backends
from engine.backends import tensorrt, tensorrt_engine, tensorrt_lane
from engine.backends.buckets import Bucket
from engine.backends.tensorrt_engine import Profile, place
from engine.errors import BackendError, BundleError

ERROR, WARNING = 1, 2
SMALL = ((1, 2), (2, 32))
FULL = ((1, 2), (4, 127))


feeds = partial(draw_feeds, vocabulary=70)


@pytest.fixture
def load(engine_bundle):
    return lambda: backends.create("tensorrt", Bundle.open(engine_bundle()), "cuda")


@pytest.fixture
def check(session):
    """Assert that a backend answers `inputs` as ONNX Runtime does."""

    def compare(backend, inputs):
        got = backend.run(inputs)
        names = [output.name for output in session.get_outputs()]
        assert sorted(got) == sorted(names)
        for name, want in zip(names, session.run(names, inputs), strict=True):
            np.testing.assert_allclose(got[name], want, atol=1e-5, err_msg=name)
        return got

    return compare


def test_answers_of_all_shapes_again_and_again(machine, load, check):
    machine()
    backend = load()
    assert (backend.name, backend.device) == ("tensorrt", "cuda:0")
    for seed in range(3):
        for batch, tokens in [(4, 127), (1, 2), (3, 17), (1, 16), (4, 16)]:
            check(backend, feeds(batch, tokens, seed))


def test_a_bucket_is_run_once_then_recorded_then_launched(machine, load, check, counted):
    world = machine()
    backend = load()
    for tokens in (20, 17, 32, 20):
        check(backend, feeds(3, tokens))
    assert [shape for _, shape, _ in world.runs] == [(4, 32)] * 2, "one as it is, one into the graph"
    calls = counted(world.driver.log)
    assert (calls["cuStreamBeginCapture_v2"], calls["cuGraphLaunch"], len(world.contexts)) == (1, 3, 1)
    check(backend, feeds(3, 33))
    assert len(world.contexts) == 2, "another bucket, another context: none is reshaped"


def test_answers_are_the_callers_own(machine, load):
    machine()
    backend = load()
    first = backend.run(feeds(2, 7))
    kept = {name: array.copy() for name, array in first.items()}
    for seed in (1, 2):
        backend.run(feeds(2, 7, seed))
    assert all(np.array_equal(first[name], kept[name]) for name in kept)


def test_a_batch_above_the_engines_is_split(machine, load, check):
    world = machine(profiles=[((1, 2), (3, 127))])
    check(load(), feeds(4, 9))
    assert [shape for _, shape, _ in world.runs[::2]] == [(3, 16), (1, 16)]


def test_one_below_the_engines_is_padded(machine, load, check):
    world = machine(profiles=[((3, 40), (4, 127))])
    check(load(), feeds(1, 5))
    assert world.runs[0][1] == (3, 40)


def test_more_tokens_than_the_engine_takes_are_refused(machine, load):
    machine(profiles=[((1, 2), (4, 64))])
    with pytest.raises(BackendError, match=r"expected 1 to 64 tokens, the engine's profiles, got 65"):
        load().run(feeds(1, 65))


@pytest.mark.parametrize(
    ("batch", "tokens", "profile", "bucket"),
    [
        (1, 20, 1, (1, 32)),
        (2, 32, 1, (2, 32)),
        (2, 33, 0, (2, 48)),
        (3, 20, 0, (4, 32)),
        (9, 20, 0, (8, 32)),
        (9, 120, 0, (8, 127)),
    ],
)
def test_the_tightest_profile(batch, tokens, profile, bucket):
    profiles = [Profile(0, (1, 8), (2, 127)), Profile(1, (1, 2), (2, 32))]
    assert place(batch, tokens, profiles) == (profiles[profile], Bucket(*bucket))


def test_profiles_are_read_off_the_engine(machine, load, check):
    world = machine(profiles=[FULL, SMALL])
    backend = load()
    check(backend, feeds(2, 30))
    check(backend, feeds(2, 40))
    assert [profile for *_, profile in world.runs[::2]] == [1, 0]


def test_nothing_is_loaded_before_the_first_run(machine, engine_bundle):
    world = machine()
    with Predictor(engine_bundle(), backend="tensorrt") as predictor:
        assert (world.loaded, world.driver.held()) == ([], [])
        assert predictor.model["device"] == "cuda:0"
        predictor.warm_up([(2, 16)])
        assert world.loaded == [b"an engine"]
        predictor.warm_up()
        assert len(world.loaded) == 1
    assert world.driver.held() == []


def test_a_predictor_answers_as_with_onnx_runtime(machine, engine_bundle, photo):
    machine()
    path = engine_bundle()
    captions = ["Obama speaks", "the president in person speaks well", "known"] * 3
    answers = []
    for name in ("tensorrt", "ort"):
        with Predictor(path, backend=name) as predictor:
            answers.append(predictor.predict_batch([photo] * len(captions), captions))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-6)
        np.testing.assert_allclose(ours.heatmap, theirs.heatmap, atol=1e-5)


def test_threads_have_lanes_of_their_own(machine, load, check):
    world = machine()
    backend, wrong = load(), []

    def work(seed):
        try:
            for batch, tokens in [(1, 9), (3, 20)] * 3:
                check(backend, feeds(batch, tokens, seed))
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert 1 <= len(world.driver.streams) <= tensorrt.LANES
    assert len(world.loaded) == 1
    backend.close()
    assert world.driver.held() == []


def test_a_predictor_that_is_dropped_frees_its_memory(machine, engine_bundle):
    """Without `close`, and without the collector of cycles: nothing of it refers back to it."""
    world = machine()
    world.by_values.add("logits_tok")
    predictor = Predictor(engine_bundle(), backend="tensorrt")
    gc.collect()
    gc.disable()
    try:
        predictor.warm_up([(1, 2), (2, 16)])
        assert world.driver.held()
        del predictor
        assert world.driver.held() == []
    finally:
        gc.enable()
    assert not world.driver.thread.stack, "the thread's context is the one it had"


def test_contexts_are_bounded(machine, load, check, monkeypatch):
    """The one unused for longest goes, with its outputs and its graph."""
    monkeypatch.setattr(tensorrt_lane, "MOST_SLOTS", 2)
    world = machine()
    backend = load()
    for tokens in (10, 20, 10, 40):  # the bucket of 20 tokens goes
        check(backend, feeds(2, tokens))
    held = len(world.driver.held())
    check(backend, feeds(2, 10))
    assert len(world.contexts) == 3
    for tokens in (20, 60, 20, 60, 100, 20):
        check(backend, feeds(2, tokens))
    assert len(world.contexts) == 7
    assert len(world.driver.held()) == held
    backend.close()
    assert world.driver.held() == []


def test_a_failure_says_what_the_library_said_to_its_thread(machine, load):
    machine()
    log = tensorrt_engine.error_log(sys.modules["tensorrt"])
    log.log(ERROR, "of this thread")
    failures = []

    def fail():
        machine().complaints.append([(ERROR, "of the failing thread")])
        with pytest.raises(BackendError) as error:
            load().run(feeds(1, 2))
        failures.append(str(error.value))

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert "of the failing thread" in failures[0]
    assert log.take() == ["of this thread"]


def test_the_engine_that_is_loaded_is_the_one_that_was_hashed(machine, engine_bundle, monkeypatch, check):
    """A file that is replaced as soon as it was read; one replaced after the start is refused."""
    world, path = machine(), engine_bundle()
    read = Bundle.read

    def replaced(bundle, name):
        content = read(bundle, name)
        (path / name).write_bytes(b"another")
        return content

    backend = backends.create("tensorrt", Bundle.open(path), "cuda")
    monkeypatch.setattr(Bundle, "read", replaced)
    check(backend, feeds(1, 2))
    assert world.loaded == [b"an engine"]

    path = engine_bundle()
    late = backends.create("tensorrt", Bundle.open(path), "cuda")
    monkeypatch.setattr(Bundle, "read", read)
    next(path.glob("*.engine")).write_bytes(b"an angine")
    with pytest.raises(BundleError, match=r"\.engine: expected SHA-256"):
        late.run(feeds(1, 2))
    assert len(world.loaded) == 1


def test_the_calling_threads_own_context_comes_back(machine, load):
    world = machine()
    world.driver.thread.stack = ["torch's"]
    backend = load()
    backend.run(feeds(1, 2))
    backend.close()
    assert world.driver.thread.stack == ["torch's"]


def test_rtx_captures_by_itself_and_compiles_once(machine, engine_bundle, check, counted):
    world = machine(library="tensorrt_rtx", version="1.7.1.116")
    path = engine_bundle({"library": "tensorrt_rtx", "version": "1.7.1.116"})
    backend = backends.create("tensorrt", Bundle.open(path), "auto")
    for batch in (1, 2, 1):
        check(backend, feeds(batch, 9))
    first, second = world.contexts
    assert first.allocation.name == "USER_MANAGED"
    assert first.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert first.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert first.cache is second.cache is not None
    assert "cuStreamBeginCapture_v2" not in counted(world.driver.log)


def test_an_output_whose_shape_only_the_run_tells(machine, load, check, counted):
    world = machine()
    world.by_values.add("logits_tok")
    backend = load()
    for tokens in (5, 9, 40):
        check(backend, feeds(2, tokens))
    assert counted(world.driver.log)["cuGraphLaunch"] == 0
    backend.close()
    assert world.driver.held() == []


def test_a_failed_run_says_why_and_the_next_one_works(machine, load, check):
    world = machine()
    backend = load()
    check(backend, feeds(1, 2))
    tensorrt_engine.error_log(sys.modules["tensorrt"]).log(ERROR, "of an earlier run")
    world.complaints.append(
        [(WARNING, "never mind"), (ERROR, "layer  mgca:\n illegal"), (ERROR, "and so on")]
    )
    words = r"tensorrt 11\.4\.0\.106 could not run 2 pairs of 16 tokens: layer mgca: illegal$"
    with pytest.raises(BackendError, match=words):
        backend.run(feeds(2, 7))
    assert world.driver.held() == [], "what the failure left behind is not used again"
    check(backend, feeds(2, 7))


@pytest.mark.parametrize("step", ["cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"])
def test_without_a_graph_it_still_answers(machine, load, check, caplog, step):
    world = machine()
    world.driver.failing[step] = 900
    backend = load()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            check(backend, feeds(2, 7))
    assert caplog.text.count("no CUDA graph for Bucket(batch=2, tokens=16)") == 1
    backend.close()
    assert world.driver.held() == []


def test_a_run_that_cannot_be_recorded(machine, load, check, caplog, monkeypatch):
    world = machine()
    backend, begin = load(), world.driver.do_cuStreamBeginCapture_v2

    def complain(stream, mode):
        begin(stream, mode)
        world.complaints.append([(ERROR, "not in a capture")])

    monkeypatch.setattr(world.driver, "do_cuStreamBeginCapture_v2", complain, raising=False)
    for _ in range(2):
        check(backend, feeds(2, 7))
    assert "not in a capture" in caplog.text
    assert world.driver.recording == {}


def test_too_little_memory(machine, load):
    world = machine()
    world.driver.free_bytes = 10_000
    with pytest.raises(
        BackendError, match=r"out of memory \(error 2\); free GPU memory or lower the bundle's"
    ):
        load().run(feeds(1, 2))
    assert world.driver.held() == []


def test_no_context(machine, load):
    machine().no_context = True
    with pytest.raises(BackendError, match="could not make an execution context: it gave no reason"):
        load().run(feeds(1, 2))


def test_an_engine_that_does_not_load(machine, load):
    machine().complaints.append([(ERROR, "Serialization assertion failed")])
    with pytest.raises(BackendError, match=r"could not load .*sm89\.engine: Serialization assertion failed$"):
        load().run(feeds(1, 2))


@pytest.fixture
def stripped(machine, engine_bundle):
    """A machine, and a backend on an engine without its weights."""
    world = machine()
    world.weights = "none"
    return world, backends.create("tensorrt", Bundle.open(engine_bundle({"stripped": True})), "cuda")


def test_a_stripped_engine_gets_the_graphs_weights(stripped, check, bundle_copy):
    world, backend = stripped
    assert world.weights == "none", "nothing is loaded before the first run"
    for tokens in (3, 40):
        check(backend, feeds(2, tokens))
    assert world.weights == str(bundle_copy / "model.onnx")
    assert len(world.loaded) == 1


def test_a_whole_engine_is_not_refitted(machine, load, check):
    world = machine()
    check(load(), feeds(1, 3))
    assert world.weights == "its own"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ({"unreadable": ["no such initializer: x", "and so on"]}, "no such initializer: x$"),
        ({"missing": ["b.weight", "a.weight"]}, "2 of its weights are not in the graph: a.weight, b.weight$"),
        ({"complaints": [[(ERROR, "out of memory")]]}, "out of memory$"),
    ],
)
def test_a_stripped_engine_that_cannot_be_refitted(stripped, monkeypatch, cause, words):
    world, backend = stripped
    late = cause.pop("complaints", [])
    vars(world).update(cause)
    refit = tensorrt_engine.Engine._refit

    def complain(*arguments):
        world.complaints += late
        refit(*arguments)

    monkeypatch.setattr(tensorrt_engine.Engine, "_refit", complain)
    with pytest.raises(BackendError, match=rf"could not refit \S+sm89\.engine from model\.onnx: {words}"):
        backend.run(feeds(1, 2))
    assert (world.contexts, world.driver.held()) == ([], [])


def test_an_altered_graph_refits_nothing(machine, engine_bundle):
    machine()
    path = engine_bundle({"stripped": True})
    data = bytearray((path / "model.onnx").read_bytes())
    data[-1] ^= 1
    (path / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx: expected SHA-256"):
        backends.create("tensorrt", Bundle.open(path), "cuda")


def test_weights_that_are_replaced_while_an_engine_is_refitted_are_refused(
    machine, engine_bundle, monkeypatch
):
    """The parser reads a graph's external weights by their path."""
    machine().weights = "none"
    weights = engine_bundle({"stripped": True}) / "model.onnx.data"
    weights.write_bytes(b"weights")
    backend = backends.create("tensorrt", Bundle.open(engine_bundle({"stripped": True})), "cuda")
    refit = tensorrt_engine.Engine._refit

    def replaced(*arguments):
        weights.write_bytes(b"another")
        refit(*arguments)

    monkeypatch.setattr(tensorrt_engine.Engine, "_refit", replaced)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: was replaced while it was loaded"):
        backend.run(feeds(1, 2))


def test_the_working_directory_may_change_before_the_first_run(machine, engine_bundle, monkeypatch, check):
    machine()
    path = engine_bundle()
    monkeypatch.chdir(path.parent)
    backend = backends.create("tensorrt", Bundle.open(path.name), "cuda")
    monkeypatch.chdir("/")
    check(backend, feeds(1, 2))


def test_an_engine_of_other_tensors(machine, load):
    machine().dtypes["box"] = "float16"
    with pytest.raises(
        BundleError, match=r"expected the tensors .*'box': 'float32'.* got .*'box': 'float16'"
    ):
        load().run(feeds(1, 2))


@pytest.mark.parametrize(
    "change", [{"image": np.zeros((1, 3, 8, 8), np.float32)}, {"stranger": np.zeros(1, np.float32)}]
)
def test_wrong_inputs_never_reach_the_gpu(machine, load, change):
    world = machine()
    with pytest.raises(BackendError, match="expected"):
        load().run(feeds(1, 4) | change)
    assert world.loaded == []


def test_closed(machine, load):
    machine()
    backend = load()
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.run(feeds(1, 2))


def test_a_batch_that_does_not_fit_runs_in_halves(machine, engine_bundle, photo):
    world = machine()
    with Predictor(engine_bundle(), backend="tensorrt", device="cuda") as predictor:
        pairs = [(photo.rotate(i), "obama speaks") for i in range(4)]
        expected = predictor.predict_batch(pairs)
        world.runs.clear()
        predictor._backend._network._idle.clear()
        gc.collect()
        world.complaints.append([(ERROR, "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)")])
        assert predictor.predict_batch(pairs) == expected
        assert {shape[0] for _, shape, _ in world.runs[1:]} == {2}
        world.driver.failing["cuMemAlloc_v2"] = 2
        predictor._backend._network._idle.clear()
        assert predictor.predict(*pairs[0]).caption == "obama speaks"
    gc.collect()
    assert world.driver.held() == []
