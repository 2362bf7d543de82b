"""Parquet: the rows of a list, and a table of answers; pyarrow is imported at the first use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.errors import InputError
from engine.packages import require
from engine.registry.config import TYPES
from engine.result import to_rows

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"

_ROWS, _PACKED_ROWS = 1024, 32  # of a list that are held at once, the latter with images in them
_GROUP = 8192  # rows of answers that are held at once
_FLAGS, _COUNTS = ("manipulated",), ("line", "words", "marked", "width", "height")
_BOXES = tuple(f"{box}{corner}" for box in ("", "given_") for corner in ("x1", "y1", "x2", "y2"))
_NUMBERS = ("score", *TYPES, *_BOXES, "milliseconds")  # the other columns are text
_WANTED = {"image": ("image", "file_name"), "caption": ("caption", "text"), "id": ("id",), "box": ("box",)}


def read_rows(paths: Sequence[Path], skip: int, content: bool) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files from row `skip` on: image, caption, id, as far as the files have them.

    A column of images is of paths, of bytes, or of both in {"bytes", "path"}, as Hugging Face's data sets
    are. The bytes come as "content"; without `content` they are empty. Raises InputError for a file that
    cannot be read or has neither images nor captions.
    """
    require("a list in Parquet", "pyarrow")
    import pyarrow as arrow
    from pyarrow.parquet import ParquetFile

    for path in paths:
        try:
            with ParquetFile(path) as file:
                if skip >= file.metadata.num_rows:
                    skip -= file.metadata.num_rows
                    continue
                yield from _rows(file, path, skip, content)
                skip = 0
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _rows(file: ParquetFile, path: Path, skip: int, content: bool) -> Iterator[dict[str, Any]]:
    import pyarrow as arrow

    schema: pyarrow.Schema = file.schema_arrow
    found = {name: next((x for x in known if x in schema.names), None) for name, known in _WANTED.items()}
    columns = {name: column for name, column in found.items() if column is not None}
    if not columns.keys() & {"image", "caption"}:
        raise InputError(
            f"{path}: expected the columns image and caption, got {', '.join(schema.names[:8]) or 'none'}"
        )
    wanted = list(columns.values())
    packed = False
    if "image" in columns:
        kind = schema.field(columns["image"]).type
        packed = (
            arrow.types.is_struct(kind) or arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
        )
        if packed and not content:
            wanted.remove(columns["image"])
            wanted += [f"{columns['image']}.path"] if arrow.types.is_struct(kind) else []
    groups = range(file.num_row_groups)
    while skip >= (size := file.metadata.row_group(groups[0]).num_rows):
        skip, groups = skip - size, groups[1:]
    size = _PACKED_ROWS if packed and content else _ROWS
    for batch in file.iter_batches(size, row_groups=list(groups), columns=wanted):
        for record in batch.slice(min(skip, len(batch))).to_pylist():
            row = {name: record.get(column) for name, column in columns.items()}
            yield _unpacked(row, content) if packed else row
        skip = max(0, skip - len(batch))


def _unpacked(row: dict[str, Any], content: bool) -> dict[str, Any]:
    """A row whose image is bytes, or bytes with a path."""
    image = row.get("image")
    inner = image if isinstance(image, dict) else {"bytes": image}
    data = inner.get("bytes") if content else b""
    return row | {"image": inner.get("path"), "content": data}


def _schema() -> pyarrow.Schema:
    """The columns of answers: those of `to_rows` after what the list calls the pair."""
    import pyarrow as arrow

    kinds = {
        **dict.fromkeys(_FLAGS, arrow.bool_()),
        **dict.fromkeys(_COUNTS, arrow.int64()),
        **dict.fromkeys(_NUMBERS, arrow.float64()),
    }
    names = ("line", "image", "id", *to_rows([InputError()])[0])
    return arrow.schema([(name, kinds.get(name, arrow.string())) for name in names])


class TableWriter:
    """Context manager that writes answers, rows of `to_rows` with what the list calls them, to a file.

    Every file has the same columns and types. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        require("--format parquet", "pyarrow")
        from pyarrow.parquet import ParquetWriter

        self._schema = _schema()
        self._writer = ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Take a row; written with others."""
        self._rows.append(row)
        if len(self._rows) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as arrow

        self._writer.write_table(arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._rows:
            self._flush()
        self._writer.close()


def read_numbers(path: Path) -> Iterator[tuple[int, str | None]]:
    """The number of each row of a file of answers, and the kind of its error; raises InputError."""
    import pyarrow as arrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            table = file.read(columns=["line", "error_kind"])
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    yield from zip(table["line"].to_pylist(), table["error_kind"].to_pylist(), strict=True)
