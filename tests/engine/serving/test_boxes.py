"""A network that judges the box that each pair brings, over HTTP."""

from __future__ import annotations

import base64
import re
import struct

import numpy as np
import pytest
from starlette.testclient import TestClient

from engine import Prediction, Predictor
from engine.serving import create_app

CAPTION = "Obama speaks"
REMEDY = r"give box=\(x1, y1, x2, y2\), as a face detector finds it"
BOX = [8.0, 6.0, 40.0, 30.0]  # in the photo of 64 x 48
INFER = "/v2/models/pmmd_refine-tiny-fp32/infer"


@pytest.fixture
def predictor(judging):
    """What the clients of this module ask."""
    return judging


@pytest.fixture
def image(jpeg):
    return base64.b64encode(jpeg).decode()


def form(client, jpeg, box):
    files = {"image": ("a.jpg", jpeg), "caption": (None, CAPTION), "box": box}
    return client.post("/v1/predict", files=files)


def tensors(jpeg, box, **more):
    """A request of the protocol for one pair."""
    pair = (("image", base64.b64encode(jpeg).decode()), ("caption", CAPTION))
    inputs = [{"name": name, "shape": [1], "datatype": "BYTES", "data": [value]} for name, value in pair]
    return {"inputs": [*inputs, {"name": "box", "shape": [1, 4], "datatype": "FP32", "data": box, **more}]}


def test_a_form_and_json_bring_a_box(client, predictor, jpeg, image):
    expected = predictor.predict(jpeg, CAPTION, BOX)
    assert expected.box == pytest.approx(BOX)
    assert expected.box_given == tuple(BOX)
    pair = {"image": image, "caption": CAPTION, "box": [8, 6, 40, 30]}
    for response in (form(client, jpeg, (None, "8, 6,40,30")), client.post("/v1/predict", json=pair)):
        assert Prediction.from_dict(response.json()) == expected


def test_each_pair_has_its_own_box(client, jpeg, image):
    boxes = [BOX, None, [0, 0, 64, 48], [0, 0, 65, 48]]
    pairs = [{"image": image, "caption": CAPTION, "box": box} for box in boxes]
    first, missing, whole, outside = client.post("/v1/predict", json={"pairs": pairs}).json()["predictions"]
    assert (first["box"], whole["box"]) == (pytest.approx(BOX), pytest.approx([0, 0, 64, 48]))
    assert missing["error"]["code"] == outside["error"]["code"] == "invalid_input"
    assert re.match(
        rf"box: expected .* got none; {REMEDY}",
        missing["error"]["message"],
    )
    assert re.match(r"box: expected .*x2 <= 64 .* got \[0.0, 0.0, 65.0, 48.0\]", outside["error"]["message"])


NO_BOX = r"box: expected x1,y1,x2,y2 in pixels of the upright image, got "


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1, 2, 3], r"pairs\[1\]\.box: expected at least 4, got 3"),
        ([1, 2, 3, 4, 5], r"pairs\[1\]\.box: expected at most 4, got 5"),
        ([1, 2, "3", 4], r"pairs\[1\]\.box\[2\]: expected a number, got '3'"),
        ([1, 2, True, 4], r"pairs\[1\]\.box\[2\]: expected a number, got true"),
        ("1,2,3,4", r"pairs\[1\]\.box: expected a list, got '1,2,3,4'"),
        ({"x1": 1}, r"pairs\[1\]\.box: expected a list, got an object"),
    ],
)
def test_what_is_no_box_in_json(client, box, message):
    response = client.post("/v1/predict", json={"pairs": [{}, {"box": box}]})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert re.fullmatch(message, response.json()["message"])


@pytest.mark.parametrize("number", ["1e999", "1" + 400 * "0"])
def test_numbers_beyond_all_pixels(client, jpeg, image, number):
    body = f'{{"image": "{image}", "caption": "a", "box": [1, 2, {number}, 4]}}'
    response = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422 and "box" in response.json()["message"]
    assert client.post(INFER, json=tensors(jpeg, [1, 2, 10**600, 4])).status_code == 422


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((None, "8,x"), f"{NO_BOX}'8,x'"),
        ((None, "8,6,40"), f"{NO_BOX}'8,6,40'"),
        ((None, "-8,6,40,30"), r"box: expected .* got \[-8.0, 6.0, 40.0, 30.0\]; clip it to the image"),
        ((None, "8,6,nan,30"), r"box: expected .* four finite numbers, got \[8.0, 6.0, nan, 30.0\]"),
        ((None, ""), rf"box: expected .* got none; {REMEDY}"),
    ],
)
def test_what_is_no_box_in_a_form(client, jpeg, box, message):
    response = form(client, jpeg, box)
    assert response.status_code == 422
    assert re.fullmatch(message, response.json()["message"]), response.json()["message"]


def test_a_file_is_no_box(client):
    response = client.post("/v1/predict", files={"box": ("box.txt", b"8,6,40,30")})
    assert response.json()["message"] == f"{NO_BOX}a file"


def test_the_protocol_has_boxes(client, predictor, jpeg):
    expected = predictor.predict(jpeg, CAPTION, BOX)
    described = client.get(INFER.removesuffix("/infer")).json()["inputs"]
    assert described[-1] == {"name": "box", "datatype": "FP32", "shape": [-1, 4]}
    for box in (BOX, [BOX]):
        outputs = client.post(INFER, json=tensors(jpeg, box)).json()["outputs"]
        assert Prediction.from_json(outputs[-1]["data"][0]) == expected
    head = tensors(jpeg, None, parameters={"binary_data_size": 16})
    text = client.build_request("POST", INFER, json=head).content
    headers = {"Inference-Header-Content-Length": str(len(text))}
    response = client.post(INFER, content=text + np.array(BOX, "<f4").tobytes(), headers=headers)
    assert Prediction.from_json(response.json()["outputs"][-1]["data"][0]) == expected
    wrong = client.post(INFER, content=text + np.array([1, -np.inf, 3, 4], "<f4").tobytes(), headers=headers)
    assert "four finite numbers, got [1.0, -inf, 3.0, 4.0]" in wrong.json()["error"]


@pytest.mark.parametrize(
    ("box", "more", "message"),
    [
        ([1, 2, 3], {}, "box: expected 4 numbers a pair, got 3"),
        ([1, 2, 3, "4"], {}, "box: expected numbers as data, got '4'"),
        (BOX, {"shape": [4]}, r"box: expected the shape \[1, 4\], .*"),
        (BOX, {"datatype": "BYTES"}, "box: expected the datatype FP32, got 'BYTES'"),
        (BOX * 2, {"shape": [2, 4]}, "inputs: expected .* of equal lengths, got .* box of 2"),
        (None, {"parameters": {"binary_data_size": 3}}, "box: expected binary data of 4 bytes .*, got 3"),
        ([0, 0, 99, 9], {}, "pair 0: box: expected .*x2 <= 64 .*"),
    ],
)
def test_wrong_boxes_of_the_protocol(client, jpeg, box, more, message):
    request = client.build_request("POST", INFER, json=tensors(jpeg, box, **more))
    headers = {"Inference-Header-Content-Length": str(len(request.content))}
    response = client.post(INFER, content=request.content + struct.pack("<3b", 1, 2, 3), headers=headers)
    assert response.status_code == 422
    assert re.fullmatch(f"[a-z_]+: {message}", response.json()["error"]), response.json()["error"]


def test_the_page_asks_for_a_box_where_one_is_judged(client):
    text = client.get("/").text
    assert text.count('id="box"') == 1
    assert "This network needs an image. Without a caption only a part is answered." in text


def test_another_network_refuses_a_box(bundle_dir, jpeg, image):
    with Predictor(bundle_dir, threads=1) as other, TestClient(create_app(other)) as client:
        while not client.app.state.service.ready:
            pass
        message = "box: expected none, for this network finds the box itself; leave it out"
        pair = {"image": image, "caption": CAPTION, "box": BOX}
        assert client.post("/v1/predict", json=pair).json()["message"] == message
        assert form(client, jpeg, (None, "8,6,40,30")).json()["message"] == message
        assert 'id="box"' not in (text := client.get("/").text)
        assert "Without an image or without a caption only a part is answered." in text
        inputs = client.get("/v2/models/asap-tiny-fp32").json()["inputs"]
        assert [each["name"] for each in inputs] == ["image", "caption"]
