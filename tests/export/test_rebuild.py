"""`dgm4 rebuild`: a bundle with an engine for this machine, or the bundle as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine import Bundle
from engine.errors import BackendError, BundleError
from engine.manifest import manifest_digest
from export import rebuild as module
from export.cli import main
from export.trt import build as trt
from export.trt.build import BuilderInfo, EngineReport
from export.trt.options import EngineOptions

ENGINE = {
    "file": "model.trt-sm90.engine",
    "library": "tensorrt",
    "version": "11.4.0.106",
    "compute_capabilities": ["9.0"],
    "profiles": [{}],
}


@pytest.fixture
def copied(bundle, tmp_path):
    return Path(shutil.copytree(bundle("asap", "fp32").path, tmp_path / "bundle"))


@pytest.fixture
def builder(monkeypatch):
    """TensorRT on a GPU of 8.9, in place of the native builder; the specs it was given."""
    specs = []

    def build(spec, out, *_):
        specs.append(spec)
        assert Path(spec.onnx).is_file()
        Path(out).write_bytes(b"engine")
        return EngineReport("tensorrt", "11.4.0.106", 1.0, 1.0, 6, ("8.9",), (), (), ())

    monkeypatch.setattr(trt, "find_builder", lambda: BuilderInfo("tensorrt", "11.4.0.106", True, ""))
    monkeypatch.setattr(trt, "build_engine", build)
    return specs


def put_engines(path, *records):
    """Enter engines into a bundle, each as a small file."""
    manifest = json.loads((path / "manifest.json").read_text())
    own = manifest["files"]["model.onnx"]["sha256"]
    for record in records:
        (path / record["file"]).write_bytes(b"old")
        digest = "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"  # of b"old"
        manifest["files"][record["file"]] = {"sha256": digest, "bytes": 3}
        manifest["engines"].append({"onnx_sha256": own} | record)
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def test_an_engine_enters_the_bundle(copied, builder, capsys):
    before = {entry.name: entry.read_bytes() for entry in copied.iterdir()}
    assert main(["rebuild", str(copied)]) == 0
    assert "model.trt-sm89.engine: tensorrt 11.4.0.106 for 8.9" in capsys.readouterr().err
    bundle = Bundle.open(copied)
    bundle.verify_all()
    (entry,) = bundle.manifest.engines
    assert entry.onnx_sha256 == bundle.manifest.files["model.onnx"].sha256
    after = {item.name: item.read_bytes() for item in copied.iterdir()}
    assert set(after) == {*before, "model.trt-sm89.engine"}
    assert {name for name in before if before[name] != after[name]} == {"manifest.json", "README.md"}
    assert "model.trt-sm89.engine" in after["README.md"].decode()
    old, new = json.loads(before["manifest.json"]), json.loads(after["manifest.json"])
    assert {key for key in old if old[key] != new[key]} == {"files", "engines", "sha256"}


def test_the_profiles_reach_the_bundles_limits(copied, builder):
    module.rebuild(copied)
    limits = Bundle.open(copied).manifest.limits
    ranges = [(profile["input_ids"][0], profile["input_ids"][2]) for profile in builder[0].profiles]
    whole = (limits.max_batch, limits.max_tokens)
    assert ranges == [((1, 2), (1, limits.max_tokens)), ((1, 2), whole)]
    assert builder[0].compute_capabilities == ()


def test_how_it_is_built_is_said_on_the_command_line(copied, builder):
    limits = Bundle.open(copied).manifest.limits
    whole = f"{limits.max_batch}x{limits.max_tokens}"
    flags = ["--profiles", f"1x16,2x24,{whole}", "--timing-cache", "none", "--build-limit", "60"]
    assert main(["rebuild", str(copied), *flags, "--workspace", "256", "--strip-weights"]) == 0
    (spec,) = builder
    assert [profile["input_ids"][2] for profile in spec.profiles[:2]] == [(1, 16), (2, 24)]
    assert (spec.timing_cache, spec.time_limit_s, spec.workspace_mb) == (None, 60.0, 256)
    (entry,) = Bundle.open(copied).manifest.engines
    assert (len(entry.profiles), entry.stripped) == (3, True)


def test_profiles_beyond_the_bundle_build_nothing(copied, builder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rebuild", str(copied), "--profiles", "999x16"])
    assert ended.value.code == 2
    assert "--profiles: profile 1 (999x16): expected 1.." in capsys.readouterr().err
    assert builder == []


def test_an_engine_of_several_profiles_is_followed_by_one_of_the_same(copied, builder):
    limits = Bundle.open(copied).manifest.limits
    extents = ((1, 16), (2, 24), (limits.max_batch, limits.max_tokens))
    module.rebuild(copied, EngineOptions(profiles=extents))
    module.rebuild(copied)
    first, second = Bundle.open(copied).manifest.engines[0].profiles, builder[1].profiles
    assert [profile["input_ids"].max for profile in first] == list(extents)
    assert [tuple(profile["input_ids"][2]) for profile in second] == list(extents)


@pytest.mark.parametrize("harm", ["gone", "short", "altered"])
def test_a_damaged_engine_is_built_again(copied, builder, harm, caplog):
    module.rebuild(copied)
    (entry,) = Bundle.open(copied).manifest.engines
    path = copied / entry.file
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(b"engin" if harm == "short" else b"engima")
    with pytest.raises(BundleError, match=r"\(dgm4 rebuild\), or export or copy"):
        Bundle.open(copied).verify_all()
    module.rebuild(copied)
    assert "an engine is left out" in caplog.text
    Bundle.open(copied).verify_all()


def test_without_a_gpu_rtx_builds_for_what_the_bundle_was_for(copied, builder, monkeypatch):
    rtx = BuilderInfo("tensorrt_rtx", "1.7.1", True, "")
    monkeypatch.setattr(trt, "find_builder", lambda: rtx)
    put_engines(copied, ENGINE | {"library": "tensorrt_rtx", "compute_capabilities": ["8.6"]})
    module.rebuild(copied)
    assert builder[0].compute_capabilities == ("8.6",)


def test_values_that_do_not_fit_are_usage_errors(copied, builder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rebuild", str(copied), "--workspace", "99999999999999"])
    assert ended.value.code == 2
    assert "--workspace: expected 1 to 1048576 MiB" in capsys.readouterr().err
    assert builder == []


def test_a_record_of_before_is_carried_as_one_of_today(copied, builder):
    ranges = {"input_ids": {"min": [1, 2], "opt": [8, 50], "max": [32, 128]}}
    put_engines(copied, {**{k: v for k, v in ENGINE.items() if k != "profiles"}, "profile": ranges})
    module.rebuild(copied)
    old, _ = json.loads((copied / "manifest.json").read_text())["engines"]
    assert (old["profiles"], "profile" in old) == ([ranges], False)


def test_engines_of_others_stay_and_stale_ones_go(copied, builder):
    stale = {"file": "model.rtx.engine", "onnx_sha256": "0" * 64}
    put_engines(copied, ENGINE, ENGINE | stale, ENGINE | {"file": "model.trt-sm89.engine", "version": "10"})
    module.rebuild(copied)
    found = [(entry.file, entry.version) for entry in Bundle.open(copied).manifest.engines]
    assert found == [("model.trt-sm90.engine", "11.4.0.106"), ("model.trt-sm89.engine", "11.4.0.106")]
    assert not (copied / "model.rtx.engine").exists()
    assert (copied / "model.trt-sm89.engine").read_bytes() == b"engine"


def test_a_failed_build_leaves_the_bundle(copied, monkeypatch, builder, capsys):
    before = {entry.name: entry.read_bytes() for entry in copied.iterdir()}

    def refuse(spec, out, *_):
        Path(out).write_bytes(b"half")
        raise trt.BuildError("the disk is full")

    monkeypatch.setattr(trt, "build_engine", refuse)
    assert main(["rebuild", str(copied)]) == 4
    assert "dgm4: error: the disk is full" in capsys.readouterr().err
    assert {entry.name: entry.read_bytes() for entry in copied.iterdir()} == before
    assert [entry.name for entry in copied.parent.iterdir()] == ["bundle"]


def test_a_damaged_bundle_is_not_blessed(copied, builder, capsys):
    data = bytearray((copied / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (copied / "model.onnx.data").write_bytes(data)
    assert main(["rebuild", str(copied)]) == 1
    assert "model.onnx.data: expected SHA-256" in capsys.readouterr().err
    assert builder == []


def test_an_engine_that_fits_stays(copied, builder, monkeypatch, capsys):
    here = BuilderInfo("tensorrt", "11.4.0", True, "", "8.9")
    monkeypatch.setattr(trt, "find_builder", lambda: here)
    assert main(["rebuild", str(copied)]) == 0
    before = (copied / "manifest.json").read_bytes()
    capsys.readouterr()
    assert main(["rebuild", str(copied)]) == 0
    assert capsys.readouterr().err == "model.trt-sm89.engine was fine; --force builds it again\n"
    assert ((copied / "manifest.json").read_bytes() == before, len(builder)) == (True, 1)
    assert main(["rebuild", str(copied), "--force"]) == 0
    assert main(["rebuild", str(copied), "--workspace", "9"]) == 0
    monkeypatch.setattr(trt, "find_builder", lambda: replace(here, compute_capability="9.0"))
    assert main(["rebuild", str(copied)]) == 0
    monkeypatch.setattr(trt, "find_builder", lambda: replace(here, version="11.5.0"))
    assert main(["rebuild", str(copied)]) == 0
    assert len(builder) == 5


def test_without_links_the_files_are_copied(copied, builder, monkeypatch):
    def refuse(*_):
        raise OSError(1, "not permitted")

    monkeypatch.setattr("export.bundle.copying.os.link", refuse)
    module.rebuild(copied)
    Bundle.open(copied).verify_all()


def test_it_needs_no_network_library():
    """A serving machine has neither torch nor onnx."""
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'triton'))); import export.rebuild"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_nothing_builds_here(copied, monkeypatch):
    monkeypatch.setattr(trt, "find_builder", lambda: None)
    with pytest.raises(BackendError, match=r"nothing here can build an engine \(tensorrt: "):
        module.rebuild(copied)


def test_a_bundle_that_tensorrt_does_not_take(bundle, builder):
    with pytest.raises(BackendError, match="calibrated Q/DQ nodes: export again with --calibration"):
        module.rebuild(bundle("asap", "int8").path)


def test_a_real_engine(copied, capsys):
    """TensorRT-RTX builds it without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    if trt.find_builder().library != "tensorrt_rtx":
        pytest.skip("TensorRT builds here, for one GPU")
    assert main(["rebuild", str(copied)]) == 0
    (entry,) = Bundle.open(copied).manifest.engines
    assert (copied / entry.file).stat().st_size > 100_000
