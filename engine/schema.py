"""Dataclasses that are read from JSON and written as JSON, each mistake an error by the field's path.

The annotation of a field is its schema:

    str, bool, int, float           a float is finite, true is no integer, and no text is endless
    Annotated[int, at_least(1)]     with a `Check`: `at_least`, `whole`, `within`, `one_of`, `matching`
    X | None, int | str             null is allowed; either type
    tuple[X, ...], tuple[X, X]      a list of any length; of this length
    dict[str, X]                    an object with any names
    a subclass of Record            an object with these fields

A field with a default may be missing. A field that is not known is a mistake: what a release cannot read, it
must not take for something else. Only an `open` record ignores it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    NamedTuple,
    NoReturn,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from engine.errors import BundleError, Dgm4Error, quoted, shorten
from engine.layout import MANIFEST

_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    dict: "an object",
    tuple: "a list",
}
_LARGEST = 1.7e308  # an integer beyond it cannot become a float
_EXACT = 2**53  # integers up to it are the same number in every reader of JSON
_LONGEST = 10_000  # characters of a string


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


class Check(NamedTuple):
    """A condition on a value of the right type, and what a message says is expected."""

    expected: str
    passes: Callable[[Any], bool]


def at_least(low: int) -> Check:
    """An integer from `low` on."""
    return Check(f"an integer >= {low}", lambda value: low <= value <= _EXACT)


def whole(low: int, high: int) -> Check:
    """An integer from `low` to `high`."""
    return Check(f"an integer from {low} to {high}", lambda value: low <= value <= high)


def within(low: float, high: float = math.inf) -> Check:
    """A finite number from `low` to `high`."""
    return Check(f"a finite number in [{low}, {high}]", lambda value: low <= value <= high)


def one_of(*choices: str) -> Check:
    """One of these strings."""
    return Check(f"one of {', '.join(choices)}", lambda value: value in choices)


def matching(pattern: str, expected: str) -> Check:
    """A string that the regular expression matches as a whole."""
    compiled = re.compile(pattern)
    return Check(expected, lambda value: compiled.fullmatch(value) is not None)


class _Mismatch(Exception):
    """A field that is not what its annotation says."""


class Record:
    """Base of frozen dataclasses that a JSON object holds; messages call that object `document`."""

    document: ClassVar[str] = MANIFEST
    error: ClassVar[type[Dgm4Error]] = BundleError
    open: ClassVar[bool] = False
    newer: ClassVar[str] = "a newer dgm4 may have written it: update the package"

    @classmethod
    def from_dict(cls, raw: object, path: str = "") -> Self:
        """Read a parsed JSON object; `path` is where it stands. Raises `error` naming a wrong field."""
        try:
            record: Self = _read_record(cls, raw, path)
        except _Mismatch as mismatch:
            raise cls.error(f"{cls.document}: {mismatch}") from None
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; a field whose default is None is left out where it is None."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: (getattr(self, field.name), field.default) for field in fields}
        return {
            name: _plain(value)
            for name, (value, default) in values.items()
            if not (value is None and default is None)
        }

    @classmethod
    def _chosen(cls, raw: dict[str, Any], path: str) -> type[Self]:
        """The class to read an object as; a base that has several chooses by a field."""
        return cls

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the object with the fields of today; a subclass renames those of older files."""
        return raw

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """Yield (field, expected, value) for each field that does not fit the others."""
        return iter(())


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_type_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def _read_record(kind: Any, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        fail(path or "the document", _NAMES[dict], raw)
    kind = kind._chosen(raw, path)
    raw, kinds, values = kind.upgrade(raw), _type_hints(kind), {}
    fields = dataclasses.fields(kind)
    for field in fields:
        if field.name in raw:
            values[field.name] = _read(kinds[field.name], raw[field.name], _join(path, field.name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            fail(_join(path, field.name), "a value", NOTHING)
    if not kind.open and (unknown := raw.keys() - {field.name for field in fields}):
        name = min(unknown)
        fail(_join(path, shorten(name)), "no field of this name", raw[name], kind.newer)
    record = kind(**values)
    for name, expected, value in record.problems():
        fail(_join(path, name), expected, value)
    return record


def _read(kind: Any, value: Any, path: str, expected: str | None = None) -> Any:
    """Return the JSON `value` as the type `kind`; `expected` is what a message says in place of the type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner, check = arguments
        result = _read(inner, value, path, check.expected)
        return result if check.passes(result) else fail(path, check.expected, value)
    if origin in (Union, UnionType):  # Annotated[X, ...] | None is a typing.Union
        return _read_union(arguments, value, path)
    if origin is tuple:
        return _read_list(arguments, value, path, expected)
    if origin is dict:
        if not isinstance(value, dict):
            fail(path, _NAMES[dict], value)
        return {name: _read(arguments[1], item, _join(path, name)) for name, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Record):
        return _read_record(kind, value, path)
    if kind is float and type(value) in (int, float) and abs(value) <= _LARGEST:  # false for NaN
        return float(value)
    if kind is str and type(value) is str and len(value) > _LONGEST:
        fail(path, f"a string of at most {_LONGEST} characters", value)
    if kind is not float and type(value) is kind:  # type(): true is no integer
        return value
    return fail(path, expected or _NAMES[kind], value)


def _read_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    first, *rest = (kind for kind in kinds if kind is not NoneType)
    if not rest:
        return _read(first, value, path)
    if type(value) not in kinds:
        fail(path, " or ".join(_NAMES[kind] for kind in (first, *rest)), value)
    return value


def _read_list(kinds: tuple[Any, ...], value: Any, path: str, expected: str | None) -> tuple[Any, ...]:
    any_length = kinds[-1] is Ellipsis
    if not isinstance(value, list) or not (any_length or len(value) == len(kinds)):
        fail(path, expected or (_NAMES[tuple] if any_length else f"a list of {len(kinds)}"), value)
    if any_length:
        kinds = kinds[:1] * len(value)
    return tuple(_read(kinds[i], item, f"{path}[{i}]") for i, item in enumerate(value))


def fail(path: str, expected: str, value: object, remedy: str = "") -> NoReturn:
    """Refuse the field at `path` of the record being read; NOTHING as `value` for one that is missing."""
    raise _Mismatch(f"{path}: expected {expected}, got {quoted(value)}{remedy and f'; {remedy}'}")


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly; raises ValueError for NaN, infinities and an object that names a field twice."""
    return json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object names a field twice")
    return fields


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
