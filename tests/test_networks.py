"""A network is its record and its own files: nothing else names it or knows a path inside it."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import glance
import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

import dgm4
from engine import Predictor, registry
from engine.errors import BundleError, CheckpointError, InputError
from engine.network.model import build_model
from engine.network.precision import to_precision
from engine.network.released import fold_network
from engine.registry.config import NetworkConfig
from export.cli import app
from export.options import ExportOptions
from export.pipeline import export_bundle

ROOT = Path(__file__).resolve().parents[1]
# Training knows the three that it trains, and which of them has which objective.
TRAINING = ("dgm4/training", "dgm4/losses")
FILES = [
    path
    for package in ("engine", "export", "kernels", "dgm4")
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.relative_to(ROOT).as_posix().startswith(TRAINING)
]


def names_in(path):
    """The networks that a file names: in a string alone, or by importing their modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in registry.NAMES:
            yield node.value
        if isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            found = [re.fullmatch(r"(engine\.registry|\w+(\.network)?\.models)\.(\w+)", x) for x in modules]
            yield from (match[3] for match in found if match and match[3] in registry.NAMES)


def test_no_other_file_names_a_network():
    own = {ROOT / "engine/registry/__init__.py"}
    own |= {
        path
        for name in registry.NAMES
        for place in PLACES
        for path in (ROOT / place).glob(f"{name}*.py")  # a long one may be several
    }
    named = {
        path.relative_to(ROOT).as_posix(): sorted(set(names_in(path))) for path in FILES if path not in own
    }
    assert {path: names for path, names in named.items() if names} == {}


PLACES = ("engine/registry", "engine/network/models", "dgm4/models")


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_network_has_its_three_files(name):
    network = registry.NETWORKS[name]
    places = PLACES[:2] if network.module else PLACES  # one that has its published form in the same module
    assert [place for place in places if not (ROOT / place / f"{name}.py").is_file()] == []
    assert set(network.sizes) == set(network.parameters) <= set(registry.SIZES)
    assert {size: (x.name, x.size) for size, x in network.sizes.items()} == {
        size: (name, size) for size in network.sizes
    }


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, x in registry.NETWORKS.items() for size in x.sizes]
)
def test_parameters_are_counted(name, size):
    with torch.device("meta"):
        model = dgm4.create_model(name, size)
    assert sum(p.numel() for p in model.parameters()) == registry.NETWORKS[name].parameters[size]


def feeds(config, tokens):
    """Inputs of one pair, as the record has them."""
    sizes = {"batch": 1, "tokens": tokens}
    kinds = {"float32": torch.float32, "int64": torch.int64}
    return {
        x.name: torch.ones([sizes.get(d, d) for d in x.shape_of(config)], dtype=kinds[x.dtype])
        for x in registry.network_of(config).inputs
    }


@pytest.mark.parametrize("name", [*registry.NAMES, "glance"])
def test_answers_are_float32_whatever_is_inside(added, name):
    *_, config = registry.NETWORKS[name].sizes.values()  # the smallest
    with torch.device("meta"), torch.inference_mode():
        answers = to_precision(build_model(config), torch.float16)(**feeds(config, 24))
    assert {x.dtype for x in answers if x is not None} == {torch.float32}


@pytest.mark.parametrize("name", [*registry.NAMES, "glance"])
def test_products_are_counted(added, name):
    """As torch counts those of the form for inference; the fused operators' few are not among them."""
    network = registry.NETWORKS[name]
    config, *_ = network.sizes.values()
    for tokens, stated in zip((24, 50), network.gflop, strict=True):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
            build_model(config)(**feeds(config, tokens))
        assert counter.get_total_flops() / 1e9 == pytest.approx(stated, rel=0.02)


def test_the_page_has_the_records():
    lines = (ROOT / "docs/networks.md").read_text().splitlines()
    assert [row for row in rows() if row not in lines] == []


def rows():
    """The table of docs/networks.md."""
    for name, network in registry.NETWORKS.items():
        count, products = max(network.parameters.values()), network.gflop
        more = ", ".join(f"`{x.name}`" for x in network.inputs[3:]) or "none"
        yield (
            f"| {network.title} (`{name}`) | {count / 1e6:.1f} M | {products[0]:g}, {products[1]:g} "
            f"| {network.tokenizer.min_tokens} | {'yes' if network.heatmap else 'no'} | {more} "
            f"| {'yes' if network.trainable else 'no'} |"
        )


@pytest.fixture
def added():
    """The network of sixty lines among the others."""
    registry.register(glance.NETWORK)
    yield glance.NETWORK
    del registry.NETWORKS["glance"], NetworkConfig.known["glance"]


def checkpoint_of(network, path):
    state = dgm4.seeded_model(network.name, "tiny").state_dict()
    safetensors.torch.save_file(state, path)
    return path, sum(x.numel() for x in state.values())


def test_it_has_sixty_lines():
    assert len(Path(glance.__file__).read_text().splitlines()) <= 60


def test_names_that_are_the_models_own_are_read_as_strictly(added):
    config = added.sizes["tiny"]
    state = glance.Model(config).state_dict()
    assert all(x.data_ptr() == state[key].data_ptr() for key, x in fold_network(state, config).items())
    for key in state:
        rest = {other: value for other, value in state.items() if other != key}
        with pytest.raises(CheckpointError, match=f"expected the tensor '{key}'"):
            fold_network(rest, config)
    with pytest.raises(CheckpointError, match="1 tensors are none of glance's, the first is 'queue'"):
        fold_network({**state, "queue": torch.zeros(1)}, config)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_network_of_sixty_lines(added, tmp_path, precision):
    """From its checkpoint, recognised by the keys, to answers of two backends."""
    path, count = checkpoint_of(added, tmp_path / "glance.safetensors")
    assert count == added.parameters["tiny"]
    out = tmp_path / "bundle"
    export_bundle(ExportOptions(out, checkpoint=path, precision=precision, engine=False), lambda stage: None)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    answers = Predictor(out, backend="ort").predict(pixels, "a man speaks")
    assert answers.heatmap is None
    assert [word.text for word in answers.words] == ["a", "man", "speaks"]
    if precision != "int8":
        again = Predictor(out, backend="torch").predict(pixels, "a man speaks")
        assert again.score == pytest.approx(answers.score, abs=1e-4 if precision == "fp32" else 2e-2)


def test_a_bundle_of_a_network_that_this_version_does_not_know(added, tmp_path):
    path, _ = checkpoint_of(added, tmp_path / "glance.safetensors")
    export_bundle(ExportOptions(tmp_path / "b", checkpoint=path, engine=False), lambda stage: None)
    del NetworkConfig.known["glance"]
    with pytest.raises(BundleError, match=r"model\.config\.name: expected one of .*cals.*, got 'glance'"):
        Predictor(tmp_path / "b")
    NetworkConfig.known["glance"] = added.config


def test_it_has_one_size_and_no_other_is_asked_for(added, tmp_path, capsys):
    """The list shows the size that there is; another is refused in one line, however it is asked for."""
    path, count = checkpoint_of(added, tmp_path / "glance.safetensors")
    assert [(x.size, x.parameters) for x in dgm4.list_models() if x.name == "glance"] == [("tiny", count)]
    assert app.run(["list"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "glance" in line] == [
        ["glance", "tiny"]
    ]
    out = ["--target", "none", "--quiet", "--out", str(tmp_path / "bundle")]
    with pytest.raises(SystemExit, match="2"):
        app.run(["export", "--model", "glance", "--size", "base", *out])
    told = "unknown size 'base' of glance: expected one of tiny"
    assert capsys.readouterr().err.splitlines()[-1].endswith(told)
    with pytest.raises(InputError, match=told):
        dgm4.create_model("glance")
    assert app.run(["export", "--model", "glance", "--size", "base", "--checkpoint", str(path), *out]) == 1
    assert capsys.readouterr().err.endswith("expected a network of size base, got tiny\n")
    assert app.run(["export", "--model", "glance", *out]) == 0
    assert app.run(["inspect", str(tmp_path / "bundle")]) == 0
    assert "bundle: glance tiny, fp32, every hash agrees" in capsys.readouterr().out


def test_every_size_has_its_parameters():
    with pytest.raises(ValueError, match=r"glance: expected parameters for each size \(tiny\), got base"):
        registry.register(replace(glance.NETWORK, parameters={"base": 1}))


def test_a_name_is_taken_once(added):
    with pytest.raises(ValueError, match="there is a network 'glance' already"):
        registry.register(added)


def test_a_checkpoint_with_the_keys_of_two_networks(tmp_path):
    state = {name: torch.zeros(1) for name in ("UtilsB", "cls_token_local_e", "bbox_head.0.weight")}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"those of asap and \w+ at once"):
        dgm4.load_checkpoint(tmp_path / "x.safetensors")
