"""The server against its own OpenAPI description: whatever it is sent, no error and no answer that is not described.

`make test` sends a few dozen requests; `make fuzz`, 1,000 to each endpoint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import schemathesis
from conftest import FUZZ
from hypothesis import settings
from malformed import send_malformed
from schemathesis import Case
from small_server import small_live

from lumrec.serving.metrics import Metrics
from lumrec.serving.server import make_app
from lumrec.serving.settings import ServeConfig

ROOT = tempfile.TemporaryDirectory(prefix="lumrec-api-")
METRICS = Metrics()
APP = make_app(small_live(Path(ROOT.name), metrics=METRICS), ServeConfig(), token="", metrics=METRICS)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"Host": "localhost"})


@pytest.mark.fuzz
@schema.parametrize()
@settings(max_examples=1000 if FUZZ else 10)
def test_answers_are_as_described(case: Case) -> None:
    answer = case.call(headers={"Host": "localhost"})
    if answer.status_code != 504:  # a request may ask for an answer in a millisecond
        case.validate_response(answer)


def test_what_is_malformed_is_refused_in_one_sentence() -> None:
    """tests/soak.py sends a thousand."""
    assert sum(send_malformed(schema, 25, derandomize=True).values()) > 20


def test_the_description_has_the_limits_of_k() -> None:
    k = APP.openapi()["components"]["schemas"]["RetrieveBody"]["properties"]["k"]
    assert (k["minimum"], k["maximum"], k["type"]) == (1, 1_000_000, "integer")
