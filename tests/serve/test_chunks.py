"""Approximate reuse: only where the recipe says so, and told apart from the exact."""

from __future__ import annotations

import pytest

from winnow.methods import load
from winnow.recipe import Recipe

RECIPES = {"full": Recipe(), "blend": load("cacheblend", separator=" # ", capacity_bytes=4 << 20)}
TEXTS = [f"The label of {noun} is dax. " * 12 for noun in ("piano", "apple", "hammer")]
BODY = {"model": "tiny", "max_tokens": 4, "temperature": 0}


def asked(client, order: str, **extra):
    prompt = " # ".join([*(TEXTS[int(i)] for i in order), "label piano"])
    return client.completions.create(prompt=prompt, extra_body={"ignore_eos": True, **extra}, **BODY)


def details(answer) -> tuple[int, int]:
    told = answer.usage.prompt_tokens_details
    return told.cached_tokens, told.approximate_tokens


def test_chunks_are_reused_in_any_order_and_told_apart(start):
    server = start(recipes=RECIPES)
    client = server.client()
    assert details(asked(client, "01", recipe="blend")) == (0, 0)
    chunk = len(server.service.translator.encode(TEXTS[0] + " # ", special=False))
    # The second chunk is there, behind another first one now; that one and the third are new.
    assert details(asked(client, "210", recipe="blend")) == (0, chunk)
    # What stands first knows no context, so it is exact wherever it comes from.
    exact, approximate = details(asked(client, "210", recipe="blend"))
    assert exact >= chunk
    assert approximate == 2 * chunk
    assert server.worker.counters.approximate_tokens >= approximate
    with server.http() as http:
        assert http.get("/stats").json()["kv_bytes"]["host/chunks"] > 0


def test_no_other_recipe_and_no_other_salt_sees_a_chunk(start):
    server = start(recipes=RECIPES)
    client = server.client()
    expected = asked(client, "12", recipe="full").choices[0].text
    asked(client, "01", recipe="blend", cache_salt="a")
    full = asked(client, "12", recipe="full")
    assert details(full)[1] == 0
    assert full.choices[0].text == expected
    first = asked(client, "12", recipe="blend", cache_salt="b")
    assert details(first)[0] == 0
    server.idle()
    assert set(server.worker.memory.by_kind()) == {"host/pool", "host/chunks"}


def test_chunks_count_under_the_limit(start):
    limit = 12 << 20
    server = start(recipes={"blend": RECIPES["blend"]}, kv_memory=limit, max_num_seqs=4)
    client = server.client()
    for order in ("01", "12", "20", "021", "102"):
        asked(client, order)
    assert 0 < server.worker.memory.peak <= limit
    with pytest.raises(ValueError, match="capacity_bytes"):
        start(recipes={"blend": load("cacheblend")}, kv_memory=limit)
