"""Every layout of a released file loads; everything else is refused, by name, and runs no code."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from checkpoints import albef, live, published, renamed_cals, save, small, whole_file
from torch.nn import functional as F

import dgm4
from dgm4.model import build
from dgm4.seeded import draw
from engine.errors import CheckpointError

NAMES = ("hammer", "asap", "cals")


def assert_loaded(model, state):
    loaded = model.state_dict()
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "zip.pth") for name in NAMES), ("cals", "legacy.pth"), ("asap", "plain.safetensors")],
)
def test_published_layouts_at_a_known_size(name, kind, tmp_path):
    """Network and size are read off the keys."""
    config = dgm4.model_config(name, "tiny")
    path = save(tmp_path / kind, whole_file(published(name, config)), legacy=kind.startswith("legacy"))
    model = dgm4.load_checkpoint(path)
    assert model.config == config
    assert_loaded(model, live(config))


def wrapped(state):
    return {f"module.{k}": v for k, v in state.items()}


@pytest.mark.parametrize("shape", ["whole", "bare", "module", "bare module", "half", "state_dict"])
def test_wrappings(name, shape, tmp_path):
    config = small(name)
    state, want = published(name, config), live(config)
    if shape == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        want = {k: v.half().float() for k, v in want.items()}
    content = wrapped(state) if "module" in shape else state
    content = content if shape.startswith("bare") else whole_file(content)
    if shape == "state_dict":
        content["state_dict"] = content.pop("model")
    path = save(tmp_path / "checkpoint.pth", content)
    checkpoint = dgm4.read_checkpoint(path)
    assert checkpoint.layout == name
    assert checkpoint.state.keys() == want.keys()
    assert_loaded(dgm4.load_checkpoint(path, config=config), want)


def test_released_names_of_cals(tmp_path):
    config = small("cals")
    path = save(tmp_path / "cals.pth", whole_file(renamed_cals(config)))
    assert dgm4.read_checkpoint(path).layout == "cals"
    assert_loaded(dgm4.load_checkpoint(path, config=config), live(config))


def test_momentum_towers_are_never_taken_for_the_live_ones(name, tmp_path):
    config = small(name)
    state = published(name, config)
    del state["visual_encoder.cls_token"]
    path = save(tmp_path / "checkpoint.pth", state)
    with pytest.raises(CheckpointError, match=r"1 missing \(visual_encoder\.cls_token\)"):
        dgm4.load_checkpoint(path, config=config)


def test_albef_initialises_the_encoders_of_any_network(name, tmp_path, caplog):
    config = small(name)
    path = save(tmp_path / "ALBEF_4M.pth", whole_file(albef(config)))
    assert dgm4.read_checkpoint(path).layout == "albef"
    torch.manual_seed(0)
    model = dgm4.load_checkpoint(path, model=name, config=config)
    torch.manual_seed(0)
    fresh = build(config).state_dict()
    drawn = live(config)
    encoders = ("visual_encoder.", "text_encoder.bert.")
    own = ("visual_encoder.Conv.", "visual_encoder.MHA2.")
    for key, value in model.state_dict().items():
        loaded = key.startswith(encoders) and not key.startswith(own)
        assert torch.equal(value, drawn[key] if loaded else fresh[key]), key
    assert "untrained" in caplog.text


def test_albef_alone_names_no_network(tmp_path):
    path = save(tmp_path / "ALBEF_4M.pth", albef(small("hammer")))
    with pytest.raises(CheckpointError, match="expected model= as one of hammer, asap, cals"):
        dgm4.load_checkpoint(path)


def test_model_overrides_what_the_keys_say(tmp_path):
    """The heads of HAMMER fit no other network, and the message says what CALS would need."""
    config = small("hammer")
    path = save(tmp_path / "hammer.pth", published("hammer", config))
    assert dgm4.load_checkpoint(path, model="hammer", config=config).config.name == "hammer"
    with pytest.raises(
        CheckpointError,
        match=r"live tensors of cals .* missing \(LIG\..*; its keys are those of HAMMER: leave model",
    ):
        dgm4.load_checkpoint(path, model="cals", config=small("cals"))
    with pytest.raises(CheckpointError, match="unknown network 'resnet': expected one of hammer"):
        dgm4.load_checkpoint(path, model="resnet")


def some_keys(name):
    """A few keys of every top module, those of CALS alone included."""
    keys = sorted(live(small(name)))
    firsts = {key.split(".", 1)[0]: key for key in keys}
    return sorted(
        {*firsts.values(), "visual_encoder.pos_embed", "text_encoder.bert.embeddings.LayerNorm.bias"}
    )


@pytest.mark.parametrize("fault", ["missing", "misshapen", "nan", "infinite"])
def test_a_faulty_live_key_is_named(name, fault, tmp_path):
    config = small(name)
    path = tmp_path / "checkpoint.pth"
    expected = {"missing": "missing", "misshapen": "misshapen", "nan": "NaN", "infinite": "infinity"}[fault]
    for key in some_keys(name):
        state = published(name, config)
        if fault == "missing":
            del state[key]
        elif fault == "misshapen":
            state[key] = torch.zeros(3, 5, 2)
        else:
            state[key] = torch.full_like(state[key], float("nan" if fault == "nan" else "-inf"))
        save(path, state)
        with pytest.raises(CheckpointError) as caught:
            dgm4.load_checkpoint(path, model=name, config=config)
        assert key in str(caught.value)
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "key", ["surprise.weight", "cls_head.9.weight", "visual_encoder.blocks.99.norm1.bias"]
)
def test_an_extra_key_is_named(name, key, tmp_path):
    config = small(name)
    path = save(tmp_path / "checkpoint.pth", published(name, config) | {key: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=rf"1 unexpected \({key}\)"):
        dgm4.load_checkpoint(path, config=config)


def test_dead_modules_of_one_network_are_strange_to_another(tmp_path):
    config = small("hammer")
    path = save(
        tmp_path / "checkpoint.pth", published("hammer", config) | {"patch_head.weight": torch.zeros(2)}
    )
    with pytest.raises(CheckpointError, match=r"1 unexpected \(patch_head\.weight\)"):
        dgm4.load_checkpoint(path, config=config)


def test_values_that_no_training_makes_are_named(tmp_path):
    """A flipped bit of an exponent; safetensors and the older pickle have no checksum."""
    config, key = small("asap"), "visual_encoder.norm.weight"
    state = published("asap", config)
    state[key] = torch.full_like(state[key], 0.01)
    state[key].view(torch.int32)[3] ^= 1 << 30
    path = save(tmp_path / "checkpoint.safetensors", state)
    with pytest.raises(
        CheckpointError, match=rf"1 with values beyond 1e\+08, as damage makes them \({key}\)"
    ):
        dgm4.load_checkpoint(path, config=config)


def test_a_cut_pickle_of_the_older_form(tmp_path):
    """Once a struct.error; at every place of the pickle, a CheckpointError."""
    whole = save(tmp_path / "whole.pth", {"a": torch.ones(3)}, legacy=True).read_bytes()
    path = tmp_path / "cut.pth"
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            dgm4.read_checkpoint(path, "asap")


def test_whatever_a_reader_raises_is_a_checkpoint_error(monkeypatch, tmp_path):
    class Foreign(Exception):
        pass

    def fail(*_, **__):
        raise Foreign("of another library")

    path = save(tmp_path / "checkpoint.pth", {"a": torch.ones(3)})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: .* \(Foreign: of another library\)"):
        dgm4.read_checkpoint(path)


def test_many_faults_are_counted_and_some_named(tmp_path):
    config = small("hammer")
    state = {k: v for k, v in published("hammer", config).items() if not k.startswith("itm_head.")}
    path = save(tmp_path / "checkpoint.pth", state)
    with pytest.raises(CheckpointError, match=r"10 missing \(itm_head\.0\.bias, .* and 5 more\)"):
        dgm4.load_checkpoint(path, config=config)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_a_live_tensor_that_is_no_real_number_is_named(dtype, tmp_path):
    config = small("hammer")
    state = published("hammer", config)
    state["cls_token_local"] = state["cls_token_local"].to(dtype)
    path = save(tmp_path / "checkpoint.pth", state)
    with pytest.raises(CheckpointError, match=rf"1 without floating values \(cls_token_local: {dtype}\)"):
        dgm4.load_checkpoint(path, config=config)


def test_unknown_width(tmp_path):
    path = save(tmp_path / "checkpoint.pth", published("asap", small("asap")))
    with pytest.raises(CheckpointError, match=r"expected the width 768 \(base\), 128 \(tiny\), got 24"):
        dgm4.load_checkpoint(path)


def test_width_cannot_be_read(tmp_path):
    state = published("asap", small("asap"))
    del state["visual_encoder.cls_token"]
    path = save(tmp_path / "checkpoint.pth", state)
    with pytest.raises(CheckpointError, match=r"expected the key visual_encoder\.cls_token"):
        dgm4.load_checkpoint(path)


@pytest.mark.parametrize("side", [14, 2, 3, 7])
def test_positions_of_an_initialisation_are_resampled(side, tmp_path, caplog):
    """Bicubic without aligned corners; the position of [CLS] passes by, and the log tells."""
    config = small("hammer")
    other = torch.from_numpy(draw("pos_embed", (1, side**2 + 1, config.width), 5))
    path = save(tmp_path / "ALBEF.pth", albef(config) | {"visual_encoder.pos_embed": other})
    got = dgm4.load_checkpoint(path, config=config).visual_encoder.pos_embed.detach()
    field = other[0, 1:].reshape(side, side, config.width).permute(2, 0, 1)[None]
    field = F.interpolate(field, size=(4, 4), mode="bicubic", align_corners=False)
    want = torch.cat([other[0, :1], field[0].permute(1, 2, 0).reshape(16, config.width)])
    assert torch.equal(got[0, 0], other[0, 0])
    assert (got[0] - want).abs().max() <= 1e-6
    assert f"positions of a {side} x {side} grid are resampled to 4 x 4" in caplog.text


def test_a_trained_grid_is_kept_or_refused(name, tmp_path, caplog):
    """The resolution is the checkpoint's own; another one that is asked for is an error."""
    config = replace(dgm4.model_config(name, "tiny"), image_size=128)
    path = save(tmp_path / "checkpoint.pth", whole_file(published(name, config)))
    assert_loaded(network := dgm4.load_checkpoint(path), live(config))
    assert network.config == config
    with pytest.raises(CheckpointError, match=r"pos_embed: expected \[1, 257, 128\], got \[1, 65, 128\]"):
        dgm4.load_checkpoint(path, config=dgm4.model_config(name, "tiny"))
    assert caplog.text == ""


@pytest.mark.parametrize("change", [{"positions": 128}, {"vocabulary": 77}])
def test_rows_of_the_text_are_the_checkpoints(change, tmp_path):
    config = replace(dgm4.model_config("hammer", "tiny"), **change)
    path = save(tmp_path / "checkpoint.pth", {"model": live(config)})
    assert dgm4.load_checkpoint(path).config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_depth": 5}, r"unexpected \(visual_encoder\.blocks\.4\."),
        ({"text_depth": 3}, r"missing \(text_encoder\.bert\.encoder\.layer\.3\."),
        ({"patch_size": 8}, r"misshapen \(visual_encoder\.patch_embed\.proj\.weight"),
    ],
)
def test_another_depth_or_patch_is_refused(change, message, tmp_path):
    config = replace(dgm4.model_config("hammer", "tiny"), **change)
    path = save(tmp_path / "checkpoint.pth", {"model": live(config)})
    with pytest.raises(CheckpointError, match=message):
        dgm4.load_checkpoint(path)


@pytest.mark.parametrize(
    "shape", [(1, 16, 24), (1, 1, 24), (1, 0, 24), (1, 11, 24), (24,), (1, 17, 23), (2, 17, 24)]
)
def test_positions_without_a_square_grid_are_misshapen(shape, tmp_path):
    config = small("hammer")
    path = save(
        tmp_path / "checkpoint.pth",
        published("hammer", config) | {"visual_encoder.pos_embed": torch.ones(shape)},
    )
    with pytest.raises(CheckpointError, match=r"visual_encoder\.pos_embed: expected \[1, 17, 24\], got"):
        dgm4.load_checkpoint(path, config=config)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    config = small("cals")
    path = save(tmp_path_factory.mktemp("good") / "good.pth", whole_file(published("cals", config)))
    return path.read_bytes(), config, live(config)


def test_a_truncated_file_is_refused(good_file, tmp_path):
    content, config, _ = good_file
    path = tmp_path / "cut.pth"
    for share in (0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError):
            dgm4.load_checkpoint(path, config=config)


def spots(content, count):
    """Bits all over the file, and as many in its directory, which holds the names and checksums."""
    draw_spot = random.Random(0)
    directory = content.rindex(b"PK\x01\x02", 0, -100) - 20_000
    places = [draw_spot.randrange(len(content)) for _ in range(count // 2)]
    places += [draw_spot.randrange(max(directory, 0), len(content)) for _ in range(count // 2)]
    return [(place, 1 << draw_spot.randrange(8)) for place in places]


def test_a_flipped_bit_is_refused_or_harmless(good_file, tmp_path):
    """At 200 places: never other weights without an error."""
    content, config, want = good_file
    path = tmp_path / "flipped.pth"
    refused = 0
    for place, bit in spots(content, 200):
        damaged = bytearray(content)
        damaged[place] ^= bit
        path.write_bytes(damaged)
        try:
            model = dgm4.load_checkpoint(path, config=config)
        except CheckpointError:
            refused += 1
        else:
            assert_loaded(model, want)
    assert refused > 100


def test_a_flipped_bit_in_a_tensor_names_the_entry(good_file, tmp_path):
    content, config, want = good_file
    path = tmp_path / "flipped.pth"
    place = content.index(want["itm_head.0.weight"].numpy().tobytes()) + 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged: the checksum of its entry .*/data/\d+ is wrong"):
        dgm4.load_checkpoint(path, config=config)


def test_a_zip_whose_directory_is_hidden_is_not_read_unchecked(good_file, tmp_path):
    """A directory that Python's zipfile overlooks, and a flipped bit: the checksum may not be skipped."""
    content, config, want = good_file
    path = tmp_path / "hidden.pth"
    place = content.index(want["itm_head.0.weight"].numpy().tobytes()) + 2
    damaged = bytearray(content)
    damaged[place] ^= 1
    damaged[-2] ^= 1  # the length of the archive's comment
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError):
        dgm4.load_checkpoint(path, config=config)
