"""Reading a JSON object field by field, with a check of every type; mistakes are BundleErrors by path."""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn

from engine.errors import BundleError

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fields:
    """A JSON object whose fields are read with a check of their type."""

    def __init__(self, raw: object, path: str):
        if not isinstance(raw, dict):
            raise BundleError(f"{MANIFEST}: {path or 'the document'}: expected an object, got {_show(raw)}")
        self.raw = raw
        self.path = path

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raise the BundleError of the field `name`."""
        found = _show(self.raw[name]) if name in self.raw else "nothing"
        raise BundleError(f"{MANIFEST}: {self._at(name)}: expected {expected}, got {found}")

    def value(self, name: str) -> Any:
        """Return the field as it is; it must be there."""
        if name not in self.raw:
            self.fail(name, "a value")
        return self.raw[name]

    def text(self, name: str) -> str:
        """Return a string field."""
        value = self.value(name)
        return value if isinstance(value, str) else self.fail(name, "a string")

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        """Return a string field that is one of `known`."""
        value = self.text(name)
        return value if value in known else self.fail(name, f"one of {', '.join(known)}")

    def digest(self, name: str) -> str:
        """Return a SHA-256 in lower-case hexadecimal."""
        value = self.text(name)
        return value if _SHA256.fullmatch(value) else self.fail(name, "64 lower-case hexadecimal digits")

    def integer(self, name: str, low: int = 1) -> int:
        """Return an integer field of at least `low`."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fail(name, f"an integer >= {low}")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a finite number field within [low, high]."""
        value = self.value(name)
        if not _is_number(value) or not low <= value <= high:
            self.fail(name, f"a finite number in [{low}, {high}]")
        return float(value)

    def boolean(self, name: str) -> bool:
        """Return a true or false field."""
        value = self.value(name)
        return value if isinstance(value, bool) else self.fail(name, "true or false")

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings."""
        value = self.value(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(name, "a list of strings")
        return tuple(value)

    def triple(self, name: str) -> tuple[float, float, float]:
        """Return a list of three finite numbers."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) != 3 or not all(_is_number(item) for item in value):
            self.fail(name, "a list of three numbers")
        return float(value[0]), float(value[1]), float(value[2])

    def child(self, name: str) -> Fields:
        """Return a field that is an object."""
        return Fields(self.value(name), self._at(name))

    def children(self, name: str) -> list[Fields]:
        """Return a field that is a list of objects."""
        value = self.value(name)
        if not isinstance(value, list):
            self.fail(name, "a list")
        return [Fields(item, f"{self._at(name)}[{i}]") for i, item in enumerate(value)]

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: object) -> bool:
    # abs() <= a float's largest: an integer beyond it cannot become one.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1.7e308
