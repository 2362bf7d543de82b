"""Answers to a long list: a run that is stopped leaves what the next one goes on with, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.scoring.entries import Entry
from export.cli.answers import Answers, json_line

ROOT = Path(__file__).resolve().parents[3]
MAKER = {"model": {"name": "asap"}, "thresholds": {"words": 0.5}}
ENTRIES = [Entry(1, "a.jpg", "one"), Entry(3, "caf\udce9.jpg", "t\udce9wo", 7), Entry(4, "c.jpg", "three")]


def line_of(entry, **changes):
    record = {**entry.head(), "caption": entry.caption.replace("\udce9", "\ufffd"), **changes}
    return json_line({"model": {"name": "asap", "backend": "ort"}, "thresholds": {"words": 0.5}, **record})


@pytest.fixture
def stopped(tmp_path):
    """A run that ended after two answers, in the middle of the third."""
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt), Answers(out) as answers:
        for entry in ENTRIES[:2]:
            answers.write(line_of(entry))
        raise KeyboardInterrupt
    with answers.partial.open("a") as file:
        file.write('{"line": 4, "im')
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl.partial"]
    return out


def test_a_stopped_run_goes_on(stopped, capsys):
    with Answers(stopped) as answers:
        entries = iter(ENTRIES)
        assert answers.keep(entries, MAKER) == (2, 0)
        answers.write(line_of(next(entries)))
    assert stopped.read_text() == "".join(map(line_of, ENTRIES))
    assert [path.name for path in stopped.parent.iterdir()] == ["answers.jsonl"]


def test_it_says_where_the_answers_are(stopped, capsys):
    with pytest.raises(ValueError, match="boom"), Answers(stopped) as answers:
        answers.keep(iter(ENTRIES), MAKER)
        raise ValueError("boom")
    expected = f"dgm4: {stopped}.partial holds the answers so far; --resume goes on with it\n"
    assert capsys.readouterr().err == expected


def test_a_finished_file_of_a_list_that_grew(stopped):
    with Answers(stopped) as answers:
        answers.keep(iter(ENTRIES[:2]), MAKER)
    with Answers(stopped) as answers:
        assert answers.keep(iter(ENTRIES), MAKER) == (2, 0)
        answers.write(line_of(ENTRIES[2]))
    assert stopped.read_text() == "".join(map(line_of, ENTRIES))


def test_a_run_that_starts_anew_says_what_it_replaces(stopped, capsys):
    capsys.readouterr()
    with Answers(stopped) as answers:
        answers.write(line_of(ENTRIES[0]))
    assert (
        "answers.jsonl.partial of an earlier run, kept for --resume, is replaced" in capsys.readouterr().err
    )
    assert stopped.read_text() == line_of(ENTRIES[0])


def test_a_full_disk_keeps_what_is_there(stopped, capsys):
    with pytest.raises(OSError, match="full"), Answers(stopped) as answers:
        answers.keep(iter(ENTRIES), MAKER)
        raise OSError(28, "full")
    assert "--resume goes on with it" in capsys.readouterr().err


def test_without_an_earlier_run_it_starts(tmp_path):
    with Answers(tmp_path / "a.jsonl") as answers:
        assert answers.keep(iter(ENTRIES), MAKER) == (0, 0)
        answers.write(line_of(ENTRIES[0]))
    assert (tmp_path / "a.jsonl").read_text() == line_of(ENTRIES[0])


def test_without_answers_nothing_is_left(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), Answers(tmp_path / "a.jsonl"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [Entry(1, "a.jpg", "changed"), *ENTRIES[1:]],
            "answer 1 is of line 1, 'a.jpg', where the list now has line 1",
        ),
        ([ENTRIES[0], Entry(2, "caf\udce9.jpg", "t\udce9wo", 7)], "answer 2 is of line 3, .* now has line 2"),
        ([ENTRIES[0], Entry(3, "caf\udce9.jpg", "t\udce9wo", 8)], "answer 2 is of line 3"),
        (ENTRIES[:1], "answer 2 is of line 3, .*, where the list now has nothing"),
    ],
)
def test_a_changed_list_is_told(stopped, entries, message):
    before = Path(f"{stopped}.partial").read_bytes()
    with (
        pytest.raises(InputError, match=f"{message}.*; leave out --resume to start anew"),
        Answers(stopped) as answers,
    ):
        answers.keep(iter(entries), MAKER)
    assert Path(f"{stopped}.partial").read_bytes() == before


def test_a_finished_file_is_refused_without_a_copy(tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text(line_of(ENTRIES[0]))
    with pytest.raises(InputError, match=r"answers.jsonl: answer 1 is of"), Answers(out) as answers:
        answers.keep(iter(ENTRIES[1:]), MAKER)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_failed_answers_are_kept_and_counted(tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text(line_of(ENTRIES[0], error="line 1: broken") + line_of(ENTRIES[1]))
    with Answers(out) as answers:
        assert answers.keep(iter(ENTRIES), MAKER) == (2, 1)


@pytest.mark.parametrize("entry", [Entry(1, "a.jpg"), Entry(1, caption="words")])
def test_half_a_pair_is_found_again(entry, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text(json_line({**entry.head(), "caption": entry.caption or ""}))
    with Answers(out) as answers:
        assert answers.keep(iter([entry]), MAKER) == (1, 0)


def test_every_line_is_valid_unicode():
    record = json.loads(json_line({"image": "caf\udce9.jpg", "id": ["\ud800"], "caption": "你好"}).encode())
    path = base64.b64decode(record.pop("image_base64"))
    assert record == {"image": "caf\ufffd.jpg", "id": ["\ufffd"], "caption": "你好"}
    assert path == b"caf\xe9.jpg"
    assert json_line({"image": "你.jpg"}) == '{"image": "你.jpg"}\n'


def test_another_bundle_is_told(stopped):
    with pytest.raises(InputError, match="of another bundle or other options"), Answers(stopped) as answers:
        answers.keep(iter(ENTRIES), {"model": {"name": "hammer"}})


def test_sigterm_leaves_the_answers_and_nothing_else(tmp_path):
    """Whatever is being written elsewhere goes."""
    script = """
        import sys, time
        from pathlib import Path
        from engine.files import replacing
        from export.cli.answers import Answers
        from export.cli.stopping import exit_on_sigterm
        from export.bundle.writer import BundleWriter
        from dgm4.data.make import _publishing

        with exit_on_sigterm(), Answers(Path("a.jsonl")) as answers, replacing(Path("page.html")) as page:
            with BundleWriter("bundle") as writer, _publishing(Path("set")) as folder:
                answers.write("{}\\n")
                page.write_text("half")
                writer.add_text("README.md", "half")
                (folder / "half").write_text("half")
                print("ready", flush=True)
                time.sleep(60)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        told = "dgm4: a.jsonl.partial holds the answers so far; --resume goes on with it\n"
        assert process.stderr.read() == told
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.jsonl.partial", "{}\n")]
