from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from engine import Bundle, Predictor
from engine import manifest as manifests
from engine.errors import BundleError
from engine.manifest import parse_manifest
from export.output import is_bundle

DELETED = object()
NEWER = "a newer dgm4 may have written it: update the package"


def changed(manifest: dict, path: str, value: object) -> dict:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = manifest
    for part in parents:
        place = place[part]
    if value is DELETED:
        del place[last]
    else:
        place[last] = value
    return manifest


def test_a_sound_bundle_opens(bundle_dir):
    bundle = Bundle.open(bundle_dir)
    bundle.verify_all()
    assert bundle.verified("model.onnx") == bundle_dir / "model.onnx"
    assert bundle.manifest.model.name == "asap"
    assert bundle.manifest.thresholds.manipulated == 0.5
    assert bundle.manifest.inputs[0].shape == ("batch", 3, 256, 256)
    assert Bundle.open(str(bundle_dir)).manifest == bundle.manifest


def test_describe_is_json_and_the_manifest(bundle_dir):
    described = json.loads(json.dumps(Bundle.open(bundle_dir).describe(), allow_nan=False))
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    del manifest["sha256"]
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    since = {"float32_layers": [], "kept_layers": []}  # which older manifests do not have
    assert described == {**since, **manifest, "path": str(bundle_dir), "total_bytes": total}


@pytest.mark.parametrize(
    ("name", "found"),
    [("nowhere", "nothing"), ("theirs.onnx", "a file"), ("empty", "a directory without one")],
)
def test_no_bundle(tmp_path, name, found):
    (tmp_path / "theirs.onnx").write_bytes(b"onnx")
    (tmp_path / "empty").mkdir()
    expected = f"{name}: not a bundle, expected the directory .* that dgm4 export writes, got {found}$"
    with pytest.raises(BundleError, match=expected):
        Bundle.open(tmp_path / name)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"{\xe9}",
        "{}".encode("utf-16")[:-1],
        b"[]",
        b"3",
        b'{"format": NaN}',
        b'{"format": 1, "format": 1}',
        b"[" * 100_000,
        b'{"format": 1' + b"0" * 9999 + b"}",
    ],
)
def test_a_manifest_that_is_no_json_object(bundle_copy, data):
    (bundle_copy / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_copy)
    message = str(caught.value)
    place = f"{bundle_copy}/manifest.json: "
    assert message.startswith((f"{place}not valid JSON: ", f"{place}expected"))
    assert message.endswith("; export or copy the bundle again") and "codec" not in message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "zip", "format: expected 'dgm4-bundle', got 'zip'"),
        ("format", DELETED, "format: expected 'dgm4-bundle', got nothing"),
        ("format_version", 2, f"format_version: expected 1, got 2; {NEWER}, or export the bundle again"),
        ("format_version", True, "format_version: expected 1, got True"),
        ("model", "asap", "model: expected an object, got 'asap'"),
        ("model/name", None, "model.name: expected a string, got None"),
        ("weights/kind", 1, "weights.kind: expected one of trained, demo, drawn"),
        ("weights/sha256", "abc", "weights.sha256: expected 64"),
        ("precision", "fp4", "precision: expected one of fp32"),
        ("preprocess/resample", "nearest", "preprocess.resample: expected one of bicubic"),
        ("preprocess/mean", [1, 2], "preprocess.mean: expected a list of 3, got"),
        ("preprocess/std", [1, 0, 1], "preprocess.std: expected three numbers from 0.001 to 1000"),
        ("preprocess/patch_size", 15, "preprocess.patch_size: expected a divisor"),
        (
            "preprocess/max_tokens",
            500,
            "preprocess.max_tokens: expected at most limits.max_tokens 127",
        ),
        ("preprocess/min_tokens", 128, "min_tokens: expected at most max_tokens"),
        ("preprocess/min_tokens", 1, "preprocess.min_tokens: expected at least 2, as asap takes, got 1"),
        ("inputs", {}, "inputs: expected a list"),
        ("inputs/0/shape", "big", r"inputs\[0\].shape: expected a list"),
        ("inputs/0/dtype", "float16", r"inputs\[0\].dtype: expected one of float32"),
        ("inputs/0/name", "picture", "inputs: expected .*, missing \\['image'\\], got"),
        ("outputs/4/name", "box", "outputs: expected"),
        ("limits/max_batch", 0, "limits.max_batch: expected an integer from 1 to 4096"),
        ("types", ["a", "b", "c", "d"], "types: expected"),
        ("thresholds/words", 1.5, "thresholds.words: expected a number above 0 and at most 1"),
        ("thresholds/words", 10**400, "thresholds.words: expected a number above 0"),
        ("thresholds/words", 0, "thresholds.words: expected a number above 0 and at most 1, got 0"),
        ("preprocess/image_size", 10**86, "preprocess.image_size: expected an integer from 1 to 1048576"),
        ("preprocess/image_size", 512, "preprocess.image_size: expected 256 of model.config, got 512"),
        ("model/config/image_size", 2**31, "model.config.image_size: expected an integer from 1 to 4096"),
        ("model/config/image_size", 4096, "model.config.image_size: expected at most 128 patches of 16"),
        ("model/config/heads", "a", "model.config.heads: expected an integer from 1 to 16384, got 'a'"),
        ("model/size", "base", "model.size: expected 'tiny' as in config, got 'base'"),
        (
            "outputs/0/shape/0",
            "/etc/passwd",
            r"outputs\[0\]: expected float32 \['batch', 2\] for",
        ),
        ("inputs/1/dtype", "float32", r"inputs\[1\]: expected int64 \['batch', 'tokens'\] for input_ids"),
        ("verification/0/more", {"a": {"a": 1}}, r"verification\[0\].more: expected no field of this name"),
        ("more", [[[]]], f"more: expected no field of this name, got .*; {NEWER}"),
        ("model/config/name", "later", f"model.config.name: expected one of hammer, .* got 'later'; {NEWER}"),
        ("created", "now", "created: expected a time, such as"),
        ("accuracy/0/metrics/mAP", 93.1, r"accuracy\[0\].metrics.mAP: expected a finite number in \[0, 1\]"),
        ("limits/max_tokens", 2**63, "limits.max_tokens: expected an integer from 1 to 8192"),
        ("files/model.onnx/bytes", -1, "files.model.onnx.bytes: expected an integer >= 0"),
        ("files/model.onnx/sha256", "A" * 64, "files.model.onnx.sha256: expected 64"),
        ("engines", [{"file": "a"}], r"engines\[0\].library: expected a value"),
        ("versions/dgm4", 3, "versions.dgm4: expected a string"),
        ("accuracy", {}, "accuracy: expected a list"),
        ("accuracy/0/pairs", 0, r"accuracy\[0\].pairs: expected an integer >= 1"),
        ("accuracy/0/metrics/AUC", None, r"accuracy\[0\].metrics.AUC: expected a finite number"),
        ("verification/0/max", "0", r"verification\[0\].max: expected a finite number"),
    ],
)
def test_every_wrong_field_is_named(bundle_dir, path, value, message):
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    with pytest.raises(BundleError, match=message):
        parse_manifest(json.dumps(changed(manifest, path, value)).encode())


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "/etc/passwd",
        "a/b",
        "a\\b",
        ".hidden",
        "",
        ".",
        "..",
        "manifest.json",
        "a\n",
        "é" * 3,
    ],
)
def test_only_plain_file_names_pass(bundle_dir, name):
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.onnx"]
    with pytest.raises(BundleError, match="files: expected plain file names beside the manifest, got"):
        parse_manifest(json.dumps(manifest).encode())


def test_an_engine_must_be_a_file_of_the_bundle(bundle_dir):
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    entry = {"file": "model.x.engine", "library": "tensorrt_rtx", "version": "1", "onnx_sha256": "0" * 64}
    manifest["engines"] = [entry | {"compute_capabilities": ["8.0"], "profile": {}}]
    with pytest.raises(
        BundleError, match=r"engines\[0\]\.file: expected one of the bundle's files, got 'model.x.engine'"
    ):
        parse_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "README.md"])
def test_a_missing_file_is_named(bundle_copy, name):
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=f"missing {name}"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["extra.txt", "model.onnx.data"])
def test_a_foreign_file_is_named(bundle_copy, name):
    (bundle_copy / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=f"{name} is not in the manifest"):
        Bundle.open(bundle_copy)


def test_foreign_files_are_counted_and_move_no_cursor(bundle_copy):
    for number in range(1000):
        (bundle_copy / f"a\x1b[31m{number}\n").write_bytes(b"")
    with pytest.raises(BundleError, match=r"and 995 more are not in the manifest; remove") as caught:
        Bundle.open(bundle_copy)
    assert str(caught.value).removeprefix(str(bundle_copy)).isprintable()


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name, bundle_copy):
    (bundle_copy / name).unlink()
    os.mkfifo(bundle_copy / name)
    with pytest.raises(
        BundleError, match=r"manifest\.json cannot be read: Not a file|model\.onnx is not a file"
    ):
        Bundle.open(bundle_copy)
    assert is_bundle(bundle_copy) == (name != "manifest.json")


def test_a_pipe_that_takes_the_place_of_an_opened_bundles_file(bundle_copy):
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / "model.onnx").unlink()
    os.mkfifo(bundle_copy / "model.onnx")
    for read in (bundle.read, bundle.verified):
        with pytest.raises(BundleError, match=r"model\.onnx: cannot be read: Not a file$"):
            read("model.onnx")


def test_a_link_to_itself(bundle_copy):
    (bundle_copy / "model.onnx").unlink()
    (bundle_copy / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(BundleError, match=r": cannot list the bundle: Too many levels of symbolic links$"):
        Bundle.open(bundle_copy)


def test_an_empty_path_is_not_the_working_directory(bundle_copy, monkeypatch):
    monkeypatch.chdir(bundle_copy)
    with pytest.raises(BundleError, match="^expected the path of a bundle's directory, got an empty one$"):
        Bundle.open("")


def test_a_foreign_folder_is_named(bundle_copy):
    (bundle_copy / "cache").mkdir()
    with pytest.raises(BundleError, match="cache is not a file"):
        Bundle.open(bundle_copy)


@pytest.fixture
def snapshot(bundle_copy, tmp_path):
    """The bundle as a cache of downloads keeps it: links to files that are named by their hashes."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(bundle_copy.iterdir())):
        path.rename(blobs / str(number))
        (folder / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (folder / ".gitattributes").write_text("*.onnx filter=lfs")
    (folder / ".cache").mkdir()
    return folder


def test_a_bundle_of_links_is_served_and_its_hashes_decide(snapshot):
    Bundle.open(snapshot).verify_all()
    with Predictor(snapshot, threads=1) as predictor:
        predictor.warm_up()
    target = (snapshot / "model.onnx").resolve()
    target.write_bytes(target.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"model\.onnx: expected SHA-256"):
        Predictor(snapshot)
    target.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is a link to nothing; export or copy"):
        Bundle.open(snapshot)


@pytest.mark.parametrize("target", ["/dev/null", "/"])
def test_a_link_to_what_is_no_file_is_refused(bundle_copy, target):
    (bundle_copy / "model.onnx").unlink()
    (bundle_copy / "model.onnx").symlink_to(target)
    with pytest.raises(BundleError, match=r"model\.onnx is not a file"):
        Bundle.open(bundle_copy)


def test_the_working_directory_may_change(bundle_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(bundle_copy.parent)
    bundle = Bundle.open(bundle_copy.name)
    monkeypatch.chdir("/")
    bundle.verify_all()
    assert bundle.path == bundle_copy
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BundleError, match="the working directory cannot be found"):
        Bundle.open("bundle")


def test_a_link_made_while_a_file_is_loaded_changes_nothing(bundle_copy, tmp_path):
    """As a copy of the bundle makes one; a write that sets the times back is found all the same."""
    bundle, path = Bundle.open(bundle_copy), bundle_copy / "model.onnx"
    with bundle.held("model.onnx"):
        (tmp_path / "copy.onnx").hardlink_to(path)
    before = path.stat()
    with pytest.raises(BundleError, match="expected SHA-256"), bundle.held("model.onnx"):  # noqa: PT012
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", ["written", "replaced", "removed", "before"])
def test_a_file_that_a_library_reads_stays_what_was_hashed(bundle_copy, change):
    path, bundle = bundle_copy / "model.onnx", Bundle.open(bundle_copy)
    content = path.read_bytes()
    if change == "before":
        path.write_bytes(content[:-1] + b"x")
    expected = "expected SHA-256" if change == "before" else "was replaced while it was loaded"
    with (
        pytest.raises(BundleError, match=rf"model\.onnx: {expected}"),
        bundle.held("README.md", "model.onnx"),
    ):
        assert change != "before"
        if change == "written":
            path.write_bytes(content)
        else:
            path.unlink()
            if change == "replaced":
                path.write_bytes(content)


def test_a_bundle_is_pickled_by_its_path(bundle_copy, manifest_template, write_manifest):
    data = pickle.dumps(Bundle.open(bundle_copy))
    again = pickle.loads(data)
    assert (again.path, again.manifest) == (bundle_copy, Bundle.open(bundle_copy).manifest)
    again.verify_all()
    write_manifest(bundle_copy, manifest_template() | {"created": "2027-01-01T00:00:00Z"})
    with pytest.raises(BundleError, match="holds another bundle than when it was pickled"):
        pickle.loads(data)


def test_a_message_does_not_repeat_a_long_path():
    with pytest.raises(BundleError, match="not a bundle") as caught:
        Bundle.open("a/" * 30_000)
    assert len(str(caught.value)) < 400


def test_a_link_to_the_whole_bundle_is_fine(bundle_dir, tmp_path):
    (tmp_path / "current").symlink_to(bundle_dir)
    Bundle.open(tmp_path / "current").verify_all()


def test_another_size_is_refused(bundle_copy):
    with (bundle_copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx: expected \d+ bytes, got \d+"):
        Bundle.open(bundle_copy)


def test_a_thousand_one_bit_flips_are_all_rejected(bundle_copy):
    generator = np.random.default_rng(17)
    names = ["model.onnx", "tokenizer.json", "README.md"]
    for number in range(1000):
        path = bundle_copy / names[number % len(names)]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(BundleError, match=f"{path.name}: expected SHA-256"):
            Bundle.open(bundle_copy).verify_all()
        path.write_bytes(whole)
    Bundle.open(bundle_copy).verify_all()


def test_a_flipped_bit_in_the_manifest_is_rejected_or_changes_nothing(bundle_copy):
    path = bundle_copy / "manifest.json"
    whole = path.read_bytes()
    sound = Bundle.open(bundle_copy).manifest
    generator = np.random.default_rng(18)
    rejected = 0
    for _ in range(1000):
        flipped = bytearray(whole)
        flipped[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        try:
            assert Bundle.open(bundle_copy).manifest == sound  # 1e-05 and 1E-05 are one number
        except BundleError:
            rejected += 1
    assert rejected >= 990


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_predictor_never_parses_an_altered_file(bundle_copy, name):
    data = bytearray((bundle_copy / name).read_bytes())
    data[100] ^= 1
    (bundle_copy / name).write_bytes(data)
    with pytest.raises(BundleError, match="expected SHA-256"):
        Predictor(bundle_copy)


def test_each_file_is_hashed_once(bundle_dir, monkeypatch):
    bundle = Bundle.open(bundle_dir)
    calls = []
    digest = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *args: calls.append(1) or digest(*args))
    for _ in range(3):
        bundle.verified("model.onnx")
        bundle.verify_all()
    assert len(calls) == 3


def test_an_unknown_file_is_refused(bundle_dir):
    with pytest.raises(BundleError, match=r"does not contain model\.trt; it contains README\.md, "):
        Bundle.open(bundle_dir).verified("model.trt")


def test_mutated_manifests_raise_only_bundle_errors(bundle_copy):
    path = Path(bundle_copy) / "manifest.json"
    whole = path.read_bytes()
    generator = np.random.default_rng(5)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(len(data))] = generator.integers(256)
        path.write_bytes(data)
        try:
            Bundle.open(bundle_copy)
        except BundleError as error:
            assert str(error)


def test_a_manifest_from_before_accuracy_was_recorded(bundle_dir):
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    assert parse_manifest(json.dumps(manifest).encode()).accuracy[0].metrics == {"AUC": 0.9}
    del manifest["accuracy"]
    assert parse_manifest(json.dumps(manifest).encode()).accuracy == ()


def test_the_calibration_of_static_int8_is_read_where_it_is_recorded(bundle_dir):
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    assert parse_manifest(json.dumps(manifest).encode()).calibration is None
    manifest["calibration"] = {"method": "minmax", "pairs": 8, "source": "set, split train", "seed": 0}
    found = parse_manifest(json.dumps(manifest).encode()).calibration
    assert (found.method, found.pairs, found.source, found.seed) == ("minmax", 8, "set, split train", 0)
    record = {"alpha": "auto", "seams": 0, "plain": 0.01, "smoothed": 0.02}
    with pytest.raises(BundleError, match="written with --smooth, which is no longer supported; export the"):
        parse_manifest(json.dumps(changed(manifest, "calibration/smoothing", record)).encode())
    del manifest["calibration"]["smoothing"]
    for path, value, message in (
        ("calibration/pairs", 0, "calibration.pairs: expected an integer >= 1"),
        ("calibration/method", 1, "calibration.method: expected a string"),
        ("calibration", [], "calibration: expected an object"),
    ):
        with pytest.raises(BundleError, match=message):
            parse_manifest(json.dumps(changed(manifest, path, value)).encode())


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ({"trained": True, "source": "x.pth", "sha256": "0" * 64}, "trained"),
        ({"trained": False, "source": "drawn from seed 1", "sha256": None}, "drawn"),
        ({"trained": True, "source": "asap.safetensors", "sha256": manifests.FIRST_DEMOS[1]}, "demo"),
    ],
)
def test_manifest_of_an_older_release_is_read(weights, kind):
    assert manifests.Weights.from_dict(weights).kind == kind
    thresholds = manifests.Thresholds.from_dict({"manipulated": 0.5, "types": 0.4, "words": 0.3})
    assert (thresholds.face_swap, thresholds.text_attribute, thresholds.words) == (0.4, 0.4, 0.3)
