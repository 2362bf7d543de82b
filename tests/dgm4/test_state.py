"""States are found wherever training code leaves them, under the network's own names, and nothing runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import gzip
import io
import os
import pathlib
import tarfile
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from dgm4.state import find_state, read_content
from engine.errors import CheckpointError

STATE = {"visual_encoder.cls_token": torch.ones(2), "itm_head.0.weight": torch.arange(6.0).view(2, 3)}
OTHER = {name: value + 1 for name, value in STATE.items()}


def named(prefix, state=None):
    return {prefix + name: value for name, value in (state or STATE).items()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def assert_same(state, want=None):
    want = want or STATE
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], want[name]) for name in want)


PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model.net._orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.module.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_dropped(prefix, tmp_path):
    assert_same(find_state(saved(tmp_path / "c.pth", {"model": named(prefix)})).state)


def test_wrappers_inside_a_name_are_dropped(tmp_path):
    inner = {name.replace(".", "._orig_mod.", 1): value for name, value in STATE.items()}
    inner = {name.replace(".0.", ".0._checkpoint_wrapped_module."): value for name, value in inner.items()}
    assert_same(find_state(saved(tmp_path / "c.pth", inner)).state)


def test_a_prefix_that_some_names_lack_stays(tmp_path):
    mixed = named("model.") | {"loss.weight": torch.ones(2)}
    assert find_state(saved(tmp_path / "c.pth", mixed)).state.keys() == mixed.keys()


NESTS = {
    "": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "hyper_parameters": {"lr": 1e-4}},
    "module": lambda state: {"module": state, "ds_version": "0.16", "param_shapes": [torch.Size([2])]},
    "model.state_dict": lambda state: {"model": {"state_dict": state}},
    "trainer.best.weights": lambda state: {"trainer": {"best": {"weights": state, "step": 1}}},
}


@pytest.mark.parametrize("place", NESTS)
def test_the_only_state_is_found_at_any_depth(place, tmp_path, caplog):
    found = find_state(saved(tmp_path / "c.pth", NESTS[place](STATE)))
    assert_same(found.state)
    assert (found.place, found.others, caplog.text) == (place, (), "")


def test_an_optimiser_and_random_streams_are_no_states(tmp_path):
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    beside = {"optimizer": optimizer.state_dict(), "random": {"torch": torch.get_rng_state()}}
    found = find_state(
        saved(tmp_path / "c.pth", {"weights": STATE, **beside, "scale": {"x": torch.tensor(1.0)}})
    )
    assert (found.place, found.others) == ("weights", ())


def test_what_was_taken_and_what_was_there_is_said(tmp_path, caplog):
    path = saved(tmp_path / "c.pth", {"model": STATE, "model_ema": OTHER, "teacher": {"net": OTHER | STATE}})
    found = find_state(path)
    assert_same(found.state)
    assert (found.place, found.others) == ("model", ("model_ema", "teacher.net"))
    assert f"{path}: took the state model; not read: model_ema, teacher.net" in caplog.text
    assert_same(find_state(path, "model_ema").state, OTHER)


def test_one_of_several_has_to_be_chosen(tmp_path):
    path = saved(tmp_path / "c.pth", {"net": STATE, "net_ema": OTHER})
    with pytest.raises(CheckpointError, match=r"got 2: net, net_ema; dgm4 convert .* --state net takes one"):
        find_state(path)
    assert_same(find_state(path, "net_ema").state, OTHER)
    with pytest.raises(CheckpointError, match=r"expected one of its states \(net, net_ema\), got 'ema'"):
        find_state(path, "ema")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_doubled_name_is_refused(prefix, tmp_path):
    path = saved(tmp_path / "c.pth", {"model": STATE | named(prefix, OTHER)})
    with pytest.raises(CheckpointError, match=r"each tensor once, got 4 names .*itm_head\.0\.weight, "):
        find_state(path)


def harmless():
    """What training code keeps beside its weights."""
    numbers = {code: np.ones((), code)[()] for code in "?bhilBHILefd"}
    return {
        "best_epoch": np.int32(3),
        "numbers": numbers,
        "history": np.arange(3, dtype=np.float32),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("/runs/1"), when=datetime.datetime(2024, 1, 1)),
        "root": pathlib.PurePosixPath("a/b"),
        "took": datetime.timedelta(seconds=3),
        "counts": collections.Counter(a=2),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_objects_are_read(zipped, tmp_path):
    path = saved(tmp_path / "c.pth", {"model": STATE, **harmless()}, _use_new_zipfile_serialization=zipped)
    content = read_content(path)
    assert content["best_epoch"] == 3
    assert content["args"].out == pathlib.PurePosixPath("/runs/1")
    assert content["history"].tolist() == [0, 1, 2]
    assert_same(find_state(path).state)


class Options(dict):
    """As Lightning's AttributeDict and EasyDict: a mapping with a state of its own."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__.update(items)


def foreign():
    return {"args": types.SimpleNamespace(lr=1), "partial": functools.partial(print, 1), "o": Options(lr=1)}


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_objects_are_all_named_and_their_tensors_can_be_read_alone(zipped, tmp_path, caplog):
    path = saved(tmp_path / "c.pth", {"model": STATE, **foreign()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        read_content(path)
    message = str(caught.value)
    for name in ("functools.partial", "builtins.print", "types.SimpleNamespace", f"{__name__}.Options"):
        assert name in message
    assert f"dgm4 convert {path} c.safetensors reads its tensors alone and runs nothing of it" in message
    assert_same(find_state(path, tensors_only=True).state)
    assert "types.SimpleNamespace were not read" in caplog.text


class Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [exec, eval, torch.load, functools.partial])
def test_nothing_runs_where_tensors_are_read_alone(function, zipped, tmp_path):
    marker = tmp_path / "ran"
    code = Call(function, f"__import__('os').mkdir({str(marker)!r})")
    path = saved(tmp_path / "c.pth", {"model": STATE, "x": code}, _use_new_zipfile_serialization=zipped)
    assert_same(find_state(path, tensors_only=True).state)
    assert not marker.exists()


@pytest.mark.parametrize("function", [os.system, os.mkdir])
def test_a_call_of_the_system_is_never_read(function, tmp_path):
    path = saved(tmp_path / "c.pth", {"model": STATE, "x": Call(function, str(tmp_path / "ran"))})
    with pytest.raises(CheckpointError, match=r"asks for posix\.\w+, which could run code"):
        find_state(path, tensors_only=True)
    assert not (tmp_path / "ran").exists()


def a_tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/x.py"):
            archive.writestr(name, b"\x80\x02}.")
    return buffer.getvalue()


def zipped_folder():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("checkpoint.pth", b"x")
    return buffer.getvalue()


def protocol_four():
    buffer = io.BytesIO()
    torch.save({"model": STATE}, buffer, pickle_protocol=4)
    return buffer.getvalue()


KINDS = {
    "a tar archive, of torch 0.1": a_tar,
    "a TorchScript archive; save the network's state_dict": torchscript,
    "a zip archive of other files (checkpoint.pth); unpack it first": zipped_folder,
    "its pickle protocol is not torch's (2)": protocol_four,
    "compressed by gzip; unpack it first": lambda: gzip.compress(b"x" * 1000),
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "a web page": lambda: b"\n<!DOCTYPE html><html></html>",
    "something else": lambda: b"hello" * 100,
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_told_by_its_bytes_without_bad_advice(kind, suffix, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    path.write_bytes(KINDS[kind]())
    with pytest.raises(CheckpointError) as caught:
        read_content(path)
    message = str(caught.value)
    assert kind in message
    assert "weights_only" not in message
    assert "\n" not in message


def test_a_suffix_is_not_believed(tmp_path):
    path = saved(tmp_path / "c.safetensors", STATE)
    assert_same(find_state(path).state)
    path = tmp_path / "c.bin"
    safetensors.torch.save_file(STATE, path)
    assert_same(find_state(path).state)
    path = saved(tmp_path / "legacy.safetensors", STATE, _use_new_zipfile_serialization=False)
    assert_same(find_state(path).state)


def test_content_that_holds_itself_is_read(tmp_path):
    content = {"weights": STATE}
    content["self"] = content
    assert_same(find_state(saved(tmp_path / "c.pth", content)).state)
