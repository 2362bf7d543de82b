"""Altered bundles: files, and manifests signed again as by their maker, and what opening them says."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fuzz.pictures import MUTATIONS
from engine.bundle import Bundle
from engine.errors import Dgm4Error
from engine.layout import MANIFEST
from engine.manifest import manifest_digest, parse_manifest
from export.bundle.writer import BundleWriter

_ABSURD: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63, 10**86, -(10**86), 0.5, 1e308, -0.0, 5e-324, True, False, None),
    *("", "a", "batch", "/etc/passwd", "..", "\x00", "\ud800", "x" * 20_000, "fp32", "0" * 64),
    *([], {}, [None], [[]], {"": {}}, {"sha256": "0" * 64}, [1, 2, 3], ["a", "b"]),
)
_DEPTHS = (1, 50, 500)


class TriedBundle(NamedTuple):
    """What became of one altered bundle.

    outcome: "refused", "same" where nothing of meaning changed, "read" where a signed value is read as it
    stands, or "silent": accepted, and it is not what the file says. place: the field or file. seconds: of
    this thread's CPU time.
    """

    kind: str
    place: str
    outcome: str
    seconds: float
    message: str = ""


def sound_bundle(out: Path) -> Path:
    """Write a small whole bundle to `out`: the demo's manifest, and files of a few kilobytes."""
    manifest = Bundle.open("demo:asap").manifest
    random = np.random.default_rng(0)
    with BundleWriter(out) as writer:
        for name in manifest.files:
            writer.path(name).write_bytes(random.bytes(3000))
        writer.commit(manifest.to_dict())
    return out


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a JSON document, at any depth."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*path, key))


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def altered_manifest(
    manifest: dict[str, Any], random: np.random.Generator
) -> tuple[str, str, dict[str, Any]]:
    """(What was done, where, the altered content): one value replaced, removed, added or moved."""
    content, places = copy.deepcopy(manifest), list(_places(manifest))
    *parents, last = places[int(random.integers(len(places)))]
    parent: Any = functools.reduce(lambda value, key: value[key], parents, content)
    kind = str(random.choice(["replaced", "scaled", "removed", "added", "nested", "swapped"]))
    value = parent[last]
    if kind == "scaled" and type(value) in (int, float):
        parent[last] = value * [-1, 0, 2, 1000, 10**30][int(random.integers(5))]
    elif kind == "removed":
        del parent[last]
    elif kind in ("added", "nested"):
        if isinstance(parent, dict):
            parent["added"] = _nested(int(random.choice(_DEPTHS))) if kind == "nested" else _absurd(random)
        else:
            parent.insert(int(random.integers(len(parent) + 1)), _absurd(random))
    elif kind == "swapped":
        other = places[int(random.integers(len(places)))]
        parent[last] = copy.deepcopy(functools.reduce(lambda value, key: value[key], other, manifest))
    else:
        kind, parent[last] = "replaced", _absurd(random)
    return kind, ".".join(str(key) for key in (*parents, last)), content


def _absurd(random: np.random.Generator) -> Any:
    return copy.deepcopy(_ABSURD[int(random.integers(len(_ABSURD)))])


def try_manifest(seed: int, bundle: Path) -> TriedBundle:
    """Read the manifest of `bundle` with one value altered and its own hash made right again."""
    random, sound = np.random.default_rng([3, seed]), _content(bundle)
    kind, place, content = altered_manifest(sound, random)
    begun = time.thread_time()
    try:
        read = parse_manifest(_signed(content)).to_dict()
    except Dgm4Error as error:
        return TriedBundle(kind, place, "refused", time.thread_time() - begun, str(error))
    took = time.thread_time() - begun
    if _equal(content, sound):
        return TriedBundle(kind, place, "same", took)
    # What was read says what the file says, with nothing but defaults added.
    return TriedBundle(kind, place, "read" if _filled(content, read) else "silent", took)


def _filled(content: Any, read: Any) -> bool:
    """Whether `read` is the content with nothing but defaults added; a field that is null may be missing."""
    if isinstance(content, dict):
        return isinstance(read, dict) and all(
            _filled(value, read.get(name)) for name, value in content.items()
        )
    if isinstance(content, list):
        return isinstance(read, list) and len(read) == len(content) and all(map(_filled, content, read))
    return _equal(content, read)


def _equal(first: Any, second: Any) -> bool:
    """Equal as JSON, where 1 and 1.0 are the same number and true is none."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(isinstance(first, bool) == isinstance(second, bool) and first == second)


@functools.cache
def _content(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    del content["sha256"]
    return content


def _signed(content: dict[str, Any]) -> bytes:
    return json.dumps({**content, "sha256": manifest_digest(content)}).encode()


def try_files(seed: int, bundle: Path, work: Path) -> TriedBundle:
    """Open and verify a copy of `bundle` in `work` with one file mutated, missing, exchanged or added."""
    random = np.random.default_rng([4, seed])
    names = sorted(path.name for path in bundle.iterdir())
    name = names[int(random.integers(len(names)))]
    kind = str(random.choice([*MUTATIONS, "missing", "exchanged", "foreign"]))
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(bundle, work)
    path, data = work / name, bytearray((bundle / name).read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "exchanged":
        path.write_bytes((bundle / names[(names.index(name) + 1) % len(names)]).read_bytes())
    elif kind == "foreign":
        (work / f"foreign-{name}").write_bytes(data)
    else:
        MUTATIONS[kind](data, random)
        path.write_bytes(data)
    return _open(kind, name, bundle, work)


def _open(kind: str, name: str, bundle: Path, work: Path) -> TriedBundle:
    begun = time.thread_time()
    try:
        opened = Bundle.open(work)
        opened.verify_all()
    except Dgm4Error as error:
        return TriedBundle(kind, name, "refused", time.thread_time() - begun, str(error))
    took, others = time.thread_time() - begun, [path for path in bundle.iterdir() if path.name != MANIFEST]
    same = opened.manifest == Bundle.open(bundle).manifest and all(
        (work / path.name).read_bytes() == path.read_bytes() for path in others
    )
    return TriedBundle(kind, name, "same" if same else "silent", took)
