"""The JSON of requests and responses, as OpenAPI shows it and as requests are checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from engine.errors import why_no_json
from engine.schema import parse_json
from engine.serving.problems import CODES, PROBLEM_TYPE, Refused

IN_BASE64 = "an image file in base64 (addresses and paths are not read)"
_SHOWN = 60  # characters of what a client gave that a message repeats
_EXPECTED = {  # by pydantic's types of faults
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "bytes_invalid_encoding": IN_BASE64,
    "bytes_type": IN_BASE64,
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
    "string_unicode": "a string of Unicode characters",
}
_BASE64 = {"type": "string", "contentEncoding": "base64"}
_Image = Annotated[
    bytes | None,
    Field(
        description="A JPEG, PNG, WebP, BMP or GIF file in base64. Addresses are not fetched.",
        json_schema_extra={"anyOf": [_BASE64, {"type": "null"}]},
    ),
]
_Caption = Annotated[str | None, Field(description="The caption; an empty one is a caption too.")]
_Box = Annotated[
    list[Annotated[float, Field(strict=True, allow_inf_nan=False)]] | None,
    Field(
        description="For a network that judges a given box: x1, y1, x2, y2 in pixels of the upright image.",
        min_length=4,
        max_length=4,
    ),
]
_Corners = Annotated[list[float], Field(min_length=4, max_length=4)]
_Score = Annotated[float, Field(ge=0, le=1)]


class PairRequest(BaseModel):
    """One image with its caption, and a box in it; null or left out is what there is not."""

    model_config = ConfigDict(extra="forbid", val_json_bytes="base64")
    image: _Image = None
    caption: _Caption = None
    box: _Box = None


class PairsRequest(BaseModel):
    """Many pairs, answered in order."""

    model_config = ConfigDict(extra="forbid")
    pairs: Annotated[list[PairRequest], Field(min_length=1)]


class Word(BaseModel):
    """A word that the network read: `caption[start:end]`."""

    text: str
    start: int
    end: int
    score: _Score
    manipulated: bool


class PredictionResponse(BaseModel):
    """The answer for one pair: the fields of `engine.Prediction`.

    `box` is (x1, y1, x2, y2) in pixels of the upright image; read it where a face type is detected.
    `box_given` is the request's, for a network that judges a given one.
    """

    manipulated: bool | None
    score: _Score | None
    types: dict[str, _Score | None]
    detected: list[str]
    box: _Corners | None
    box_given: _Corners | None
    words: list[Word]
    caption: str
    size: Annotated[list[int], Field(min_length=2, max_length=2)] | None
    warnings: list[str]
    thresholds: dict[str, float]
    model: dict[str, str]
    timing: dict[str, float]
    heatmap: Annotated[list[list[_Score]] | None, Field(description="only with `heatmap=true`")] = None
    card: Annotated[str, Field(description="HTML for people, only with `card=true`")] = ""


class PairError(BaseModel):
    """Why one pair of many has no answer."""

    code: str
    message: str


class FailedPair(BaseModel):
    """What stands in the place of a pair that failed."""

    error: PairError


class PredictionsResponse(BaseModel):
    """The answers for many pairs, in order."""

    predictions: list[PredictionResponse | FailedPair]


class ProblemResponse(BaseModel):
    """Why a request was refused."""

    status: int
    code: Annotated[str, Field(json_schema_extra={"enum": list(CODES)})]
    message: str
    request_id: str


def _form_of(value: object) -> str:
    return "pairs" if isinstance(value, dict) and "pairs" in value else "pair"


_REQUEST: TypeAdapter[PairRequest | PairsRequest] = TypeAdapter(
    Annotated[
        Annotated[PairRequest, Tag("pair")] | Annotated[PairsRequest, Tag("pairs")], Discriminator(_form_of)
    ]
)


def read_request(body: bytes) -> PairRequest | PairsRequest:
    """Read JSON; raises Refused for another text, and for fields that are unknown or of another type."""
    return checked(_REQUEST, body)


def checked(adapter: TypeAdapter[Any], body: bytes) -> Any:
    """Read JSON as a type of pydantic's; raises Refused."""
    try:
        parse_json(body)  # pydantic's own parser takes the last of two fields of one name
    except (ValueError, RecursionError) as error:
        raise Refused(400, "bad_request", f"the body: expected JSON: {why_no_json(error)}") from None
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            why = first["msg"].removeprefix("Invalid JSON: ")
            raise Refused(400, "bad_request", f"the body: expected JSON in UTF-8: {why}") from None
        raise Refused(422, "invalid_request", explain(error)) from None


def explain(error: Any) -> str:
    """The first fault that pydantic or FastAPI found: `field: expected ..., got ...`."""
    first = error.errors()[0]
    kind, given, context = first["type"], first["input"], first.get("ctx", {})
    tags = ("pair", "pairs") if first["loc"][:1] in (("pair",), ("pairs",)) else ()  # the discriminator's
    place = ""
    for part in first["loc"][len(tags[:1]) :]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    if kind == "extra_forbidden":
        return f"{place}: expected no field of this name"
    if kind == "missing":
        return f"{place}: expected this field, got none"
    expected = _EXPECTED.get(kind, str(first["msg"]))
    for fault, bound, limit in (("too_short", "least", "min_length"), ("too_long", "most", "max_length")):
        if kind == fault:
            got = context["actual_length"] or "none"
            return f"{place}: expected at {bound} {context[limit]}, got {got}"
    return f"{place or 'the body'}: expected {expected}, got {shown(given)}"


def shown(given: object) -> str:
    """What a client gave, in a few words of JSON's."""
    if isinstance(given, bytes):
        given = given.decode(errors="replace")
    if isinstance(given, str):
        return repr(given if len(given) <= _SHOWN else given[:_SHOWN] + "...")
    if isinstance(given, Sequence | Mapping):
        return "a list" if isinstance(given, Sequence) else "an object"
    return (
        json.dumps(given) if given is None or isinstance(given, bool | int | float) else repr(given)[:_SHOWN]
    )


def known_options(request: Request) -> None:
    """Raise Refused for an option in the address that the route does not know, or that is given twice."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name, _ in (given := request.query_params.multi_items()):
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "no option"
            raise Refused(422, "invalid_request", f"query: expected {expected}, got {shown(name)}")
    if len(given) > len(dict(given)):
        raise Refused(422, "invalid_request", "query: expected each option once, got one of them twice")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a path, for OpenAPI."""
    schema = {"schema": {"$ref": "#/components/schemas/ProblemResponse"}}
    return {
        status: {
            "description": "; ".join(
                f"`{code}`: {text[5:]}" for code, text in CODES.items() if text.startswith(str(status))
            ),
            "content": {PROBLEM_TYPE: schema},
        }
        for status in statuses
    }
