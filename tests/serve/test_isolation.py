"""Nothing of one client reaches another: salts, and what an error or the page tells."""

from __future__ import annotations

import random

from winnow.bench.serve_model import words
from winnow.models.random import PRESETS


def test_salts_share_nothing_and_one_salt_does(start):
    server = start()
    client = server.client()
    secret = [700 + i % 90 for i in range(640)]

    def ask(salt: str | None, tail: int = 5):
        body = {} if salt is None else {"cache_salt": salt}
        return client.completions.create(
            model="tiny", prompt=[*secret, tail], max_tokens=8, temperature=0, extra_body=body, logprobs=0
        )

    def cached(answer) -> int:
        return answer.usage.prompt_tokens_details.cached_tokens

    first = ask("alice")
    assert cached(first) == 0
    assert [cached(ask(salt)) for salt in ("bob", None, "", "alice ", "Alice", "alice/")] == [
        0,
        0,
        640,
        0,
        0,
        0,
    ]
    again = ask("alice", tail=6)
    assert cached(again) == 640
    # What is computed does not depend on what was reused.
    assert ask("alice").choices[0].text == ask("carol").choices[0].text == first.choices[0].text


def test_a_salt_cannot_name_another_name_space(start):
    """The name space is a path of model, recipe and salt: a salt that looks like one is only a salt."""
    server = start()
    engine = server.worker.engines["full"]
    client = server.client()
    prompt = [700 + i % 90 for i in range(200)]
    client.completions.create(model="tiny", prompt=prompt, max_tokens=1, extra_body={"cache_salt": "x"})
    forged = engine._namespace("x")
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=1, extra_body={"cache_salt": forged}
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_two_clients_at_once_get_their_own_text(start):
    """Many prompts in one packed batch: every answer is the one that its prompt gets alone."""
    import concurrent.futures

    server = start()
    prompts = [[300 + 7 * i, *([500 + i] * (20 + 13 * i))] for i in range(10)]

    def ask(number: int) -> str:
        answer = server.client().completions.create(
            model="tiny",
            prompt=prompts[number],
            max_tokens=12,
            temperature=0,
            extra_body={"cache_salt": f"client {number}", "ignore_eos": True},
        )
        return answer.choices[0].text

    alone = [ask(number) for number in range(10)]
    with server.http() as http:
        http.post("/reset_prefix_cache")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, range(10))) == alone


def test_errors_do_not_repeat_what_others_sent(server):
    with server.http() as http:
        http.post("/v1/completions", json={"model": "tiny", "prompt": "hidden words", "max_tokens": 1})
        for path in ("/stats", "/metrics", "/server_info"):
            assert "hidden" not in http.get(path).text
        surrogate = http.post(
            "/v1/completions",
            content=b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
            headers={"content-type": "application/json"},
        )
        assert surrogate.status_code == 400


def test_words_of_the_load_test_are_tokens():
    vocabulary = PRESETS["tiny"]["vocab_size"]
    assert len(words(50, vocabulary, random.Random(0)).split()) == 50
