"""The pages for people: one to try the service, one about its paths. Nothing is fetched elsewhere."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from engine import __version__
from engine.cards.markup import environment
from engine.serving.service import Service

if TYPE_CHECKING:
    from jinja2 import Template

router = APIRouter(include_in_schema=False)

# Cards carry their style, and their images as data. Scripts are only the page's own file.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_MODEL = ("name", "size", "precision", "backend", "device")
_CODE = re.compile(r"`([^`]+)`")

static = StaticFiles(directory=Path(__file__).parent / "static")


@router.get("/")
async def page(request: Request) -> HTMLResponse:
    """The page to try the service."""
    service: Service = request.app.state.service
    return _html(
        "try.html",
        model=" ".join(service.predictor.model[part] for part in _MODEL),
        warning=service.predictor.manifest.weights.warning,
        needs_box=service.judges_box,
        needs_caption=service.compares,
        needs_token=service.settings.token is not None,
        megabytes=min(service.settings.max_body, service.predictor.image_options.max_bytes) // 2**20,
    )


@router.get("/docs")
async def reference(request: Request) -> HTMLResponse:
    """The reference: what /openapi.json says, for people."""
    schema: dict[str, Any] = request.app.openapi()
    return _html("reference.html", api=schema, type_of=type_of, marked=marked)


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words; a model is called by its name."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(type_of(each) for each in schema[several])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"array of {type_of(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_of(schema['additionalProperties'])}"
    if kind == "object" and "properties" in schema:
        return f"object of {', '.join(schema['properties'])}"
    return kind + (f" ({schema['contentEncoding']})" if "contentEncoding" in schema else "")


def marked(text: str) -> Markup:
    """Text in which `code` of Markdown is code; everything is escaped."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def _html(name: str, **values: Any) -> HTMLResponse:
    text = _template(name).render(version=__version__, **values)
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


@cache
def _template(name: str) -> Template:
    return environment("engine.serving").get_template(name)
