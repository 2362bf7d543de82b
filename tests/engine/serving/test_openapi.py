"""Requests that schemathesis makes of the application's own OpenAPI document."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra `test`")

from schemathesis.config import SchemathesisConfig  # noqa: E402

from engine.serving import Settings, create_app  # noqa: E402

CONFIG = SchemathesisConfig.from_dict(
    # A text in base64 that is no image is what the schema allows, and refused with 422.
    {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "4xx"]}}}
)


@pytest.fixture(scope="module")
def document(predictor):
    """The document of an application that runs."""
    from starlette.testclient import TestClient

    app = create_app(predictor, Settings(name="asap"))
    with TestClient(app):
        while not app.state.service.ready:
            pass
        yield schemathesis.openapi.from_asgi("/openapi.json", app, config=CONFIG)


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_documented(case):
    if "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = "asap"
    case.call_and_validate()
