"""A model repository: what stands in it, that it answers as the bundle does, and that it comes whole."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from engine import Bundle, Predictor
from engine.errors import BundleError, InputError
from export import cli
from export.cli import export as cli_export
from export.inference_server import network_client
from export.inference_server.answers import ANSWER, PAIR
from export.inference_server.config import ServerOptions
from export.inference_server.repository import RepositoryWriter, name_models, write_repository

CAPTION = "The defeat at the park brings pleasure to Laura Cook"


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_stands_in_it(asap, tmp_path):
    manifest = write_repository({"m": asap}, tmp_path / "r")
    files = files_of(tmp_path / "r")
    source = files_of(asap.path)
    assert set(files) == {
        *("README.md", "client.py", "manifest.json", "m/config.pbtxt", "m/bundle.json", "m/tokenizer.json"),
        *("m/1/model.onnx", "m/1/model.onnx.data"),
    }
    assert files["m/1/model.onnx"] == source["model.flat.onnx"]  # the graph without functions
    assert files["m/1/model.onnx.data"] == source["model.onnx.data"]
    assert files["m/bundle.json"] == source["manifest.json"]
    assert json.loads(files.pop("manifest.json")) == manifest
    for place, content in files.items():
        assert manifest["files"][place]["sha256"] == hashlib.sha256(content).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_the_readme_tells_the_contract(asap, tmp_path):
    write_repository({"m": asap}, tmp_path / "r", ServerOptions(accelerate=True, queue_delay_us=77))
    text = (tmp_path / "r" / "README.md").read_text()
    spec = asap.manifest.preprocess
    for part in (
        *map(str, spec.mean + spec.std),
        "[batch, 3, 256, 256]",
        "first 50 words",
        "\n77 microseconds",
    ):
        assert part in text
    for tensor in (*asap.manifest.inputs, *asap.manifest.outputs):
        assert f"`{tensor.name}`" in text
    assert "/tmp/dgm4-tensorrt" in text


class Server:
    """tritonclient.http over ONNX Runtime: answers from the repository's own file, as the server would."""

    def __init__(self, folder):
        self.folder, self.shapes = folder, []

    def infer(self, model_name, inputs):
        session = onnxruntime.InferenceSession(self.folder / model_name / "1" / "model.onnx")
        feeds = {tensor.name: tensor.array for tensor in inputs}
        for node in session.get_inputs():
            declared = next(tensor for tensor in inputs if tensor.name == node.name)
            assert list(feeds[node.name].shape) == declared.shape
            assert {"FP32": np.float32, "INT64": np.int64}[declared.datatype] == feeds[node.name].dtype
        self.shapes.append(feeds["input_ids"].shape)
        names = [node.name for node in session.get_outputs()]
        return SimpleNamespace(as_numpy=dict(zip(names, session.run(names, feeds), strict=True)).get)


class InferInput:
    def __init__(self, name, shape, datatype):
        self.name, self.shape, self.datatype = name, shape, datatype

    def set_data_from_numpy(self, array):
        self.array = array


def test_the_client_gets_the_answer_of_the_bundle(asap, tmp_path):
    write_repository({"m": asap}, tmp_path / "r")
    server, triton = Server(tmp_path / "r"), SimpleNamespace(InferInput=InferInput)
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    answer = network_client.Model(tmp_path / "r" / "m").ask(triton, server, Image.fromarray(noise), CAPTION)
    with Predictor(asap.path, backend="ort") as predictor:
        expected = predictor.predict(noise, CAPTION)
    assert server.shapes == [(1, 16)]  # padded, for requests that share a batch
    assert answer.score == pytest.approx(expected.score, abs=1e-5)
    assert answer.types == pytest.approx(expected.types, abs=1e-5)
    assert answer.box == pytest.approx(expected.box, abs=1e-2)
    assert [(w.text, w.start, w.end) for w in answer.words] == [
        (w.text, w.start, w.end) for w in expected.words
    ]
    assert [w.score for w in answer.words] == pytest.approx([w.score for w in expected.words], abs=1e-5)
    assert answer.heatmap == pytest.approx(expected.heatmap, abs=1e-5)


def test_the_client_as_a_command(asap, tmp_path):
    """The copy in the repository, run as a user would, with a tritonclient that cannot be reached."""
    write_repository({"m": asap}, tmp_path / "r")
    fake = tmp_path / "fake" / "tritonclient"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "http.py").write_text(
        "class InferInput:\n"
        "    def __init__(self, name, shape, datatype): pass\n"
        "    def set_data_from_numpy(self, array): pass\n"
        "class InferenceServerClient:\n"
        "    def __init__(self, url): self.url = url\n"
        "    def infer(self, name, inputs): raise OSError(f'nobody at {self.url} serves {name}')\n"
    )
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    path = os.pathsep.join([str(tmp_path / "fake"), str(Path(cli.__file__).parents[2])])
    command = [sys.executable, str(tmp_path / "r" / "client.py"), "m", str(tmp_path / "a.png"), "A man"]
    done = subprocess.run(
        [*command, "--url", "there:1"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "client: error: nobody at there:1 serves m\n"


def test_several_bundles(bundle, asap, tmp_path):
    hammer = Bundle.open(bundle("hammer", "fp32").path)
    named = name_models([asap, hammer])
    assert list(named) == ["asap-tiny-fp32", "hammer-tiny-fp32"]
    manifest = write_repository(named, tmp_path / "r")
    assert set(manifest["models"]) == set(named)
    with pytest.raises(InputError, match="are both asap-tiny-fp32"):
        name_models([asap, asap])


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", ".hidden", "ä"])
def test_names_that_the_server_would_not_take(asap, tmp_path, name):
    with pytest.raises(InputError, match="expected a model's name"):
        write_repository({name: asap}, tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_a_plan_of_tensorrt(with_engine, tmp_path):
    manifest = write_repository({"m": with_engine("tensorrt")}, tmp_path / "r", ServerOptions(plan=True))
    assert (tmp_path / "r/m/1/model.plan").read_bytes() == b"engine"
    assert not (tmp_path / "r/m/1/model.onnx").exists()
    assert manifest["models"]["m"]["of"] == "model.engine"
    assert "TensorRT version that built it" in (tmp_path / "r/README.md").read_text()


@pytest.mark.parametrize(("library", "kinds"), [("tensorrt_rtx", "tensorrt_rtx"), (None, "none")])
def test_no_plan_for_the_server(with_engine, asap, tmp_path, library, kinds):
    bundle = asap if library is None else with_engine(library)
    with pytest.raises(BundleError, match=f"for a plan, got {kinds}; export the bundle on the server's GPU"):
        write_repository({"m": bundle}, tmp_path / "r", ServerOptions(plan=True))
    assert not (tmp_path / "r").exists()


def test_no_plan_without_its_weights(with_engine, tmp_path):
    bundle = with_engine("tensorrt", stripped=True)
    with pytest.raises(BundleError, match="does not refit model.engine; build one without --strip"):
        write_repository({"m": bundle}, tmp_path / "r", ServerOptions(plan=True))
    assert not (tmp_path / "r").exists()


def test_a_truncated_engine(with_engine, tmp_path):
    damaged = with_engine("tensorrt")
    (damaged.path / "model.engine").write_bytes(b"engin")
    with pytest.raises(BundleError, match="model.engine: expected 6 bytes, got 5"):
        write_repository({"m": damaged}, tmp_path / "r", ServerOptions(plan=True))
    assert not (tmp_path / "r").exists()


def test_a_bundle_without_a_graph(asap, tmp_path):
    files = {name: entry for name, entry in asap.manifest.files.items() if not name.endswith(".onnx")}
    bare = Bundle(asap.path, dataclasses.replace(asap.manifest, precision="bf16", files=files))
    bf16 = Bundle(asap.path, dataclasses.replace(asap.manifest, precision="bf16"))
    for bundle in (bare, bf16):  # ONNX Runtime on a CPU has no products in it
        with pytest.raises(BundleError, match="in bf16 has no ONNX graph for the server's ONNX Runtime"):
            write_repository({"m": bundle}, tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_dynamic_int8_serves_its_only_graph(asap, tmp_path):
    files = {name: entry for name, entry in asap.manifest.files.items() if name != "model.flat.onnx"}
    dynamic = Bundle(asap.path, dataclasses.replace(asap.manifest, files=files))
    write_repository({"m": dynamic}, tmp_path / "r")
    assert (tmp_path / "r/m/1/model.onnx").read_bytes() == (asap.path / "model.onnx").read_bytes()


def test_a_repository_of_ours_is_replaced(asap, tmp_path):
    write_repository({"old": asap}, tmp_path / "r")
    write_repository({"new": asap}, tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir() if p.is_dir()) == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("place", ["other/1/model.onnx", "m/2/model.onnx", "notes.txt", "m/1/empty/"])
def test_files_of_strangers_are_never_touched(asap, tmp_path, place):
    write_repository({"m": asap}, tmp_path / "r")
    path = tmp_path / "r" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if place.endswith("/") else path.write_text("mine")
    before = files_of(tmp_path / "r")
    with pytest.raises(BundleError, match=f"not in its manifest: {place.rstrip('/')}; move them away"):
        write_repository({"m": asap}, tmp_path / "r")
    assert files_of(tmp_path / "r") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r"]


def test_a_strangers_repository_or_a_bundle_in_the_place(asap, bundle, tmp_path):
    (tmp_path / "r/resnet/1").mkdir(parents=True)
    with pytest.raises(BundleError, match="is not empty and not a model repository"):
        write_repository({"m": asap}, tmp_path / "r")
    shutil.copytree(asap.path, tmp_path / "b")
    with pytest.raises(BundleError, match="is not empty and not a model repository"):
        write_repository({"m": asap}, tmp_path / "b")
    Bundle.open(tmp_path / "b").verify_all()


@pytest.mark.parametrize("place", ["sendfile", "fsync", "mkdir"])
def test_a_full_disk_keeps_the_old_repository(asap, tmp_path, monkeypatch, place):
    write_repository({"old": asap}, tmp_path / "r")
    before = files_of(tmp_path / "r")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((Path, "mkdir") if place == "mkdir" else (os, place)), full)
    with pytest.raises(
        BundleError, match="the model repository .*: cannot be written: .*; free space or choose"
    ):
        write_repository({"new": asap}, tmp_path / "r")
    monkeypatch.undo()
    assert files_of(tmp_path / "r") == before
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("name", ["manifest.json", "/etc/passwd", "../x", "m//x", "m/../x", ""])
def test_only_places_inside(tmp_path, name):
    with (
        RepositoryWriter(tmp_path / "r") as writer,
        pytest.raises(BundleError, match="a file in the repository"),
    ):
        writer.path(name)


def test_the_command(asap, tmp_path, capsys):
    out = tmp_path / "r"
    assert cli.main(["repository", str(asap.path), "--out", str(out), "--name", "m", "--preferred", "4"]) == 0
    told, err = capsys.readouterr()
    assert told.splitlines()[0].startswith("m: model.onnx of model.flat.onnx, ")
    assert told.splitlines()[1] == f"ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository={out}"
    assert err == ""
    assert "preferred_batch_size: [4]" in (out / "m/config.pbtxt").read_text()
    assert cli.main(["repository", str(asap.path), "--out", str(tmp_path / "absent" / "r")]) == 1
    assert "its folder does not exist: create it first" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["repository", "a", "b", "--out", "r", "--name", "m"])
    assert caught.value.code == 2


def test_export_writes_one_too(bundle, tmp_path, capsys, monkeypatch):
    from export import pipeline

    made = bundle("asap", "fp32")
    monkeypatch.setattr(pipeline, "export_bundle", lambda *_: made.manifest)
    monkeypatch.setattr(cli_export, "_try", lambda *_: None)
    arguments = ["export", "--out", str(made.path), "--triton-repository"]
    assert cli.main([*arguments, str(tmp_path / "r")]) == 0
    assert "asap-tiny-fp32: model.onnx of model.flat.onnx" in capsys.readouterr().err
    assert (tmp_path / "r/asap-tiny-fp32/config.pbtxt").is_file()


@pytest.mark.parametrize(
    ("place", "message"), [("photos", "a model repository"), ("a/b", "one that exists"), (".", "own place")]
)
def test_a_place_that_cannot_be_is_found_before_the_export(tmp_path, capsys, place, message):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"picture")
    out = tmp_path / "bundle"
    arguments = [
        "export",
        "--out",
        str(out),
        "--triton-repository",
        str(out if place == "." else tmp_path / place),
    ]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1  # no stage was run
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]


def test_what_stands_in_a_repository_of_a_predictor(asap, tmp_path):
    manifest = write_repository({"m": asap}, tmp_path / "r", ServerOptions(form="python"))
    files, source = files_of(tmp_path / "r"), files_of(asap.path)
    inside = {f"m/1/bundle/{name}" for name in source}
    assert set(files) == {
        "README.md",
        "client.py",
        "manifest.json",
        "m/config.pbtxt",
        "m/1/model.py",
        *inside,
    }
    assert {name.rpartition("/")[2]: files[name] for name in inside} == source
    Bundle.open(tmp_path / "r/m/1/bundle").verify_all()
    assert manifest["models"]["m"]["with"] == "python"
    assert manifest["models"]["m"]["serves"] == "model.py"
    readme = files["README.md"].decode()
    for name, *_ in (*PAIR, *ANSWER):
        assert f"`{name}`" in readme
    assert "--shm-size" in readme
    assert "untrained_weights" in readme


def test_what_stands_in_a_repository_of_an_ensemble(asap, tmp_path):
    manifest = write_repository({"m": asap}, tmp_path / "r", ServerOptions(form="ensemble", threads=3))
    ends = {f"m-{end}/{name}" for end in ("pre", "post") for name in ("bundle.json", "tokenizer.json")}
    assert set(files_of(tmp_path / "r")) == {
        *(
            "README.md",
            "client.py",
            "manifest.json",
            "m/1/README.md",
            "m-pre/1/model.py",
            "m-post/1/model.py",
        ),
        *(f"{name}/config.pbtxt" for name in ("m", "m-pre", "m-network", "m-post")),
        *("m-network/1/model.onnx", "m-network/1/model.onnx.data"),
        *ends,
    }
    assert manifest["models"]["m"]["parts"] == ["m", "m-pre", "m-network", "m-post"]
    assert 'key: "intra_op_thread_count"' in (tmp_path / "r/m-network/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("precision", "options", "told"),
    [
        ("int8", {"form": "ensemble"}, True),
        ("int8", {"form": "network", "kind": "cpu"}, True),
        ("int8", {"form": "network", "kind": "gpu"}, False),
        ("int8", {"form": "python"}, False),
        ("fp32", {"form": "network"}, False),
    ],
)
def test_the_readme_tells_of_int8_without_vnni(asap, tmp_path, precision, options, told):
    bundle = Bundle(asap.path, dataclasses.replace(asap.manifest, precision=precision))
    write_repository({"m": bundle}, tmp_path / "r", ServerOptions(**options))
    assert ("VNNI" in (tmp_path / "r/README.md").read_text()) == told


def test_what_the_server_compiled_does_not_hinder(asap, tmp_path):
    write_repository({"m": asap}, tmp_path / "r", ServerOptions(form="python"))
    compiled = tmp_path / "r/m/1/__pycache__/model.cpython-312.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"code")
    write_repository({"m": asap}, tmp_path / "r", ServerOptions(form="python"))
    assert not compiled.exists()
    compiled.with_suffix(".txt").parent.mkdir()
    compiled.with_suffix(".txt").write_text("mine")
    with pytest.raises(BundleError, match="not in its manifest: m/1/__pycache__/model.cpython-312.txt"):
        write_repository({"m": asap}, tmp_path / "r", ServerOptions(form="python"))


def test_a_model_without_the_package_says_what_to_do(asap, tmp_path):
    """model.py in an interpreter that has nothing: the server shows the last line."""
    write_repository({"m": asap}, tmp_path / "r", ServerOptions(form="python"))
    command = [sys.executable, "-I", "-S", str(tmp_path / "r/m/1/model.py")]
    done = subprocess.run(command, env={"PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: No module named 'export': install the package dgm4")


def test_the_command_with_a_predictor(asap, tmp_path, capsys):
    out = tmp_path / "r"
    assert cli.main(["repository", str(asap.path), "--out", str(out), "--with", "python", "--name", "m"]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    size = sum(path.stat().st_size for path in (out / "m").rglob("*") if path.is_file())
    assert told == f"m: model.py of {asap.path.name}, {size / 1e6:.0f} MB"
    with pytest.raises(SystemExit) as caught:
        cli.main(["repository", str(asap.path), "--out", str(out), "--with", "python", "--plan"])
    assert caught.value.code == 2
    assert "--plan is for the server's own runtimes: leave it out with python" in capsys.readouterr().err
