"""Requests made from the server's own description: nothing may crash it or leave its form."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# Long answers would only take time: what is fuzzed is the interface.
_MOST = 8
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


def fuzz(server, *, path: str = "") -> tuple[set[str], set[tuple[str, int]]]:
    """Attack every operation whose path ends so: what was tried, and what was answered."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried: set[str] = set()
    answered: set[tuple[str, int]] = set()
    for found in described.get_all_operations():
        operation = found.ok()
        if not operation.path.endswith(path):
            continue
        tried.add(operation.label)

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25,
            deadline=None,
            phases=(Phase.generate,),
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def attack(case):
            if isinstance(case.body, dict):
                shorten(case.body, case.path)
            reply = case.call_and_validate(checks=CHECKS, timeout=30)
            answered.add((case.operation.label, reply.status_code))
            assert server.worker.failure is None

        attack()
    return tried, answered


@pytest.mark.slow
def test_every_operation_keeps_its_word(server):
    tried, answered = fuzz(server)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "GET /stats"} <= tried
    # Both what will do and what will not was among them.
    for path in ("POST /v1/completions", "POST /detokenize"):
        assert {(path, 200), (path, 400)} <= answered


def shorten(body: dict, path: str) -> None:
    """Long answers would only take time; and without the right name nothing behind it were reached."""
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], _MOST)
    if path.endswith("completions"):
        body.setdefault("max_tokens", _MOST)
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"


def test_the_server_is_as_it_was_afterwards(server):
    server.idle()
    answer = server.client().completions.create(model="tiny", prompt=[5], max_tokens=2, temperature=0)
    assert answer.usage.completion_tokens == 2
    assert set(server.worker.memory.by_kind()) == {"host/pool"}
