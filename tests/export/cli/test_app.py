"""What all verbs share: help, usage, suggestions, how loud they are, and standard streams that are closed."""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from engine.errors import BackendError
from export import cli
from export.cli import app
from export.cli import inspect as cli_inspect

ROOT = Path(__file__).resolve().parents[3]


def parsers_of(parser):
    """A parser and those of the verbs below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_of(below)


PARSERS = {parser.prog: parser for parser in parsers_of(app.make_parser())}


def refused(arguments, capsys):
    """What a command line that is refused shows: the lines on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_without_arguments_there_is_help_with_examples(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    _, _, examples = err.partition("examples:\n")
    assert [line.split()[0] for line in examples.splitlines()] == ["dgm4"] * 3
    assert all(f"\n{purpose}:\n" in err for purpose in app.PURPOSES)
    for verb in {prog.split()[1] for prog in PARSERS if " " in prog}:
        assert len(re.findall(rf"^  {verb} +\S.*$", err, re.MULTILINE)) == 1


def test_a_verb_of_verbs_alone_shows_its_help(capsys):
    assert cli.main(["data"]) == 2
    assert "choose a small vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("prog", PARSERS)
def test_every_verb_has_an_example_that_it_takes(prog, capsys):
    text = PARSERS[prog].format_help()
    examples = re.findall(r"^  (dgm4 .+)$", text.partition("examples:\n")[2], re.MULTILINE)
    assert examples
    for example in examples:
        assert example.startswith(prog)
        parts = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', example)][1:]
        if "--help" not in parts:
            app.make_parser().parse_args(parts)


@pytest.mark.parametrize(
    ("arguments", "usage", "reason"),
    [
        (
            ["predcit"],
            "usage: dgm4 [options] verb ...",
            "dgm4: error: no verb 'predcit'; did you mean predict?",
        ),
        (
            ["zzz"],
            "usage: dgm4 [options] verb ...",
            "dgm4: error: no verb 'zzz'; dgm4 --help lists the verbs",
        ),
        (["data", "mke"], "usage: dgm4 data [options] verb", "no verb 'mke'; did you mean make?"),
        (
            ["predict", "b", "--lst", "x"],
            "usage: dgm4 predict [options] bundle [image] [caption]",
            "dgm4 predict: error: unrecognized arguments: --lst x; did you mean --list?",
        ),
        (
            ["train"],
            "usage: dgm4 train [options] --data DIR --out DIR",
            "arguments are required: --data, --out",
        ),
        (
            ["export", "--size", "large"],
            "usage: dgm4 export",
            "invalid choice: 'large' (choose from base, tiny)",
        ),
        (["export", "--size", "tinny"], "usage: dgm4 export", "did you mean tiny?"),
        (
            ["bench", "b", "--backend", "tensort"],
            "usage: dgm4 bench",
            "got 'tensort'; did you mean tensorrt?",
        ),
        (["bench", "b", "--threads", "9999"], "usage: dgm4 bench", "the usable cores, got '9999'"),
        (["train", "--data", "a", "--out", "b", "--device", "foo"], "usage: dgm4 train", "got 'foo'"),
        (["export", "--drawn", "--checkpoint", "x"], "usage: dgm4 export", "leave out one of --drawn and"),
        (["export", "--target", "7.5"], "usage: dgm4 export", "--target: tensorrt_rtx builds for compute"),
        (["data", "make", "--out", "x", "--pairs", "1"], "usage: dgm4 data make", "from 6, got '1'"),
        (["inspect", "b", "--data", "x"], "usage: dgm4 inspect", "--data and --split are for --layers"),
        (
            ["predict", "a.jpg", "A man"],
            "usage: dgm4 predict",
            "BUNDLE is missing, 'a.jpg' is none: expected dgm4 predict BUNDLE a.jpg 'A man'; demo:asap is",
        ),
        (["predict", "a.PNG"], "usage: dgm4 predict", "expected dgm4 predict BUNDLE a.PNG CAPTION;"),
        (["predict", "-", "words"], "usage: dgm4 predict", "expected dgm4 predict BUNDLE - words;"),
        (["predict", "b.csv"], "usage: dgm4 predict", "expected dgm4 predict BUNDLE --list b.csv;"),
        (["predict", "a.jpg", "--list", "b"], "usage: dgm4 predict", "dgm4 predict BUNDLE --list b;"),
        (
            ["predict", "demo:asap", "a.jpg", "Two", "men", "and", "a", "dog"],
            "usage: dgm4 predict",
            'unrecognized arguments: men and a dog; quote the caption: "A caption of several words"',
        ),
        (["export", "--demo"], "usage: dgm4 export", "unrecognized arguments: --demo"),
        (
            ["predict", "b", "i", "c", "--device", "cpuu"],
            "usage: dgm4 predict",
            "got 'cpuu'; did you mean cpu?",
        ),
        (
            ["predict", "b", "i", "c", "--threshold", "text_swop=0.5"],
            "usage: dgm4 predict",
            "got 'text_swop=0.5'; did you mean text_swap?",
        ),
        (
            ["predict", "b", "i", "c", "--device", "cuda:0", "--backend", "ort"],
            "usage: dgm4 predict",
            "--device cuda:0: the backend ort runs on cpu; leave out one of --device and --backend",
        ),
        (
            ["bench", "b", "--backend", "torch", "--backend", "tensorrt", "--device", "cpu"],
            "usage: dgm4 bench",
            "--device cpu: the backend tensorrt runs on cuda;",
        ),
        (["bench", "b", "--seconds", "\x1b[31m"], "usage: dgm4 bench", r"got '\x1b[31m'"),
        (["bench", "b", "--\x1b[31m"], "usage: dgm4 bench", r"unrecognized arguments: --\x1b[31m"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_of_usage_then_the_reason(arguments, usage, reason, capsys, monkeypatch):
    from export.trt.build import BuilderInfo

    monkeypatch.setattr(
        "export.options.build.find_builder", lambda: BuilderInfo("tensorrt_rtx", "1.7", True, "")
    )
    first, second = refused(arguments, capsys)
    assert first.startswith(usage)
    assert second.endswith(reason) if reason.endswith("?") else reason in second
    assert "--demo; did you mean" not in second


def test_what_a_user_gave_moves_no_cursor_and_is_not_endless(capsys):
    name = "\x1b[2J\u202e" + "x" * 300
    for arguments in (["predict", name, "a.jpg", "x"], ["train", "--data", name, "--out", "o"]):
        assert cli.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.isprintable()
    line = refused(["bench", "b", "--batch", "9" * 5000], capsys)[1]
    assert len(line) < 300


def test_a_full_disk_behind_stdout():
    """The number of the system's error says nothing, and Python tells of it once more at exit."""
    command = [sys.executable, "-m", "export.cli", "list"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    expected = "stdout: cannot be written: No space left on device; free space or choose another place"
    assert (done.returncode, done.stderr) == (1, f"dgm4: error: {expected}\n")


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (["inspect", "b"], logging.WARNING),
        (["-v", "inspect", "b"], logging.INFO),
        (["inspect", "b", "-v"], logging.INFO),
        (["inspect", "-vv", "b"], logging.DEBUG),
        (["--verbose", "inspect", "b"], logging.INFO),
        (["-q", "inspect", "b"], logging.WARNING),
        (["inspect", "b", "--quiet"], logging.WARNING),
    ],
)
def test_how_loud_it_is_may_stand_anywhere(arguments, level, monkeypatch):
    heard = []

    def run(options):
        heard.append((logging.getLogger("engine.bundle").getEffectiveLevel(), options.quiet))
        heard.append(logging.getLogger("PIL").getEffectiveLevel())
        return 0

    monkeypatch.setattr(cli_inspect, "run", run)
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.WARNING)
    try:
        assert cli.main(arguments) == 0
    finally:
        logging.getLogger().setLevel(before)
        app._set_up_log(0, False)
    assert heard == [(level, "q" in arguments[0] + arguments[-1]), logging.WARNING]


def test_loud_and_quiet_exclude_each_other(capsys):
    assert "not allowed with" in refused(["inspect", "b", "-v", "-q"], capsys)[1]


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    def run(_options):
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")

    monkeypatch.setattr(cli_inspect, "run", run)
    assert cli.main(["inspect", "b"]) == BackendError.exit_code
    assert capsys.readouterr().err.startswith("dgm4: error: dgm4 inspect needs torch: pip install")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_standard_streams_may_be_closed(closed, tmp_path):
    """The file that is opened next does not take the number of the closed one."""
    code = """
        import sys
        from pathlib import Path
        from export import cli
        from export.cli import inspect

        def run(options):
            with open("made", "w") as file:
                Path("number").write_text(str(file.fileno()))
            print("to stdout")
            sys.stderr.write("to stderr")
            return 0

        inspect.run = run
        sys.exit(cli.main(["inspect", "b"]))
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(code))
    command = f"{sys.executable} {script} {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_options_stand_anywhere_among_the_arguments(place):
    words = ["my-bundle", "photo.jpg", "A caption"]
    options = app.make_parser().parse_args(["predict", *words[:place], "--json", *words[place:]])
    assert (str(options.bundle), str(options.image), options.caption) == (
        "my-bundle",
        "photo.jpg",
        "A caption",
    )
    assert options.json


@pytest.mark.parametrize("prog", PARSERS)
def test_every_verb_is_described(prog):
    assert PARSERS[prog].description


def test_the_usage_of_an_error_names_the_arguments(capsys):
    with pytest.raises(SystemExit):
        app.make_parser().parse_args(["predict", "b", "a.jpg", "x", "--threshold", "nan"])
    assert capsys.readouterr().err.startswith("usage: dgm4 predict [options] bundle [image] [caption] ")
