"""What a client can send to harm others: it is refused, or costs only the one who sent it."""

from __future__ import annotations

import pytest

CHAT = [{"role": "user", "content": "key bako"}]
MANY_DIGITS = "1" * 5000  # Python refuses to read a number of that many


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 1e-310, "seed": 1},
        {"temperature": 5e-324, "seed": 1, "n": 3},
        {"temperature": 1.0, "seed": 2**63 - 1, "n": 4},
        {"temperature": 1.0, "seed": -(2**63), "n": 2},
        {"temperature": 2.0, "top_p": 1e-300},
        {"temperature": 2.0, "top_k": 2**31 - 1, "min_p": 1.0},
        {"logit_bias": {str(token): -100 for token in range(1023)}},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": []}]},
        dict.fromkeys(("temperature", "n", "top_p", "stop", "stream", "seed", "tools", "logprobs")),
    ],
    ids=lambda extra: ",".join(extra)[:40],
)
def test_extremes_are_answered(server, extra):
    with server.http() as http:
        reply = http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": CHAT, "max_tokens": 6, **extra}
        )
    assert reply.status_code == 200, reply.text
    assert all(choice["finish_reason"] for choice in reply.json()["choices"])


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"logit_bias": {MANY_DIGITS: 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
    ],
)
def test_what_would_be_dropped_or_break_is_refused(server, extra, param):
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT, **extra})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith(param)


def test_an_answer_may_be_given_back_as_the_client_has_it(server):
    client = server.client()
    options = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    first = client.chat.completions.create(messages=CHAT, **options).choices[0].message
    again = client.chat.completions.create(messages=[*CHAT, first.model_dump(), *CHAT], **options)
    assert again.usage.prompt_tokens > 4


def test_the_server_lives_on(server):
    server.idle()
    assert server.worker.failure is None
    assert server.worker.counters.ended.get("error", 0) == 0
