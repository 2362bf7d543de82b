from collections.abc import Buffer, Iterable

def resample(
    bands: Iterable[Buffer | tuple[object, object]],
    width: int,
    height: int,
    levels: Buffer,
    out: Buffer,
    *,
    passes: str | None = None,
) -> None: ...
def passes() -> list[str]: ...
