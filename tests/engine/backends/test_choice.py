"""The record of the fastest backend: when "auto" follows it, and what a damaged or foreign one does."""

from __future__ import annotations

import dataclasses
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from engine import Bundle, Predictor, backends
from engine.backends import choice
from engine.backends.choice import Choice
from engine.errors import BackendError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and faults that were not yet warned of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choice._warn.cache_clear()
    return tmp_path / "cache" / "dgm4" / "backends"


@pytest.fixture
def opened(bundle):
    """A bundle that both ONNX Runtime and torch serve."""
    return Bundle.open(bundle("asap", "fp32").path)


def made(bundle, threads=None, **changes):
    fields = {
        "format": choice.FORMAT,
        "situation": choice.current(bundle, threads),
        "backend": "torch",
        "threads": threads,
        "medians": {"torch": 3.0, "ort": 4.25},
        "model": "asap tiny fp32",
        "time": "2026-11-29T10:00:00+00:00",
    }
    return Choice(**(fields | changes))


def model(bundle, threads=None, **options):
    with Predictor(bundle, device="cpu", threads=threads, **options) as predictor:
        return predictor.model


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.name == choice.logger.name]


REASON = "measured by dgm4 bench --choose on 2026-11-29: torch 3.0 ms, ort 4.2 ms"


def test_auto_follows_the_record_and_says_so(opened, cache):
    assert model(opened)["backend"] == "ort"
    path = choice.write(made(opened))
    assert path.parent == cache
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    found = model(opened)
    assert (found["backend"], found["chosen"]) == ("torch", REASON)
    assert model(opened, backend="ort")["chosen"] == "asked for"


def test_a_record_is_of_the_threads_that_are_asked_for(opened):
    choice.write(made(opened, threads=1))
    assert model(opened)["backend"] == "ort"
    assert model(opened, threads=1)["backend"] == "torch"


def test_the_winners_threads_are_used(opened, monkeypatch):
    asked = []
    fake = SimpleNamespace(name="torch")
    monkeypatch.setattr(backends, "_load", lambda name: lambda *given: asked.append(given[2]) or fake)
    choice.write(made(opened, threads=1, situation=choice.current(opened, None)))
    assert backends.create("auto", opened, "cpu").name == "torch"
    assert asked == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle": "0" * 64},
        {"processor": "another"},
        {"cores": 4096},
        {"libraries": {"onnxruntime": "1.0"}},
    ],
)
def test_a_record_of_another_situation_does_not_count(opened, cache, changes, caplog):
    """Not even under the name of this one's."""
    other = made(opened, situation=dataclasses.replace(choice.current(opened, None), **changes))
    path = choice.write(other)
    assert model(opened)["backend"] == "ort"
    path.rename(choice._path(choice.current(opened, None)))
    assert model(opened)["backend"] == "ort"
    assert warned(caplog) == []


def test_a_backend_that_is_gone_is_not_chosen(opened):
    choice.write(made(opened, backend="tensorflow"))
    assert model(opened)["backend"] == "ort"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-20],
        lambda data: b"\xff\xfe" + data,
        lambda data: b"[" * 60_000,
        lambda data: b" " * 100_000 + data,
        lambda data: data.replace(b"3.0", b"NaN"),
        lambda data: data.replace(b'"backend": "torch"', b'"backend": null'),
        lambda data: data.replace(choice.FORMAT.encode(), b"dgm4-backend-9"),
        lambda data: b"[]",
    ],
)
def test_a_damaged_record_is_ignored_with_one_warning(opened, damage, caplog):
    path = choice.write(made(opened))
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert {model(opened)["backend"] for _ in range(3)} == {"ort"}
    (message,) = warned(caplog)
    assert message.startswith(f"{path} is ignored: ")
    assert message.endswith("; dgm4 bench --choose writes it anew")
    assert "\n" not in message


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_a_record_that_cannot_be_read(opened, caplog):
    choice.write(made(opened)).chmod(0)
    assert model(opened)["backend"] == "ort"
    assert "Permission denied" in caplog.text


def test_a_folder_in_the_place_of_the_record(opened, caplog):
    path = choice.write(made(opened))
    path.unlink()
    path.mkdir()
    assert model(opened)["backend"] == "ort"
    with pytest.raises(BackendError, match="the choice cannot be written: .*, or set XDG_CACHE_HOME"):
        choice.write(made(opened))
    assert "is ignored: " in caplog.text


def test_writers_at_once_leave_a_whole_record(opened, cache, caplog):
    choices = [made(opened, backend=name, model="x" * 9_000) for name in ("ort", "torch")]
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(lambda one=one: [choice.write(one) for _ in range(20)]) for one in choices]
        while not all(future.done() for future in writing):
            assert choice.find(opened, None) in (*choices, None)
        [future.result() for future in writing]
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    assert warned(caplog) == []


def test_recorded_lists_what_can_be_read(opened):
    here = made(opened)
    choice.write(here)
    there = made(opened, situation=dataclasses.replace(here.situation, cores=4096))
    choice.write(there)
    found = list(choice.recorded())
    assert sorted(found, key=lambda one: one.situation.cores) == [here, there]
    assert [choice.applies(one) for one in (here, there)] == [True, False]
