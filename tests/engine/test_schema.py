"""Records that are read from JSON by their annotations, and written as they were read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from engine.errors import BundleError
from engine.manifest import EngineEntry, parse_manifest
from engine.schema import Record, at_least, matching, one_of, whole, within


@dataclass(frozen=True)
class Part(Record):
    name: Annotated[str, matching("[a-z]+", "lower-case letters")]
    share: Annotated[float, within(0, 1)]


@dataclass(frozen=True)
class Whole(Record):
    kind: Annotated[str, one_of("red", "blue")]
    count: Annotated[int, at_least(1)]
    note: str | None
    size: int | str
    pair: tuple[float, float]
    parts: tuple[Part, ...]
    named: dict[str, Part]
    spread: Annotated[int, whole(1, 9)]
    on: bool = False
    more: dict[str, int] = field(default_factory=dict)
    extra: Annotated[str, one_of("x")] | None = None

    def problems(self) -> Iterator[tuple[str, str, object]]:
        if self.count < len(self.parts):
            yield "count", f"at least {len(self.parts)}, one a part", self.count


PART = {"name": "a", "share": 0.5}
WHOLE = {
    "kind": "red",
    "count": 2,
    "note": None,
    "size": "batch",
    "pair": [1, 2.5],
    "parts": [PART, PART],
    "named": {"one": PART},
    "spread": 9,
}


def test_a_record_survives_json():
    raw = {**WHOLE, "on": True, "more": {"a": 1}, "extra": "x"}
    record = Whole.from_dict(raw)
    assert record.pair == (1.0, 2.5)
    assert record.parts == (Part("a", 0.5), Part("a", 0.5))
    assert json.loads(json.dumps(record.to_dict())) == raw
    assert Whole.from_dict(record.to_dict()) == record


def test_defaults_are_written_but_for_none():
    written = Whole.from_dict(WHOLE).to_dict()
    assert written == {**WHOLE, "on": False, "more": {}}
    assert "extra" not in written
    assert written["note"] is None  # it has no default, so it is always there


def test_unknown_fields_are_mistakes_unless_the_record_is_open(monkeypatch):
    newer = {**WHOLE, "parts": [PART, {**PART, "newer": {"a": 1}}]}
    with pytest.raises(
        BundleError, match=r"parts\[1\]\.newer: expected no field of this name, got \{.*\}; a newer dgm4 may"
    ):
        Whole.from_dict(newer)
    monkeypatch.setattr(Part, "open", True)
    assert Whole.from_dict(newer) == Whole.from_dict(WHOLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "green"}, "at.kind: expected one of red, blue, got 'green'"),
        ({"kind": ["red"]}, "at.kind: expected one of red, blue, got ['red']"),
        ({"count": 0}, "at.count: expected an integer >= 1, got 0"),
        ({"count": 2**60}, "at.count: expected an integer >= 1, got 1152921504606846976"),
        ({"spread": 10**86}, "at.spread: expected an integer from 1 to 9, got 1000"),
        ({"note": "x" * 10_001}, "at.note: expected a string of at most 10000 characters, got 'xxx"),
        ({"count": True}, "at.count: expected an integer >= 1, got True"),
        ({"count": 1}, "at.count: expected at least 2, one a part, got 1"),
        ({"note": 3}, "at.note: expected a string, got 3"),
        ({"size": None}, "at.size: expected an integer or a string, got None"),
        ({"pair": [1]}, "at.pair: expected a list of 2, got [1]"),
        ({"pair": [1, float("nan")]}, "at.pair[1]: expected a finite number, got nan"),
        ({"pair": [1, 10**400]}, "at.pair[1]: expected a finite number, got 1000"),
        ({"parts": {}}, "at.parts: expected a list, got {}"),
        ({"parts": [PART, 5]}, "at.parts[1]: expected an object, got 5"),
        ({"parts": [{"name": "a"}]}, "at.parts[0].share: expected a value, got nothing"),
        (
            {"named": {"one": {**PART, "name": "A"}}},
            "at.named.one.name: expected lower-case letters",
        ),
        ({"named": []}, "at.named: expected an object, got []"),
        ({"on": 1}, "at.on: expected true or false, got 1"),
        ({"extra": "y"}, "at.extra: expected one of x, got 'y'"),
        (
            {"parts": [{**PART, "share": 1.5}]},
            "at.parts[0].share: expected a finite number in [0, 1]",
        ),
    ],
)
def test_a_mistake_names_the_field(change, message):
    with pytest.raises(BundleError) as caught:
        Whole.from_dict({**WHOLE, **change}, "at")
    assert message in str(caught.value)


def test_a_manifest_is_written_as_it_was_read(bundle_dir):
    data = (bundle_dir / "manifest.json").read_bytes()
    content = {name: value for name, value in json.loads(data).items() if name != "sha256"}
    since = {"float32_layers": [], "kept_layers": []}  # which older manifests do not have
    weights = {"licence": "not stated", **content["weights"]}
    assert parse_manifest(data).to_dict() == {**since, **content, "weights": weights}


def test_an_engine_is_written_as_it_was_read():
    shapes = {"input_ids": {"min": [1, 2], "opt": [8, 50], "max": [8, 127]}}
    entry = {
        "file": "model.rtx-sm90.engine",
        "library": "tensorrt_rtx",
        "version": "1.7.1",
        "compute_capabilities": ["9.0"],
        "onnx_sha256": "0" * 64,
        "profiles": [shapes],
        "plugins": {"Gelu": 3},
        "fused_attention": 4,
        "stripped": False,
        "version_compatible": True,
        "hardware": "same",
        "build": {"seconds": 9.0, "peak_memory_mb": 812},
    }
    assert EngineEntry.from_dict(entry).to_dict() == entry
    older = {name: entry[name] for name in list(entry)[:5]} | {"profile": shapes}
    upgraded = EngineEntry.from_dict(older)
    assert upgraded.to_dict()["profiles"] == [shapes]
    assert "profile" not in upgraded.to_dict()
