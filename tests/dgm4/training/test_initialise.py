"""Initial weights: DeiT by timm's names, ALBEF, released checkpoints, and files that do not fit."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dgm4.training.initialise import Initialisation, start_from
from dgm4.training.snapshot import released_state, write_snapshot
from dgm4.training.trainee import Trainee
from engine.errors import BackendError, CheckpointError, InputError

OURS = ("Conv.", "MHA2.")


def trainee_of(config, seed):
    torch.manual_seed(seed)
    return Trainee(config, queue=8)


@pytest.fixture
def config(name, config_of):
    return config_of(name)


def deit(config, side=14):
    """A ViT's state under timm's names, on a grid of `side`, with the classifiers of DeiT."""
    vision = trainee_of(replace(config, name="hammer"), 5).network.visual_encoder
    state = {k: torch.randn_like(v) for k, v in vision.state_dict().items()}
    state["pos_embed"] = torch.randn(1, side**2 + 1, config.width)
    return state | {"head.weight": torch.ones(1000, config.width), "head.bias": torch.ones(1000)}


def assert_momentum_follows(trainee):
    for name, module in trainee._pairs():
        momentum = getattr(trainee, f"{name}_m").state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(momentum[key], value), (name, key)


def test_deit_fills_the_visual_encoder(config, tmp_path):
    torch.save({"model": deit(config)}, path := tmp_path / "deit.pth")
    trainee, untouched = trainee_of(config, 1), trainee_of(config, 1)
    start_from(trainee, Initialisation(vision=str(path)))
    wanted = torch.load(path, weights_only=True)["model"]
    field = wanted["pos_embed"][:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    field = F.interpolate(field, size=(4, 4), mode="bicubic", align_corners=False)
    positions = torch.cat([wanted["pos_embed"][:, :1], field.permute(0, 2, 3, 1).reshape(1, 16, -1)], 1)
    for key, value in trainee.network.visual_encoder.state_dict().items():
        if key.startswith(OURS):
            assert torch.equal(value, untouched.network.visual_encoder.state_dict()[key]), key
        elif key == "pos_embed":
            assert (value - positions).abs().max() <= 1e-6
        else:
            assert torch.equal(value, wanted[key]), key
    for key, value in trainee.network.text_encoder.state_dict().items():
        assert torch.equal(value, untouched.network.text_encoder.state_dict()[key]), key
    assert_momentum_follows(trainee)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.1.mlp.fc1.bias": None},
            r"misshapen: visual_encoder\.blocks\.1\.mlp\.fc1\.bias; unexpected: none",
        ),
        ({"blocks.0.norm1.bias": torch.ones(3)}, r"misshapen: visual_encoder\.blocks\.0\.norm1\.bias;"),
        (
            {"blocks.7.norm1.bias": torch.ones(32)},
            r"none; unexpected: visual_encoder\.blocks\.7\.norm1\.bias",
        ),
        ({"pos_embed": torch.ones(1, 16, 32)}, r"misshapen: visual_encoder\.pos_embed;"),
    ],
    ids=range(4),
)
def test_a_vit_that_does_not_fit_is_named(change, message, config_of, tmp_path):
    config = config_of("hammer")
    state = {k: v for k, v in (deit(config) | change).items() if v is not None}
    torch.save(state, path := tmp_path / "deit.pth")
    with pytest.raises(CheckpointError, match=rf"deit\.pth: expected .* width 32 and depth 2; .*{message}"):
        start_from(trainee_of(config, 1), Initialisation(vision=str(path)))


def test_no_file(config_of, tmp_path):
    for given in ({"vision": str(tmp_path / "none.pth")}, {"weights": tmp_path / "none.pth"}):
        with pytest.raises(CheckpointError, match=r"none\.pth: no such file"):
            start_from(trainee_of(config_of("hammer"), 1), Initialisation(**given))


# timm


def with_timm(monkeypatch, module):
    """Let `import timm` give a module, or raise."""
    load = builtins.__import__

    def fake(name, *arguments, **options):
        if name != "timm":
            return load(name, *arguments, **options)
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(builtins, "__import__", fake)


def test_weights_of_timm(config_of, monkeypatch):
    state, asked = deit(config_of("hammer")), []

    def create(name, pretrained):
        asked.append((name, pretrained))
        return SimpleNamespace(state_dict=lambda: dict(state))

    with_timm(monkeypatch, SimpleNamespace(create_model=create))
    trainee = trainee_of(config_of("hammer"), 1)
    start_from(trainee, Initialisation(vision="timm:deit_base_patch16_224"))
    assert asked == [("deit_base_patch16_224", True)]
    assert torch.equal(trainee.visual_encoder_m.cls_token, state["cls_token"])


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'timm'"), RuntimeError("operator torchvision::nms does not exist")]
)
def test_timm_is_not_usable(error, config_of, monkeypatch):
    with_timm(monkeypatch, error)
    with pytest.raises(BackendError, match=rf"timm:deit need timm, which cannot be loaded: {error}"):
        start_from(trainee_of(config_of("hammer"), 1), Initialisation(vision="timm:deit"))


def test_timm_has_no_such_weights(config_of, monkeypatch):
    def create(name, pretrained):
        raise RuntimeError("Unknown model")

    with_timm(monkeypatch, SimpleNamespace(create_model=create))
    with pytest.raises(InputError, match="timm has no weights for 'vit_x': Unknown model"):
        start_from(trainee_of(config_of("hammer"), 1), Initialisation(vision="timm:vit_x"))


# Checkpoints


def albef(config):
    """ALBEF's layout: encoders, projections, momentum copies, its own heads."""
    state = released_state(trainee_of(replace(config, name="hammer"), 5))
    firsts = (
        "visual_encoder",
        "text_encoder",
        "vision_proj",
        "text_proj",
        "temp",
        "image_queue",
        "text_queue",
    )
    kept = {k: v for k, v in state.items() if k.split(".")[0].removesuffix("_m") in firsts}
    kept = {k: v for k, v in kept.items() if ".classifier." not in k}
    kept |= {k: v + 1 for k, v in kept.items() if k.split(".")[0].endswith("_m") and v.is_floating_point()}
    heads = {
        "text_encoder.cls.predictions.bias": torch.ones(9),
        "itm_head.weight": torch.ones(2, config.width),
    }
    return kept | heads | {"itm_head.bias": torch.ones(2)}


def test_albef_fills_encoders_and_projections(config, tmp_path):
    state = albef(config)
    torch.save({"model": state}, path := tmp_path / "ALBEF_4M.pth")
    trainee, untouched = trainee_of(config, 1), trainee_of(config, 1).state_dict()
    start_from(trainee, Initialisation(weights=path))
    filled = ("network.visual_encoder.", "network.text_encoder.bert.", "vision_proj.", "text_proj.", "temp")
    count = 0
    for key, value in trainee.state_dict().items():
        name = key.removeprefix("network.")
        if key.startswith(filled) and not name.removeprefix("visual_encoder.").startswith(OURS):
            assert torch.equal(value, state[name]), key
            count += 1
        elif "_m." not in key or "itm_head_m" in key:
            assert torch.equal(value, untouched[key]), key
    assert count > 60
    assert_momentum_follows(trainee)


def test_a_run_starts_from_another_runs_checkpoint(config, tmp_path):
    """All that is trained, ASAP's two heads and the temperature too; queues are drawn anew."""
    first, second = trainee_of(config, 5), trainee_of(config, 1)
    with torch.no_grad():
        first.temp.fill_(0.2)
    write_snapshot(path := tmp_path / "run.pth", {"model": released_state(first)})
    start_from(second, Initialisation(weights=path))
    theirs = first.state_dict()
    for key, value in second.state_dict().items():
        assert torch.equal(value, theirs[key]) != key.endswith("_queue"), key


def test_deit_goes_over_a_checkpoint(config_of, tmp_path):
    config = config_of("asap")
    torch.save(albef(config), tmp_path / "albef.pth")
    torch.save(state := deit(config), tmp_path / "deit.pth")
    trainee = trainee_of(config, 1)
    start_from(trainee, Initialisation(tmp_path / "albef.pth", str(tmp_path / "deit.pth")))
    assert torch.equal(trainee.network.visual_encoder.cls_token, state["cls_token"])
    assert torch.equal(trainee.text_proj.weight, albef(config)["text_proj.weight"])


def test_weights_that_do_not_fit_are_named(config_of, tmp_path):
    config = config_of("hammer")
    path = tmp_path / "weights.pth"
    trainee = trainee_of(config, 1)
    for change, message in (
        (
            {"text_encoder.bert.embeddings.word_embeddings.weight": torch.ones(9, 32)},
            r"word_embeddings\.weight: exp",
        ),
        (
            {"vision_proj.weight": torch.ones(8, 32)},
            r"1 misshapen \(vision_proj\.weight: expected \[16, 32\], got \[8",
        ),
    ):
        torch.save(albef(config) | change, path)
        with pytest.raises(CheckpointError, match=rf"weights\.pth: .*{message}"):
            start_from(trainee, Initialisation(weights=path))
    torch.save(released_state(trainee), path)
    with pytest.raises(CheckpointError, match=r"live tensors of cals .*missing \(LIG"):
        start_from(trainee_of(config_of("cals"), 1), Initialisation(weights=path))
