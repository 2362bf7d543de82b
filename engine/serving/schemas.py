"""The JSON of requests and responses, as OpenAPI shows it and as requests are checked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from engine.errors import shorten
from engine.serving.problems import CODES, PROBLEM_TYPE, Refused

_BASE64 = {"type": "string", "contentEncoding": "base64"}
_Image = Annotated[
    bytes | None,
    Field(
        description="A JPEG, PNG, WebP, BMP or GIF file in base64. Addresses are not fetched.",
        json_schema_extra={"anyOf": [_BASE64, {"type": "null"}]},
    ),
]
_Caption = Annotated[str | None, Field(description="The caption; an empty one is a caption too.")]
_Score = Annotated[float, Field(ge=0, le=1)]


class PairRequest(BaseModel):
    """One image with its caption; null or left out is what there is not."""

    model_config = ConfigDict(extra="forbid", val_json_bytes="base64")
    image: _Image = None
    caption: _Caption = None


class PairsRequest(BaseModel):
    """Many pairs, answered in order."""

    model_config = ConfigDict(extra="forbid")
    pairs: list[PairRequest]


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
    """

    manipulated: bool | None
    score: _Score | None
    types: dict[str, _Score | None]
    detected: list[str]
    box: Annotated[list[float], Field(min_length=4, max_length=4)] | None
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
        return adapter.validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] == "json_invalid":
            raise Refused(400, "bad_request", explain(error)) from None
        raise Refused(422, "invalid_request", explain(error)) from None


def explain(error: Any) -> str:
    """The first fault that pydantic or FastAPI found, as `field: what was expected`."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("pair", "pairs"))
    return shorten(f"{place}: {first['msg']}" if place else str(first["msg"]))


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
