import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import dgm4
from engine.bundle import Bundle
from engine.errors import BundleError
from engine.registry.config import TYPES
from export.bundle import writer as bundle
from export.bundle.writer import BundleWriter, sweep_partials

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = {
    "model": {"name": "asap", "size": "tiny", "config": dgm4.model_config("asap", "tiny").to_dict()},
    "weights": {"kind": "drawn", "source": "drawn from seed 1", "sha256": None},
    "precision": "fp16",
    "preprocess": {
        "image_size": 256,
        "patch_size": 16,
        "resample": "bicubic",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "max_words": 50,
        "max_tokens": 127,
        "min_tokens": 2,
    },
    "inputs": [
        {"name": "image", "dtype": "float32", "shape": ["batch", 3, 256, 256]},
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "tokens"]},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "tokens"]},
    ],
    "outputs": [
        {"name": "logits_real_fake", "dtype": "float32", "shape": ["batch", 2]},
        {"name": "logits_multicls", "dtype": "float32", "shape": ["batch", 4]},
        {"name": "box", "dtype": "float32", "shape": ["batch", 4]},
        {"name": "logits_tok", "dtype": "float32", "shape": ["batch", "tokens - 1", 2]},
    ],
    "limits": {"max_batch": 32, "max_tokens": 127},
    "types": ["face_swap", "face_attribute", "text_swap", "text_attribute"],
    "thresholds": dict.fromkeys(("manipulated", *TYPES, "words"), 0.5),
    "engines": [],
    "versions": {"dgm4": "0.1.0", "python": "3.11.7"},
    "verification": [
        {"stage": "onnx", "against": "torch fp32", "max": 2.5e-6, "rms": 1e-7, "tolerance": 1e-4}
    ],
}


def manifest_of(text, **fields):
    return {**MANIFEST, "versions": {**MANIFEST["versions"], "text": text}, **fields}


def write(out, text="one", **options):
    with BundleWriter(out, **options) as writer:
        writer.add_text("model.onnx", text)
        writer.add_bytes("model.onnx.data", text.encode() * 1000)
        return writer.commit(manifest_of(text))


def read_whole(out):
    """Text of a bundle after checking every hash; fails on a mixture, a stranger or a missing file."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert {path.name for path in out.iterdir()} == {"manifest.json", *manifest["files"]}
    for name, record in manifest["files"].items():
        content = (out / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return manifest["versions"]["text"]


def partials(directory):
    return [path.name for path in directory.iterdir() if path.name.endswith(".partial")]


def test_contents_and_hashes(tmp_path):
    manifest = write(tmp_path / "b")
    assert read_whole(tmp_path / "b") == "one"
    assert manifest == json.loads((tmp_path / "b/manifest.json").read_text())
    assert (manifest["format"], manifest["format_version"]) == ("dgm4-bundle", 1)
    assert manifest["created"].endswith("+00:00")
    assert set(manifest["files"]) == {"model.onnx", "model.onnx.data"}
    assert partials(tmp_path) == []
    Bundle.open(tmp_path / "b").verify_all()


def test_caller_manifest_is_not_changed(tmp_path):
    given = manifest_of("one")
    with BundleWriter(tmp_path / "b") as writer:
        writer.commit(given)
    assert given == manifest_of("one")


def test_replaces_a_bundle_and_an_empty_directory(tmp_path):
    (tmp_path / "b").mkdir()
    for text in ("one", "two", "three"):
        write(tmp_path / "b", text)
        assert read_whole(tmp_path / "b") == text
    assert partials(tmp_path) == []


def test_replaces_without_an_exchanging_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_exchange", lambda left, right: False)
    write(tmp_path / "b", "one")
    write(tmp_path / "b", "two")
    assert read_whole(tmp_path / "b") == "two"
    assert partials(tmp_path) == []


def test_failed_second_rename_restores_the_old_bundle(tmp_path, monkeypatch):
    out = tmp_path / "b"
    write(out, "one")
    monkeypatch.setattr(bundle, "_exchange", lambda left, right: False)
    rename, calls = Path.rename, []

    def fail_second(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(BundleError, match="Input/output error"):
        write(out, "two")
    assert read_whole(out) == "one"
    assert partials(tmp_path) == []


def test_overwrite_can_be_refused(tmp_path):
    write(tmp_path / "b", "one")
    with pytest.raises(BundleError, match="already holds a bundle"):
        write(tmp_path / "b", "two", overwrite=False)
    assert read_whole(tmp_path / "b") == "one"


def test_symlink_to_a_bundle_stays_a_symlink(tmp_path):
    write(tmp_path / "b", "one")
    (tmp_path / "current").symlink_to("b")
    write(tmp_path / "current", "two")
    assert (tmp_path / "current").is_symlink()
    assert read_whole(tmp_path / "b") == "two"


@pytest.mark.parametrize("manifest", [None, "not json", "[1]", '{"format": "other"}', b"\xff\xfe"])
def test_stranger_directory_is_refused(tmp_path, manifest):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"mine")
    if manifest is not None:
        (out / "manifest.json").write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(BundleError, match="not a bundle"):
        write(out)
    assert (out / "holiday.jpg").read_bytes() == b"mine"
    assert partials(tmp_path) == []


def test_bundle_with_a_foreign_file_is_refused(tmp_path):
    write(tmp_path / "b")
    (tmp_path / "b/notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="notes.txt"):
        write(tmp_path / "b", "two")
    assert (tmp_path / "b/notes.txt").read_text() == "mine"


def test_foreign_file_that_comes_during_writing_is_kept(tmp_path):
    write(tmp_path / "b")
    with pytest.raises(BundleError, match="notes.txt"), BundleWriter(tmp_path / "b") as writer:
        (tmp_path / "b/notes.txt").write_text("mine")
        writer.commit(manifest_of("two"))
    assert (tmp_path / "b/notes.txt").read_text() == "mine"


def test_file_in_the_place_of_the_bundle_is_refused(tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(BundleError, match="is a file"):
        write(tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"


@pytest.mark.parametrize("parent", ["file", "missing"])
def test_parent_that_cannot_hold_it(tmp_path, parent):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"the bundle .*/b: cannot be written: .*(create it|is a file)"):
        write(tmp_path / parent / "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BundleError, match="no permission"):
        write(tmp_path / "b")


def test_exception_leaves_nothing(tmp_path):
    write(tmp_path / "b", "one")
    with pytest.raises(KeyError), BundleWriter(tmp_path / "b") as writer:
        writer.add_text("model.onnx", "two")
        raise KeyError("unrelated")
    assert read_whole(tmp_path / "b") == "one"
    assert partials(tmp_path) == []


def test_block_without_commit_leaves_nothing(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_text("model.onnx", "two")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match="closed"):
        writer.path("model.onnx")


@pytest.mark.parametrize("place", ["write", "fsync", "body"])
def test_full_disk_keeps_the_old_bundle(tmp_path, monkeypatch, place):
    write(tmp_path / "b", "one")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    if place == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(BundleError, match="No space left on device; free space or"),
        BundleWriter(tmp_path / "b") as writer,
    ):
        if place == "body":
            full()
        writer.add_text("model.onnx", "two")
        writer.commit(manifest_of("two"))
    monkeypatch.undo()
    assert read_whole(tmp_path / "b") == "one"
    assert partials(tmp_path) == []


def test_really_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount")
    try:
        write(mount / "b", "one")
        with (
            pytest.raises(BundleError, match="No space left on device; free space or"),
            BundleWriter(mount / "b") as writer,
        ):
            for index in range(100):
                writer.add_bytes(f"model.{index}", bytes(10_000))
        assert read_whole(mount / "b") == "one"
        assert partials(mount) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "..\\x", "manifest.json"])
def test_only_plain_names(tmp_path, name):
    with BundleWriter(tmp_path / "b") as writer, pytest.raises(BundleError, match="plain file name"):
        writer.path(name)


@pytest.mark.parametrize("kind", ["directory", "symlink"])
def test_bundle_is_flat_and_of_regular_files(tmp_path, kind):
    with pytest.raises(BundleError, match="not a regular file"), BundleWriter(tmp_path / "b") as writer:
        path = writer.path("odd")
        path.mkdir() if kind == "directory" else path.symlink_to("/etc/hostname")
        writer.commit(MANIFEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        (
            {"thresholds": dict.fromkeys(("manipulated", *TYPES, "words"), float("nan"))},
            "NaN is not a JSON number",
        ),
        ({"types": ["face_swap"]}, "types: expected .*, got"),
        ({"precision": "fp12"}, "precision: expected one of"),
    ],
)
def test_manifest_that_the_reader_refuses_is_not_published(tmp_path, fields, cause):
    with pytest.raises(BundleError, match=cause), BundleWriter(tmp_path / "b") as writer:
        writer.commit(manifest_of("one", **fields))
    assert list(tmp_path.iterdir()) == []


def test_commit_hashes_again_only_what_changed_since_the_preview(tmp_path, monkeypatch):
    hashed = []
    digest = bundle.sha256_of
    monkeypatch.setattr(bundle, "sha256_of", lambda file: hashed.append(Path(file.name).name) or digest(file))
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_text("same.txt", "same")
        writer.add_text("other.txt", "old")
        writer.preview(manifest_of("draft"))
        assert sorted(hashed) == ["other.txt", "same.txt"]
        hashed.clear()
        time.sleep(0.02)  # a clock tick of the file system
        writer.add_text("other.txt", "new")  # as long, and in place
        writer.commit(manifest_of("one"))
    assert hashed == ["other.txt"]
    assert read_whole(tmp_path / "b") == "one"


def test_every_file_is_as_readable_as_the_directory(tmp_path):
    before = os.umask(0o022)
    try:
        with BundleWriter(tmp_path / "b") as writer:
            writer.add_text("model.onnx", "one").chmod(0o600)
            writer.commit(MANIFEST)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "b").iterdir()}
    assert modes == {"model.onnx": 0o644, "manifest.json": 0o644}
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


def test_sweep_spares_the_living_and_strangers(tmp_path):
    out = tmp_path / "b"
    stale = tmp_path / ".b.1-00ff.partial"
    for path in (
        stale,
        tmp_path / ".b.partial",
        tmp_path / ".bc.1-00ff.partial",
        tmp_path / "b.1-00ff.partial",
    ):
        path.mkdir()
        (path / "file").write_text("x")
    with BundleWriter(out) as writer:
        assert not stale.exists()
        assert sweep_partials(out) == []
        writer.add_text("model.onnx", "one")
        writer.commit(manifest_of("one"))
    assert read_whole(out) == "one"
    assert len(list(tmp_path.iterdir())) == 4


def test_bundle_set_aside_by_a_killed_writer_comes_back(tmp_path):
    write(tmp_path / "b", "one")
    (tmp_path / "b").rename(tmp_path / ".b.1-00ff.old.partial")
    with BundleWriter(tmp_path / "b"):
        pass
    assert read_whole(tmp_path / "b") == "one"


WRITER = """
import json
import sys
from pathlib import Path
from export.bundle.writer import BundleWriter
from export.cli.stopping import exit_on_sigterm
from contextlib import nullcontext

manifest = json.loads(sys.argv[3])

def loop():
    version = 0
    while True:
        version += 1
        with BundleWriter(Path(sys.argv[1])) as writer:
            for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
                writer.add_text(name, str(version) * 20000)
            writer.commit({**manifest, "versions": {"text": str(version)}})
        if version == 1:
            print("ready", flush=True)

with exit_on_sigterm() if sys.argv[2] == "handled" else nullcontext():
    loop()
"""


def kill_while_writing(out, number, handled, delay_s):
    command = [sys.executable, "-P", "-c", textwrap.dedent(WRITER), str(out), handled, json.dumps(MANIFEST)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        process.send_signal(number)
        return exit_status(process)


def exit_status(process):
    try:
        return process.wait(timeout=60)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "handled", "status"),
    [
        (signal.SIGKILL, "plain", -signal.SIGKILL),
        (signal.SIGTERM, "plain", -signal.SIGTERM),
        (signal.SIGTERM, "handled", 143),
    ],
)
def test_killed_at_any_moment(tmp_path, number, handled, status):
    draw = random.Random(1)
    out = tmp_path / "b"
    for _ in range(14):
        assert kill_while_writing(out, number, handled, draw.uniform(0, 0.04)) == status
        text = read_whole(out)
        assert (out / "model.onnx").read_text() == text * 20000
        if handled == "handled":
            assert partials(tmp_path) == []
    write(out, "last")
    assert read_whole(out) == "last"
    assert partials(tmp_path) == []
