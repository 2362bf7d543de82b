"""Write the sample set: a small data set in the format of DGM4, made of images that are at hand."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dgm4.data.pair import Pair, description, draw_pair, explanation, paint
from dgm4.data.sources import PHOTOS, SPLITS, Split, data_file
from engine.errors import InputError
from engine.files import unfinished

RECORD = "sample.json"
FORMAT = "dgm4-sample-set"
VERSION = 2  # goes up whenever the same seed would give other files
_PARTS = {"train": 10 / 13, "val": 1 / 13, "test": 2 / 13}
FEWEST = 6  # two of each split: a swapped caption is another pair's
_README = """# Sample set

{total} pairs of a picture and its caption in the format of DGM4 (train {train}, val {val}, test {test}),
written by `dgm4 data make --pairs {total} --seed {seed}`, generator version {version}. Half of them are not
manipulated.

Images are photographs out of scikit-image's wheel. In half of them are people, composed of small grey faces
(Labeled Faces in the Wild, 25x25 pixels), and the caption comes from a grammar. The others are photographs
without painted people: as a camera or an editor leaves them, with captions of what they show, or graded,
with captions of the grammar; where a photograph shows a face, that may be swapped or bent too. The set shows
that training and evaluation work. To be learnt in minutes, forgeries carry an exaggerated trace: a swapped
face leans towards magenta, bent eyes or a bent mouth towards green, and mood words always follow the light.
A score on it says nothing about real manipulated news. The boxes under `mtcnn_boxes` are those of all faces,
drawn rather than detected.

No face and no photograph is in two splits. Whether two faces are of the same person is unknown to the source.
"""

Progress = Callable[[int], object]


def make_sample_set(
    out: str | Path, pairs: int = 5200, seed: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `pairs` pairs to the folder `out` and return how many of each split and class there are.

    The same seed gives the same bytes, with the same versions of numpy, scipy and Pillow. `progress` is
    called with 1 after each pair. The folder appears when it is complete. Raises `InputError` for fewer
    than 6 pairs, a negative seed, or a folder that holds anything but a sample set; `BackendError` where
    scikit-image is missing.
    """
    out = Path(out).resolve()
    if pairs < FEWEST or seed < 0:
        raise InputError(f"expected at least {FEWEST} pairs and a seed from 0, got {pairs} and {seed}")
    check_out(out)
    data_file("lfw_subset.npy")
    with _publishing(out) as folder:
        counts = _write_splits(folder, split_sizes(pairs), seed, progress or (lambda done: None))
        record = {"format": FORMAT, "version": VERSION, "seed": seed, "pairs": pairs, "counts": counts}
        record["photos"] = {split: list(names) for split, names in PHOTOS.items()}
        _write_json(folder / RECORD, record)
        sizes = {split: counts[split]["total"] for split in SPLITS}
        text = _README.format(total=pairs, seed=seed, version=VERSION, **sizes)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return counts


def split_sizes(pairs: int) -> dict[Split, int]:
    """How many pairs go to each split: ten, one and two of thirteen, at least two each."""
    val, test = (max(2, round(pairs * _PARTS[split])) for split in ("val", "test"))
    return {"train": pairs - val - test, "val": val, "test": test}


def check_out(out: Path) -> None:
    """Raise InputError unless `out` is absent, an empty folder, or a sample set that may be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_dir() and (not any(out.iterdir()) or _is_sample_set(out)):
        return
    raise InputError(
        f"{out}: expected a new or empty folder or a sample set of this command, got something else; "
        "choose another --out"
    )


def _is_sample_set(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT


@contextlib.contextmanager
def _publishing(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place at the end, or is removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}"
    folder, old = out.parent / f"{stem}.partial", out.parent / f"{stem}.old"
    with unfinished(folder):
        folder.mkdir()
        try:
            yield folder
            check_out(out)
            if os.path.lexists(out):
                out.rename(old)
            folder.rename(out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _write_splits(
    folder: Path, sizes: dict[Split, int], seed: int, progress: Progress
) -> dict[str, dict[str, int]]:
    """Write images, annotations and side-cars; return the counts by split."""
    captions: dict[str, str] = {}
    explanations: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    number = 0
    for split, size in sizes.items():
        records = []
        for index in range(size):
            pair = draw_pair(seed, split, index, size)
            _write_picture(folder, pair)
            records.append(pair.record(number))
            captions[pair.image], explanations[pair.image] = description(pair), explanation(pair)
            number += 1
            progress(1)
        _write_json(folder / "metadata" / f"{split}.json", records)
        classes = Counter(record["fake_cls"] for record in records)
        counts[split] = {"total": size, **dict(sorted(classes.items()))}
    _write_json(folder / "metadata" / "captions.json", captions)
    _write_json(folder / "metadata" / "explanations.json", explanations)
    return counts


def _write_picture(folder: Path, pair: Pair) -> None:
    path = folder / pair.image.removeprefix("DGM4/")
    path.parent.mkdir(parents=True, exist_ok=True)
    paint(pair).save(path, quality=pair.scene.quality)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
