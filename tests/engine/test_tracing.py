"""Spans: none where OpenTelemetry is not imported; else the stages, by shape and without contents."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engine import InputError
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
