"""Sizes, keys, queues, time, and clients that go away."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import socket
import threading
import time

import openai
import pytest
import torch

from winnow.methods import load
from winnow.recipe import Recipe
from winnow.serve.config import Settings

LONG = {"model": "tiny", "prompt": [5] * 40, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}


def test_keys_open_the_interface_and_nothing_else_does(start):
    server = start(api_keys=("first", "second"))
    for key in ("first", "second"):
        assert server.client(api_key=key).models.list().data
    for key in ("third", "firs", "first2"):
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key=key).models.list()
    with server.http() as http:
        for path in ("/v1/models", "/metrics", "/stats", "/server_info", "/openapi.json"):
            reply = http.get(path)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/version", "/"):
            assert http.get(path).status_code == 200, path
        info = http.get("/server_info", headers={"Authorization": "Bearer first"}).text
        assert "second" not in info


def test_large_bodies_are_refused_before_they_are_read(start):
    server = start(max_body=10_000)
    with server.http() as http:
        reply = http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 20_000})
        assert reply.status_code == 413
        chunked = http.post("/v1/completions", content=(b" " * 1000 for _ in range(20)))
        assert chunked.status_code == 413
        assert http.get("/health").status_code == 200


def test_a_full_queue_answers_429_with_a_time(start):
    server = start(max_num_seqs=1, max_queue=2)
    client = server.client()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(client.completions.create, **{**LONG, "max_tokens": 700})]
        while not server.worker.running():
            time.sleep(0.01)
        short = {**LONG, "max_tokens": 20}
        running += [pool.submit(client.completions.create, **short) for _ in range(2)]
        while len(server.worker.waiting()) < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**short)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert [one.result().usage.completion_tokens for one in running] == [700, 20, 20]


def test_a_request_that_takes_too_long_ends(start):
    server = start(request_timeout=0.3)
    with pytest.raises(openai.APIStatusError) as late:
        server.client().completions.create(**LONG)
    assert late.value.status_code == 408
    chunks = server.client().completions.create(stream=True, **LONG)
    with pytest.raises(openai.APIError, match="longer"):
        list(chunks)
    server.idle()
    assert server.worker.memory.by_kind() == {"host/pool": server.worker.memory.held()}


def test_a_stream_that_is_closed_frees_its_memory(start):
    server = start(prefix_caching=False)
    stream = server.client().completions.create(stream=True, **LONG)
    next(iter(stream))
    assert server.worker.running()
    stream.response.close()
    server.idle(5)
    assert server.worker.memory.held() == 0
    assert server.worker.counters.ended == {"cancelled": 1}


def test_a_client_that_vanishes_frees_its_memory(start):
    """Also without a stream, and while the request still waits in the queue."""
    server = start(prefix_caching=False, max_num_seqs=1)
    body = json.dumps({**{k: v for k, v in LONG.items() if k != "extra_body"}, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    port = int(server.url.rsplit(":", 1)[1])
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    for one in sockets:
        one.sendall(head.encode() + body)
    while len(server.worker.running()) + len(server.worker.waiting()) < 3:
        time.sleep(0.01)
    for one in sockets:
        one.close()
    server.idle(5)
    assert server.worker.memory.held() == 0
    assert server.worker.counters.ended == {"cancelled": 3}
    assert server.client().completions.create(model="tiny", prompt=[5], max_tokens=1).choices


def test_a_worker_that_stopped_takes_nothing_and_leaves_nobody_waiting(start):
    server = start()
    server.worker.stop()
    with server.http(timeout=5) as http:
        answers = [
            http.post("/reset_prefix_cache"),
            http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}),
        ]
    assert [one.status_code for one in answers] == [503, 503]
    assert all("shutting down" in one.json()["error"]["message"] for one in answers)


def test_recipes_are_chosen_by_name_and_bytes_fall(start, text):
    server = start(recipes={"full": Recipe(), "small": load("snapkv", keep=64)})
    options = {"model": "tiny", "prompt": [7] * 1500, "max_tokens": 4, "temperature": 0}
    client = server.client()
    client.completions.create(**options)
    client.completions.create(extra_body={"recipe": "small"}, **options)
    server.idle()
    full, small = (job.result.stats for job in reversed(server.worker.recent_jobs()))
    assert sum(small.bytes_stored.values()) < 0.3 * sum(full.bytes_stored.values())
    # Prompts are computed alike under both recipes, so the second found the entries of the first, but
    # for the page with the queries that vote on what is kept.
    assert small.tokens_reused == 1408


def test_shutdown_lets_running_requests_end_and_refuses_new_ones(start):
    server = start(grace=30)
    client = server.client()
    got: list[int] = []

    def ask() -> None:
        answer = client.completions.create(**{**LONG, "max_tokens": 300})
        got.append(answer.usage.completion_tokens)

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.worker.running():
        time.sleep(0.01)
    server.server.should_exit = True
    thread.join(30)
    assert got == [300]
    while server.worker.alive:
        time.sleep(0.01)
    with pytest.raises(openai.APIConnectionError):
        server.client().models.list()


def test_steps_are_short_on_a_cpu_unless_a_pattern_depends_on_them():
    settings = Settings(served_model_name="tiny", recipes={"full": Recipe()}, max_model_len=64)
    cpu, gpu, patterned = torch.device("cpu"), torch.device("cuda"), load("anchor-attention")
    assert [settings.step_tokens(*case) for case in ((cpu, Recipe()), (gpu, Recipe()), (cpu, patterned))] == [
        512,
        2048,
        2048,
    ]
    given = dataclasses.replace(settings, max_num_batched_tokens=100)
    assert given.step_tokens(cpu, patterned) == given.step_tokens(gpu, Recipe()) == 100
    with pytest.raises(ValueError, match="max_num_batched_tokens must be at least 1"):
        dataclasses.replace(settings, max_num_batched_tokens=0)


def test_a_server_s_engines_take_the_steps_of_their_recipes(start):
    server = start(recipes={"full": Recipe(), "anchor": load("anchor-attention")})
    steps = {name: engine.limits.max_num_batched_tokens for name, engine in server.worker.engines.items()}
    assert steps == {"full": 512, "anchor": 2048}
