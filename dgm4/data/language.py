"""Local models of the transformers library that write texts: one captions images, one answers instructions.

Nothing is ever downloaded and no code of a model's folder is run. Decoding is greedy, in float32 on a CPU,
so the same images and prompts give the same texts, whatever the batch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.errors import BackendError, InputError, quoted
from engine.packages import install_command

# What a captioner with a chat template is told beside the image; the others are shown the image alone.
CAPTION_PROMPT = "Describe this news photograph in one or two sentences: who is seen, and what they do."
CAPTION_TOKENS = 64
ANSWER_TOKENS = 96
# Model types that caption an image without being told anything.
WORDLESS = ("blip", "blip-2", "git", "vision-encoder-decoder")
_THOUGHTS_END = "</think>"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufffd]")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class Captioner:
    """A captioning model of a folder; calling it with RGB images gives one line of text for each.

    The folder is one of `save_pretrained`: an image-text-to-text model whose processor has a chat template,
    or one of the types in `WORDLESS`. `prompt` is for the former. Raises InputError where the folder holds no
    such model or only a part of its weights, BackendError where transformers or the device is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        max_new_tokens: int = CAPTION_TOKENS,
        prompt: str = CAPTION_PROMPT,
    ):
        library, config = _library(), _read_config(folder)
        if config.model_type == "vision-encoder-decoder":
            kinds = {type(config): library.VisionEncoderDecoderModel}
        else:
            kinds = library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind = _model_class(kinds, config, folder, "an image-captioning model")
        self._tokenizer, self._images = _load_readers(folder, config)
        self._chat = getattr(self._images, "chat_template", None) is not None
        if not self._chat and config.model_type not in WORDLESS:
            raise InputError(
                f"{folder}: expected a captioner with a chat template, or one of {', '.join(WORDLESS)}; "
                f"got type {config.model_type} without one"
            )
        self._prompt = prompt
        self._writer = _Writer(kind, folder, self._tokenizer, device, max_new_tokens)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Caption a batch of RGB images, in their order; a text may be empty."""
        return self._writer.write(self._inputs(pictures)) if pictures else []

    def _inputs(self, pictures: Sequence[Image.Image]) -> Mapping[str, Tensor]:
        if not self._chat:
            return {"pixel_values": self._images(images=list(pictures), return_tensors="pt")["pixel_values"]}
        content = [{"type": "image"}, {"type": "text", "text": self._prompt}]
        text = self._images.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs: Mapping[str, Tensor] = self._images(
            images=[[picture] for picture in pictures],
            text=[text] * len(pictures),
            padding=True,
            add_special_tokens=not _has_start(text, self._tokenizer),
            return_tensors="pt",
        )
        return inputs


class Instructor:
    """An instruction model of a folder; calling it with prompts gives one line of text for each.

    The folder is one of `save_pretrained`: a causal language model, whose tokenizer's chat template is used
    where there is one, or a sequence-to-sequence model. Errors as for `Captioner`.
    """

    def __init__(self, folder: str | Path, device: str = "auto", max_new_tokens: int = ANSWER_TOKENS):
        library, config = _library(), _read_config(folder)
        if getattr(config, "is_encoder_decoder", False):
            kinds = library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        else:
            kinds = library.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = _model_class(kinds, config, folder, "an instruction model (causal or sequence-to-sequence)")
        self._tokenizer = _load(library.AutoTokenizer, folder, "its tokenizer")
        _pad_left(self._tokenizer)
        self._writer = _Writer(kind, folder, self._tokenizer, device, max_new_tokens)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Answer a batch of prompts, in their order; a text may be empty.

        Raises InputError where a prompt and its answer do not fit into the model's positions.
        """
        if not prompts:
            return []
        texts, special = list(prompts), True
        if self._tokenizer.chat_template is not None:
            texts = [self._as_chat(prompt) for prompt in prompts]
            special = not _has_start(texts[0], self._tokenizer)
        inputs = self._tokenizer(texts, padding=True, add_special_tokens=special, return_tensors="pt")
        # Some tokenizers make token types that causal models do not take.
        return self._writer.write({name: inputs[name] for name in ("input_ids", "attention_mask")})

    def _as_chat(self, prompt: str) -> str:
        """The prompt as the only turn, since many templates refuse a system turn; thinking is left out."""
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
        return text


class _Writer:
    """A model with its tokenizer: inputs in, greedy texts out."""

    def __init__(self, kind: Any, folder: str | Path, tokenizer: Any, device: str, max_new_tokens: int):
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: expected a whole number from 1, got {max_new_tokens}")
        self._device = pick_device(device)
        model, report = _load(kind, folder, "its weights", output_loading_info=True)
        if report["missing_keys"]:
            names = sorted(report["missing_keys"])
            raise InputError(f"{folder}: {len(names)} weights are missing, the first is {names[0]}")
        # A half-precision CPU model would round differently from batch to batch.
        self._model = (model.float() if self._device.type == "cpu" else model).to(self._device).eval()
        self._tokenizer, self._folder, self._room = tokenizer, folder, max_new_tokens
        # Handed to generate() instead, what is None would be filled from these; BLIP's decoder has its own.
        for part in self._model.modules():
            if getattr(part, "generation_config", None) is not None:
                own = part.generation_config
                part.generation_config = _greedy(own, max_new_tokens, tokenizer.pad_token_id)

    @torch.inference_mode()
    def write(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Generate for a batch of inputs [B, ...]; return B lines, without the prompts."""
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        apart = bool(getattr(self._model.config, "is_encoder_decoder", False))
        self._check_room(max(length, self._room) if apart else length + self._room)
        moved = {name: self._move(value) for name, value in inputs.items()}
        try:
            ids = self._model.generate(**moved)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{self._folder}: the device's memory is full; take a smaller batch"
            ) from error
        answers = ids if apart else ids[:, length:]
        return [one_line(t) for t in self._tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _move(self, value: Tensor) -> Tensor:
        dtype = self._model.dtype if value.is_floating_point() else value.dtype
        return value.to(self._device, dtype)

    def _check_room(self, needed: int) -> None:
        config = self._model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)  # none where they are relative
        if isinstance(positions, int) and needed > positions:
            raise InputError(
                f"{self._folder}: prompt and answer need {needed} positions, the model has {positions}; "
                "take a model of a longer context or fewer new tokens"
            )


def one_line(text: str) -> str:
    """The text on one line, runs of white space as one space, without control characters and thoughts."""
    return " ".join(_CONTROL.sub(" ", text.rpartition(_THOUGHTS_END)[2]).split())


def pick_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N"; InputError or BackendError for another."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {quoted(name)}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device: torch finds {torch.cuda.device_count()} GPUs here, got {quoted(name)}; take cpu or auto"
        )
    return device


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackendError(
            f"describing pictures needs transformers, which is not installed: {install_command('train')}"
        ) from error
    return transformers


def _read_config(folder: str | Path) -> Any:
    if not (Path(folder) / "config.json").is_file():
        raise InputError(
            f"{folder}: expected the folder of a model of the transformers library, with config.json; "
            "a model is never downloaded"
        )
    return _load(_library().AutoConfig, folder, "its config.json")


def _model_class(kinds: Mapping[Any, Any], config: Any, folder: str | Path, wanted: str) -> Any:
    """The class that a model of this configuration has among `kinds`, if its weights are of that class."""
    kind = kinds.get(type(config), None)
    names = getattr(config, "architectures", None) or []
    if kind is None or (names and kind.__name__ not in names):
        actual = f"{names[0]} of type {config.model_type}" if names else f"type {config.model_type}"
        raise InputError(f"{folder}: expected {wanted}, got {actual}")
    return kind


def _load_readers(folder: str | Path, config: Any) -> tuple[Any, Any]:
    """A captioner's tokenizer, and what makes inputs of images."""
    library = _library()
    if config.model_type == "vision-encoder-decoder":
        tokenizer = _load(library.AutoTokenizer, folder, "its tokenizer")
        return tokenizer, _load(library.AutoImageProcessor, folder, "its image processor")
    processor = _load(library.AutoProcessor, folder, "its processor")
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(
            f"{folder}: expected a tokenizer and an image processor, got {type(processor).__name__}"
        )
    _pad_left(processor.tokenizer)
    if getattr(processor, "chat_template", None) is None:
        return processor.tokenizer, processor.image_processor
    return processor.tokenizer, processor


def _load(kind: Any, folder: str | Path, what: str, **options: Any) -> Any:
    """Call from_pretrained on a folder; BackendError where a library is missing, else InputError."""
    try:
        return kind.from_pretrained(str(folder), **_LOCAL, **options)
    except ImportError as error:
        raise BackendError(f"{folder}: {what} needs a library: {_first_line(error)}") from error
    except Exception as error:  # the library and the formats below it raise nearly every kind
        raise InputError(f"{folder}: cannot load {what}: {_first_line(error)}") from error


def _greedy(own: Any, max_new_tokens: int, pad: int | None) -> Any:
    """A model's generation settings, made greedy; its own limits of length and its sampling are dropped."""
    settings = copy.deepcopy(own)
    settings.update(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, max_length=None)
    settings.update(temperature=None, top_p=None, top_k=None, length_penalty=None, early_stopping=False)
    if settings.pad_token_id is None:
        settings.pad_token_id = pad
    return settings


def _pad_left(tokenizer: Any) -> None:
    """Pad before the text, so that an answer follows its prompt; any token does, as it is masked."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _has_start(text: str, tokenizer: Any) -> bool:
    """Whether a chat template already wrote the start token, which must not come twice."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
