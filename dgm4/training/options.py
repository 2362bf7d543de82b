"""What a training run is: options, and the recipes that hold them as TOML."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engine.errors import InputError, quoted
from engine.registry import SIZES, TRAINABLE

PRECISIONS = ("fp32", "bf16", "fp16")
_LARGEST_SEED = 2**32


@dataclass(frozen=True)
class TrainOptions:
    """A recipe; the defaults are HAMMER's published ones.

    `batch` is pairs a process and step, `accumulate` steps a weight update. `lr_vision` is the visual
    encoder's rate; warm-up is linear, then a cosine down to `min_lr`, both counted in epochs. `clip` bounds
    the norm of the gradient, 0 for no bound. `queue` counts past features of the contrastive losses.
    `guidance` (ASAP's MGCA loss), `refinement` (CALS's GLRM) and `sampled` (CAFormer) are those of `Trainee`.
    `flip` mirrors half of the images.
    """

    model: str = "hammer"
    size: str = "base"
    epochs: int = 50
    batch: int = 32
    accumulate: int = 1
    lr: float = 2e-5
    lr_vision: float = 5e-5
    min_lr: float = 1e-6
    weight_decay: float = 0.02
    warmup_epochs: float = 10.0
    clip: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    queue: int = 65536
    seed: int = 1
    flip: bool = True
    guidance: bool = True
    refinement: bool = True
    sampled: bool = True

    def __post_init__(self) -> None:
        """Raise InputError for a value out of range."""
        for name, known in (("model", TRAINABLE), ("size", SIZES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}: expected one of {', '.join(known)}, got {quoted(getattr(self, name))}"
                )
        for name in ("epochs", "batch", "accumulate", "queue", "lr", "lr_vision"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: expected a value above 0, got {quoted(getattr(self, name))}")
        for name in ("min_lr", "weight_decay", "warmup_epochs", "clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: expected a value from 0, got {quoted(getattr(self, name))}")
        if self.seed > _LARGEST_SEED:
            raise InputError(f"seed: expected at most {_LARGEST_SEED}, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read a TOML file of `TrainOptions` fields; raises InputError for another field or type."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a recipe in TOML: {error}") from error
    return check_fields(content, str(path))


def check_fields(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return `values` with whole numbers as floats where floats are meant; raises InputError."""
    known = {field.name: type(field.default) for field in fields(TrainOptions)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{source}: unknown field {quoted(name)}; expected some of {', '.join(known)}")
        kind = known[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{source}: {name}: expected {kind.__name__}, got {quoted(value)}")
        checked[name] = value
    return checked
