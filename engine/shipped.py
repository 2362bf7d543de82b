"""The ready bundles that ship with the package, by name: `Predictor("demo:asap")`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from engine.errors import BundleError, did_you_mean, shorten
from engine.layout import MANIFEST
from engine.registry import NETWORKS

_PREFIX, _SUFFIX = "demo:", "-int8"


def shipped_bundles() -> list[str]:
    """Names of the bundles that ship, such as "demo:asap"; each stands for its path."""
    folder = _folder()
    found = sorted(folder.glob(f"*{_SUFFIX}/{MANIFEST}")) if folder else []
    return [f"{_PREFIX}{path.parent.name.removesuffix(_SUFFIX)}" for path in found]


def locate(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path of the bundle that a name such as "demo:asap" stands for, anything else as it is.

    Raises BundleError for a name whose bundle does not ship.
    """
    name = str(path)
    if not name.startswith(_PREFIX):
        return path
    known = shipped_bundles()
    folder = _folder()
    if name not in known or folder is None:
        network = name.removeprefix(_PREFIX)
        make = (
            f"; make one: dgm4 export --model {network}" if network in NETWORKS else did_you_mean(name, known)
        )
        ready = ", ".join(known) or "not installed"
        raise BundleError(f"{shorten(name)}: expected the name of a ready bundle ({ready}){make}")
    return folder / f"{name.removeprefix(_PREFIX)}{_SUFFIX}"


def suggest(path: Path) -> str:
    """A question that names the ready bundle which was probably meant by a path to nothing."""
    wanted = f"{_PREFIX}{path.name}"
    return f"; did you mean {wanted}?" if wanted in shipped_bundles() else ""


def _folder() -> Path | None:
    """The package's demo folder, found without importing what needs torch; None where it is not installed."""
    spec = importlib.util.find_spec("dgm4")
    places = (spec.submodule_search_locations if spec else None) or []
    return next((Path(place) / "demo" for place in places if (Path(place) / "demo").is_dir()), None)
