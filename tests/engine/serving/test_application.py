"""The routes: what they answer, what they refuse, and what they count."""

from __future__ import annotations

import base64
import json
import logging
import re
import struct
import time

import pytest
from starlette.testclient import TestClient

from engine import Prediction
from engine.errors import BackendError, DeadlineError, InputError, OverloadedError
from engine.serving import Settings, create_app
from engine.serving.schemas import PredictionResponse

CAPTION = "Obama speaks in person"


def await_ready(service):
    for _ in range(500):
        if service.ready:
            return
        time.sleep(0.02)


def form(client, image=None, caption=None, **options):
    """Post a form with a file and a caption."""
    data = {} if caption is None else {"caption": caption}
    # A form without a file would be sent as text.
    files = {"caption": (None, caption)} if image is None else {"image": ("secret-name.jpg", image)}
    return client.post("/v1/predict", files=files, data={} if image is None else data, **options)


def encoded(data):
    return base64.b64encode(data).decode()


def problem(response, status, code):
    """The message of a refusal, which must be this one."""
    data = response.json()
    assert (response.status_code, data["code"]) == (status, code), data
    assert response.headers["content-type"] == "application/problem+json"
    assert data["request_id"] == response.headers["x-request-id"]
    return data["message"]


def test_a_form_and_json_are_answered_as_the_predictor_does(client, predictor, jpeg):
    expected = predictor.predict(jpeg, CAPTION)
    for response in (
        form(client, jpeg, CAPTION),
        client.post("/v1/predict", json={"image": encoded(jpeg), "caption": CAPTION}),
    ):
        assert response.status_code == 200
        assert Prediction.from_dict(response.json()) == expected
        assert "heatmap" not in response.json() and "card" not in response.json()


def test_the_schema_has_the_fields_of_a_prediction(client, jpeg):
    data = form(client, jpeg, CAPTION, params={"heatmap": True, "card": True}).json()
    assert data.keys() == PredictionResponse.model_fields.keys()
    assert len(data["heatmap"]) == 16 and data["card"].count("<img") >= 1


@pytest.mark.parametrize(("image", "caption"), [(True, None), (False, CAPTION), (False, ""), (True, "")])
def test_half_a_pair(client, predictor, jpeg, image, caption):
    given = jpeg if image else None
    expected = predictor.predict(given, caption)
    data = {"image": encoded(jpeg) if image else None, "caption": caption}
    for response in (form(client, given, caption), client.post("/v1/predict", json=data)):
        assert Prediction.from_dict(response.json()) == expected


def test_a_file_that_nobody_chose_is_no_image(client):
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename=""\r\n\r\n\r\n'
    text = b'--b\r\nContent-Disposition: form-data; name="caption"\r\n\r\nObama\r\n--b--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post("/v1/predict", content=file + text, headers=headers).json()
    assert answer["warnings"][0].startswith("no_image") and answer["caption"] == "Obama"


def test_many_pairs_keep_their_order_and_fail_alone(client, predictor, jpeg):
    captions = ["Obama", "the president speaks", "poison", None]
    pairs = [{"image": encoded(jpeg), "caption": caption} for caption in captions]
    pairs.insert(1, {"image": encoded(b"no image"), "caption": "broken"})
    pairs.append({})
    answers = client.post("/v1/predict", json={"pairs": pairs}).json()["predictions"]
    codes = [answer.get("error", {}).get("code") for answer in answers]
    assert codes == [None, "invalid_input", None, "no_finite_score", None, "invalid_input"]
    assert Prediction.from_dict(answers[2]) == predictor.predict(jpeg, "the president speaks")
    assert 'dgm4_errors_total{code="invalid_input"} 2.0' in client.get("/metrics").text


# Parts of a form, neither of which is followed by the last boundary.
A_CAPTION = b'--b\r\nContent-Disposition: form-data; name="caption"\r\n\r\nObama\r\n'
AN_IMAGE = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n\xff\xd8'
BROKEN = [
    ({"content": b"{"}, "application/json", 400, "bad_request"),
    ({"content": b"[" * 100_000}, "application/json", 400, "bad_request"),
    ({"content": b'{"caption": "\xff"}'}, "application/json", 400, "bad_request"),
    ({"content": b'{"caption": "\\ud800"}'}, "application/json", 400, "bad_request"),
    ({"content": b"[]"}, "application/json", 422, "invalid_request"),
    ({"content": b"null"}, "application/json", 422, "invalid_request"),
    ({"content": b'{"caption": 1}'}, "application/json", 422, "invalid_request"),
    ({"content": b'{"captions": "x"}'}, "application/json", 422, "invalid_request"),
    ({"content": b'{"image": "http://127.0.0.1/a.jpg"}'}, "application/json", 422, "invalid_request"),
    ({"content": b'{"image": "/etc/host"}'}, "application/json", 422, "invalid_request"),
    ({"content": b'{"pairs": {}}'}, "application/json", 422, "invalid_request"),
    ({"content": b'{"pairs": [], "caption": "x"}'}, "application/json", 422, "invalid_request"),
    ({"content": b"{}"}, "application/json", 422, "invalid_input"),
    ({"content": b"x"}, "text/plain", 415, "unsupported_media_type"),
    ({"content": b"x"}, "", 415, "unsupported_media_type"),
    ({"content": b"caption=x"}, "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    ({"content": b"x"}, "multipart/form-data", 400, "bad_request"),
    ({"content": b"x"}, "multipart/form-data; boundary=a", 400, "bad_request"),
    ({"content": b"--a\r\n\r\n\r\n--a--"}, "multipart/form-data; boundary=a", 400, "bad_request"),
    ({"content": b""}, "multipart/form-data; boundary=a", 400, "bad_request"),
    ({"content": A_CAPTION + AN_IMAGE}, "multipart/form-data; boundary=b", 400, "bad_request"),
    ({"content": AN_IMAGE + A_CAPTION}, "multipart/form-data; boundary=b", 400, "bad_request"),
]


@pytest.mark.parametrize(("body", "kind", "status", "code"), BROKEN, ids=range(len(BROKEN)))
def test_a_clients_faults_are_4xx(client, body, kind, status, code):
    problem(client.post("/v1/predict", headers={"content-type": kind}, **body), status, code)


IN_BASE64 = r"an image file in base64 \(addresses and paths are not read\)"
MESSAGES = [
    ("[]", 422, "the body: expected an object, got a list"),
    ("null", 422, "the body: expected an object, got null"),
    ("{}", 422, "the pair: expected an image or a caption, got neither"),
    ('{"caption": 1}', 422, "caption: expected a string, got 1"),
    ('{"captions": "x"}', 422, "captions: expected no field of this name"),
    ('{"image": "http://a/b.jpg"}', 422, f"image: expected {IN_BASE64}, got 'http://a/b.jpg'"),
    ('{"image": 3}', 422, f"image: expected {IN_BASE64}, got 3"),
    ('{"pairs": {}}', 422, "pairs: expected a list, got an object"),
    ('{"pairs": []}', 422, "pairs: expected at least 1, got none"),
    ('{"pairs": [{"caption": "a"}, 3]}', 422, r"pairs\[1\]: expected an object, got 3"),
    ('{"pairs": [{"image": "!!"}]}', 422, rf"pairs\[0\]\.image: expected {IN_BASE64}, got '!!'"),
    ('{"caption": "a", "caption": "b"}', 400, "the body: expected JSON: an object names a field twice"),
    ('{"pairs": [{"caption": NaN}]}', 400, "the body: expected JSON: NaN is not a JSON number"),
    ('{"caption": "' + r"\ud800" + '"}', 400, "the body: expected JSON in UTF-8: .*"),
]


@pytest.mark.parametrize(("body", "status", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_a_fault_is_one_line_with_its_field(client, body, status, message):
    response = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    text = problem(response, status, response.json()["code"])
    assert re.fullmatch(message, response.json()["message"]), text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/predict?heat=1", "query: expected one of heatmap, card, got 'heat'"),
        ("/v1/predict?card=1&card=0", "query: expected each option once, got one of them twice"),
        ("/v1/predict?card=perhaps", "query.card: expected true or false, got 'perhaps'"),
    ],
)
def test_options_in_the_address_are_known_and_given_once(client, path, message):
    response = client.post(path, json={"caption": "a"})
    problem(response, 422, "invalid_request")
    assert response.json()["message"] == message


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ((None, b"caf\xe9"), "caption: expected a text in UTF-8, got the byte 0xe9 at 3"),
        (("caption.txt", b"caf\xe9"), "caption: expected a text in UTF-8, got the byte 0xe9 at 3"),
        (
            (None, b"caf\xe9", "text/plain; charset=latin-1"),
            "caption: expected a text in UTF-8, got the charset 'latin-1'",
        ),
        ((None, "caf\u00e9".encode(), "text/plain; charset=UTF-8"), None),
        ((None, "caf\u00e9".encode()), None),
        (("caption.txt", "caf\u00e9".encode()), None),
    ],
)
def test_a_caption_of_a_form_is_utf_8(client, caption, message):
    response = client.post("/v1/predict", files={"caption": caption})
    if message is None:
        assert response.json()["caption"] == "caf\u00e9"
    else:
        problem(response, 422, "invalid_request")
        assert response.json()["message"] == message


def test_a_charset_of_the_whole_form_is_utf_8_too(client):
    body = A_CAPTION.replace(b"Obama", b"caf\xe9") + b"--b--\r\n"
    kind = "multipart/form-data; boundary=b; charset=latin-1"
    response = client.post("/v1/predict", content=body, headers={"content-type": kind})
    problem(response, 422, "invalid_request")
    assert "expected a text in UTF-8, got the charset 'iso8859-1'" in response.json()["message"]


def test_refusals_and_assets_are_counted_under_their_route(open_client, monkeypatch):
    client = open_client(token=TOKEN, max_body=1000)
    client.headers["authorization"] = f"Bearer {TOKEN}"
    client.get("/static/try.js")
    client.get("/static/nothing.js")
    client.post("/v1/predict", content=b"x" * 2000)
    client.post("/v1/predict", headers={"content-encoding": "gzip"}, content=b"x")
    client.get("/v1/predict", headers={"authorization": ""})
    client.get("/v2/models/other", headers={"authorization": ""})
    client.get("/nowhere", headers={"authorization": ""})
    counted = {
        (sample.labels["route"], sample.labels["status"])
        for metric in client.app.state.service.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "dgm4_requests_total"
    }
    assert counted == {
        ("/static", "200"),
        ("/static", "404"),
        ("/v1/predict", "413"),
        ("/v1/predict", "415"),
        ("/v1/predict", "401"),
        ("/v2/models/{name}", "401"),
        ("unmatched", "401"),
    }


def test_a_batch_above_the_bundles_is_refused_at_once(predictor):
    most = predictor.manifest.limits.max_batch
    with pytest.raises(InputError, match=f"max_batch: expected at most {most}, the bundle's limit, got"):
        create_app(predictor, Settings(max_batch=most + 1))


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({"image": (None, "a text")}, 422),
        ({"picture": ("a.jpg", b"x")}, 422),
        ([("caption", (None, "a")), ("caption", (None, "b"))], 422),
        ([("image", ("a", b"a")), ("image", ("b", b"b"))], 400),
        ({"image": ("a.jpg", b"x")}, 422),
        ({"caption": (None, "x" * 2_000_000)}, 400),
    ],
)
def test_wrong_forms(client, files, status):
    assert client.post("/v1/predict", files=files).status_code == status


def test_paths_and_methods(client):
    problem(client.get("/nowhere"), 404, "not_found")
    problem(client.get("/static/..%2f__init__.py"), 404, "not_found")
    response = client.get("/v1/predict")
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    problem(client.post("/v1/predict", params={"heatmap": "perhaps"}), 422, "invalid_request")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("full"), 503, "overloaded"),
        (DeadlineError("late"), 504, "deadline_exceeded"),
        (InputError("wrong"), 422, "invalid_input"),
        (BackendError("/secret/place is gone"), 500, "internal"),
        (ZeroDivisionError("the secret caption"), 500, "internal"),
        (MemoryError(), 500, "internal"),
    ],
)
def test_errors_have_a_status_and_a_code(client, monkeypatch, caplog, error, status, code):
    def submit(*_, **__):
        raise error

    monkeypatch.setattr(client.app.state.service._batcher, "submit", submit)
    response = form(client, b"x", "x")
    assert "secret" not in problem(response, status, code)
    assert (response.headers.get("retry-after") == "1") == (status == 503)


def test_limits_of_pairs_and_bytes(open_client, jpeg):
    client = open_client(max_pairs=2, max_body=4_000, max_buffered=4_000)
    pairs = {"pairs": [{"caption": "a"}] * 3}
    problem(client.post("/v1/predict", json=pairs), 413, "too_large")
    problem(form(client, b"x" * 5_000), 413, "too_large")
    chunks = (b"x" * 1_000 for _ in range(9))
    kind = {"content-type": "application/json"}
    problem(client.post("/v1/predict", content=chunks, headers=kind), 413, "too_large")
    assert form(client, None, CAPTION).status_code == 200
    assert "dgm4_buffered_bytes 0.0" in client.get("/metrics").text


def test_compressed_bodies_are_refused(client):
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    problem(client.post("/v1/predict", content=b"x", headers=headers), 415, "unsupported_media_type")


def test_other_sites_may_not_send(client):
    response = client.post("/v1/predict", json={}, headers={"sec-fetch-site": "cross-site"})
    problem(response, 403, "cross_site")
    assert "access-control-allow-origin" not in response.headers
    # A browser that does not say where the page is from says its origin.
    for origin in ("http://evil.example", "null"):
        problem(client.post("/v1/predict", json={}, headers={"origin": origin}), 403, "cross_site")
    own = client.post("/v1/predict", json={"caption": "x"}, headers={"origin": str(client.base_url)})
    assert own.status_code == 200


TOKEN = "a-token-of-some-length"
OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
OPEN += ("/static/try.js",)


def test_a_token_is_asked_for_everywhere_but_there(open_client):
    client = open_client(token=TOKEN)
    for path in OPEN:
        assert client.get(path).status_code == 200, path
    shut = client.app.openapi()["paths"].keys() - set(OPEN)
    assert len(shut) >= 6
    for path in shut:
        for given in (None, "", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe9"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            response = client.request("POST" if "predict" in path else "GET", path, headers=headers)
            assert response.status_code == 401, (path, given)
            assert response.headers["www-authenticate"] == "Bearer"
        good = client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"})
        assert good.status_code == 200
    assert TOKEN not in repr(client.app.state.service.settings)


def test_a_client_has_its_share(open_client):
    client = open_client(rate=0.5, burst=2)
    statuses = [client.post("/v1/predict", json={"caption": "a"}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    response = client.post("/v1/predict", json={"caption": "a"})
    problem(response, 429, "rate_limited")
    assert 1 <= int(response.headers["retry-after"]) <= 2
    assert client.get("/healthz").status_code == 200


def test_security_headers(client):
    for path in ("/", "/healthz", "/nowhere", "/static/try.js"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers
    assert "script-src 'self';" in client.get("/").headers["content-security-policy"]


@pytest.mark.parametrize(("body", "most"), [(48, 32), (8, 8)])
def test_the_page_tells_the_largest_image(open_client, body, most):
    """Which a body of the largest size may not be."""
    client = open_client(max_body=body * 2**20, max_buffered=body * 2**20)
    assert f"At most {most} MB." in client.get("/").text


def test_request_ids(client):
    assert client.get("/healthz", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for odd in ("a" * 65, "a b", "<script>", "\xe9"):
        made = client.get("/healthz", headers={"x-request-id": odd.encode("latin-1")}).headers["x-request-id"]
        assert len(made) == 32


def test_metrics(client, jpeg):
    form(client, jpeg, CAPTION)
    lines = client.get("/metrics").text.splitlines()
    assert 'dgm4_requests_total{method="POST",route="/v1/predict",status="200"} 1.0' in lines
    assert "dgm4_batch_pairs_count 1.0" in lines and "dgm4_pending_pairs 0.0" in lines
    stages = {
        line.partition('stage="')[2].partition('"')[0] for line in lines if "dgm4_stage_seconds_count" in line
    }
    assert {"decode", "resize", "tokenize", "inference", "postprocess", "total"} <= stages
    for random in ("BREW", "A" * 50):
        client.request(random, f"/{random}")
    assert "BREW" not in client.get("/metrics").text and "AAAA" not in client.get("/metrics").text


def test_it_is_ready_only_after_the_warm_up_and_not_after_one_that_failed(predictor, monkeypatch):
    def fail(*_):
        raise BackendError("no device")

    monkeypatch.setattr(predictor, "warm_up", fail)
    app = create_app(predictor, Settings())
    with TestClient(app) as client:
        while app.state.service.failure is None:
            pass
        problem(client.get("/readyz"), 503, "not_ready")
        assert client.get("/healthz").status_code == 200
        problem(client.post("/v1/predict", json={"caption": "a"}), 503, "not_ready")
        assert client.get("/v2/health/ready").json() == {"error": "not_ready: the warm-up failed"}


INFER = "/v2/models/asap-tiny-fp32/infer"


def tensor(name, data, **more):
    return {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data, **more}


def test_the_protocol_answers_as_the_predictor_does(client, predictor, jpeg):
    expected = [predictor.predict(jpeg, caption) for caption in ("Obama", CAPTION)]
    body = {
        "id": "7",
        "inputs": [tensor("image", [encoded(jpeg)] * 2), tensor("caption", ["Obama", CAPTION])],
    }
    data = client.post(INFER, json=body).json()
    outputs = {output["name"]: output for output in data["outputs"]}
    assert (data["id"], data["model_name"], outputs["types"]["shape"]) == ("7", "asap-tiny-fp32", [2, 4])
    assert outputs["score"]["data"] == [prediction.score for prediction in expected]
    assert [Prediction.from_json(text) for text in outputs["prediction"]["data"]] == expected
    described = client.get("/v2/models/asap-tiny-fp32").json()
    assert [output["name"] for output in described["outputs"]] == list(outputs)
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/asap-tiny-fp32/ready"):
        assert client.get(path).status_code == 200


def test_binary_tensors_as_triton_clients_send_them(client, predictor, jpeg):
    elements = struct.pack("<I", len(jpeg)) + jpeg
    head = {
        "parameters": {"binary_data_output": True},
        "inputs": [
            {
                "name": "image",
                "shape": [1, 1],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(elements)},
            }
        ],
        "outputs": [{"name": "types"}, {"name": "prediction", "parameters": {"binary_data": False}}],
    }
    text = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    response = client.post(INFER, content=text + elements, headers=headers)
    length = int(response.headers["inference-header-content-length"])
    outputs = json.loads(response.content[:length])["outputs"]
    assert outputs[0]["parameters"] == {"binary_data_size": 16}
    values = struct.unpack("<4f", response.content[length:])
    expected = predictor.predict(jpeg, None)
    assert values[0] == pytest.approx(expected.types["face_swap"])
    assert values[2] == -1  # what was not answered
    assert Prediction.from_json(outputs[1]["data"][0]) == expected


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [tensor("caption", ["a"]), tensor("caption", ["a"])],
        [tensor("other", ["a"])],
        [tensor("caption", ["a"], datatype="FP32")],
        [tensor("caption", ["a"], shape=[2])],
        [tensor("caption", ["a"], shape=[-1])],
        [tensor("caption", [1])],
        [tensor("caption", [["a", "b"]])],
        [tensor("image", ["no base64!"])],
        [tensor("image", [encoded(b"no image")])],
        [tensor("caption", ["a", "b"]), tensor("image", [""])],
        [tensor("caption", [])],
        [tensor("caption", ["a"], parameters={"binary_data_size": 9})],
        [tensor("caption", ["a"], parameters={"binary_data_size": "9"})],
        [tensor("caption", ["a"], parameters={"binary_data_size": -1})],
    ],
)
def test_wrong_tensors(client, inputs):
    response = client.post(INFER, json={"inputs": inputs})
    assert response.status_code == 422 and set(response.json()) == {"error"}
    assert re.fullmatch("[^\n]*: .*expected .*", response.json()["error"]) or "no image" in str(inputs)


@pytest.mark.parametrize(
    ("header", "tail"), [("9999", b""), ("x", b""), ("-1", b""), (None, b"\xff\xff\xff\xff")]
)
def test_wrong_binary_data(client, header, tail):
    inputs = [{"name": "caption", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 4}}]
    text = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)) if header is None else header}
    response = client.post(INFER, content=text + tail, headers=headers)
    assert response.status_code in (400, 422) and "error" in response.json()


def test_another_model_and_another_output(client):
    assert client.get("/v2/models/other").status_code == 404
    body = {"inputs": [tensor("caption", ["a"])], "outputs": [{"name": "logits"}]}
    assert client.post(INFER, json=body).status_code == 422


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "short"},
        {"token": "with a blank in it!"},
        {"name": "a/b"},
        {"max_pairs": 0},
        {"max_pairs": 300},
        {"max_body": 2**40},
        {"timeout_s": -1.0},
        {"rate": 0.0},
        {"max_batch": 1.5},
    ],
)
def test_wrong_settings(wrong):
    with pytest.raises(InputError, match=next(iter(wrong)).removesuffix("_s")[:4]):
        Settings(**wrong)


def test_only_the_log_that_is_trusted_is_repeated():
    from engine.serving.logs import JsonFormatter

    def line(name, message, error=None):
        record = logging.LogRecord(
            name, logging.ERROR, "f.py", 3, message, (), error and (type(error), error, None)
        )
        return json.loads(JsonFormatter().format(record))

    assert line("engine.serving.gate", "request")["message"] == "request"
    hostile = line("asyncio", "exception=InputError('a secret caption')", ValueError("a secret caption"))
    assert "secret" not in json.dumps(hostile) and hostile["error"] == "ValueError"


def test_an_application_starts_again(predictor, jpeg):
    """As a server that reloads does: the Batcher is a new one, the metrics go on."""
    app = create_app(predictor)
    for runs in (1, 2):
        with TestClient(app) as client:
            await_ready(app.state.service)
            assert form(client, jpeg, CAPTION).status_code == 200
            assert f'dgm4_pairs_total{{verdict="manipulated"}} {runs}.0' in client.get("/metrics").text
    assert predictor.predict(jpeg, CAPTION)  # which was given, and is not closed


def test_a_path_is_opened_and_closed(bundle_dir):
    app = create_app(bundle_dir)
    with TestClient(app) as client:
        await_ready(app.state.service)
        assert client.get("/readyz").status_code == 200
    with pytest.raises(BackendError):
        app.state.service.predictor.predict(None, CAPTION)
