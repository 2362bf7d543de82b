"""Side-cars: what is written, kept, left out and saved, with stand-ins for the models; and the verb."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from dgm4.data.annotations import read_split
from dgm4.data.dataset import read_sidecar
from dgm4.data.describe import (
    Described,
    Pace,
    explanation_prompt,
    read_pictures,
    write_captions,
    write_explanations,
)
from engine.errors import InputError
from export.cli import main

COUNT = 10


def pair(i, **changes):
    image = f"DGM4/origin/bbc/{i}.png"
    orig = {"fake_cls": "orig", "fake_image_box": [], "fake_text_pos": [], "mtcnn_boxes": []}
    return {"id": i, "image": image, "text": f"Caption, number {i}", **orig, **changes}


@pytest.fixture
def data(tmp_path):
    """Ten pictures whose widths are 20, 21, ..., for training and one of them for validation."""
    folder = tmp_path / "DGM4"
    (folder / "origin/bbc").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for i in range(COUNT):
        Image.new("RGB", (20 + i, 30), (25 * i, 90, 30)).save(folder / f"origin/bbc/{i}.png")
    (folder / "metadata/train.json").write_text(json.dumps([pair(i) for i in range(COUNT)]))
    (folder / "metadata/val.json").write_text(json.dumps([pair(3, text="another"), pair("x")]))
    return folder


@pytest.fixture
def samples(data):
    return read_pictures(data, ["train"])


def name(i):
    return f"DGM4/origin/bbc/{i}.png"


def widths(pictures):
    return [f"width {picture.width}" for picture in pictures]


def captions(data):
    return read_sidecar(data / "metadata/captions.json")


def explanations(data):
    return read_sidecar(data / "metadata/explanations.json")


def never(batch):
    raise AssertionError("nothing was left to do")


def leftovers(data):
    return [path.name for path in (data / "metadata").iterdir() if path.suffix != ".json"]


# What is written


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_picture_gets_its_own_caption(data, samples, batch):
    sizes, done = [], []

    def caption(pictures):
        sizes.append(len(pictures))
        return widths(pictures)

    counts = write_captions(data, samples, caption, Pace(batch=batch), done.append)
    assert counts == Described(written=COUNT, kept=0, unreadable=0, empty=0)
    assert captions(data) == {name(i): f"width {20 + i}" for i in range(COUNT)}
    assert max(sizes) == min(batch, COUNT) and sum(sizes) == sum(done) == COUNT
    assert leftovers(data) == []


def test_the_files_are_those_that_training_reads(data, samples):
    write_captions(data, samples, widths)
    write_explanations(data, samples, list)
    keys = {sample.image for sample in read_split(data, "train").samples}
    assert captions(data).keys() == explanations(data).keys() == keys


def test_an_explanation_is_asked_for_with_both_captions(data, samples, caplog):
    write_captions(data, samples[:2], widths)
    with caplog.at_level(logging.WARNING):
        counts = write_explanations(data, samples[:3], list)
    assert counts == Described(written=3, kept=0, unreadable=0, empty=0)
    prompts = explanations(data)
    for i in range(2):
        assert f"Caption: Caption, number {i}\n" in prompts[name(i)]
        assert f"shows: width {20 + i}\n" in prompts[name(i)]
    assert prompts[name(2)] == explanation_prompt("Caption, number 2", None)
    assert "shows:" not in prompts[name(2)]
    assert "1 of 3 pictures have no caption" in caplog.text


def test_the_labels_are_not_told(data):
    fake = {"fake_cls": "face_swap&text_swap", "fake_image_box": [1, 2, 3, 4], "fake_text_pos": [0]}
    (data / "metadata/test.json").write_text(json.dumps([pair(0, **fake)]))
    write_explanations(data, read_pictures(data, ["test"]), list)
    assert explanations(data) == {name(0): explanation_prompt("Caption, number 0", None)}


def test_a_prompt_holds_the_words_that_the_networks_read():
    long = explanation_prompt("\n ".join(f"News-{i}," for i in range(40)), "a {news} " * 60)
    assert "Caption: News-0, News-1," in long and "News-24, News-25" not in long  # two words each
    assert long.count("{news}") == 25
    assert len(explanation_prompt("x" * 5000, "y" * 5000)) < 1600
    assert "\ud800" not in explanation_prompt("a \ud800", None)
    assert "Caption: \n" in explanation_prompt(" .- ", None)


def test_of_pairs_with_one_picture_the_first_is_explained(data, caplog):
    found = read_pictures(data, ["train", "val"])
    assert [sample.id for sample in found] == [*map(str, range(COUNT)), "x"]
    assert found[3].text == "Caption, number 3"
    assert "12 pairs share 11 pictures" in caplog.text
    assert [sample.text for sample in read_pictures(data, ["val", "train"], 1)] == ["another"]


# What is left out


def test_a_bad_picture_is_left_out_and_counted(data, samples, caplog):
    (data / "origin/bbc/1.png").write_bytes(b"no picture")
    (data / "origin/bbc/4.png").unlink()
    counts = write_captions(data, samples, widths, Pace(batch=4))
    assert counts == Described(written=COUNT - 2, kept=0, unreadable=2, empty=0)
    assert captions(data) == {name(i): f"width {20 + i}" for i in range(COUNT) if i not in (1, 4)}
    lines = [line for line in caplog.messages if line.startswith("left out: ")]
    assert len(lines) == 2 and str(data.resolve() / "origin/bbc/1.png") in lines[0]
    assert "2 unreadable pictures, 0 empty texts" in caplog.text


def test_a_batch_of_bad_pictures_is_no_reason_to_stop(data, samples):
    for i in range(COUNT - 1):
        (data / f"origin/bbc/{i}.png").write_bytes(b"")
    write_captions(data, samples, widths, Pace(batch=2))
    assert captions(data) == {name(COUNT - 1): "width 29"}


def test_an_empty_text_is_left_out_and_counted(data, samples):
    counts = write_captions(data, samples[:3], lambda pictures: ["a", "", "c"])
    assert counts == Described(written=2, kept=0, unreadable=0, empty=1)
    assert captions(data) == {name(0): "a", name(2): "c"}


def test_a_sliver_of_a_picture_is_widened(data, samples):
    Image.new("L", (1, 300)).save(data / "origin/bbc/0.png")
    write_captions(data, samples[:1], lambda pictures: [f"{p.mode} {p.size}" for p in pictures])
    assert captions(data) == {name(0): "RGB (16, 300)"}


# Resuming


def test_a_second_run_keeps_what_is_there(data, samples):
    (data / "metadata/captions.json").write_text(json.dumps({name(2): "by hand", "other": "stays"}))
    counts = write_captions(data, samples[:5], widths)
    assert counts == Described(written=4, kept=1, unreadable=0, empty=0)
    assert captions(data)[name(2)] == "by hand" and captions(data)["other"] == "stays"
    assert write_captions(data, samples[:5], never) == Described(0, 5, 0, 0)
    done = []
    write_captions(data, samples, widths, progress=done.append)
    assert done == [5, 5] and len(captions(data)) == COUNT + 1


def test_redo_replaces_the_texts_of_its_pictures_alone(data, samples):
    write_captions(data, samples, lambda pictures: ["old"] * len(pictures))
    assert write_captions(data, samples[:2], widths, Pace(redo=True)) == Described(2, 0, 0, 0)
    assert [captions(data)[name(i)] for i in range(3)] == ["width 20", "width 21", "old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_a_whole_file_and_goes_on(data, samples, error):
    calls = []

    def caption(pictures):
        calls.append(len(pictures))
        if len(calls) == 4:
            raise error
        return widths(pictures)

    with pytest.raises(error):
        write_captions(data, samples, caption, Pace(batch=2))
    assert list(captions(data)) == [name(i) for i in range(6)]
    assert leftovers(data) == []
    assert write_captions(data, samples, widths, Pace(batch=2)) == Described(4, 6, 0, 0)
    assert captions(data) == {name(i): f"width {20 + i}" for i in range(COUNT)}


def test_a_run_that_did_nothing_leaves_no_file(data, samples):
    with pytest.raises(AssertionError):
        write_captions(data, samples, never)
    write_captions(data, [], never)
    assert not (data / "metadata/captions.json").exists()


def test_the_file_is_replaced_whole_every_so_often(data, samples, monkeypatch):
    """Seen from a reader between the batches, and when writing fails midway."""
    seen = []

    def caption(pictures):
        path = data / "metadata/captions.json"
        seen.append(len(captions(data)) if path.exists() else 0)
        return widths(pictures)

    write_captions(data, samples, caption, Pace(batch=2, save_every=3))
    assert seen == [0, 0, 4, 4, 8]
    path = data / "metadata/captions.json"
    with path.open("rb") as reader:
        before = path.read_bytes()
        write_captions(data, samples[:1], lambda pictures: ["other"], Pace(redo=True))
        assert reader.read() == before  # another file took its place
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_captions(data, samples, lambda pictures: ["new"] * len(pictures), Pace(redo=True))
    assert path.read_bytes() == before
    assert leftovers(data) == []


def test_a_file_that_is_no_sidecar_is_not_overwritten(data, samples):
    for which, write in (("captions", write_captions), ("explanations", write_explanations)):
        path = data / f"metadata/{which}.json"
        path.write_text("[1]")
        with pytest.raises(InputError, match=rf"{which}\.json: expected an object"):
            write(data, samples, never)
        assert path.read_text() == "[1]"
        path.unlink()


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"save_every": 0}])
def test_a_pace_is_positive(wrong):
    with pytest.raises(InputError, match="expected batch and save_every from 1"):
        Pace(**wrong)


# The verb


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """A drawn ViT with GPT-2, and a drawn GPT-2."""
    folder = tmp_path_factory.mktemp("models")
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    small = {"n_embd": 16, "n_layer": 1, "n_head": 1, "eos_token_id": 1, "bos_token_id": 1}
    gpt2 = transformers.GPT2Config(vocab_size=len(words), n_positions=256, **small)
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vit, gpt2, decoder_start_token_id=1, pad_token_id=0
    )
    reader = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    captioner, instructor = (
        transformers.VisionEncoderDecoderModel(config=config),
        transformers.GPT2LMHeadModel(gpt2),
    )
    torch.manual_seed(1)
    for parameter in (*captioner.parameters(), *instructor.parameters()):
        torch.nn.init.normal_(parameter, std=0.6)
    for part in (captioner, reader, fast):
        part.save_pretrained(folder / "captioner")
    for part in (instructor, fast):
        part.save_pretrained(folder / "instructor")
    return folder


def run(*arguments):
    return main(["data", "describe", "--device", "cpu", *map(str, arguments)])


def test_the_verb_writes_both_files(data, language_models, capsys):
    both = ("--captioner", language_models / "captioner", "--instructor", language_models / "instructor")
    assert run("--data", data, *both, "--limit", 4, "--batch", 3) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pictures"] == 4
    for which, texts in (("captions", captions(data)), ("explanations", explanations(data))):
        assert answer[which]["kept"] == answer[which]["unreadable"] == 0
        assert answer[which]["written"] == len(texts) == 4 - answer[which]["empty"]
        assert all(text == " ".join(text.split()) for text in texts.values())
    first = captions(data), explanations(data)
    assert run("--data", data, *both, "--limit", 4, "--batch", 1, "--redo") == 0
    assert (captions(data), explanations(data)) == first
    assert json.loads(capsys.readouterr().out)["captions"]["kept"] == 0
    assert run("--data", data, *both, "--split", "train", "val") == 0
    assert json.loads(capsys.readouterr().out)["captions"]["kept"] == len(first[0])


def test_either_model_may_be_left_out(data, language_models, capsys):
    assert run("--data", data, "--instructor", language_models / "instructor", "--limit", 2) == 0
    assert not (data / "metadata/captions.json").exists()
    assert "captions" not in json.loads(capsys.readouterr().out)
    (data / "metadata/explanations.json").unlink(missing_ok=True)
    assert run("--data", data, "--captioner", language_models / "captioner", "--limit", 2) == 0
    assert not (data / "metadata/explanations.json").exists()
    assert "explanations" not in json.loads(capsys.readouterr().out)


def test_errors_of_the_verb(data, language_models, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run("--data", data)
    assert caught.value.code == 2
    assert "expected --captioner DIR, --instructor DIR or both" in capsys.readouterr().err
    # Nothing is captioned where the second model is none.
    good = ("--captioner", language_models / "captioner")
    assert run("--data", data, *good, "--instructor", tmp_path) == 1
    assert f"dgm4: error: {tmp_path}: expected the folder of a model" in capsys.readouterr().err
    assert not (data / "metadata/captions.json").exists()
    assert run("--data", tmp_path / "none", *good) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("--data", data, *good) == 4
    assert "pip install" in capsys.readouterr().err
