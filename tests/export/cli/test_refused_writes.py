"""A full disk and a read-only one: each command that writes names the user's own path and a remedy."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from safetensors import SafetensorError

from dgm4.data.make import make_sample_set
from dgm4.saving import save_pickle, save_safetensors
from dgm4.shipped import demo_checkpoint, demo_sample
from engine import Bundle
from engine.errors import InputError
from engine.layout import SIGNATURE
from engine.scoring import PairList, Work, ray_data
from engine.scoring.shards import cut
from export.cli import main
from export.writing import writing

NUMBERS = [errno.ENOSPC, errno.EROFS]
TRAIN = ("--size", "tiny", "--set", "epochs=1", "--set", "batch=4")
# Arguments with {data}, {list}, {checkpoint} and the place that refuses, and how messages name that.
COMMANDS = {
    "convert": ("convert {checkpoint} {disk}/c.safetensors", "OUT {disk}/c.safetensors"),
    "score": ("score -q demo:asap {list} --out {disk}/sc", "--out {disk}/sc"),
    "data make": ("data make -q --out {disk}/set --pairs 6", "--out {disk}/set"),
    "data vocabulary": ("data vocabulary --data {data} --out {disk}/v --size 300", "--out {disk}/v"),
    "predict": ("predict -q demo:asap --list {list} --out {disk}/p.jsonl", "--out {disk}/p.jsonl"),
    "html": ("predict -q demo:asap --list {list} --html --out {disk}/p", "--out {disk}/p"),
    "plot": ("predict -q demo:asap {photo} A --plot {disk}/p.png", "--plot {disk}/p.png"),
    "demo": ("-q demo --out {disk}/d.png", "--out {disk}/d.png"),
    "evaluate": (
        "evaluate -q demo:asap --data {data} --reference none --html {disk}/e --limit 2",
        "--html {disk}/e",
    ),
    "train": ("train -q --data {data} --out {disk}/run --stop-after 1", "--out {disk}/run"),
    "pretrain": ("pretrain -q --data {data} --out {disk}/v.pth", "--out {disk}/v.pth"),
    "export": ("export -q --checkpoint {checkpoint} --target none --out {disk}/b", "the bundle {disk}/b"),
    "calibrate": (
        "calibrate -q demo:asap --data {data} --split train --false-alarms 0.4 --out {disk}/b",
        "the bundle {disk}/b",
    ),
    "repository": ("repository demo:asap --out {disk}/m", "the model repository {disk}/m"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "set"
    make_sample_set(out, 40)
    return out


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder; called with an error's number, whose disk refuses writes with it, in the system's own way."""
    place = tmp_path / "disk"
    place.mkdir()
    open_, mkdir = io.open, os.mkdir

    def refuse(number):
        def below(path):
            named = isinstance(path, str | bytes | Path)
            return named and place in Path(os.fsdecode(path)).absolute().parents

        def opening(path, mode="r", *more, **named):
            if not below(path) or not set(mode) & set("wxa+"):
                return open_(path, mode, *more, **named)
            if number == errno.EROFS:
                raise OSError(number, os.strerror(number), os.fspath(path))
            open_(path, "a").close()  # a full disk has room for a name
            return open_("/dev/full", mode.replace("x", "w"), *more, **named)  # no name in its errors

        def making(path, *more, **named):
            if number == errno.EROFS and below(path):
                raise OSError(number, os.strerror(number), os.fspath(path))
            mkdir(path, *more, **named)

        def saving(_state, path, metadata=None):
            assert below(path)
            raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")

        monkeypatch.setattr(builtins, "open", opening)
        monkeypatch.setattr(io, "open", opening)
        monkeypatch.setattr(os, "mkdir", making)
        monkeypatch.setattr(safetensors.torch, "save_file", saving)
        return place

    return refuse


def told(number, what, option="--out"):
    remedy = "" if number == errno.EROFS else "free space or "
    return f"{what}: cannot be written: {os.strerror(number)}; {remedy}choose another {option}"


@pytest.mark.parametrize("number", NUMBERS, ids=["full", "read-only"])
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_names_the_users_own_path(command, number, disk, data, tmp_path, capsys):
    photo = demo_sample()[0]
    listed = tmp_path / "pairs.jsonl"
    listed.write_text(json.dumps({"image": str(photo), "caption": "A man"}) + "\n")
    place = disk(number)
    names = {"data": data, "list": listed, "photo": photo, "checkpoint": demo_checkpoint("asap")}
    arguments, what = (text.format(disk=place, **names) for text in COMMANDS[command])
    more = TRAIN if command in ("train", "pretrain") else ()
    assert main([*arguments.split(), *more]) == 1
    said = capsys.readouterr().err.splitlines()[-1].replace("/vocab.txt", "")
    option = what.split()[0] if what.split()[0] != "the" else "--out"
    assert said == f"dgm4: error: {told(number, what, option)}"


@pytest.mark.parametrize("number", NUMBERS, ids=["full", "read-only"])
def test_a_signature(number, disk, tmp_path, capsys):
    """It has no other place."""
    private = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey
    kinds = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = private.generate().private_bytes(
        kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption()
    )
    (tmp_path / "key.pem").write_bytes(key)
    copy = shutil.copytree(Bundle.open("demo:asap").path, tmp_path / "disk" / "b")
    disk(number)
    assert main(["sign", str(copy), "--key", str(tmp_path / "key.pem")]) == 1
    expected = told(number, f"the signature {copy / SIGNATURE}").removesuffix("choose another --out")
    assert capsys.readouterr().err == f"dgm4: error: {expected}sign a copy of the bundle\n"


@pytest.mark.parametrize("number", NUMBERS, ids=["full", "read-only"])
def test_a_worker_of_ray(number, disk, tmp_path, monkeypatch):
    """Its error reaches the driver with its number, and is told there as one of this machine's."""
    pytest.importorskip("ray")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.jpg", "caption": "A man"}\n')
    out = tmp_path / "disk" / "sc"
    out.mkdir()
    disk(number)
    work = Work(bundle="demo:asap", digest="", source=tmp_path / "pairs.jsonl", out=out)
    shards = list(cut(PairList(work.source), 1))
    monkeypatch.setattr(ray_data.Worker, "_open", lambda _: None)
    monkeypatch.setattr("engine.scoring.worker.answers", lambda *_: [])
    rows = [{"done": row} for row in ray_data.ShardActor(work, shards)({"id": np.array([0])})["done"]]
    monkeypatch.setattr(ray_data, "_connected", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray_data, "_dataset", lambda *_: SimpleNamespace(iter_rows=lambda: rows))
    with pytest.raises(InputError) as caught, writing(out, "--out"):
        list(ray_data.score_on(ray_data.Cluster(), work, shards))
    assert str(caught.value) == told(number, f"--out {out}")


def test_a_checkpoint_that_does_not_fit(disk, tmp_path):
    """torch tells of the length of its file, safetensors the number in words."""
    import torch

    state = {"a": torch.zeros(100_000)}
    save_pickle(state, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["a"].shape == (100_000,)
    place = disk(errno.ENOSPC)
    for save in (save_pickle, save_safetensors):
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))) as caught:
            save(state, place / "a")
        assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (OSError(errno.EACCES, "Permission denied", "{disk}/out"), True),
        (OSError(errno.EACCES, "Permission denied", "{disk}/out/part"), True),
        (OSError(errno.EACCES, "Permission denied", "{disk}/.out.7-ab.partial/part"), True),
        (OSError(errno.EACCES, "Permission denied", "{disk}/out.partial"), True),
        (OSError(errno.EACCES, "Permission denied", "{disk}"), True),
        (OSError(errno.EACCES, "Permission denied", "{disk}/out.jpg"), False),
        (OSError(errno.EACCES, "Permission denied", "{disk}/other/out"), False),
        (OSError(errno.ENOSPC, "No space left on device", "{disk}/other"), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("no write at all"), False),
    ],
    ids=str,
)
def test_what_is_an_error_of_the_place(error, ours, tmp_path, monkeypatch):
    """Also of one that is given relative to the working directory."""
    if isinstance(error, OSError) and error.filename:
        error = OSError(error.errno, error.strerror, error.filename.format(disk=tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError if ours else type(error)) as caught, writing(Path("out"), "--out"):
        raise error
    assert str(caught.value).startswith("--out out: cannot be written: ") == ours


def test_stdout_is_not_taken_for_the_page(tmp_path, monkeypatch, capsys):
    """Where both are written and the first is full."""
    from export.cli import evaluate

    monkeypatch.setattr(evaluate, "_evaluate", lambda *_: None)
    monkeypatch.setattr(evaluate, "_report_problems", lambda _: None)
    monkeypatch.setattr("export.evaluation.gate.find_failures", lambda _: None)
    monkeypatch.setattr("export.evaluation.page.write_page", lambda *_: "page")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("export.evaluation.report.write_table", lambda *_: (_ for _ in ()).throw(full))
    (tmp_path / "metadata").mkdir()
    arguments = ["evaluate", "demo:asap", "--data", tmp_path, "--html", tmp_path.parent / "page.html"]
    monkeypatch.setattr("export.cli.app._drop_stdout", lambda: None)
    assert main([*map(str, arguments), "--reference", "none"]) == 1
    assert capsys.readouterr().err == f"dgm4: error: {told(errno.ENOSPC, 'stdout', 'place')}\n"


def test_a_large_image_is_refused_in_one_line(tmp_path, capsys, caplog):
    """Pillow's own warning stays out of it."""
    path = tmp_path / "large.png"
    Image.new("1", (12_000, 12_000)).save(path)
    assert main(["predict", "demo:asap", str(path), "A man"]) == 1
    err = capsys.readouterr().err
    assert "expected at most 64000000 pixels, got 12000 x 12000" in err.splitlines()[-1]
    assert "Decompression" not in err + caplog.text
