"""The proof's hard inputs and its Predictor, on a CPU: what passes here, and what each check catches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import checks, edges, serving
from benchmarks.kernels.bench import OURS
from engine.errors import EngineMismatchError
from export.trt import build as trt

ELEMENTS = 2000  # stands for 2^31
OPERATOR = "latent_pool"


@pytest.fixture
def broken(monkeypatch):
    """Put `wrong(form, inputs)` in the place of the pooling's form, and leave the other operators out."""

    def break_(wrong):
        def benches(operator, **settings):
            (bench,) = checks.benches(operator, **settings)
            form = bench.forms[OURS]
            yield replace(bench, forms={**bench.forms, OURS: lambda *inputs: wrong(form, inputs)})

        monkeypatch.setattr(edges, "benches", benches)
        monkeypatch.setattr(edges, "OWN", (OPERATOR,))

    return break_


def test_our_operators_stand_hard_inputs():
    rows = list(edges.hard("cpu", batch=3, small=True))
    assert len(rows) == 17
    assert all(row["right"] and not row["lost_nan"] for row in rows)
    assert sum(row["nan"] > 0 for row in rows) >= 13  # all but bytes, and a masked reference's zeros


def test_an_error_that_grows_with_the_mean_is_caught(broken):
    broken(lambda form, x: form(*x) * (1 + 1e-3 * x[0].mean().abs()))
    with pytest.raises(RuntimeError, match="latent pooling"):
        list(edges.hard("cpu", batch=3, small=True))


def test_a_lost_nan_is_caught(broken):
    broken(lambda form, x: form(*x).nan_to_num(0.0))
    with pytest.raises(RuntimeError, match="'right': True, 'nan': 64, 'lost_nan': 64"):
        list(edges.hard("cpu", batch=3, small=True))


def test_masks_of_any_layout(monkeypatch):
    rows = list(edges.masks("cpu", 3, 33, 7))
    assert len(rows) == 6
    assert sum(row["strides"] == (7, 1) for row in rows) == 1
    plain = edges.attention

    def one_layout(query, key, value, heads, mask):
        return plain(query, key, value, heads, mask if mask.stride(1) == 1 else mask.flip(1))

    monkeypatch.setattr(edges, "attention", one_layout)
    with pytest.raises(RuntimeError, match="every second column: .*; columns first: "):
        list(edges.masks("cpu", 3, 33, 7))


def test_another_device(broken):
    if torch.cuda.device_count() < 2:
        assert list(edges.second_device()) == [{"missing": "a second GPU"}]
    assert len(list(edges.second_device("cpu", small=True))) == 17
    broken(lambda form, x: 1.1 * form(*x))
    with pytest.raises(RuntimeError, match="latent pooling on cpu: error 0.1"):
        list(edges.second_device("cpu", small=True))


@pytest.mark.parametrize("operator", edges.OWN)
def test_a_long_batch_is_a_short_one_repeated(operator):
    rows = list(edges.large(operator, "cpu", ELEMENTS, batch=3, small=True))
    assert all(row["elements"] > ELEMENTS and not row["different"] for row in rows)
    matrices = sum(row["name"].endswith("a matrix") for row in rows)
    assert matrices == {"residual_norm": 3, "gelu": 2, "quantize": 1}.get(operator, 0)


def test_an_offset_that_overflows_is_caught(broken):
    def overflow(form, inputs):
        out = form(*inputs)
        out[3:] = 0
        return out

    broken(overflow)
    with pytest.raises(RuntimeError, match="latent pooling: error .*, 2 of 3 repetitions differ"):
        list(edges.large(OPERATOR, "cpu", ELEMENTS, batch=3, small=True))


@pytest.fixture
def exported(bundle, monkeypatch):
    monkeypatch.setattr(serving, "_export", lambda folder, name, backend: bundle("asap", name).path)
    monkeypatch.setattr(serving, "buckets", lambda limits: [(1, 16), (2, 16)])


def test_a_predictor_is_asked_in_every_way(exported, monkeypatch):
    warm, found = serving.check("fp16", device="cpu", pairs=3)
    assert warm["buckets"] == 2
    assert set(found["distances"]) == {"one by one", "a batch", "a stream", "threads"}
    assert all(0 < distance < 1e-2 for distance in found["distances"].values())
    monkeypatch.setitem(serving.CLOSE, "fp16", 0.0)
    with pytest.raises(RuntimeError, match="one by one: .* from the CPU; a batch: "):
        list(serving.check("fp16", device="cpu", pairs=1))


def test_tensorrt_is_asked_where_it_is_installed(exported, monkeypatch):
    builders = (trt.BuilderInfo("tensorrt", None, False, "not installed"),)
    monkeypatch.setattr(trt, "find_builder", lambda: None)
    monkeypatch.setattr(trt, "describe_builders", lambda: builders)
    assert list(serving.check("fp16", "tensorrt")) == [{"missing": "tensorrt: not installed"}]
    monkeypatch.setattr(trt, "find_builder", lambda: builders[0])
    plain = serving.Predictor

    def predictor(path, backend, device):
        if backend == "tensorrt":
            raise EngineMismatchError("for another GPU")
        return plain(path, backend=backend, device=device)

    monkeypatch.setattr(serving, "Predictor", predictor)
    assert list(serving.check("fp16", "tensorrt", pairs=1)) == [{"missing": "for another GPU"}]


def test_every_shape_of_a_graph_is_warmed_up(bundle):
    from engine import Bundle

    shapes = serving.buckets(Bundle.open(bundle("asap", "fp32").path).manifest.limits)
    assert len(shapes) == len(set(shapes)) == 48
    assert shapes[0] == (1, 16)
    assert shapes[-1] == (32, 128)
