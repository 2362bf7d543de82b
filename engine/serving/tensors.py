"""Tensors of the Open Inference Protocol, in JSON or as binary data behind it.

The binary form is Triton Inference Server's extension of the protocol, which `tritonclient` sends by default.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter

from engine.prediction import Prediction
from engine.registry.config import TYPES
from engine.serving.problems import Refused
from engine.serving.schemas import IN_BASE64, checked, shown

HEADER = "inference-header-content-length"  # bytes of JSON before the binary data
INPUTS = {"image": "BYTES", "caption": "BYTES", "box": "FP32"}
_CORNERS = 4  # numbers of a box
NOTHING = -1.0  # where the network did not answer: JSON has no NaN, and no score and no pixel is below 0
# Datatype and the shape behind the number of pairs.
OUTPUTS: dict[str, tuple[str, list[int]]] = {
    "score": ("FP32", []),
    "types": ("FP32", [len(TYPES)]),
    "box": ("FP32", [4]),
    "prediction": ("BYTES", []),
}
_LENGTH = struct.Struct("<I")  # before each element of a BYTES tensor

Parameters = dict[str, Any]


class InferInput(BaseModel):
    """A tensor of a request: its values in `data`, or binary data of `parameters.binary_data_size` bytes."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: list[Any] | None = None


class InferOutput(BaseModel):
    """An output that a request asks for; without any it gets all of them."""

    name: str
    parameters: Parameters = {}


class InferRequest(BaseModel):
    """A request of the protocol: the tensors `image` and `caption`, BYTES of shape [n], or one of them.

    For a network that judges a given box also `box`, FP32 of shape [n, 4].
    """

    id: str = ""
    parameters: Parameters = {}
    inputs: list[InferInput]
    outputs: list[InferOutput] = []


class OutputTensor(BaseModel):
    """A tensor of a response."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: list[Any] | None = None


class InferResponse(BaseModel):
    """A response of the protocol; -1 is what the network did not answer."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor]


_REQUEST = TypeAdapter(InferRequest)


def read_infer(body: bytes, header: str | None) -> tuple[InferRequest, dict[str, list[Any]]]:
    """Read a request, with the elements of its tensors by name; raises Refused."""
    length = len(body)
    if header is not None:
        if not header.isdecimal() or int(header) > length:
            raise Refused(400, "bad_request", f"{HEADER}: expected at most {length}, the bytes of the body")
        length = int(header)
    request: InferRequest = checked(_REQUEST, body[:length])
    elements: dict[str, list[Any]] = {}
    rest = memoryview(body)[length:]
    for tensor in request.inputs:
        _check(tensor, elements)
        size = tensor.parameters.get("binary_data_size")
        boxes = tensor.name == "box"
        if size is None:
            elements[tensor.name] = _boxes_of_json(tensor) if boxes else list(_from_json(tensor))
        elif not isinstance(size, int) or not 0 <= size <= len(rest):
            raise _wrong(tensor.name, f"binary_data_size of at most {len(rest)}, the bytes that follow", size)
        else:
            read = _boxes_of_binary if boxes else _from_binary
            elements[tensor.name], rest = read(tensor.name, rest[:size]), rest[size:]
        count = len(elements[tensor.name])
        shapes = ([count, _CORNERS],) if boxes else ([count], [count, 1])
        if tensor.shape not in shapes:
            raise _wrong(tensor.name, f"the shape {shapes[0]}, as many as its elements", tensor.shape)
    if len({len(found) for found in elements.values()}) != 1:
        got = ", ".join(f"{name} of {len(found)}" for name, found in elements.items()) or "none"
        text = f"inputs: expected image, caption and box, or some of them, of equal lengths, got {got}"
        raise Refused(422, "invalid_request", text)
    if not all(elements.values()):
        raise Refused(422, "invalid_request", "inputs: expected at least one pair, got none")
    for caption in elements.get("caption", ()):
        check_text("caption", caption)
    return request, elements


def _check(tensor: InferInput, known: dict[str, list[Any]]) -> None:
    if tensor.name not in INPUTS or tensor.name in known:
        raise _wrong("inputs", "image, caption and box, each once", tensor.name)
    if tensor.datatype != INPUTS[tensor.name]:
        raise _wrong(tensor.name, f"the datatype {INPUTS[tensor.name]}", tensor.datatype)


def _from_json(tensor: InferInput) -> Iterator[bytes]:
    """Elements of JSON: captions as they are, images in base64; a row of one element may be a list."""
    for value in tensor.data or []:
        if isinstance(value, list) and len(value) == 1:
            (value,) = value
        if not isinstance(value, str):
            raise _wrong(tensor.name, "strings as data", value)
        if tensor.name == "caption":
            yield value.encode()
            continue
        try:
            yield base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise _wrong(tensor.name, IN_BASE64, value) from None


def _from_binary(name: str, data: memoryview) -> list[bytes]:
    """Elements of binary data: of each its length as 4 bytes, little-endian, and its bytes."""
    elements, position = [], 0
    while position < len(data):
        start = position + _LENGTH.size
        end = start + _LENGTH.unpack(data[position:start])[0] if start <= len(data) else start
        if end > len(data):
            raise _wrong(name, "elements that fill its binary data", f"one that ends at byte {end}")
        elements.append(bytes(data[start:end]))
        position = end
    return elements


def _boxes_of_json(tensor: InferInput) -> list[list[float]]:
    """Four numbers a pair, in rows or one after the other."""
    rows = tensor.data or []
    numbers = [x for row in rows for x in (row if isinstance(row, list) else [row])]
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(tensor.name, "numbers as data", value)
    return _boxes(tensor.name, numbers)


def _boxes_of_binary(name: str, data: memoryview) -> list[list[float]]:
    if len(data) % 4:
        raise _wrong(name, "binary data of 4 bytes a number", len(data))
    return _boxes(name, np.frombuffer(data, "<f4").tolist())


def _boxes(name: str, numbers: list[float]) -> list[list[float]]:
    if len(numbers) % _CORNERS:
        raise _wrong(name, f"{_CORNERS} numbers a pair", len(numbers))
    return [numbers[i : i + _CORNERS] for i in range(0, len(numbers), _CORNERS)]


def write_infer(
    request: InferRequest, name: str, version: str, predictions: Sequence[Prediction]
) -> tuple[bytes, dict[str, str]]:
    """The response's body and its headers; outputs are binary where the request asks for that."""
    asked = request.outputs or [InferOutput(name=output) for output in OUTPUTS]
    everything = bool(request.parameters.get("binary_data_output", False))
    outputs, blobs = [], []
    for output in asked:
        if output.name not in OUTPUTS:
            raise _wrong("outputs", f"some of {', '.join(OUTPUTS)}", output.name)
        datatype, inner = OUTPUTS[output.name]
        shape = [len(predictions), *inner]
        tensor: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": shape}
        values = [_value(output.name, prediction) for prediction in predictions]
        if output.parameters.get("binary_data", everything):
            blobs.append(_to_binary(datatype, values))
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = [x for value in values for x in (value if isinstance(value, list) else [value])]
        outputs.append(tensor)
    head = {"model_name": name, "model_version": version, "id": request.id, "outputs": outputs}
    text = json.dumps(head, allow_nan=False).encode()
    if not blobs:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER: str(len(text))}
    return b"".join([text, *blobs]), headers


def _value(name: str, prediction: Prediction) -> Any:
    """An output of one pair, a number or a list of them; a string for `prediction`."""
    if name == "score":
        return _number(prediction.score)
    if name == "types":
        return [_number(prediction.types[kind]) for kind in TYPES]
    if name == "box":
        return list(prediction.box or [NOTHING] * 4)
    return prediction.to_json(heatmap=False)


def _number(value: float | None) -> float:
    return NOTHING if value is None else value


def _to_binary(datatype: str, values: list[Any]) -> bytes:
    if datatype == "FP32":
        return np.array(values, dtype="<f4").tobytes()
    encoded = [value.encode() for value in values]
    return b"".join(part for value in encoded for part in (_LENGTH.pack(len(value)), value))


def _wrong(place: str, expected: str, got: object) -> Refused:
    return Refused(422, "invalid_request", f"{place}: expected {expected}, got {shown(got)}")


def check_text(place: str, data: bytes | bytearray) -> None:
    """Raise Refused for bytes that are no UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        text = f"{place}: expected a text in UTF-8, got the byte 0x{data[error.start]:02x} at {error.start}"
        raise Refused(422, "invalid_request", text) from None
