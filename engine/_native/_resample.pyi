from collections.abc import Iterable
from typing import Any

def resample(
    bands: Iterable[Any], width: int, height: int, levels: Any, out: Any, *, passes: str | None = None
) -> None: ...
def passes() -> list[str]: ...
