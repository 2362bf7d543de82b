import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from export.cli import main
from export.cli.answers import Answers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def served(bundle):
    return str(bundle("asap", "fp32").path)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def records(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_pair(served, photo, capsys):
    assert main(["predict", served, str(photo), "A Woman's smile"]) == 0
    (record,) = records(capsys)
    assert record["image"] == str(photo)
    assert [word["text"] for word in record["words"]] == ["A", "Woman's", "smile"]
    assert "heatmap" not in record
    assert record["warnings"][0].startswith("untrained_weights")


@pytest.mark.parametrize(("decode", "sizes"), [("exact", []), ("fast", [(256, 256)])])
def test_a_jpeg_is_decoded_as_asked(served, tmp_path, capsys, monkeypatch, decode, sizes):
    drafts = []
    monkeypatch.setattr(JpegImageFile, "draft", lambda image, mode, size: drafts.append(size))
    Image.new("RGB", (900, 600)).save(tmp_path / "photo.jpg")
    assert main(["predict", served, str(tmp_path / "photo.jpg"), "words", "--decode", decode]) == 0
    assert records(capsys)[0]["size"] == [900, 600] and drafts == sizes


def test_a_rebuild_needs_a_gpu(served, photo, capsys, monkeypatch):
    monkeypatch.setattr("engine.backends._has_driver", lambda: False)
    assert main(["predict", served, str(photo), "words", "--rebuild"]) == 4
    assert "this machine's GPU, which needs an NVIDIA driver" in capsys.readouterr().err


def test_a_missing_image_is_told_before_the_network_is_loaded(served, tmp_path, capsys, caplog):
    assert main(["predict", served, str(tmp_path / "nowhere.jpg"), "words"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere.jpg': no such file" in line
    assert not caplog.records


def test_failures_on_a_page_and_an_empty_cell(served, photo, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image,caption\nphoto.png,\nphoto.png,a,b\n")
    arguments = ["predict", served, "--list", str(tmp_path / "list.csv")]
    assert main([*arguments, "--html", "--out", str(tmp_path / "page.html")]) == 1
    assert "1 of 2 pairs failed; their cards hold the error" in capsys.readouterr().err
    assert main(arguments) == 1
    alone, cut = records(capsys)
    assert alone["manipulated"] is None and alone["warnings"][1].startswith("no_caption: ")
    assert (cut["image"], cut["kind"]) == ("photo.png", "InputError")


def test_heatmap_threshold_and_plot(served, photo, tmp_path, capsys):
    plot = tmp_path / "answer.png"
    arguments = ["--heatmap", "--threshold", "1.0", "--plot", str(plot)]
    assert main(["predict", served, str(photo), "words", *arguments]) == 0
    (record,) = records(capsys)
    assert np.array(record["heatmap"]).shape == (16, 16)
    assert not record["manipulated"]
    assert Image.open(plot).size[0] > 200


def test_a_list_answers_line_by_line_and_keeps_ids(served, photo, tmp_path, capsys):
    lines = [
        b'\xef\xbb\xbf{"image": "photo.png", "caption": "one", "id": 7}\r\n',
        b"\n",
        b"no json\n",
        b'{"image": "photo.png", "caption": "caf\xe9"}\n',
        b'{"image": "photo.png", "n": ' + b"9" * 5000 + b"}\n",
        b"[" * 100_000 + b"\n",
        b'{"image": 3, "caption": "x"}\n',
        b'{"image": "absent.png", "text": "x"}\n',
        b'{"image": "photo.png", "text": "two"}',
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(b"".join(lines))
    assert main(["predict", served, "--list", str(source), "--batch", "2"]) == 1
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["line"] for record in found] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert found[0]["id"] == 7 and "id" not in found[-1]
    assert [record["line"] for record in found if "error" in record] == [3, 4, 5, 6, 7, 8]
    assert "absent.png" in found[6]["error"] and found[6]["kind"] == "InputError"
    assert "6 of 8 pairs failed" in captured.err


def test_list_from_stdin(served, photo, capsys, monkeypatch):
    text = json.dumps({"image": str(photo), "caption": "words"})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["predict", served, "--list", "-"]) == 0
    assert len(records(capsys)) == 1


def test_a_page_is_whole_and_in_its_file_alone(served, photo, tmp_path, capsys):
    page = tmp_path / "out" / "page.html"
    page.parent.mkdir()
    assert main(["predict", served, str(photo), "<b>é", "--html", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</body></html>\n")
    assert "&lt;b&gt;é" in text
    assert list(page.parent.iterdir()) == [page]
    assert capsys.readouterr().out == ""


def test_a_list_becomes_one_page_with_the_errors_in_their_place(served, photo, tmp_path):
    lines = ['{"image": "photo.png", "caption": "one"}', "<b>", '{"image": "absent.png", "caption": "two"}']
    source, page = tmp_path / "pairs.jsonl", tmp_path / "page.html"
    source.write_text("\n".join(lines))
    assert main(["predict", served, "--list", str(source), "--html", "--out", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    assert [text.count(x) for x in ("<article", "<style>", '<p class="reason">')] == [3, 1, 2]
    assert "<b>3</b> pairs" in text and "<b>2</b> errors" in text
    assert "line 2</bdi>" in text and "got &#39;&lt;b&gt;&#39;</p>" in text
    assert "absent.png</bdi>" in text and '<p class="reason">no such file' in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["photo.png"],
        ["photo.png", "x", "--list", "pairs.jsonl"],
        ["--list", "pairs.jsonl", "--plot", "x.png"],
        ["photo.png", "x", "--batch", "0"],
        ["photo.png", "x", "--threads", "-3"],
        ["photo.png", "x", "--threads", "99999"],
        ["photo.png", "x", "--threshold", "3"],
        [".", "--html"],
        ["photo.png", "x", "--html", "--json"],
        ["photo.png", "x", "--resume", "--out", "x.jsonl"],
        ["--list", "pairs.jsonl", "--resume"],
    ],
)
def test_usage(served, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", served, *arguments])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--backend=foo", "expected auto or one of ort, torch, .*, got 'foo'"),
        ("--device=gpu", "expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_a_name_that_is_none_is_a_usage_error(verb, option, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "bundle", option])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["{photo}", "x", "--plot", "answer.xyz"], "ending in .png", 1),
        (["{photo}", "x", "--plot", "absent/answer.png"], "folder that exists", 1),
        (["{photo}", "x", "--out", "."], "folder that exists", 1),
        (["{photo}", "x", "--out", "absent/x.jsonl"], "folder that exists", 1),
        (["absent.png", "x"], "'absent.png': no such file", 1),
        (["--list", "absent.jsonl"], "absent.jsonl: cannot read the list", 1),
    ],
)
def test_one_line_for_a_user_error(served, photo, tmp_path, arguments, message, code, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [part.format(photo=photo) for part in arguments]
    assert main(["predict", served, *filled]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [x for x in captured.err.splitlines() if x.startswith("dgm4: error:")]
    assert message in line
    assert "Traceback" not in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.png"]


def test_the_list_is_never_overwritten(served, photo, tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps({"image": "photo.png", "caption": "x"}))
    before = source.read_bytes()
    assert main(["predict", served, "--list", str(source), "--out", str(source)]) == 1
    assert source.read_bytes() == before
    assert "would overwrite an input" in capsys.readouterr().err


def test_any_locale(served, photo):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "export.cli", "predict", served, str(photo), "café 中文", "--html"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    page = done.stdout.decode("utf-8")
    assert "café" in page and "中文" in page


def test_numbers_are_rounded_and_letters_stay(served, photo, capsys):
    assert main(["predict", served, str(photo), "caf\xe9 \u4e2d\u6587"]) == 0
    out = capsys.readouterr().out
    assert "caf\xe9 \u4e2d\u6587" in out
    record = json.loads(out)
    assert record["score"] == round(record["score"], 6)
    assert record["box"] is None or record["box"] == [round(x, 1) for x in record["box"]]
    assert all(word["score"] == round(word["score"], 6) for word in record["words"])


def test_a_summary_for_people(served, photo, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["predict", served, str(photo), "a \x1b[31mman", "--threshold", "0"]) == 0
    first, second, *_ = out = capsys.readouterr().out.splitlines()
    assert first == f"{photo}: manipulated"
    assert re.fullmatch(r"  score  +[<> \d.]+ % \(threshold < 0.1 %\)", second)
    assert [line.split()[0] for line in out[2:] if line[:3] != "   "][-2:] == ["words", "warning"]
    assert not any("\x1b" in line for line in out)
    assert main(["predict", served, str(photo), "a man", "--threshold", "1"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{photo}: not manipulated"
    assert not {"types", "face", "words"} & {line.split()[0] for line in rest}
    assert main(["predict", served, str(photo), "a man", "--json"]) == 0
    assert len(records(capsys)) == 1


def test_an_image_from_stdin(served, photo, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes())))
    assert main(["predict", served, "-", "words"]) == 0
    (piped,) = records(capsys)
    assert main(["predict", served, str(photo), "words"]) == 0
    (named,) = records(capsys)
    assert piped["image"] == "-"
    assert {**piped, "image": 0, "timing": 0} == {**named, "image": 0, "timing": 0}


def test_a_long_list_is_taken_up_where_it_stopped(served, photo, tmp_path, capsys, monkeypatch):
    source, out = tmp_path / "list.csv", tmp_path / "answers.jsonl"
    source.write_text("image,caption\n" + "".join(f"photo.png,caption {n}\n" for n in range(5)))
    arguments = ["predict", served, "--list", str(source), "--out", str(out), "--batch", "1"]
    assert main(arguments) == 0
    whole = out.read_text().splitlines()
    assert "predict: 5 of 5 pairs" in capsys.readouterr().err
    out.unlink()
    written = Answers.write

    def stop(self, text):
        if '"line": 5' in text:
            raise KeyboardInterrupt
        written(self, text)

    monkeypatch.setattr(Answers, "write", stop)
    assert main(arguments) == 130
    monkeypatch.setattr(Answers, "write", written)
    assert "--resume goes on with it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl.partial",
        "list.csv",
        "photo.png",
    ]
    assert main([*arguments, "--resume"]) == 0
    assert "predict: 3 of 5 pairs" in capsys.readouterr().err
    without_times = [
        [{**json.loads(x), "timing": 0} for x in lines] for lines in (whole, out.read_text().splitlines())
    ]
    assert without_times[0] == without_times[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "list.csv", "photo.png"]
    assert main([*arguments, "--resume", "--threshold", "0.9"]) == 1
    assert "of another bundle or other options" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--json", "--html"])
def test_a_name_that_is_not_utf8(form, served, photo, tmp_path, capsys):
    """Its bytes come as surrogates, which strict readers of JSON refuse: the path is told whole besides."""
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(photo.read_bytes())
    assert main(["predict", served, str(tmp_path / name), "words", form, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out").read_text(encoding="utf-8")
    if form == "--html":
        assert r"caf\udce9.png" in text
    else:
        record = json.loads(text)
        assert record["image"] == str(tmp_path / "caf\ufffd.png")
        assert base64.b64decode(record["image_base64"]) == os.fsencode(tmp_path / name)


def test_stdout_closed(served, photo, tmp_path):
    """An answer in a file is whole; one that has nowhere to go is an error."""
    (tmp_path / "list.csv").write_text("image,caption\nphoto.png,words\n")
    command = f"{sys.executable} -m export.cli predict {served} --list {tmp_path}/list.csv"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done, lost = (
        subprocess.run(["sh", "-c", line], env=environment, cwd=ROOT, capture_output=True, timeout=120)
        for line in (f"{command} --out {tmp_path}/o >&-", f"{command} >&-")
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o").read_text())["line"] == 2
    assert lost.returncode == 1
    assert lost.stderr.decode().startswith("dgm4: error: stdout is closed: expected somewhere to write")


@pytest.mark.parametrize(
    "verb", [["inspect", "{bundle}"], ["doctor"], ["list"], ["predict", "{bundle}", "a", "b"]]
)
def test_an_answer_with_nowhere_to_go_is_an_error(verb, served, monkeypatch, capsys):
    with Path(os.devnull).open("w") as null:
        monkeypatch.setattr(sys, "stdout", null)
        assert main([part.format(bundle=served) for part in verb]) == 1
    assert "stdout is closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "a.png", "x"],
        ["evaluate", "--data", "d"],
        ["calibrate", "--data", "d", "--false-alarms", "0.01"],
        ["bench"],
    ],
)
def test_a_batch_above_the_bundles_limit_is_a_usage_error(arguments, served, capsys):
    verb, *more = arguments
    with pytest.raises(SystemExit) as stop:
        main([verb, served, *more, "--batch", "99999"])
    assert stop.value.code == 2
    assert re.search(r"--batch: expected at most \d+, the bundle's limit, got 99999", capsys.readouterr().err)


@pytest.mark.parametrize("form", ["--json", "--html"])
def test_an_empty_list_is_an_error(form, served, tmp_path, capsys):
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    source.touch()
    assert main(["predict", served, "-q", "--list", str(source), "--out", str(out), form]) == 1
    assert capsys.readouterr().err == (
        f"dgm4: error: {source}: expected at least one pair, got an empty list\n"
    )
    assert not out.exists()


def test_half_a_pair_of_a_list_is_answered(served, photo, tmp_path, capsys, monkeypatch):
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"image": "photo.png", "caption": null}\n{"caption": "words"}')
    assert main(["predict", served, "--list", str(source)]) == 0
    image, caption = records(capsys)
    assert (image["image"], image["score"], image["words"]) == ("photo.png", None, [])
    assert (caption["image"], caption["box"], caption["caption"]) == (None, None, "words")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["predict", served, "--list", str(source)]) == 0
    out = capsys.readouterr().out
    assert "photo.png: not answered\n" in out and "line 2: not answered\n" in out


@pytest.mark.parametrize("name", ["list.csv", "list.json", "list.jsonl"])
def test_a_message_has_the_number_of_its_line(name, served, photo, tmp_path, capsys):
    images = ["photo.png", "absent.png", "photo.png", "absent.png"]
    forms = {
        "list.csv": "image,caption\n" + "".join(f"{image},x\n" for image in images),
        "list.json": json.dumps([{"image": image, "caption": "x"} for image in images]),
        "list.jsonl": "".join(json.dumps({"image": image, "caption": "x"}) + "\n" for image in images),
    }
    source, out = tmp_path / name, tmp_path / "answers.jsonl"
    source.write_text(forms[name])
    arguments = ["predict", served, "--list", str(source), "--out", str(out)]
    assert main(arguments) == 1
    failed = [record for record in map(json.loads, out.read_text().splitlines()) if "error" in record]
    assert len(failed) == 2
    for record in failed:
        unit = "item" if name == "list.json" else "line"
        assert record["error"].startswith(f"{unit} {record['line']} ('")
    # A finished file is kept, with what failed.
    before = out.read_text()
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 1
    assert out.read_text() == before
    assert "2 of 4 pairs failed; their lines hold the error; leave out --resume to try them again" in (
        capsys.readouterr().err
    )
