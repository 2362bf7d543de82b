"""The service's log: a JSON object a line, without captions, images, file names or addresses."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

# Whose messages are shown. Those of other libraries may repeat what a client sent.
_TRUSTED = ("engine.serving", "engine.backends", "engine.predictor", "engine.batcher", "uvicorn")


class JsonFormatter(logging.Formatter):
    """One JSON object a record; `extra={"fields": {...}}` of a record is part of it.

    Of an exception it shows the type and the lines of code, never the message: that may repeat a caption.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        data: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.name.startswith(_TRUSTED):
            data["message"] = record.getMessage()
        else:
            data["place"] = f"{record.filename}:{record.lineno}"
        data |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            data["error"] = record.exc_info[0].__name__
            data["frames"] = [
                f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(record.exc_info[2])
            ]
        return json.dumps(data)


def set_up(level: int) -> None:
    """Write the log of this process to stderr as JSON lines from `level` on; replaces other handlers."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("engine", "uvicorn"):
        logging.getLogger(name).setLevel(level)
