"""The timing cache: where it lies, that it is reused, and that without it a build goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from export.trt import worker
from export.trt.timing_cache import default_cache, load_timing_cache, save_timing_cache


class Cache:
    """An ITimingCache of the bytes it was made with and what this build adds."""

    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"+"


class Config:
    """An IBuilderConfig on a GPU that knows caches of itself alone, which begin with `own`."""

    def __init__(self, own=b""):
        self.own, self.attached = own, []

    def create_timing_cache(self, serialized_timing_cache):
        return Cache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.data and not cache.data.startswith(self.own):
            return False
        self.attached.append(cache.data)
        return True


def build(config, path):
    """What a build does with its cache; the warnings."""
    said = []
    save_timing_cache(path, load_timing_cache(config, path, said.append), said.append)
    return said


def test_what_one_build_measured_the_next_one_has(tmp_path):
    path, config = tmp_path / "folder" / "t.cache", Config()
    assert [build(config, path) for _ in range(3)] == [[], [], []]
    assert config.attached == [b"", b"+", b"++"]
    assert [entry.name for entry in path.parent.iterdir()] == ["t.cache"]


def test_one_of_another_gpu_is_begun_anew(tmp_path):
    path, config = tmp_path / "t.cache", Config(own=b"H100")
    path.write_bytes(b"A100 and its tactics")
    assert build(config, path) == []
    assert config.attached == [b""]
    assert path.read_bytes() == b"+"


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (said,) = build(Config(), tmp_path / "file" / "t.cache")
    assert "t.cache was not saved: " in said
    (tmp_path / "held").mkdir()
    (said,) = build(Config(), tmp_path / "held")
    assert "held was not saved: Is a directory" in said
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "held"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_one_that_cannot_be_read_is_a_warning(tmp_path):
    path = tmp_path / "t.cache"
    path.write_bytes(b"+")
    path.chmod(0)
    assert "was not read: Permission denied" in build(Config(), path)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_bindings_take_it(tmp_path):
    """RTX's own caches are empty, but have the interface; one that is garbage begins anew."""
    rtx = pytest.importorskip("tensorrt_rtx")

    class Channel:
        def send(self, event, **fields): ...

    builder = rtx.Builder(worker._make_logger(rtx, Channel()))
    config, path = builder.create_builder_config(), tmp_path / "t.cache"
    assert build(config, path) == []
    assert path.stat().st_size > 0
    path.write_bytes(b"garbage" * 20)
    assert build(config, path) == []
    assert b"garbage" not in path.read_bytes()


def test_each_version_and_gpu_has_its_own_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = tmp_path / "dgm4" / "timing" / "tensorrt-11.4.0.106-NVIDIA-H100-80GB-HBM3.cache"
    assert default_cache("tensorrt", "11.4.0.106", "NVIDIA H100 80GB HBM3") == name
    assert default_cache("tensorrt", "11.4.0.106", "../x").parent == name.parent
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = Path(tmp_path, ".cache", "dgm4", "timing")
    assert default_cache("tensorrt", "10.13", "A").parent == inside


def test_there_is_none_for_rtx_nor_without_a_gpu():
    assert default_cache("tensorrt_rtx", "1.7.1", "NVIDIA RTX 4090") is None
    assert default_cache("tensorrt", "11.4", None) is None
