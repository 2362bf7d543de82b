"""A Predictor as a web service: `create_app` makes the ASGI application, `dgm4 serve` runs it.

Needs the extra `serve`: FastAPI, uvicorn, prometheus-client.
"""

from engine.serving.application import create_app
from engine.serving.settings import Settings

__all__ = ["Settings", "create_app"]
