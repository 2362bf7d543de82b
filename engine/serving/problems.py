"""What a request is refused with: a status, a code for programs and a message for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import BackendError, DeadlineError, InputError, NumericalError, OverloadedError

PROBLEM_TYPE = "application/problem+json"
RETRY_S = 1  # seconds after which a refused client may try again
# The codes of statuses that the framework answers with.
_STATUSES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 422: "invalid_request"}
_KINDS: dict[type[Exception], tuple[int, str]] = {
    InputError: (422, "invalid_input"),
    NumericalError: (422, "no_finite_score"),
    OverloadedError: (503, "overloaded"),
    DeadlineError: (504, "deadline_exceeded"),
}
CODES = {
    "bad_request": "400: the body is not what its content type says",
    "unauthorized": "401: no token, or a wrong one",
    "cross_site": "403: a page of another site sent the request",
    "not_found": "404: no such path, or a model of another name",
    "method_not_allowed": "405: the path takes another method",
    "request_timeout": "408: the body took too long to arrive",
    "too_large": "413: more bytes or more pairs than the service takes",
    "unsupported_media_type": "415: neither JSON nor a form; or a compressed body",
    "invalid_request": "422: a field is missing, unknown or of another type",
    "invalid_input": "422: the image, the caption or the box cannot be used",
    "no_finite_score": "422: the network's outputs for this pair are not finite",
    "rate_limited": "429: the client sent more than its share; see Retry-After",
    "internal": "500: a fault of the service",
    "overloaded": "503: too many pairs are waiting; see Retry-After",
    "not_ready": "503: the service is starting or stopping; see Retry-After",
    "deadline_exceeded": "504: there was no answer within the time limit",
}


class Refused(HTTPException):
    """A request that is refused, with a code of `CODES`."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(status, message, dict(headers or {}))
        self.code = code


class Problem(NamedTuple):
    """One refusal: what the client is told. `headers` are those of the response."""

    status: int
    code: str
    message: str
    headers: Mapping[str, str] = {}

    def response(self, request_id: str, protocol: bool) -> Response:
        """As JSON; `protocol` is whether the Open Inference Protocol's `error` holds the message."""
        if protocol:
            return self._json({"error": f"{self.code}: {self.message}"}, "application/json")
        data = {"status": self.status, "code": self.code, "message": self.message}
        return self._json(data | {"request_id": request_id}, PROBLEM_TYPE)

    def _json(self, data: dict[str, Any], kind: str) -> Response:
        return Response(json.dumps(data), self.status, dict(self.headers), media_type=kind)


def problem_of(error: BaseException) -> Problem:
    """What to tell the client of an error; of one that is no client's fault only that there was one."""
    if isinstance(error, Refused):
        return Problem(error.status_code, error.code, error.detail, error.headers or {})
    if isinstance(error, HTTPException):
        code = _STATUSES.get(error.status_code, "bad_request")
        return Problem(error.status_code, code, error.detail, error.headers or {})
    for kind, (status, code) in _KINDS.items():
        if isinstance(error, kind):
            retry = {"Retry-After": str(RETRY_S)} if status == 503 else {}
            return Problem(status, code, str(error), retry)
    if isinstance(error, BackendError):  # its message may name files of the server
        return Problem(500, "internal", "the network could not run; the server's log names the kind of error")
    return Problem(500, "internal", "the service failed; the server's log has the place")
