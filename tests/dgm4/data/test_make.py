from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dgm4.config import TYPES
from dgm4.data import make
from dgm4.data.make import make_sample_set, split_sizes
from engine.errors import InputError
from engine.inputs.text import clean_caption
from export.cli import main

PAIRS = 52  # 40, 4 and 8
SPLITS = ("train", "val", "test")


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def records(folder, split):
    return json.loads((folder / "metadata" / f"{split}.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "set"
    done = []
    counts = make_sample_set(folder, PAIRS, seed=3, progress=done.append)
    assert sum(done) == PAIRS
    return folder, counts


def test_the_seed_decides_every_byte(made, tmp_path):
    make_sample_set(tmp_path / "again", PAIRS, seed=3)
    assert digests(tmp_path / "again") == digests(made[0])
    make_sample_set(tmp_path / "other", 6, seed=4)
    make_sample_set(tmp_path / "third", 6, seed=5)
    assert digests(tmp_path / "other") != digests(tmp_path / "third")


def test_no_leftovers_beside_the_set(made):
    assert [p.name for p in made[0].parent.iterdir()] == ["set"]


def test_split_sizes():
    assert split_sizes(5200) == {"train": 4000, "val": 400, "test": 800}
    assert split_sizes(6) == {"train": 2, "val": 2, "test": 2}
    assert all(sum(split_sizes(n).values()) == n and min(split_sizes(n).values()) > 1 for n in range(6, 99))


def test_every_record_is_valid(made):
    folder, _ = made
    seen = set()
    for split in SPLITS:
        for record in records(folder, split):
            types = [] if record["fake_cls"] == "orig" else record["fake_cls"].split("&")
            assert types == [t for t in TYPES if t in types]
            path = folder / record["image"].removeprefix("DGM4/")
            with Image.open(path) as picture:
                picture.load()
                width, height = picture.size
            assert 256 <= min(width, height) <= max(width, height) <= 320
            faked = [t for t in types if t.startswith("face")]
            assert bool(record["fake_image_box"]) == bool(faked)
            if faked:
                assert record["image"].startswith(f"DGM4/manipulation/{faked[0]}/")
                x1, y1, x2, y2 = record["fake_image_box"]
                assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
                assert 40 <= x2 - x1 <= 120 and 54 <= y2 - y1 <= 140
                assert record["fake_image_box"] in record["mtcnn_boxes"]
            else:
                assert record["image"].startswith("DGM4/origin/")
            cleaned = clean_caption(record["text"])
            assert not cleaned.warnings
            words = cleaned.text.split(" ")
            assert 1 <= len(words) <= 40
            marked = record["fake_text_pos"]
            assert bool(marked) == any(t.startswith("text") for t in types)
            assert marked == sorted(set(marked)) and all(0 <= i < len(words) for i in marked)
            seen.add((record["image"], record["id"]))
    assert len(seen) == PAIRS == len({image for image, _ in seen}) == len({number for _, number in seen})


def test_classes_have_their_shares(made):
    folder, counts = made
    for split in SPLITS:
        classes = Counter(record["fake_cls"] for record in records(folder, split))
        assert dict(classes) == {k: n for k, n in counts[split].items() if k != "total"}
    wide = Counter(record["fake_cls"] for record in records(folder, "train")[:24])
    assert wide.pop("orig") == 12
    assert len(wide) == 8
    assert {name: count for name, count in wide.items() if count == 2} == dict.fromkeys(TYPES, 2)


def test_side_cars_cover_every_picture(made):
    folder, _ = made
    images = {record["image"] for split in SPLITS for record in records(folder, split)}
    for name in ("captions", "explanations"):
        texts = json.loads((folder / "metadata" / f"{name}.json").read_text())
        assert set(texts) == images and all(texts.values())


def test_provenance(made):
    folder, counts = made
    record = json.loads((folder / "sample.json").read_text())
    assert (record["seed"], record["pairs"], record["counts"]) == (3, PAIRS, counts)
    assert record["version"] == make.VERSION
    assert f"--pairs {PAIRS} --seed 3" in (folder / "README.md").read_text()


def test_a_sample_set_is_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    make_sample_set(out, 6, seed=1)
    first = digests(out)
    make_sample_set(out, 6, seed=2)
    assert digests(out) != first
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="choose another --out"):
        make_sample_set(foreign, 6)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError):
        make_sample_set(foreign / "thesis.txt", 6)


@pytest.mark.parametrize(("pairs", "seed"), [(5, 1), (6, -1)])
def test_too_few_pairs_and_negative_seeds_are_refused(tmp_path, pairs, seed):
    with pytest.raises(InputError, match="at least 6"):
        make_sample_set(tmp_path / "set", pairs, seed)
    assert not any(tmp_path.iterdir())


def test_a_failure_leaves_the_old_set(tmp_path, monkeypatch):
    out = tmp_path / "set"
    make_sample_set(out, 6, seed=1)
    before = digests(out)
    monkeypatch.setattr(make, "paint", lambda pair: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_sample_set(out, 6, seed=2)
    assert digests(out) == before and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_command_line(tmp_path, capsys):
    assert main(["data", "make", "--out", str(tmp_path / "set"), "--pairs", "7", "--seed", "9"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sum(split["total"] for split in answer["counts"].values()) == 7
    (tmp_path / "file").write_text("x")
    assert main(["data", "make", "--out", str(tmp_path / "file")]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_pictures_are_as_light_as_their_captions_say(made):
    folder, _ = made
    texts = json.loads((folder / "metadata" / "captions.json").read_text())
    levels = {"bright": [], "dark": []}
    for image, text in texts.items():
        if text.split()[1] not in levels:
            continue
        with Image.open(folder / image.removeprefix("DGM4/")) as picture:
            levels[text.split()[1]].append(np.asarray(picture.convert("L")).mean())
    assert min(levels["bright"]) > max(levels["dark"]) + 10


@pytest.mark.parametrize("pairs", ["0", "1", "5", "-1", "six"])
def test_too_few_pairs_are_a_usage_error(tmp_path, capsys, pairs):
    with pytest.raises(SystemExit) as ended:
        main(["data", "make", "--out", str(tmp_path / "set"), f"--pairs={pairs}"])
    assert ended.value.code == 2
    assert f"argument --pairs: expected a whole number from 6, got '{pairs}'" in capsys.readouterr().err
