"""A pair of a list, and its place there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from engine.errors import InputError, quoted, shorten
from engine.inputs.pairs import box_of

IMAGE_NAMES, CAPTION_NAMES = ("image", "file_name"), ("caption", "text")
SHOWN = 60  # characters of a faulty line that a message repeats
ROW = "row"  # the unit of a list in Parquet
_LONGEST_PATH = 4096  # characters: the system's limit
_EXPECTED = 'expected {"image": path, "caption": text}, where one of the two may be null'


class Mark(NamedTuple):
    """A place in a list: how many bytes and lines of its text come before it, or how many items."""

    offset: int = 0
    number: int = 0


START = Mark()


@dataclass(frozen=True)
class Entry:
    """A pair of a list, or what is wrong with it; `number` counts lines, or items where there are none.

    `image` is the path as the list has it, relative to `PairList.base`; `id` what the list calls the pair.
    The image or the caption is None where the list has none. Of a pair with an error what is known is there.
    `unit` is what `number` counts: "line" or "item". `content` are the bytes of an image that the list itself
    holds, `box` the box to judge.
    """

    number: int
    image: str | None = None
    caption: str | None = None
    id: Any = None
    error: InputError | None = None
    unit: str = "line"
    content: bytes | None = field(default=None, repr=False)
    box: Any = None

    @property
    def place(self) -> str:
        """What a message calls the pair, as "line 3"."""
        return f"{self.unit} {self.number}"

    @property
    def name(self) -> str:
        """What people know it by."""
        return self.image or self.place

    def head(self) -> dict[str, Any]:
        """What the record of the pair's prediction begins with."""
        identity = {} if self.id is None else {"id": self.id}
        image = self.image
        if image is not None and len(image) > _LONGEST_PATH:  # an image in base64, say
            image = shorten(image)
        return {"line": self.number, "image": image, **identity}


def make_entry(record: Any, empty: Entry, shown: str) -> Entry:
    """The pair of a JSON object, at the place of `empty`, which may have the image's content."""
    if isinstance(record, dict):
        image, caption = (_first(record, names) for names in (IMAGE_NAMES, CAPTION_NAMES))
        known = image if isinstance(image, str) else None
        empty = replace(empty, image=known, id=record.get("id"))
        neither = image is None and caption is None and empty.content is None
        if known == image and isinstance(caption, str | None) and not neither:
            return replace(empty, caption=caption, box=box_of(record))
    return failed(empty, f"{_EXPECTED}, got {shown}")


def failed(entry: Entry, reason: str) -> Entry:
    """The entry of a pair that cannot be used, with what is known of it."""
    where = entry.place if entry.image is None else f"{entry.place} ({quoted(entry.image)})"
    return replace(entry, error=InputError(f"{where}: {reason}"))


def _first(record: dict[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if name in record), None)


def shown(line: bytes) -> str:
    """What a message repeats of a faulty line."""
    return repr(line.decode(errors="replace").strip()[:SHOWN])
