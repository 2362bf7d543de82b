"""`POST /v1/predict`: one pair as a form or as JSON, or many as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from fastapi import APIRouter, Depends, Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from engine.inputs.boxes import box_of_text
from engine.inputs.pairs import Caption
from engine.prediction import Prediction
from engine.serving.problems import Refused, problem_of
from engine.serving.schemas import (
    PairsRequest,
    PredictionResponse,
    PredictionsResponse,
    known_options,
    problems,
    read_request,
    shown,
)
from engine.serving.service import Answer, Given, Service
from engine.serving.tensors import check_text

router = APIRouter()

_FIELDS = {"image", "caption", "box"}
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"ascii")
_PAIR, _PAIRS = ({"$ref": f"#/components/schemas/{name}"} for name in ("PairRequest", "PairsRequest"))
_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": {"oneOf": [_PAIR, _PAIRS]}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "image": {"type": "string", "contentMediaType": "application/octet-stream"},
                    "caption": {"type": "string"},
                    "box": {"type": "string", "description": "x1,y1,x2,y2 in pixels of the upright image"},
                },
                "additionalProperties": False,
            }
        },
    },
}


class _InMemory(MultiPartParser):
    """A form whose file is kept in memory, within the limit of the body: nothing is written to a disk."""

    spool_max_size = sys.maxsize
    ended = False

    def on_part_end(self) -> None:
        """See Starlette, which would read a text that is not UTF-8 as Latin-1; raises Refused."""
        part = self._current_part
        if part.file is None:
            kind = dict(part.item_headers).get(b"content-type", b"")
            charset = parse_options_header(kind)[1].get(b"charset", self._charset.encode())
            if charset.lower() not in _CHARSETS:
                got = f"the charset {shown(charset)}"
                raise Refused(
                    422, "invalid_request", f"{part.field_name}: expected a text in UTF-8, got {got}"
                )
            check_text(part.field_name, part.data)
        super().on_part_end()

    def on_end(self) -> None:
        """See Starlette: called at the form's last boundary."""
        self.ended = True


@router.post(
    "/v1/predict",
    summary="Predict one pair or many",
    tags=["predict"],
    openapi_extra={"requestBody": _BODY},
    dependencies=[Depends(known_options)],
    response_model=None,
    responses={
        200: {"model": PredictionResponse | PredictionsResponse, "description": "The answer, or the answers"},
        **problems(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504),
    },
)
async def predict(request: Request, heatmap: bool = False, card: bool = False) -> Response:
    """Predict an image with its caption, sent as a form (`image`, `caption`) or as JSON.

    JSON holds the image in base64: `{"image": ..., "caption": ...}`, or many as `{"pairs": [...]}`. What is
    null or left out is judged without. A network that judges a given box needs `box`, `[x1, y1, x2, y2]` in
    pixels of the upright image, in a form `x1,y1,x2,y2`. With many pairs the error of one takes its place,
    and the rest is answered. `heatmap` adds the 16 x 16 map of the image, `card` the answer as HTML.
    """
    service: Service = request.app.state.service
    pairs, many = await _read(request)
    answers = await service.predict(request, pairs)
    if not many:
        (only,) = answers
        if isinstance(only, Exception):
            raise only
        return _json(await _show(only, pairs[0], heatmap, card))
    shown = [await _show(answer, pair, heatmap, card) for answer, pair in zip(answers, pairs, strict=True)]
    return _json({"predictions": shown})


async def _read(request: Request) -> tuple[list[Given], bool]:
    """The pairs of a request, and whether it has the form for many."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return [await _read_form(request)], False
    if kind != "application/json":
        text = "expected the content type application/json or multipart/form-data"
        raise Refused(415, "unsupported_media_type", text)
    body = read_request(await request.body())
    if isinstance(body, PairsRequest):
        return [(pair.image, pair.caption, pair.box) for pair in body.pairs], True
    return [(body.image, body.caption, body.box)], False


async def _read_form(request: Request) -> Given:
    try:
        parser = _InMemory(request.headers, request.stream(), max_files=1, max_fields=len(_FIELDS))
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, "bad_request", error.message) from None
    if not parser.ended:
        raise Refused(400, "bad_request", "the form ends before its last boundary: it was cut short")
    names = [name for name, _ in form.multi_items()]
    if not set(names) <= _FIELDS or len(names) > len(set(names)):
        got = ", ".join(shown(name) for name in names)
        text = f"the form: expected the fields image, caption and box, each at most once, got {got}"
        raise Refused(422, "invalid_request", text)
    return await _image(form), await _caption(form), _box(form)


async def _image(form: FormData) -> bytes | None:
    """The image's bytes; None for a field that a browser sends of a file that was not chosen."""
    given = form.get("image")
    if isinstance(given, str):
        raise Refused(422, "invalid_request", "image: expected a file, got a text without a filename")
    if given is None or not (given.filename or given.size):
        return None
    return await given.read()


async def _caption(form: FormData) -> Caption | None:
    given = form.get("caption")
    if not isinstance(given, UploadFile):
        return given
    check_text("caption", text := await given.read())
    return text


def _box(form: FormData) -> list[float] | None:
    """The numbers of the box; None for a field that was left empty. The image is asked later."""
    given = form.get("box")
    if not given:
        return None
    got = "a file"
    if isinstance(given, str):
        try:
            return box_of_text(given)
        except ValueError:
            got = shown(given)
    text = f"box: expected x1,y1,x2,y2 in pixels of the upright image, got {got}"
    raise Refused(422, "invalid_request", text)


async def _show(answer: Answer, pair: Given, heatmap: bool, card: bool) -> dict[str, Any]:
    if isinstance(answer, Exception):
        problem = problem_of(answer)
        return {"error": {"code": problem.code, "message": problem.message}}
    shown = answer.to_dict(heatmap)
    if card:
        shown["card"] = await asyncio.to_thread(_card, answer, pair[0])
    return shown


def _card(prediction: Prediction, image: bytes | None) -> str:
    return prediction.to_html(image)


def _json(data: dict[str, Any]) -> Response:
    return Response(json.dumps(data, allow_nan=False), media_type="application/json")
