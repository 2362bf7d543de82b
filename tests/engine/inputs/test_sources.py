"""File objects, tensors, base64, deep modes, switches that other modules set: what else users bring."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from engine.errors import InputError
from engine.inputs.preprocess import ImageOptions, decode_image


def pixels_of(source) -> np.ndarray:
    return np.asarray(decode_image(source).rgb)


def codes(source) -> list[str]:
    return [warning.partition(":")[0] for warning in decode_image(source).warnings]


# File objects


class Upload:
    """A file of a web framework that reads little by little."""

    name = "photo of a user.png"

    def __init__(self, data, step=1000):
        self.data, self.step = io.BytesIO(data), step

    def read(self, size=-1):
        return self.data.read(min(size, self.step))


def test_file_objects_are_read(photo, encode, tmp_path):
    data = encode(photo, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with path.open("rb") as buffered, path.open("rb", buffering=0) as raw:
        for file in (io.BytesIO(data), buffered, raw, Upload(data)):
            assert np.array_equal(pixels_of(file), np.asarray(photo))


def open_as_text(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    return (tmp_path / "a.png").open(errors="ignore")


def at(position):
    def make(data, tmp_path):
        file = io.BytesIO(data)
        file.seek(position if position >= 0 else len(data))
        return file

    return make


def closed(data, tmp_path):
    file = io.BytesIO(data)
    file.close()
    return file


class Async:
    async def read(self, size=-1):
        return b""


class Answering:
    def __init__(self, answer):
        self.answer = answer

    def read(self, size=-1):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (open_as_text, "the file is open as text; open it with mode 'rb'"),
        (closed, "the file is closed; pass it while it is open"),
        (at(-1), r"the file stands at its end, byte \d+; call seek\(0\) before"),
        (at(20), r"not an image .*; reading began at byte 20 of the file, call seek\(0\) before"),
        (lambda data, _: Async(), r"read\(\) is asynchronous; pass `await file.read\(\)` or file.file"),
        (lambda data, _: Answering("text"), "the file is open as text"),
        (lambda data, _: Answering(None), r"expected bytes of the file's read\(\), got NoneType"),
        (lambda data, _: Answering(KeyError("gone")), "reading the file failed: 'gone'"),
        (lambda data, _: io.BytesIO(), "the file is empty"),
        (lambda data, _: Upload(b"x" * 5000), "'photo of a user.png': not an image of a supported"),
    ],
)
def test_a_file_object_that_cannot_be_read_says_why(photo, encode, tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        decode_image(make(encode(photo, "PNG"), tmp_path))


def test_an_endless_file_stops_at_the_limit():
    with pytest.raises(InputError, match="expected at most 5000 bytes, got 5001"):
        decode_image(Upload(b"x" * 10**6), options=ImageOptions(max_bytes=5000))


# Tensors


def test_tensors_are_arrays_with_the_channels_first_or_last(photo):
    values = np.asarray(photo)
    last = torch.from_numpy(values.copy())
    first = last.permute(2, 0, 1)
    for tensor in (last, first, first / 255, (first / 255).double(), (first / 255).requires_grad_()):
        assert np.array_equal(pixels_of(tensor), values)
    grey = torch.from_numpy(np.array(photo.convert("L")))
    for tensor in (grey, grey[None], grey[..., None]):
        assert np.array_equal(pixels_of(tensor)[..., 0], grey.numpy())
    assert np.abs(pixels_of((first / 255).bfloat16()).astype(int) - values).max() <= 2


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 3, 64, 64), "pass the images of a batch one by one"),
        (torch.zeros(3, 64, 64) - 1, "floats in .* before its normalisation"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "uint8 or of floats"),
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (torch.zeros(3, 8, 3), "reads as height x width x channels and as channels first"),
        (torch.zeros(3, 64, 64, device="meta"), "the tensor has no values"),
        (torch.zeros(3, 64, 64).to_sparse(), "the tensor has no values"),
    ],
)
def test_tensors_that_are_no_image_are_refused(tensor, message):
    with pytest.raises(InputError, match=message):
        decode_image(tensor)


# An image in base64


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("given", ["url", "bare", "bytes", "in a folder", "wrapped"])
def test_base64_is_told_in_a_short_line(photo, encode, kind, given):
    text = base64.b64encode(encode(photo.resize((200, 200)), kind)).decode()
    url = f"data:image/{kind.lower()};base64,{text}"
    source = {
        "url": url,
        "bare": text,
        "bytes": url.encode(),
        "in a folder": f"/srv/lists/{url}",
        "wrapped": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    }[given]
    with pytest.raises(InputError, match=r"an image in base64; pass its bytes, base64.b64decode\(") as caught:
        decode_image(source, name="item 5")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("source", ["x" * 60_000, "a/" * 30_000, "https://example.org/" + "a" * 60_000])
def test_no_message_repeats_a_long_source(source):
    with pytest.raises(InputError) as caught:
        decode_image(source, name="item 5")
    assert len(str(caught.value)) < 300


def test_a_missing_file_of_a_base64_like_name_is_missing():
    with pytest.raises(InputError, match="no such file"):
        decode_image("Qk" + "a" * 40 + ".png")


# Depth


def png(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel; `colour` is PNG's colour type."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture(scope="module")
def shallow():
    """Values of 8 bits, [40, 50, 3]."""
    return np.random.default_rng(1).integers(0, 159, (40, 50, 3), dtype=np.uint16)


def test_eight_bits_in_a_deep_grey_image_are_read_with_a_warning(shallow, encode):
    grey = shallow[..., 0]
    for source in (
        encode(Image.fromarray(grey), "PNG"),
        Image.fromarray(grey),
        Image.fromarray(grey.astype(np.int32)),
        Image.fromarray(grey.astype(np.float32)),
    ):
        assert np.array_equal(pixels_of(source)[..., 0], grey)
    assert decode_image(encode(Image.fromarray(grey), "PNG")).warnings == (
        "depth_guessed: pixels up to 158 in a deep image were read on a scale of 0 to 255",
    )


def test_eight_bits_in_a_deep_colour_image_are_read_with_a_warning(shallow):
    opaque = np.dstack([shallow, np.full(shallow.shape[:2], 255, np.uint16)])
    for source in (png(shallow, 2), png(opaque, 6)):
        assert np.array_equal(pixels_of(source), shallow)
        assert codes(source) == ["depth_guessed"]


def test_deep_images_that_use_their_depth_are_read_without_a_word(shallow, encode):
    deep = shallow * 400
    opaque = np.dstack([deep, np.full(shallow.shape[:2], 65535, np.uint16)])
    for source in (
        png(deep, 2),
        png(opaque, 6),
        png(deep[..., :1], 0),
        encode(Image.fromarray(deep[..., 0]), "PNG"),
    ):
        assert np.array_equal(pixels_of(source)[..., 0], deep[..., 0] >> 8)
        assert codes(source) == []


def test_a_scan_of_twelve_bits_is_told_to_be_dark(shallow):
    assert codes(png(shallow[..., :1] * 25, 0)) == ["depth_guessed"]


def test_floats_on_either_scale_are_told_where_both_would_do(shallow):
    unit = (shallow[..., 0] / 255).astype(np.float32)
    assert codes(Image.fromarray(unit)) == ["depth_guessed"]
    assert codes(Image.fromarray(unit * 255)) == []


# What turns or empties an image


@pytest.mark.parametrize("given", ["file", "image", "turned by hand"])
def test_an_image_that_exif_turns_says_so(photo, encode, given):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo, "PNG", exif=exif.tobytes())
    image = Image.open(io.BytesIO(data))
    if given == "turned by hand":
        turned = image.transpose(Image.Transpose.ROTATE_270)
        turned.info["exif"] = image.info["exif"]
        image = turned
    decoded = decode_image(data if given == "file" else image)
    assert decoded.warnings == ("exif_turned: turned upright by its EXIF orientation 6",)
    assert decode_image(image, options=ImageOptions(apply_orientation=False)).warnings == ()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (2, 2), "red"), ["tiny_image"]),
        (Image.new("RGB", (31, 5000), "red"), ["tiny_image"]),
        (Image.new("RGB", (32, 32), "red"), ["blank_image"]),
        (Image.new("L", (3000, 2000), 7), ["blank_image"]),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), ["blank_image"]),
    ],
)
def test_an_image_that_carries_nothing_says_so(image, expected):
    assert codes(image) == expected


def test_one_pixel_of_another_colour_is_not_blank():
    image = Image.new("RGB", (3000, 2000))
    image.putpixel((1717, 999), (0, 0, 1))
    assert codes(image) == []


# Switches that other modules set


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_refused_whatever_others_allow(lenient, photo, encode, kind):
    data = encode(photo.resize((400, 300)), kind)
    cut = data[: len(data) // 3]
    for source in (cut, io.BytesIO(cut), Image.open(io.BytesIO(cut))):
        with pytest.raises(InputError, match="truncated|cannot be read"):
            decode_image(source)
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "others keep their switch"
    Image.open(io.BytesIO(cut)).load()


def test_threads_of_others_keep_their_switch_meanwhile(lenient, photo, encode):
    data = encode(photo.resize((800, 600)), "JPEG", quality=95)
    cut = data[: len(data) // 3]

    def ours(_):
        with pytest.raises(InputError):
            decode_image(cut)

    def theirs(_):
        Image.open(io.BytesIO(cut)).load()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: (ours if i % 2 else theirs)(i), range(80)))


def test_the_limit_of_pixels_is_ours_where_pillow_has_none(monkeypatch, photo, encode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match="expected at most 3000 pixels"):
        decode_image(encode(photo, "PNG"), options=ImageOptions(max_pixels=3000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"lets Pillow read \(PIL.Image.MAX_IMAGE_PIXELS is 1000\)"):
        decode_image(encode(photo, "PNG"))


def test_a_warning_that_is_an_error_does_not_escape(photo, encode):
    broken = encode(
        photo, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f\xff\xff\xff\x7f"
    )
    for filtered in ("ignore", "error"):
        with warnings.catch_warnings():
            warnings.simplefilter(filtered)
            assert np.array_equal(pixels_of(broken), np.asarray(photo))
