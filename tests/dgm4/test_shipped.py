"""What ships with the package, and how it is written."""

from __future__ import annotations

import hashlib

import pytest
import torch
from PIL import Image

import dgm4
from dgm4 import shipped
from dgm4.shipped import RECORD, demo_checkpoint, demo_of, demo_record, demo_sample
from dgm4.training.options import TrainOptions
from dgm4.training.release import release
from dgm4.training.snapshot import released_state
from dgm4.training.trainer import make_trainee
from engine.errors import CheckpointError, InputError
from engine.registry import TRAINABLE

LARGEST = 6_000_000  # bytes of one network's weights


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as training writes it, with momentum towers and queues."""

    def write(name, spoil=None):
        trainee = make_trainee(TrainOptions(model=name, size="tiny", queue=8), 2048)
        state = released_state(trainee)
        if spoil:
            state[spoil] = state[spoil] + 1e6
        path = tmp_path / f"{name}.pth"
        torch.save({"model": state}, path)
        return path, trainee.network.eval()

    return write


@pytest.mark.parametrize("name", TRAINABLE)
def test_released_weights_are_small_and_answer_as_the_checkpoint(name, checkpoint, tmp_path):
    path, network = checkpoint(name)
    out = tmp_path / "released.safetensors"
    assert release(path, out, {"network": name}) == out.stat().st_size <= LARGEST
    loaded = dgm4.load_checkpoint(out)
    assert loaded.config.name == name
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 256, 256, generator=random)
    ids = torch.randint(5, 2000, (2, 9), generator=random)
    with torch.inference_mode():
        got, want = (net(image, ids, torch.ones_like(ids)) for net in (loaded, network))
    assert max((a - b).abs().max() for a, b in zip(got[:4], want[:4], strict=True)) <= 2e-2


def test_a_weight_beyond_float16_is_refused(checkpoint, tmp_path):
    path, _ = checkpoint("hammer", spoil="vision_proj.weight")  # which inference never reads
    release(path, tmp_path / "a.safetensors", {})
    path, _ = checkpoint("hammer", spoil="itm_head.0.weight")
    with pytest.raises(CheckpointError, match="itm_head.0.weight does not fit float16"):
        release(path, tmp_path / "b.safetensors", {})
    assert not (tmp_path / "b.safetensors").exists()


def test_only_the_three_networks_are_known():
    with pytest.raises(InputError, match="unknown network 'clip'"):
        demo_checkpoint("clip")


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_demo_is_small_trained_and_on_record(name):
    """Its record is that of a network that has learnt, on a set that is not trivial."""
    path, record = demo_checkpoint(name), demo_record()["networks"][name]
    assert path.stat().st_size == record["bytes"] <= LARGEST
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    assert demo_of(record["sha256"]) == name
    assert demo_of("0" * 64) is None
    network = dgm4.load_checkpoint(path)
    assert (network.config.name, network.config.size) == (name, "tiny")
    assert 0.85 <= record["metrics"]["AUC"] <= 0.98
    assert record["training"]["epochs"] == record["training"]["recipe"]["epochs"]


def test_the_demo_sample_is_a_manipulated_pair():
    picture, caption = demo_sample()
    truth = demo_record()["sample"]
    assert truth["fake_cls"] == "face_swap&text_attribute"
    assert set(truth["words"]) <= set(caption.lower().replace(".", "").split())
    with Image.open(picture) as opened:
        left, top, right, bottom = truth["box"]
        assert 0 <= left < right <= opened.width
        assert 0 <= top < bottom <= opened.height


@pytest.mark.parametrize("missing", ["asap.safetensors", RECORD.name])
def test_a_missing_file_is_told(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "DEMO", tmp_path)
    monkeypatch.setattr(shipped, "RECORD", tmp_path / RECORD.name)
    with pytest.raises(CheckpointError, match=f"{missing}: the demo.* not there"):
        demo_record() if missing == RECORD.name else demo_checkpoint("asap")
