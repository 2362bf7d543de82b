"""The data set: agreement with the engine, labels by hand, boxes against pixels, flips, side-cars."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dgm4.data import dataset as module
from dgm4.data.annotations import Sample, read_annotations
from dgm4.data.dataset import IGNORED, PairDataset, collate, flip_box
from dgm4.data.labels import label_tokens
from dgm4.tokenizer import build_tokenizer, find_vocabulary
from engine.errors import InputError
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, ImageOptions, decode_image
from engine.inputs.text import CaptionTokenizer

RED, GREY = (230, 20, 40), (90, 120, 110)
CLS = 101


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer(find_vocabulary(), 30522).save(str(path))
    return CaptionTokenizer(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight noisy JPEG files of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    for i in range(8):
        pixels = random.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def sample(picture, text="a well-known minister", types=(), box=None, fake_words=(), image=None):
    return Sample("17", picture, image or picture.name, text, types, box, fake_words)


@pytest.fixture
def samples(pictures):
    files = sorted(pictures.iterdir())
    return [sample(file, text=f"some {'very ' * i}long") for i, file in enumerate(files)]


def same(first, second):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


# Agreement with the engine


def test_training_and_serving_read_the_same_bits(samples, tokenizer, network_input):
    for cache in (False, True):
        dataset = PairDataset(samples, tokenizer, cache=cache)
        for _ in range(2):
            for item, each in zip(dataset, samples, strict=True):
                assert np.array_equal(item.image.numpy(), network_input(each.picture))
                assert np.array_equal(item.input_ids.numpy(), tokenizer(each.text)[1].ids)


@pytest.mark.parametrize(
    "text",
    ["", " .- ", "\ud800 lone", "tab\tnew\nline", "x" * 5000, "word " * 70],
    ids=["none", "marks", "surrogate", "blanks", "long", "wordy"],
)
def test_any_caption_gives_the_engines_ids(samples, tokenizer, text):
    item = PairDataset([sample(samples[0].picture, text)], tokenizer)[0]
    assert np.array_equal(item.input_ids.numpy(), tokenizer(text)[1].ids)
    assert len(item.token_labels) == len(item.input_ids) - 1


def test_a_picture_is_read_as_it_is_stored(tmp_path, tokenizer, network_input):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.effect_noise((60, 30), 90).convert("RGB").save(path, exif=exif)
    item = PairDataset([sample(path, types=("face_swap",), box=(0, 0, 30, 30))], tokenizer)[0]
    as_stored = ImageOptions(apply_orientation=False)
    assert decode_image(path, options=as_stored).rgb.size == (60, 30)
    assert np.array_equal(item.image.numpy(), network_input(path, options=as_stored))
    assert not np.array_equal(item.image.numpy(), network_input(path))
    assert item.box.tolist() == [0.25, 0.5, 0.5, 1.0]


# Labels


def test_word_pieces_carry_their_words_label(samples, tokenizer):
    # cleaned: the(0) unaffable(1) presidents(2) well(3) known(4) 50%(5) speech(6)
    text = 'The unaffable "president\'s" -- well-known, 50% speech!'
    ids, labels = label_tokens(sample(samples[0].picture, text, ("text_swap",), None, (1, 4, 5)), tokenizer)
    pieces = ["the", "una", "##ffa", "##ble", "presidents", "well", "known", "50", "%", "speech"]
    vocabulary = find_vocabulary().read_text(encoding="utf-8").splitlines()
    assert [vocabulary[i] for i in ids] == ["[CLS]", *pieces]
    assert labels.tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    assert labels.dtype == np.int64


def test_a_lone_tab_does_not_shift_the_labels(samples, tokenizer):
    # Published words: "a\tman"(0) walks(1) "in\nrain"(2) today(3); the tokenizer sees six.
    picture = samples[0].picture
    for fake, expected in {
        (0,): [1, 1, 0, 0, 0, 0],
        (1,): [0, 0, 1, 0, 0, 0],
        (2, 3): [0, 0, 0, 1, 1, 1],
    }.items():
        marked = sample(picture, "a\tman walks in\nrain today", ("text_swap",), None, fake)
        assert label_tokens(marked, tokenizer)[1].tolist() == expected


def test_a_word_without_a_token_does_not_shift_the_labels(samples, tokenizer):
    # The tokenizer deletes a control character that is a word of its own.
    marked = sample(samples[0].picture, "one \x01 two", ("text_swap",), None, (2,))
    assert label_tokens(marked, tokenizer)[1].tolist() == [0, 1]


def test_labels_end_where_the_tokenizer_cuts(samples, tokenizer):
    text = "supercalifragilisticexpialidocious " * 50
    ids, labels = label_tokens(sample(samples[0].picture, text, ("text_swap",), None, (0, 49)), tokenizer)
    assert (len(ids), len(labels)) == (127, 126)
    first = len(tokenizer(text.split(" ")[0])[1].ids) - 1
    assert labels.tolist() == [1] * first + [0] * (126 - first)


def test_classes_become_labels(samples, tokenizer):
    picture = samples[0].picture
    marked = sample(picture, types=("face_attribute", "text_swap"), box=(1, 2, 30, 40), fake_words=(0,))
    pristine, fake = PairDataset([samples[0], marked], tokenizer)
    assert (pristine.fake, pristine.types.tolist(), pristine.box.tolist()) == (0, [0] * 4, [0] * 4)
    assert (fake.fake, fake.types.tolist()) == (1, [0, 1, 1, 0])


# Boxes and flips


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_two_flips_are_none(box):
    assert flip_box(flip_box(box)) == pytest.approx(box, abs=2**-52)
    assert flip_box(box)[1:] == box[1:]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_box_covers_the_rectangles_pixels(tokenizer, tmp_path, data):
    width, height = data.draw(st.integers(20, 200)), data.draw(st.integers(20, 200))
    x1, y1 = data.draw(st.integers(0, width - 16)), data.draw(st.integers(0, height - 16))
    x2, y2 = data.draw(st.integers(x1 + 16, width)), data.draw(st.integers(y1 + 16, height))
    picture = Image.new("RGB", (width, height), GREY)
    picture.paste(RED, (x1, y1, x2, y2))
    picture.save(tmp_path / "box.png")
    marked = sample(tmp_path / "box.png", types=("face_swap",), box=(x1, y1, x2, y2))
    dataset = PairDataset([marked], tokenizer, image_size=64, flip=True)
    centres = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        item = dataset[0]
        check_box(item, 64, width, height)
        centres.add(float(item.box[0]))
    # Both of the two were drawn, unless the box is its own mirror image.
    assert len(centres) == (1 if x1 + x2 == width else 2)


def check_box(item, size, width, height):
    """The box's pixels are red and the others grey, but for what the resize mixes at its edges."""
    scale = torch.tensor(CLIP_STD)[:, None, None]
    rgb = (item.image * scale + torch.tensor(CLIP_MEAN)[:, None, None]) * 255
    cx, cy, w, h = (item.box.double() * size).tolist()
    centre = torch.arange(size) + 0.5
    margin_x, margin_y = 2 * max(size / width, 1) + 1, 2 * max(size / height, 1) + 1
    for colour, sign in ((RED, -1), (GREY, 1)):
        inside_x = (centre - cx).abs() < w / 2 + sign * margin_x
        inside_y = (centre - cy).abs() < h / 2 + sign * margin_y
        chosen = inside_y[:, None] & inside_x[None]
        chosen = chosen if colour is RED else ~chosen
        wanted = torch.tensor(colour)[:, None]
        assert torch.allclose(rgb[:, chosen], wanted.expand(3, int(chosen.sum())).float(), atol=1e-2)


def test_the_flip_mirrors_the_resized_picture(samples, tokenizer):
    plain, flipping = PairDataset(samples, tokenizer), PairDataset(samples, tokenizer, flip=True, seed=4)
    kinds = []
    for still, item in zip(plain, flipping, strict=True):
        mirrored = torch.equal(item.image, still.image.flip(2))
        assert mirrored or torch.equal(item.image, still.image)
        assert item.box.tolist() == [0, 0, 0, 0]
        kinds.append(mirrored)
    assert len(set(kinds)) == 2


def flips(samples, tokenizer, seed, epoch):
    """Which samples are flipped, read off the pictures."""
    dataset = PairDataset(samples, tokenizer, image_size=4, flip=True, seed=seed, cache=True)
    still = PairDataset(samples, tokenizer, image_size=4, cache=True)
    dataset.set_epoch(epoch)
    return [not torch.equal(dataset[i].image, still[i].image) for i in range(len(samples))]


def test_flips_are_drawn_from_seed_epoch_and_index(samples, tokenizer):
    many = samples * 40
    drawn = flips(many, tokenizer, 0, 0)
    assert drawn == flips(many, tokenizer, 0, 0)
    assert 0.4 < np.mean(drawn) < 0.6
    for seed, epoch in ((0, 1), (1, 0), (1, 1)):
        assert 0.4 < np.mean(np.equal(drawn, flips(many, tokenizer, seed, epoch))) < 0.6


def test_evaluation_is_deterministic(samples, tokenizer):
    first = list(dataset := PairDataset(samples, tokenizer))
    dataset.set_epoch(5)
    assert all(same(a, b) for a, b in zip(first, dataset, strict=True))


def test_workers_and_order_change_nothing(samples, tokenizer):
    dataset = PairDataset(samples, tokenizer, image_size=16, flip=True, cache=True)
    shuffled = DataLoader(
        dataset, batch_size=3, shuffle=True, collate_fn=collate, num_workers=2, persistent_workers=True
    )
    pictures = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)  # the workers outlive the epoch and have to see it
        found = {}
        for batch in shuffled:
            found |= dict(zip(batch.indices.tolist(), batch.image, strict=True))
        fresh = PairDataset(samples, tokenizer, image_size=16, flip=True)
        fresh.set_epoch(epoch)
        pictures.append(torch.stack([found[i] for i in range(len(samples))]))
        assert torch.equal(pictures[-1], torch.stack([item.image for item in fresh]))
    assert not torch.equal(*pictures)


def test_it_travels_to_spawned_workers(samples, tokenizer):
    dataset = PairDataset(samples, tokenizer, image_size=16)
    loader = DataLoader(
        dataset, batch_size=8, collate_fn=collate, num_workers=1, multiprocessing_context="spawn"
    )
    (batch,) = loader
    assert same(batch, collate(list(dataset)))


# The cache


def test_a_picture_is_decoded_once(samples, tokenizer, monkeypatch):
    opened = []
    decode = module.decode_image
    monkeypatch.setattr(
        module, "decode_image", lambda path, **options: opened.append(path) or decode(path, **options)
    )
    twice = [*samples, sample(samples[0].picture, text="another caption")]
    cached, plain = (PairDataset(twice, tokenizer, flip=True, cache=cache) for cache in (True, False))
    for epoch in range(3):
        opened.clear()
        cached.set_epoch(epoch)
        plain.set_epoch(epoch)
        items = list(cached)
        assert opened == ([each.picture for each in samples] if epoch == 0 else [])
        assert all(same(a, b) for a, b in zip(items, plain, strict=True))


def test_what_is_cached_is_small_and_private(samples, tokenizer):
    dataset = PairDataset(samples, tokenizer, cache=True)
    first = dataset[0].image.clone()
    dataset[0].image.zero_()
    assert torch.equal(dataset[0].image, first)
    (kept, _) = dataset._pictures[samples[0].picture]
    assert (kept.dtype, kept.nbytes) == (np.uint8, 256 * 256 * 3)


# Failures


def test_a_picture_that_breaks_is_named(samples, tokenizer, tmp_path):
    path = tmp_path / "broken.jpg"
    whole = samples[0].picture.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for file in (path, tmp_path / "none.jpg"):
        broken = PairDataset([samples[0], sample(file)], tokenizer)
        with pytest.raises(InputError, match=rf"sample 17 \('.*{file.name}'\): "):
            broken[1]
        for workers in (0, 1):
            with pytest.raises(InputError, match=file.name):
                list(DataLoader(broken, collate_fn=collate, num_workers=workers))


def test_a_box_outside_its_picture_is_named(samples, tokenizer):
    marked = sample(samples[0].picture, types=("face_swap",), box=(0, 0, 92, 40))
    with pytest.raises(InputError, match=r"sample 17 .*0\.jpg.*expected a box inside .* 90 x 40 pixels"):
        PairDataset([marked], tokenizer)[0]
    rounded = sample(samples[0].picture, types=("face_swap",), box=(0, 0, 91, 40))
    assert PairDataset([rounded], tokenizer)[0].box.tolist() == [0.5, 0.5, 1, 1]


def test_options_are_checked(samples, tokenizer):
    for options in ({"image_size": 0}, {"seed": -1}):
        with pytest.raises(InputError, match="expected image_size >= 1 and seed >= 0"):
            PairDataset(samples, tokenizer, **options)
    with pytest.raises(InputError, match="expected an epoch >= 0, got -1"):
        PairDataset(samples, tokenizer).set_epoch(-1)
    with pytest.raises(IndexError):
        PairDataset(samples, tokenizer)[len(samples)]
    assert PairDataset(samples, tokenizer)[-1].position == len(samples) - 1


# Side-cars and batches


def test_side_car_texts_are_tokenised(samples, tokenizer, caplog):
    captions = {each.image: f"A picture of {i} (men)." for i, each in enumerate(samples)}
    explanations = {samples[1].image: "the face is\twrong"}
    with caplog.at_level(logging.WARNING):
        dataset = PairDataset(samples, tokenizer, captions=captions, explanations=explanations)
    assert dataset.missing == {"captions": 0, "explanations": 7}
    assert caplog.messages == ["explanations: 7 of 8 samples have no text; their caption stands in"]
    batch = collate([dataset[0], dataset[1]])
    assert batch.caption_ids[1].tolist() == tokenizer("a picture of 1 men")[1].ids.tolist()
    assert batch.caption_mask.tolist() == [[1] * 6] * 2
    for row, text in enumerate((samples[0].text, "the face is wrong")):
        ids = tokenizer(text)[1].ids.tolist()
        assert batch.explanation_ids[row].tolist()[: len(ids)] == ids
        assert batch.explanation_mask[row].sum() == len(ids)


def test_a_batch_is_padded_to_the_longest(samples, tokenizer):
    dataset = PairDataset(samples, tokenizer)
    assert dataset.missing == {}
    batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=collate)))
    assert batch[-4:] == (None,) * 4
    assert batch.image.shape == (3, 3, 256, 256)
    assert batch.image.dtype == batch.types.dtype == batch.box.dtype == torch.float32
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.token_labels.tolist() == [[0, 0] + [IGNORED] * 2, [0, 0, 0, IGNORED], [0] * 4]
    assert batch.input_ids[0].tolist() == [*tokenizer("some long")[1].ids.tolist(), 0, 0]
    assert (batch.types.shape, batch.box.shape) == ((3, 4), (3, 4))
    assert batch.indices.tolist() == [0, 1, 2]
    for name in ("input_ids", "attention_mask", "fake", "token_labels", "indices"):
        assert getattr(batch, name).dtype == torch.int64


def test_a_batch_of_empty_captions_has_a_column(samples, tokenizer):
    batch = collate([PairDataset([sample(samples[0].picture, "")], tokenizer)[0]])
    assert batch.input_ids.tolist() == [[CLS, 0]]
    assert batch.attention_mask.tolist() == [[1, 0]]
    assert batch.token_labels.tolist() == [[IGNORED]]


def test_from_the_annotations_to_a_batch(tmp_path, tokenizer):
    (tmp_path / "manipulation").mkdir()
    Image.new("RGB", (50, 100)).save(tmp_path / "manipulation/1.jpg")
    record = {
        "id": 5,
        "image": "DGM4/manipulation/1.jpg",
        "text": "Ministers, unaffable",
        "fake_cls": "face_swap&text_attribute",
        "fake_image_box": [10, 20, 30, 101],
        "fake_text_pos": [1],
    }
    (tmp_path / "list.json").write_text(json.dumps([record]))
    dataset = PairDataset(read_annotations(tmp_path / "list.json", tmp_path).samples, tokenizer)
    batch = pickle.loads(pickle.dumps(collate([dataset[0]])))
    assert batch.fake.tolist() == [1]
    assert batch.types.tolist() == [[1, 0, 0, 1]]
    assert batch.box[0].tolist() == pytest.approx([0.4, 0.6, 0.4, 0.8])
    assert batch.token_labels.tolist() == [[0, 1, 1, 1]]
