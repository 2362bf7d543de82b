"""Local models: tiny drawn ones of each family, against greedy decoding written out, and every refusal."""

from __future__ import annotations

import json
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dgm4.data import language
from dgm4.data.language import CAPTION_PROMPT, Captioner, Instructor, one_line, pick_device
from engine.errors import BackendError, InputError

PROMPTS = ["say why", "a man and a dog run in the rain", "who", "the minister smiles at a crowd of people"]
CHAT = "{% for m in messages %}<s>user : {{ m['content'] }} {% endfor %}reply :"
PICTURE_CHAT = (
    "<s>{% for m in messages %}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}"
)
WORDS = sorted({*" ".join([*PROMPTS, CAPTION_PROMPT, "user : reply"]).split(), *(f"w{i}" for i in range(40))})
SIDE, TOKENS = 16, 6


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make_tokenizer(pad="<pad>", **options):
    marks = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(marks + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        **options,
    )


VOCABULARY = 5 + len(WORDS)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VISION = {**SMALL, "image_size": SIDE, "patch_size": 8}
VISION.pop("vocab_size")
PIXELS = {"size": {"height": SIDE, "width": SIDE}}


def save(folder, model, *readers):
    """Save a model whose weights are drawn wide, so that its words depend on what it reads."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.6)
    for part in (model, *readers):
        part.save_pretrained(folder)
    return folder


def gpt2(**options):
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, **IDS, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def causal(folder):
    return save(folder / "gpt2", transformers.GPT2LMHeadModel(gpt2()), make_tokenizer(pad=None))


@pytest.fixture(scope="module")
def chat(folder):
    model = transformers.GPT2LMHeadModel(gpt2())
    return save(folder / "chat", model, make_tokenizer(chat_template=CHAT))


@pytest.fixture(scope="module")
def t5(folder):
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return save(folder / "t5", transformers.T5ForConditionalGeneration(config), make_tokenizer())


def vit_gpt2(folder):
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), gpt2(), decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
    )
    model = transformers.VisionEncoderDecoderModel(config=config)
    model.generation_config.update(num_beams=4, max_length=16, do_sample=True)  # as some checkpoints have it
    return save(folder, model, transformers.ViTImageProcessor(**PIXELS), make_tokenizer())


def blip(folder):
    text = {**SMALL, **IDS, "sep_token_id": 2, "encoder_hidden_size": 32, "max_position_embeddings": 32}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(**PIXELS), make_tokenizer())
    return save(folder, transformers.BlipForConditionalGeneration(config), processor)


def git(folder):
    config = transformers.GitConfig(vision_config=VISION, **SMALL, **IDS, max_position_embeddings=64)
    pixels = {"size": {"shortest_edge": SIDE}, "crop_size": PIXELS["size"]}
    processor = transformers.GitProcessor(transformers.CLIPImageProcessor(**pixels), make_tokenizer())
    return save(folder, transformers.GitForCausalLM(config), processor)


def llava(folder):
    text = transformers.LlamaConfig(**SMALL, **IDS, max_position_embeddings=64)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_index=4
    )
    pixels = {"size": {"shortest_edge": SIDE}, "crop_size": PIXELS["size"]}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**pixels),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=PICTURE_CHAT,
    )
    return save(folder, transformers.LlavaForConditionalGeneration(config), processor)


FAMILIES = {"vit_gpt2": vit_gpt2, "blip": blip, "git": git, "llava": llava}


@pytest.fixture(scope="module", params=FAMILIES)
def captioning(request, folder):
    return FAMILIES[request.param](folder / request.param)


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(2)
    return [Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(4)]


def greedy(model, ids, **inputs):
    """Greedy decoding written out: one prompt, no padding, no cache."""
    start = ids.shape[1]
    for _ in range(TOKENS):
        with torch.no_grad():
            word = model(**inputs, **{key_of(model): ids}).logits[0, -1].argmax()
        ids = torch.cat([ids, word.view(1, 1)], 1)
        if word == 2:
            break
    return make_tokenizer().decode(ids[0, start:], skip_special_tokens=True)


def key_of(model):
    return "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"


# Instructors


def test_a_causal_model_answers_greedily_whatever_the_batch(causal):
    model = transformers.GPT2LMHeadModel.from_pretrained(causal).eval()
    expected = [greedy(model, make_tokenizer()(p, return_tensors="pt").input_ids) for p in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    instructor = Instructor(causal, "cpu", TOKENS)
    assert instructor(PROMPTS) == expected
    assert [instructor([prompt])[0] for prompt in PROMPTS] == expected
    assert Instructor(causal, "cpu", TOKENS)(PROMPTS[::-1]) == expected[::-1]
    assert instructor([]) == []


def test_the_chat_template_is_used_where_there_is_one(chat):
    model = transformers.GPT2LMHeadModel.from_pretrained(chat).eval()
    texts = [f"<s> user : {prompt} reply :" for prompt in PROMPTS]
    ids = [make_tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    assert ids[0][0].tolist().count(1) == 1 and (ids[0] != 3).all()  # every word is known
    assert Instructor(chat, "cpu", TOKENS)(PROMPTS) == [greedy(model, row) for row in ids]


def test_a_sequence_to_sequence_model_answers(t5):
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5).eval()
    start = torch.tensor([[0]])
    rows = [make_tokenizer()(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    expected = [greedy(model, start, input_ids=row) for row in rows]
    assert Instructor(t5, "cpu", TOKENS)(PROMPTS) == expected
    assert [Instructor(t5, "cpu", TOKENS)([prompt])[0] for prompt in PROMPTS] == expected
    assert len(set(expected)) > 1


def test_a_prompt_must_leave_room(causal, t5):
    assert Instructor(causal, "cpu", TOKENS)(["w1 " * 57])
    with pytest.raises(InputError, match="need 65 positions, the model has 64"):
        Instructor(causal, "cpu", TOKENS)(["w1 " * 58])
    assert Instructor(t5, "cpu", TOKENS)(["w1 " * 600])  # positions are relative


# Captioners


def test_every_family_captions_whatever_the_batch(captioning, pictures):
    captioner = Captioner(captioning, "cpu", TOKENS)
    texts = captioner(pictures)
    assert [captioner([picture])[0] for picture in pictures] == texts
    assert Captioner(captioning, "cpu", TOKENS)(pictures) == texts
    assert len(set(texts)) > 1  # the picture is looked at
    assert all(len(text.split()) <= TOKENS and set(text.split()) <= set(WORDS) for text in texts)
    assert captioner([]) == []


def test_a_captioner_is_greedy_whatever_its_settings_say(folder, pictures, caplog):
    path = vit_gpt2(folder / "settings")
    assert json.loads((path / "generation_config.json").read_text())["num_beams"] == 4
    model = transformers.VisionEncoderDecoderModel.from_pretrained(path).eval()
    read = transformers.AutoImageProcessor.from_pretrained(path)
    rows = [read(images=picture, return_tensors="pt").pixel_values for picture in pictures]
    expected = [greedy(model, torch.tensor([[1]]), pixel_values=row) for row in rows]
    transformers.utils.logging.set_verbosity_warning()  # the verb lowers it
    caplog.clear()
    assert Captioner(path, "cpu", TOKENS)(pictures) == expected
    assert caplog.messages == []


def test_a_chat_captioner_reads_its_prompt(folder, pictures):
    path = llava(folder / "prompted")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path).eval()
    processor = transformers.AutoProcessor.from_pretrained(path)
    for prompt in (CAPTION_PROMPT, "who"):
        inputs = processor(images=pictures[0], text=f"<image> {prompt}", return_tensors="pt")
        assert inputs.input_ids[0].tolist().count(1) == 1
        expected = greedy(model, inputs.input_ids, pixel_values=inputs.pixel_values)
        assert Captioner(path, "cpu", TOKENS, prompt)(pictures)[0] == expected


# Refusals


def test_a_folder_without_a_model_is_named(tmp_path):
    for kind in (Captioner, Instructor):
        with pytest.raises(InputError, match=f"{tmp_path}: expected the folder of a model.*never downloaded"):
            kind(tmp_path, "cpu")
        with pytest.raises(InputError, match="gpt2: expected the folder"):
            kind("gpt2", "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=f"{tmp_path}: cannot load its config.json"):
        Instructor(tmp_path, "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match=f"{tmp_path}: cannot load its config.json.*unheard-of"):
        Captioner(tmp_path, "cpu")


def test_a_model_of_another_kind_is_refused(causal, captioning, tmp_path):
    with pytest.raises(
        InputError, match="expected an image-captioning model, got GPT2LMHeadModel of type gpt2"
    ):
        Captioner(causal, "cpu")
    if "git" not in captioning.name:  # a GIT model is a causal language model as well
        with pytest.raises(InputError, match="expected an instruction model"):
            Instructor(captioning, "cpu")
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="got BertForMaskedLM of type bert"):
        Instructor(tmp_path, "cpu")


def test_a_captioner_that_needs_words_needs_a_template(folder, tmp_path):
    path = shutil.copytree(llava(folder / "plain"), tmp_path / "plain")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="expected a captioner with a chat template.*got type llava"):
        Captioner(path, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_part_missing_or_broken_is_refused(causal, tmp_path, name):
    path = shutil.copytree(causal, tmp_path / "model")
    (path / name).write_bytes(b"broken")
    with pytest.raises(InputError, match=f"{path}: cannot load its (weights|tokenizer)"):
        Instructor(path, "cpu")
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{path}: cannot load its (weights|tokenizer)"):
        Instructor(path, "cpu")


def test_missing_weights_are_not_drawn(causal, tmp_path):
    path = shutil.copytree(causal, tmp_path / "model")
    model = transformers.GPT2LMHeadModel.from_pretrained(causal)
    weights = model.state_dict()
    del weights["transformer.h.1.mlp.c_fc.weight"]
    model.save_pretrained(path, state_dict=weights)
    with pytest.raises(
        InputError, match="1 weights are missing, the first is transformer.h.1.mlp.c_fc.weight"
    ):
        Instructor(path, "cpu")


def test_code_of_a_model_is_not_run(causal, tmp_path):
    path = shutil.copytree(causal, tmp_path / "model")
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cannot load its config\.json"):
        Instructor(path, "cpu")
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_command_to_install_it_is_named(causal, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in (Captioner, Instructor):
        with pytest.raises(
            BackendError, match=r"transformers, which is not installed: pip install .dgm4\[train\]"
        ):
            kind(causal, "cpu")


def test_a_library_that_a_model_needs_is_named(causal, monkeypatch):
    def fail(*_, **__):
        raise ImportError("needs sentencepiece\nmore")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(BackendError, match="gpt2: its tokenizer needs a library: needs sentencepiece$"):
        Instructor(causal, "cpu")


def test_a_full_device_says_what_to_do(causal, monkeypatch):
    instructor = Instructor(causal, "cpu", TOKENS)

    def fail(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(instructor._writer._model, "generate", fail)
    with pytest.raises(BackendError, match="take a smaller batch"):
        instructor(PROMPTS)


def test_devices(causal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(BackendError, match="torch finds 0 GPUs here, got 'cuda'"):
        pick_device("cuda")
    with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        Instructor(causal, "gpu")
    with pytest.raises(InputError, match="expected a whole number from 1, got 0"):
        Instructor(causal, "cpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert language.pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1").index == 1
    with pytest.raises(BackendError, match="cuda:2"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" a\n\n b\tc ", "a b c"),
        ("<think>hm\nhm</think>\n\nYes.", "Yes."),
        ("a\x00b\ufffd", "a b"),
        ("\x85\u2028", ""),
        ("", ""),
    ],
)
def test_a_text_becomes_one_line(text, line):
    assert one_line(text) == line
