"""Approximate reuse: only where the recipe says so, and told apart from the exact."""

from __future__ import annotations

import concurrent.futures

import openai
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


def test_chunks_give_way_to_requests_and_to_the_limit(start):
    """A pool that may hold a gigabyte lives on what two megabytes leave, beside prefixes and answers."""
    limit = 2 << 20
    recipes = {"full": Recipe(), "blend": load("cacheblend", separator=" # ")}
    server = start(recipes=recipes, kv_memory=limit, max_num_batched_tokens=128)
    seen = []

    def ask(i: int) -> None:
        if i % 3:
            texts = [f"text {i} of {j}: the label of hammer is wug. " * 8 for j in range(3)]
            server.client().completions.create(
                prompt=" # ".join([*texts, "label hammer"]),
                extra_body={"recipe": "blend", "ignore_eos": True},
                **{**BODY, "max_tokens": 40},
            )
        else:
            server.client().completions.create(
                prompt=[300 + i] * 700, extra_body={"recipe": "full", "ignore_eos": True}, **BODY
            )
        seen.append(server.worker.memory.by_kind())

    held = server.worker.memory.held
    server.worker.memory.held = lambda: seen.append({"sum": held()}) or seen[-1]["sum"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(24)))
    server.idle()
    assert max(one["sum"] for one in seen if "sum" in one) <= server.worker.memory.peak <= limit
    assert any(one.get("host/chunks") for one in seen)
    kinds = server.worker.memory.by_kind()
    assert set(kinds) == {"host/pool", "host/chunks"}
    assert sum(kinds.values()) <= limit


def test_chunks_that_were_there_stay_for_the_request_that_reads_them(start):
    """Making room for what a request still lacks must not drop what it has."""
    probe = start(recipes=RECIPES)
    asked(probe.client(), "01", recipe="blend")
    held = probe.worker.memory.by_kind()["host/chunks"]
    one = held // 2
    # Room for the three chunks and a sequence that holds them all, and for little else.
    server = start(recipes={"blend": RECIPES["blend"]}, kv_memory=9 * one)
    client = server.client()
    asked(client, "201")
    # Of the same chunks one is new in front; the two behind it are there, and must be when their turn comes.
    lengths = [len(server.service.translator.encode(t + " # ", special=False)) for t in TEXTS]
    assert details(asked(client, "101")) == (0, lengths[0] + lengths[1])
    assert server.worker.memory.peak <= 9 * one


def test_a_reset_forgets_chunks_too(start):
    server = start(recipes=RECIPES)
    client = server.client()
    asked(client, "01", recipe="blend")
    with server.http() as http:
        assert http.get("/stats").json()["kv_bytes"]["host/chunks"] > 0
        assert 'codec="chunks"' in http.get("/metrics").text
        http.post("/reset_prefix_cache")
        assert http.get("/stats").json()["kv_bytes"]["host/chunks"] == 0
    assert details(asked(client, "01", recipe="blend")) == (0, 0)


def test_a_division_that_can_never_fit_is_refused_at_once(start):
    server = start(recipes=RECIPES, kv_memory=400 << 10)
    with pytest.raises(openai.BadRequestError, match="KV memory"):
        asked(server.client(), "012", recipe="blend")
