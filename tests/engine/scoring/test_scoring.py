"""Scoring without Ray: whole files or none, one answer to each pair, and a second run that goes on."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine import Prediction, Predictor, to_rows
from engine.errors import BundleError, InputError
from engine.scoring import PairList, ray_data, score
from engine.scoring import job as jobs
from engine.scoring.entries import START
from engine.scoring.shards import cut, read
from export.cli import main

from .conftest import BROKEN, MISSING, PAIRS

ROOT = Path(__file__).resolve().parents[3]


def lines(out):
    """The records of a folder of JSON lines, in the order of the list."""
    return [json.loads(x) for path in sorted(out.glob("pairs-*")) for x in path.read_text().splitlines()]


def plain(record):
    return {name: x for name, x in record.items() if name != "timing"}


def test_answers_are_those_of_predict(long_list, tmp_path):
    out = tmp_path / "out"
    tally = score(long_list.work(), size=8)
    assert (tally.pairs, tally.failed) == (PAIRS, {"InputError": 2})
    assert json.loads((out / "_SUCCESS").read_text()) == {"shards": 4, **tally.to_dict()}
    assert not list(out.glob(".pairs*"))
    predicted = tmp_path / "predicted.jsonl"
    command = ["predict", str(long_list.bundle), "--list", str(long_list.path), "--out", str(predicted)]
    assert main([*command, "--batch", "4", "--threads", "1", "-q"]) == 1
    wanted = [json.loads(x) for x in predicted.read_text().splitlines()]
    for ours, theirs in zip(lines(out), wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["line"], ours["image"]) == (theirs["line"], theirs["image"])
        # Where a batch begins differs, and with it the rounding.
        assert ours.get("score", 0) == pytest.approx(theirs.get("score", 0), abs=2e-6)
    failed = [x for x in lines(out) if "error" in x]
    assert [x["line"] for x in failed] == [MISSING, BROKEN]
    assert all(x["error"].startswith(f"line {x['line']}") and x["kind"] == "InputError" for x in failed)


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_a_second_run_does_what_is_missing(long_list, tmp_path, format_):
    pytest.importorskip("pyarrow")
    work, out = long_list.work(format=format_), tmp_path / "out"
    tally = score(work, size=8)
    files = sorted(out.glob("pairs-*"))
    before = {path.name: path.read_bytes() for path in files}
    files[2].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    (out / f".{files[2].name}.1-ab.partial").write_text("of a process that was killed")
    assert score(work, size=8) == tally
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "was answered twice"
    assert sorted(path.name for path in out.glob("pairs-*")) == sorted(before)
    assert not list(out.glob(".pairs*"))
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_files_that_are_not_the_shards(long_list, tmp_path, format_):
    pytest.importorskip("pyarrow")
    work, out = long_list.work(format=format_), tmp_path / "out"
    score(work, size=8)
    files = sorted(out.glob("pairs-*"))
    own = files[2].read_bytes()
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(InputError, match="row 1 answers pair 9, expected one above 16"):
        score(work, size=8)
    if format_ == "jsonl":
        files[2].write_bytes(b"{garbage\n" + own.partition(b"\n")[2])
        with pytest.raises(InputError, match="row 1 is no answer; delete the file and run again"):
            score(work, size=8)
    files[2].write_bytes(own)
    (out / f"foreign.{format_}").touch()
    with pytest.raises(InputError, match="foreign"):
        score(work, size=8)


def test_a_folder_is_of_one_job(long_list, tmp_path):
    work = long_list.work()
    score(work, size=8)
    for other, size, difference in (
        (
            dataclasses.replace(work, thresholds={"manipulated": 0.9}),
            8,
            "thresholds of the bundle, not manipulated=0.9",
        ),
        (dataclasses.replace(work, digest="0" * 64), 8, "bundle [0-9a-f]{64}, not 0{64}"),
        (dataclasses.replace(work, batch=8), 8, f"batch {work.batch}, not 8"),
        (work, 9, "shard 8, not 9"),
    ):
        with pytest.raises(InputError, match=f"another job, with {difference}; ask for the same, or"):
            score(other, size)
    text = long_list.path.read_text()
    long_list.path.write_text(text.replace("The man 29", "The man 30"))
    with pytest.raises(InputError, match="its list had other pairs when the job began; put the list back"):
        score(work, size=8)
    long_list.path.write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"its list had 30 pairs, not 31, when the job began; put the list"):
        score(work, size=8)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(InputError, match="expected a new folder or one of this job"):
        score(dataclasses.replace(work, out=tmp_path / "else"), 8)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"version"', "Expecting"),
        (b"\xff", "it is not UTF-8"),
        (b"[1]", "a field is missing"),
        (b"{}", "a field is missing"),
        (b"[" * 100_000, "it is nested too deeply"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_record_of_a_job_is_named(long_list, content, why):
    work = long_list.work()
    work.out.mkdir()
    path = work.out / "_job.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"_job\.json: is damaged, .*: {why}.*; choose another --out"
    ) as error:
        score(work, size=8)
    assert "\n" not in str(error.value)


def test_what_ends_a_job(long_list, tmp_path):
    work, out = long_list.work(), tmp_path / "out"
    with pytest.raises(InputError, match=r"2 of 16 pairs failed \(InputError 2\), more than the 1"):
        score(work, size=8, max_failed=1)
    assert not (out / "_SUCCESS").exists()
    with pytest.raises(BundleError, match="another bundle than the job began with"):
        score(dataclasses.replace(work, out=tmp_path / "other", digest="0" * 64), 8)
    first = sorted(out.glob("pairs-*"))[0]
    first.write_text(first.read_text().split("\n", 1)[1])
    with pytest.raises(InputError, match="holds 7 answers, expected 8; delete it"):
        score(work, size=8)
    first.unlink()
    (out / "pairs-000000000000-000000000030.jsonl").write_text("")
    with pytest.raises(InputError, match=r"pairs-000000000000-000000000030\.jsonl: was added"):
        score(work, size=8)


def test_a_list_that_changes_meanwhile(long_list):
    shards = list(cut(PairList(long_list.path), 8))
    long_list.path.write_text(long_list.path.read_text().replace("The man 20", "The man 21"))
    assert len(list(read(PairList(long_list.path), shards[1]))) == 8
    with pytest.raises(InputError, match="entries 17 to 24 are others than when the job began"):
        list(read(PairList(long_list.path), shards[2]))


def test_one_process_at_a_time(long_list):
    work = long_list.work()
    with jobs.open_job(work, 8), pytest.raises(InputError, match="another process scores into it"):
        score(work, 8)


def test_kills(long_list, tmp_path):
    """SIGKILL in the middle, twice: files are whole, and in the end each pair has one answer."""
    out = tmp_path / "out"
    text = long_list.path.read_text()
    long_list.path.write_text(text * 8)
    command = [sys.executable, "-m", "export.cli", "score", str(long_list.bundle), str(long_list.path)]
    command += ["--out", str(out), "--shard", "5", "--batch", "4", "--threads", "1", "-q"]
    for kept in (1, 12):
        process = subprocess.Popen(command, cwd=ROOT)
        while len(list(out.glob("pairs-*"))) < kept and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = list(out.glob("pairs-*"))
        assert kept <= len(done) < 48
        assert {len(path.read_text().splitlines()) for path in done} == {5}
        assert not (out / "_SUCCESS").exists()
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert [x["line"] for x in lines(out)] == list(range(1, 8 * PAIRS + 1))
    assert json.loads((out / "_SUCCESS").read_text())["failed"] == {"InputError": 16}
    assert not list(out.glob(".pairs*"))


def test_parquet_has_the_rows(long_list, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    score(long_list.work(format="parquet"), size=8)
    score(long_list.work("lines"), size=8)
    table = parquet.read_table(tmp_path / "out")  # passes over _SUCCESS and _job.json
    assert table["line"].to_pylist() == list(range(1, PAIRS + 1))
    assert table["id"].to_pylist()[:2] == ['{"n": 0}', '{"n": 1}']
    errors = table["error_kind"].to_pylist()
    assert [n for n, kind in enumerate(errors, 1) if kind] == [MISSING, BROKEN]
    with Predictor(long_list.bundle, thumbnail=0) as predictor:
        row = to_rows([predictor.predict(long_list.path.parent / "0.png", "The man 0, é")])[0]
    ours = table.to_pylist()[0]
    assert list(ours) == ["line", "image", "id", *row]
    for name, value in row.items():
        same = ours[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
        assert same or name == "milliseconds", name
    assert ours["words"] == len(Prediction.from_dict(lines(tmp_path / "lines")[0]).words)


def rows_of(pairs, start=START):
    return [(e.number, e.image, e.caption, e.id, e.error and str(e.error)) for e, _ in pairs.read(start)]


FORMS = {
    "list.jsonl": '{"image": "a"}\n\n{"image": "b", "text": "y"}\nno\n{"image": null, "text": "z"}\r\n',
    "list.csv": 'id,image,caption\n1,a,"x\ny"\n\n2,b,"un"closed"\n3,c\n4,d,z\n',
    "bare.csv": '\na.png,"x\ny"\nb.png,z\nc.png,"w"\n',
    "list.json": '[{"image": "a", "caption": "x"}, 3, {"image": "b", "caption": "y"}, {"caption": "z"}]',
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_of_every_form_make_the_list(name, size, tmp_path):
    path = tmp_path / name
    path.write_text(FORMS[name], newline="")
    pairs = PairList(path)
    whole, shards = rows_of(pairs), list(cut(pairs, size))
    assert len(whole) >= 3
    parts = [row for shard in shards for row in rows_of(pairs, shard.mark)[: len(shard)]]
    assert parts == whole
    assert [entry.number for shard in shards for entry in read(pairs, shard)] == [row[0] for row in whole]


def test_shards_of_a_folder(tmp_path):
    for name in "dbca":
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.txt").write_text(f"of {name}")
    (tmp_path / "c.txt").unlink()
    shards = list(cut(PairList(tmp_path), 3))
    assert [[e.image for e in read(PairList(tmp_path), shard)] for shard in shards] == [
        ["a.png", "b.png", "c.png"],
        ["d.png"],
    ]


def test_lists_in_parquet(tmp_path, long_list):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture = (long_list.path.parent / "0.png").read_bytes()
    images = [{"bytes": picture, "path": f"{n}.png"} for n in range(5)]
    images[3] = None
    columns = {"image": images, "text": list("abcde"), "id": range(5), "more": range(5)}
    folder = tmp_path / "tables"
    folder.mkdir()
    parquet.write_table(arrow.table(columns), folder / "1.parquet", row_group_size=2)
    images = arrow.array([None, None, picture], arrow.binary())
    parquet.write_table(arrow.table({"image": images, "caption": ["f", None, None]}), folder / "2.parquet")
    pairs = PairList(folder)
    entries = list(pairs)
    assert [e.number for e in entries] == list(range(1, 9))
    assert [e.content == picture for e in entries] == [True, True, True, False, True, False, False, True]
    assert [(e.image, e.caption, e.id) for e in entries[3:6]] == [
        (None, "d", 3),
        ("4.png", "e", 4),
        (None, "f", None),
    ]
    assert "where one of the two may be null" in str(entries[6].error)
    for size in (1, 2, 3, 8):
        found = [e for shard in cut(pairs, size) for e in read(pairs, shard)]
        assert [(e.number, e.caption) for e in found] == [(e.number, e.caption) for e in entries]
    tally = score(long_list.work(source=folder), size=3)
    assert (tally.pairs, tally.failed) == (8, {"InputError": 1})
    (folder / "3.parquet").write_bytes(b"PAR1 none")
    with pytest.raises(InputError, match=r"3\.parquet: cannot be read as Parquet"):
        list(pairs)
    parquet.write_table(arrow.table({"url": ["x"]}), folder / "3.parquet")
    with pytest.raises(InputError, match="expected the columns image and caption, got url"):
        list(pairs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-", "--out", "new"], "a stream cannot be read again"),
        (["list", "--out", "a/b/c"], "in a folder that exists"),
        (["list", "--out", "bundle/new"], "lies in a bundle"),
        (["nowhere.jsonl", "--out", "new"], "cannot read the list"),
    ],
)
def test_usage(arguments, said, long_list, tmp_path, monkeypatch, capsys):
    (tmp_path / "bundle").symlink_to(long_list.bundle)
    monkeypatch.chdir(tmp_path)
    assert main(["score", "bundle", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_the_command(long_list, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["score", str(long_list.bundle), str(long_list.path), "--out", str(out), "--shard", "20"]
    assert main([*command, "--max-failed", "2"]) == 0
    said, told = capsys.readouterr()
    assert said == f"{out}: {PAIRS} pairs, 2 failed (InputError 2; their rows hold the errors)\n"
    assert f"score: {PAIRS} of {PAIRS} pairs" in told
    for wrong in (["--workers", "2"], ["--heatmap", "--format", "parquet"]):
        with pytest.raises(SystemExit):
            main([*command, *wrong])


def test_what_ends_a_job_on_a_cluster(long_list, tmp_path):
    """An error that is not of a pair comes back as data, and so does a shard that kills its workers."""
    work = long_list.work()
    work.out.mkdir()
    shards = list(cut(PairList(work.source), 8))
    numbers = {"id": np.array([1])}
    (done,) = ray_data.ShardActor(work, shards)(numbers)["done"]
    assert json.loads(done) == {"pairs": 8, "failed": {"InputError": 1}}
    tries = tmp_path / "out" / f".{shards[1].name}.tries"
    assert not tries.exists()
    tries.write_text(".....")
    for other, said in (
        (work, "5 workers died over these pairs"),
        (dataclasses.replace(work, digest="0" * 64, out=tmp_path / "a"), "another bundle than the job"),
        (dataclasses.replace(work, version="0.0.1", out=tmp_path / "b"), "the driver 0.0.1"),
    ):
        other.out.mkdir(exist_ok=True)
        (done,) = ray_data.ShardActor(other, shards)(numbers)["done"]
        assert said in json.loads(done)["message"]
