"""Spans: none where OpenTelemetry is not imported; else the stages, by shape and without contents."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from engine import Batcher, InputError
from engine.tracing import span

SECRET = "Rosebud"


def test_without_opentelemetry_nothing_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    with span("prepare", pairs=1) as note:
        note(tokens=3)
    code = "import sys, engine, dgm4; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def spans(monkeypatch):
    """The spans that ended, through a provider of the SDK."""
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


def test_the_stages_of_a_pair_lie_in_the_callers_span(predictor, photo, spans):
    import opentelemetry.trace

    with opentelemetry.trace.get_tracer("theirs").start_as_current_span("request") as request:
        predictor.predict(photo, f"{SECRET} speaks")
        list(predictor.stream([(photo, SECRET)] * 3, batch_size=2))
    *stages, _ = spans()
    assert [stage.name for stage in stages[:3]] == ["dgm4.prepare", "dgm4.inference", "dgm4.postprocess"]
    assert {stage.parent.span_id for stage in stages} == {request.get_span_context().span_id}
    prepare, inference, postprocess = (dict(stage.attributes) for stage in stages[:3])
    tokens = prepare["dgm4.tokens"]
    assert prepare == {"dgm4.width": photo.width, "dgm4.height": photo.height, "dgm4.tokens": tokens}
    assert (inference["dgm4.pairs"], inference["dgm4.tokens"]) == (1, tokens)
    assert inference["dgm4.backend"] == predictor.model["backend"]
    assert postprocess == {"dgm4.words": 2}
    assert SECRET not in "".join(stage.to_json() for stage in stages)


def test_an_error_is_told_by_its_class_alone(predictor, spans):
    with pytest.raises(InputError):
        predictor.predict(f"{SECRET}.jpg", "words")
    (stage,) = spans()
    assert (stage.name, stage.status.status_code.name) == ("dgm4.prepare", "ERROR")
    assert dict(stage.attributes) == {"error.type": "InputError"}
    assert SECRET not in stage.to_json() and not stage.events


def test_the_stages_of_a_batch_lie_in_its_first_callers_span_and_know_the_others(predictor, photo, spans):
    """Two callers whose pairs share a batch: `held` keeps the network busy until both wait."""
    trace = pytest.importorskip("opentelemetry.trace")
    tracer, held = trace.get_tracer("theirs"), threading.Event()
    submit = predictor._runner.submit

    def wait(items):
        assert held.wait(20)
        return submit(items)

    with Batcher(predictor, max_wait_ms=10_000) as batcher:
        batcher._runner = Slow(predictor._runner, wait)
        futures, callers = [batcher.submit(photo, "alone")], []
        while batcher.statistics().batches == 0:
            time.sleep(0.001)
        for caption in ("first", "second"):
            with tracer.start_as_current_span(caption) as request:
                callers.append(request.get_span_context())
                futures.append(batcher.submit(photo, caption))
            while batcher.statistics().ready < len(callers):  # else the second may be ready first
                time.sleep(0.001)
        held.set()
        assert [future.result(20).caption for future in futures] == ["alone", "first", "second"]
    alone, batch = (stage for stage in spans() if stage.name == "dgm4.batch")
    assert alone.parent is None and alone.links == ()
    assert batch.parent.span_id == callers[0].span_id and batch.attributes["dgm4.pairs"] == 2
    assert [link.context.span_id for link in batch.links] == [callers[1].span_id]
    inside = [
        stage.name for stage in spans() if stage.parent and stage.parent.span_id == batch.context.span_id
    ]
    assert inside == ["dgm4.inference", "dgm4.postprocess", "dgm4.postprocess"]
    prepared = [stage for stage in spans() if stage.name == "dgm4.prepare"]
    assert {stage.parent and stage.parent.span_id for stage in prepared} == {
        None,
        *(caller.span_id for caller in callers),
    }


class Slow:
    """A runner whose batches go through `submit`."""

    def __init__(self, runner, submit):
        self._runner, self.submit = runner, submit

    def __getattr__(self, name):
        return getattr(self._runner, name)
