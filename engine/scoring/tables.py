"""A list as a table of text: CSV and its relatives."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.errors import quoted
from engine.inputs.boxes import box_of_text
from engine.scoring.entries import CAPTION_NAMES, IMAGE_NAMES, SHOWN, Entry, failed, shown

TABLES = (".csv", ".tsv")
_DELIMITERS = ",;\t|"
_COLUMN_NAME = re.compile(r"[^\W\d][\w -]*")  # a path has a dot or a slash


@dataclass(frozen=True)
class Table:
    """How a CSV is read: delimiter, number of columns, and which hold image, caption, id and box."""

    delimiter: str
    columns: int
    image: int
    caption: int
    id: int | None
    box: int | None
    header: bool

    @staticmethod
    def found(first: bytes, suffix: str) -> Table | None:
        """The table that the first line is of, or None."""
        line = first.decode(errors="replace")
        rows = {delimiter: next(csv.reader([line], delimiter=delimiter)) for delimiter in _DELIMITERS}
        for delimiter, row in rows.items():
            names = [name.strip().lower() for name in row]
            image, caption = (
                next((names.index(x) for x in known if x in names), None)
                for known in (IMAGE_NAMES, CAPTION_NAMES)
            )
            if image is not None and caption is not None:
                known, box = (names.index(name) if name in names else None for name in ("id", "box"))
                return Table(delimiter, len(row), image, caption, known, box, True)
        # Without a header a comma may be one of the caption's, so that outside a .csv only a tab counts.
        for delimiter, row in rows.items():
            if len(row) == 2 and (delimiter == "\t" or suffix in TABLES) and not _is_header(row):
                return Table(delimiter, 2, 0, 1, None, None, False)
        return None

    def read(self, lines: Iterator[tuple[int, bytes]], read: int) -> Iterator[Entry]:
        """The entries of numbered lines; `read` is the number of the last line before them."""
        taken: list[str] = []  # the lines of the row

        def text() -> Iterator[str]:
            nonlocal read
            for number_of_line, line in lines:
                read = number_of_line
                taken.append(line.decode(errors="surrogateescape"))
                yield taken[-1]

        rows = csv.reader(text(), delimiter=self.delimiter)
        if self.header:
            next(rows)
        while True:
            number = read + 1
            taken.clear()
            try:
                row = next(rows)
                if len(taken) > 1:  # a quote that nothing closes takes all the lines after it
                    list(csv.reader(taken, delimiter=self.delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error as error:
                row = next(csv.reader(taken[:1], delimiter=self.delimiter))
                reason = f"{error}; close the quotes of its caption, and double those within"
                yield failed(self._known(row, number), reason)
                continue
            if len(row) > 1 or any(cell.strip() for cell in row):
                yield self._entry(row, number)

    def _entry(self, row: list[str], number: int) -> Entry:
        entry = self._known(row, number)
        if len(row) != self.columns:
            return failed(
                entry,
                f"expected {self.columns} fields, got {len(row)}; "
                f"quote a caption that holds the delimiter {self.delimiter!r}",
            )
        caption = row[self.caption] if row[self.caption].strip() else None
        if caption is not None and not _is_utf8(caption):
            return failed(entry, f"expected UTF-8, got {quoted(caption[:SHOWN])}; save the list as UTF-8")
        if entry.image is None and caption is None:
            return failed(entry, "expected an image or a caption, got two empty cells")
        return replace(entry, caption=caption)

    def _known(self, row: list[str], number: int) -> Entry:
        """The image and the id of a row, also of one that a delimiter in its caption has cut."""

        def cell(column: int | None) -> str | None:
            if column is None:
                return None
            place = column if column < self.caption else column + len(row) - self.columns
            return row[place].strip() or None if 0 <= place < len(row) and place != self.caption else None

        box: list[float] | str | None = cell(self.box)
        if isinstance(box, str):
            with contextlib.suppress(ValueError):  # the predictor refuses the cell as it is
                box = box_of_text(box)
        return Entry(number, cell(self.image), None, cell(self.id), box=box)


def _is_header(row: list[str]) -> bool:
    """Whether a row of two cells names columns rather than an image and its caption."""
    names = [cell.strip().lower() for cell in row]
    known = (*IMAGE_NAMES, *CAPTION_NAMES)
    return any(name in known for name in names) or all(_COLUMN_NAME.fullmatch(name) for name in names)


def why_no_table(first: bytes) -> str:
    """Why the first line is of no table, and what to do."""
    line = first.decode(errors="replace").lower()
    cells = [cell.strip() for cell in re.split(rf"[{re.escape(_DELIMITERS)}]", line)]
    found = [known[0] for known in (IMAGE_NAMES, CAPTION_NAMES) if any(name in cells for name in known)]
    expected = "expected a header with the columns image and caption, or two columns without one"
    if len(found) == 1:
        lacking = "caption" if found == ["image"] else "image"
        advice = f"add the column {lacking}, whose cells may be empty, or give it this name"
    elif len(cells) == 2 and _is_header(cells):
        advice = "give its columns these names, or put image,caption above a row that is a pair"
    else:
        advice = "quote a caption that holds the delimiter"
    return f"{expected}, got {shown(first)}; {advice}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # holds bytes that are not
        return False
    return True
