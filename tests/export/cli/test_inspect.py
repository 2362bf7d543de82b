"""`dgm4 inspect` and `dgm4 doctor`: what they print, and JSON that parses."""

from __future__ import annotations

import hashlib
import json
import shutil

from engine import __version__
from engine.manifest import manifest_digest
from export import cli


def test_inspect(name, bundle, capsys):
    made = bundle(name, "fp32")
    assert cli.main(["inspect", str(made.path)]) == 0
    text = capsys.readouterr().out
    assert f"{name} tiny, fp32, every hash agrees" in text
    assert "drawn from seed 1; not trained" in text
    assert text.count("\nfile ") == len(made.manifest["files"])
    assert text.count("\nverified ") == len(made.manifest["verification"])


def test_inspect_as_json(bundle, capsys):
    made = bundle("asap", "int8")
    assert cli.main(["inspect", "--json", str(made.path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["precision"] == "int8"
    assert record["files"] == made.manifest["files"]


def test_inspect_tells_what_serves_the_bundle(bundle, monkeypatch, capsys):
    monkeypatch.setattr("engine.backends._has_driver", lambda: False)
    assert cli.main(["inspect", str(bundle("asap", "fp8").path)]) == 0
    assert [x for x in capsys.readouterr().out.splitlines() if x.startswith("served")] == ["served by  torch"]
    assert cli.main(["inspect", "--json", str(bundle("asap", "fp16").path)]) == 0
    backends = json.loads(capsys.readouterr().out)["backends"]
    assert (backends["ort"], backends["torch"]) == (None, None)
    assert "driver" in backends["ort-cuda"]
    assert "tensorrt" not in backends, "the bundle has no engine"


def test_inspect_of_layers_where_none_is_rounded(bundle, capsys):
    assert cli.main(["inspect", "--layers", str(bundle("hammer", "fp32").path)]) == 0
    assert "layers     none is rounded in fp32" in capsys.readouterr().out


def test_inspect_of_engines(bundle, tmp_path, capsys):
    path = shutil.copytree(bundle("hammer", "fp32").path, tmp_path / "bundle")
    ranges = [{"input_ids": {"min": [1, 2], "opt": [1, 16], "max": most}} for most in ([1, 32], [32, 128])]
    fields = json.loads((path / "manifest.json").read_text())
    common = {"library": "tensorrt", "version": "11.4", "compute_capabilities": ["9.0"]}
    for name, own in {
        "old": {"profile": ranges[1]},
        "lean": {"profiles": ranges, "version_compatible": True, "hardware": "ampere"},
        "thin": {"profiles": ranges[1:], "stripped": True, "hardware": "same", "plugins": {"Pool": 2}},
    }.items():
        (path / f"{name}.engine").write_bytes(b"")
        fields["files"][f"{name}.engine"] = {"sha256": hashlib.sha256().hexdigest(), "bytes": 0}
        fields["engines"].append({**common, "file": f"{name}.engine", "onnx_sha256": "0" * 64, **own})
    del fields["sha256"]
    (path / "manifest.json").write_text(json.dumps({**fields, "sha256": manifest_digest(fields)}))
    assert cli.main(["inspect", str(path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("engine ")]
    assert [line.partition(": tensorrt 11.4, for ")[2] for line in lines] == [
        "9.0, up to 32x128 pairs x tokens",
        "8.0 and later, up to 1x32, 32x128 pairs x tokens, version-compatible",
        "every GPU of 9.0, up to 32x128 pairs x tokens, plugins Pool, weights stripped",
    ]


def test_inspect_of_a_damaged_bundle(bundle, tmp_path, capsys):
    copy = shutil.copytree(bundle("hammer", "fp32").path, tmp_path / "bundle")
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    for path, named in ((copy, "model.onnx.data"), (tmp_path / "absent", str(tmp_path / "absent"))):
        assert cli.main(["inspect", str(path)]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert named in err


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("DGM4_LOG", "info")
    monkeypatch.setenv("DGM4_SERVE_TOKEN", "Rosebud")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("dgm4", "python", "package", "backends", "builder"):
        assert f"{word} " in text
    assert text.splitlines()[-1] == "variable   DGM4_SERVE_TOKEN is set"
    assert "variable   DGM4_LOG=info\n" in text


def test_doctor_as_json(capsys, monkeypatch):
    monkeypatch.setenv("DGM4_SERVE_TOKEN", "Rosebud")
    monkeypatch.delenv("DGM4_LOG", raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    assert "Rosebud" not in text
    record = json.loads(text)
    assert record["dgm4"] == __version__
    assert record["ready_bundles"] == ["demo:asap"]
    assert record["secrets"] == {"DGM4_SERVE_TOKEN": True}
    assert record["environment"]["DGM4_LOG"] is None
    assert record["environment"]["ORT_DISABLE_TELEMETRY"] == "1"
    assert record["cores"] >= 1
    assert [name for name in record["backends"] if name != "openvino"] == ["ort", "torch"]
    assert record["packages"]["torch"]
    assert set(record["builders"]) == {"tensorrt", "tensorrt_rtx"}
    assert all(isinstance(builder["usable"], bool) for builder in record["builders"].values())
