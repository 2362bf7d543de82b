"""What an operator sets of the service: its limits, its token, its batches."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from engine.errors import InputError, quoted
from engine.inputs.options import check_count

_MB = 2**20
_SHORTEST_TOKEN = 16
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_TOKEN = re.compile(r"[\w.~+/=-]+")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and options of the service; none of them changes an answer.

    Attributes:
        name: of the model in the Open Inference Protocol; None: `<model>-<size>-<precision>`.
        token: what clients must send as `Authorization: Bearer TOKEN`, of 16 characters or more; None: no
            client has to.
        max_body: bytes of a request's body. An image in base64 takes 4/3 of its bytes.
        max_buffered: bytes of bodies that are held at once, of all requests together; `max_body` at least.
        max_pairs: pairs of one request.
        max_batch: pairs that run as one batch; None: the bundle's largest.
        max_wait_ms: milliseconds that a pair waits for others to share its batch.
        max_pending: pairs that are taken and not yet answered, `max_pairs` at least; more get 503.
        timeout_s: seconds from a request's headers to its answer; past it the answer is 504.
        read_timeout_s: seconds that the body may take to arrive; past it the answer is 408.
        rate: pairs a second that one client may send in the long run, else 429; None: any number.
        burst: pairs that one client may send at once, where there is a `rate`.
    """

    name: str | None = None
    token: str | None = field(default=None, repr=False)
    max_body: int = 48 * _MB
    max_buffered: int = 256 * _MB
    max_pairs: int = 32
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    max_pending: int = 256
    timeout_s: float = 30.0
    read_timeout_s: float = 15.0
    rate: float | None = None
    burst: int = 32

    def __post_init__(self) -> None:
        """Raise InputError for a number outside its range, a short token, and limits that exclude others."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or isinstance(value, str):
                continue
            if item.type in ("int", "int | None"):
                check_count(item.name, value, least=1)
            elif not isinstance(value, int | float) or not 0 <= value < 86_400:
                raise InputError(f"{item.name}: expected a number from 0 to 86400, got {quoted(value)}")
        if self.token is not None and not (
            len(self.token) >= _SHORTEST_TOKEN and _TOKEN.fullmatch(self.token)
        ):
            raise InputError(
                f"token: expected {_SHORTEST_TOKEN} or more letters, digits or -._~+/=, "
                f"got {len(self.token)} characters"
            )
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise InputError(f"name: expected letters, digits, -, _ or ., got {quoted(self.name)}")
        for small, large in (("max_pairs", "max_pending"), ("max_body", "max_buffered")):
            if getattr(self, small) > getattr(self, large):
                unit = " bytes" if small == "max_body" else ""
                raise InputError(
                    f"{large}: expected at least {small}, which is {getattr(self, small)}{unit}, "
                    f"got {getattr(self, large)}{unit}"
                )
        if self.rate is not None and self.rate == 0:
            raise InputError("rate: expected a number above 0, got 0; leave it out for no limit")
