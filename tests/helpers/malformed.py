"""Requests that are not as the server's OpenAPI description says, drawn by schemathesis from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode


def send_malformed(schema: Any, number: int, *, derandomize: bool = False) -> Counter[int]:
    """Sends about `number` malformed requests, the same to each endpoint with a body; how often each status came.

    Raises AssertionError for an answer that is no 4xx, or that does not say in one sentence what is wrong.
    """
    operations = [each.ok() for each in schema.get_all_operations()]
    operations = [each for each in operations if each.method == "post"]
    statuses: Counter[int] = Counter()

    def send(case: Case) -> None:
        answer = case.call(headers={"Host": "localhost"})
        statuses[answer.status_code] += 1
        said = answer.json().get("detail")
        assert 400 <= answer.status_code < 500, (
            f"{case.as_curl_command()} gives {answer.status_code} {answer.text:.200}"
        )
        assert isinstance(said, str) and len(said) < 500 and len(said.splitlines()) == 1, (
            f"{case.as_curl_command()} {said!r}"
        )

    for operation in operations:
        drawn = given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))(send)
        settings(
            max_examples=-(-number // len(operations)),
            derandomize=derandomize,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(drawn)()
    return statuses
