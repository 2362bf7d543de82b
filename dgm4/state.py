"""The named tensors of a checkpoint file, read without running anything that the file asks for.

A file is what its bytes say, whatever its suffix: safetensors, torch's zip archive or its older pickle. The
state may be nested ({"model": state}, Lightning's, DeepSpeed's), and its names may carry the prefixes of
wrappers (`module.`, `_orig_mod.`).
"""

from __future__ import annotations

import argparse
import datetime
import logging
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from dgm4.places import check_checkpoint
from engine.errors import CheckpointError, quoted

log = logging.getLogger(__name__)

State = dict[str, Tensor]

_NAMED_AT_MOST = 5
_STATES = ("model", "state_dict", "module")  # the papers' key, that of training frameworks, DeepSpeed's
# First component of a name that a wrapper around the network adds.
_WRAPPERS = {"module", "model", "net", "network", "_orig_mod", "_forward_module"}
# Components that only wrappers have, anywhere in a name: torch.compile, FSDP, activation checkpointing.
_INNER = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_BLOCKED = re.compile(r"GLOBAL ([\w.]+) whose module \S+ is blocked")
_FILLED = re.compile(r"Can only SETITEMS? for .* got <class '(?:dgm4\.state\.)?([\w.]+)'>")
_MOST_FOREIGN = 100  # kinds of foreign objects in one file
_TAR_PLACE = 257  # of "ustar" in a tar archive

# What may stand beside the tensors: numbers, times, paths and options. None of it runs code.
_scalar: Any = np.float64(0).__reduce__()[0]
_array: Any = np.zeros(1).__reduce__()[0]
_PATHS = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath}
_SAFE_GLOBALS: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGUSmM"},
    np.ndarray,
    *(
        (function, f"{module}.{function.__name__}")
        for function in (_scalar, _array)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    ),
    argparse.Namespace,
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
    *(
        (kind, f"{module}.{pure}{name}Path")
        for name, kind in _PATHS.items()
        for pure in ("", "Pure")
        for module in ("pathlib", "pathlib._local")
    ),
]


class Found(NamedTuple):
    """A state, its place in the file ("model", "" for the whole), and the places of the states left there.

    `vocabulary` is the SHA-256 of the word pieces it was trained with, where the file records it.
    """

    state: State
    place: str
    others: tuple[str, ...]
    vocabulary: str | None


class _Inert:
    """Stands in for an object of a foreign class: takes whatever a file gives it and does nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _InertMapping(_Inert):
    """Stands in for a foreign mapping, which torch's reader fills only where it is one of Python's own."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def read_content(path: Path, tensors_only: bool = False) -> Any:
    """Read what a checkpoint file holds, on the CPU and without running code.

    Objects of other classes than tensors, numbers, paths, times and options are refused; with `tensors_only`
    placeholders stand in for them. Raises CheckpointError.
    """
    check_checkpoint(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            return safetensors.torch.load_file(path)
        if head[:2] == b"PK":
            _check_zip(path)
        elif head[:1] != b"\x80":
            _refuse(path, _foreign(head))
        return _read_pickle(path, head[:2] == b"PK", tensors_only)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes its reader raise anything
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        _refuse(path, f"it cannot be read ({reason}): it is damaged or something else", error)


def _refuse(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(f"{path}: expected a .pth or .safetensors checkpoint, but {reason}") from cause


def _foreign(head: bytes) -> str:
    """What a file of no known format is, by its first bytes."""
    if not head:
        return "the file is empty; fetch or write it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself (git lfs pull)"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed by gzip; unpack it first"
    if head.lstrip()[:1] == b"<":
        return "it is a web page; download the file itself"
    if head[_TAR_PLACE:].startswith(b"ustar"):
        return "it is a tar archive, of torch 0.1 or of files; unpack it, or save it again with a later torch"
    return "it is something else, or damaged"


def _check_zip(path: Path) -> None:
    """torch writes a CRC for each tensor and never checks it; a flipped bit would load in silence."""
    with zipfile.ZipFile(path) as archive:
        damaged, names = archive.testzip(), archive.namelist()
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged: the checksum of its entry {damaged} is wrong; fetch it again"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        _refuse(path, "it is a TorchScript archive; save the network's state_dict() with torch.save")
    if not any(name.endswith("/data.pkl") for name in names):
        _refuse(path, f"it is a zip archive of other files ({some(names)}); unpack it first")


def _read_pickle(path: Path, zipped: bool, tensors_only: bool) -> Any:
    """Read a pickle of torch; what it asks for beside tensors is never imported, only named."""
    foreign: dict[str, Any] = {}
    while True:
        known = [*_SAFE_GLOBALS, *((kind, name) for name, kind in foreign.items())]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(known), path.open("rb") as file:
                warnings.simplefilter("ignore")  # of a protocol that the reader then refuses
                misnamed = path.suffix == ".safetensors"  # which torch believes of a path
                source, mapped = (file, False) if misnamed else (path, zipped)
                content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
            break
        except Exception as error:  # a damaged file makes it raise anything
            # torch's own message advises to load the file unsafely; only names are taken from it.
            unpickling = isinstance(error, pickle.UnpicklingError)
            if unpickling and _stand_in(foreign, str(error)):
                continue
            if not (unpickling or foreign):
                raise
            raise CheckpointError(
                f"{path}: expected a checkpoint of plain tensors, but {_unreadable(str(error), foreign)}"
            ) from error
    names = some(sorted(foreign))
    if foreign and not tensors_only:
        raise CheckpointError(
            f"{path}: expected a checkpoint of plain tensors, but it asks for {names}, which could run code; "
            f"dgm4 convert {path} {path.with_suffix('.safetensors').name} reads its tensors alone and runs "
            "nothing of it"
        )
    if foreign:
        log.warning("%s: its objects of %s were not read", path, names)
    return content


def _stand_in(foreign: dict[str, Any], message: str) -> bool:
    """Add a placeholder for the class that stopped torch's reader; False where none helps."""
    if (filled := _FILLED.search(message)) is not None:
        name, base = filled[1], _InertMapping
    elif (asked := _GLOBAL.search(message)) is not None:
        name = asked[1] if "." in asked[1] else f"builtins.{asked[1]}"
        base = _Inert
    else:
        return False
    if _BLOCKED.search(message) or len(foreign) == _MOST_FOREIGN:
        return False
    if name in foreign and issubclass(foreign[name], base):
        return False
    foreign[name] = type(name, (base,), {})
    return True


def _unreadable(message: str, foreign: Mapping[str, Any]) -> str:
    """Why torch's reader gave up, without its advice; `foreign` had placeholders."""
    blocked = _BLOCKED.search(message)
    if foreign or blocked:
        names = some([*([blocked[1]] if blocked else []), *foreign])
        return f"it asks for {names}, which could run code, and no tensors can be read past it"
    if "Unsupported operand" in message:
        return "its pickle protocol is not torch's (2); save it with torch.save"
    return "it is no pickle of tensors"


def read_state(path: Path) -> State:
    """Read the state of a checkpoint file, under its own names; see `find_state`."""
    return find_state(path).state


def find_state(path: Path, place: str | None = None, tensors_only: bool = False) -> Found:
    """Find the state of a checkpoint file: that at `place` ("model_ema"), else the one that is meant.

    That is the file itself, what stands under "model", "state_dict" or "module", or the only one there is.
    Prefixes of wrappers that all names share are dropped. Raises CheckpointError where no state or more than
    one is there, and where two names become one.
    """
    content = read_content(path, tensors_only)
    states = dict(_states(content))
    usual, inner = "", content
    while isinstance(inner, Mapping) and (key := next((k for k in _STATES if _nested(inner, k)), None)):
        usual, inner = _join(usual, key), inner[key]
    if _is_state(inner):
        states = {usual: inner, **states}
    if place is None and (_is_state(inner) or len(states) == 1):
        place = next(iter(states))
    elif place is None:
        _refuse_states(path, inner, list(states))
    elif place not in states:
        raise CheckpointError(
            f"{path}: expected one of its states ({some(list(states))}), got {quoted(place)}"
        )
    others = tuple(name for name in states if name != place)
    if others:
        log.warning("%s: took the state %s; not read: %s", path, place or "of the file", ", ".join(others))
    vocabulary = content.get("vocabulary")
    return Found(
        _own_names(path, states[place]), place, others, vocabulary if isinstance(vocabulary, str) else None
    )


def _refuse_states(path: Path, content: Any, states: list[str]) -> NoReturn:
    expected = f'{path}: expected a state of named tensors, or {{"model": state}}, got'
    if not states:
        raise CheckpointError(f"{expected} {_describe(content)}")
    raise CheckpointError(
        f"{expected} {len(states)}: {some(states)}; dgm4 convert {path} OUT.safetensors --state {states[0]} "
        "takes one"
    )


def _nested(content: Mapping[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), Mapping) and not _is_state(content)


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _states(content: Any) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every state with weights at any depth, by its place; an optimiser's are numbered and left out."""
    waiting, seen = [("", content)], set[int]()
    while waiting:
        place, value = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        if not _is_state(value):
            waiting += [(_join(place, k), v) for k, v in value.items() if isinstance(k, str)]
        elif any(tensor.is_floating_point() and tensor.dim() for tensor in value.values()):
            yield place, value


def _own_names(path: Path, state: Mapping[str, Tensor]) -> State:
    """The tensors by the names that the network itself gives them."""
    names = {name: _INNER.sub("", name) for name in state}
    bare = {name: _bare(own) for name, own in names.items()}
    counts = Counter(bare.values())
    doubled = [name for name in names if counts[bare[name]] > 1]
    if doubled:
        raise CheckpointError(
            f"{path}: expected each tensor once, got {len(doubled)} names that only a wrapper's prefix tells "
            f"apart ({some(sorted(doubled, key=bare.__getitem__))}); keep one of each"
        )
    firsts = {name.partition(".")[0] for name in names.values()}
    while len(firsts) == 1 and firsts <= _WRAPPERS and all("." in name for name in names.values()):
        names = {name: own.partition(".")[2] for name, own in names.items()}
        firsts = {name.partition(".")[0] for name in names.values()}
    return {own: state[name] for name, own in names.items()}


def _bare(name: str) -> str:
    """A name without any wrapper's prefix."""
    first, dot, rest = name.partition(".")
    return _bare(rest) if dot and first in _WRAPPERS else name


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        foreign = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
        names = f"no tensors under {some(foreign)}" if foreign else "no keys"
        return f"a {type(content).__name__} with {names}"
    return f"a {type(content).__name__}"


def some(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
