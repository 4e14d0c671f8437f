"""KV memory as a hard limit: what does not fit waits, goes to disk and comes back the same."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import torch

from winnow.engine.engine import Engine
from winnow.engine.request import SamplingParams
from winnow.methods import load, rows
from winnow.models.load import load_model
from winnow.models.swiftkv.model import transformed
from winnow.recipe import Recipe
from winnow.serve.scratch import Scratch
from winnow.store.swap import Swap

RECIPES = {
    "full": Recipe(),
    "snapkv": load("snapkv", keep=48),
    "tidal": load("tidal-decode", keep=64),
    "reuse": load("prefix-reuse"),
}
BODY = {"ignore_eos": True}


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, 900, (length,), generator=generator).tolist()


def drained(engine: Engine) -> None:
    while engine.busy:
        engine.step()


@pytest.mark.parametrize(("place", "space"), [("swap", 1 << 20), ("disk", 0), ("disk", 4096)])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [0, 1, 5, 12])
def test_a_suspended_request_goes_on_as_if_nothing_had_been(model, tmp_path, name, steps, place, space):
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3, ignore_eos=True, logprobs=0)

    def run(interrupted: bool) -> tuple[list[int], object, object]:
        engine = Engine(model, RECIPES[name])
        result = engine.submit(prompt(200, 1), params)
        other = engine.submit(prompt(90, 2), params)
        for _ in range(steps):
            engine.step()
        if interrupted and not result.finish_reason:
            before = engine.bytes_held()
            swap = Swap(tmp_path, space)
            engine.suspend(result, swap)
            assert engine.bytes_held() < before or not steps
            assert engine.bytes_suspended(result) > 0 or not steps
            engine.step()
            assert set(swap.bytes()) == {place if steps or not space else "swap"}
            assert swap.bytes().get("disk", 0) == sum(f.stat().st_size for f in tmp_path.iterdir())
            engine.resume(result)
            assert not swap.bytes()
            assert not list(tmp_path.iterdir())
        drained(engine)
        assert engine.bytes_held() == 0
        return result.token_ids, result.samples[0].logprobs, other.token_ids

    assert run(True) == run(False)


# Need a profile that a model makes for itself first.
PROFILED = {"razor-attention", "epicache"}


@pytest.mark.parametrize("name", [row["name"] for row in rows() if row["name"] not in PROFILED])
def test_every_method_survives_a_suspension(module, tmp_path, name):
    torch.manual_seed(0)
    config = type(module.config)(**{**module.config.to_dict(), "num_hidden_layers": 4})
    recipe = load(name)
    model = transformed(load_model(type(module)(config).eval())[0], recipe.generation)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=0)

    def run(interrupted: bool) -> tuple[list[int], object]:
        engine = Engine(model, recipe)
        result = engine.submit(prompt(600, 1), params)
        for _ in range(3):
            engine.step()
        if interrupted:
            engine.suspend(result, Swap(tmp_path, 64 << 20))
            assert engine.bytes_held() == 0
            engine.resume(result)
        drained(engine)
        return result.token_ids, result.samples[0].logprobs

    assert run(True) == run(False)


def test_nothing_is_computed_again_after_a_suspension(model, tmp_path):
    engine = Engine(model, Recipe())
    result = engine.submit(prompt(300, 1), SamplingParams(max_new_tokens=4, ignore_eos=True))
    engine.step()
    scores = result.stats.score_entries
    engine.suspend(result, Swap(tmp_path))
    engine.resume(result)
    drained(engine)
    assert result.stats.score_entries == scores
    assert len(result.token_ids) == 4


def test_samples_of_one_prompt_are_suspended_together(model, tmp_path):
    engine = Engine(model, Recipe())
    params = SamplingParams(max_new_tokens=8, n=3, temperature=1.5, seed=1, ignore_eos=True)
    whole, cut = engine.submit(prompt(100, 1), params), engine.submit(prompt(100, 1), params)
    for _ in range(3):
        engine.step()
    engine.suspend(cut, Swap(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    engine.step()
    engine.resume(cut)
    drained(engine)
    assert [s.token_ids for s in cut.samples] == [s.token_ids for s in whole.samples]
    assert engine.bytes_held() == 0


@pytest.mark.parametrize("space", [0, 1 << 20])
def test_a_cancelled_suspension_leaves_nothing(model, tmp_path, space):
    swap = Swap(tmp_path, space)
    engine = Engine(model, Recipe())
    result = engine.submit(prompt(100, 1), SamplingParams(max_new_tokens=8))
    engine.step()
    engine.suspend(result, swap)
    assert swap.bytes()
    engine.cancel(result)
    assert not swap.bytes()
    assert not list(tmp_path.iterdir())
    assert result.finish_reason == "cancelled"


@pytest.mark.parametrize("recipe", ["full", "snapkv"])
def test_the_limit_holds_under_load_and_answers_do_not_change(start, recipe):
    """Eight requests of up to 700 tokens where a third of that fits, with pools competing."""
    options = [
        {"model": "tiny", "prompt": prompt(100 + 80 * i, i), "max_tokens": 24, "temperature": 0}
        for i in range(8)
    ]
    recipes = {recipe: RECIPES[recipe]}

    def ask(server, one: dict) -> str:
        return server.client().completions.create(extra_body=BODY, **one).choices[0].text

    roomy = start(recipes=recipes)
    expected = [ask(roomy, one) for one in options]
    limit = 2 << 20
    tight = start(recipes=recipes, kv_memory=limit, max_num_batched_tokens=128)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda one: ask(tight, one), options))
    assert texts == expected
    assert limit / 2 < tight.worker.memory.peak <= limit
    tight.idle()
    assert tight.worker.memory.held() == tight.worker.memory.by_kind()["host/pool"]


# Where the swap's host memory takes every preempted request, none, or some.
SPACES = {"swap": 16 << 20, "disk": 0, "both": 120 << 10}


@pytest.mark.parametrize("place", SPACES)
def test_growing_answers_preempt_the_youngest_and_all_end(start, tmp_path, place):
    """Each request fits at first; together they outgrow the memory while they write."""
    limit = 5 << 18
    server = start(kv_memory=limit, swap_space=SPACES[place], swap_dir=tmp_path, prefix_caching=False)
    if place == "swap":  # nothing may need the disk
        server.worker._scratch.close()
    seen = watch(server)
    options = [{"model": "tiny", "prompt": prompt(20, i), "max_tokens": 400} for i in range(6)]
    alone = start(prefix_caching=False)

    def ask(server, one: dict) -> str:
        answer = server.client().completions.create(extra_body=BODY, temperature=0, **one)
        return answer.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda one: ask(server, one), options))
        expected = list(pool.map(lambda one: ask(alone, one), options))
    assert server.worker.counters.preemptions > 0
    assert texts == expected
    assert server.worker.memory.peak <= limit
    server.idle()
    tiers = {kind for elsewhere in seen for kind in elsewhere}
    assert (
        tiers == {"swap": {"swap/packed"}, "disk": {"disk/swap"}, "both": {"swap/packed", "disk/swap"}}[place]
    )
    assert max(elsewhere.get("swap/packed", 0) for elsewhere in seen) <= server.worker.swap.peak
    assert server.worker.swap.peak <= SPACES[place]
    assert server.worker.memory.held() == 0
    assert not server.worker.memory.elsewhere()
    assert not list(tmp_path.rglob("*.kv"))


def watch(server) -> list[dict[str, int]]:
    """What lies outside the memory, looked at by the worker whenever it has preempted somebody.

    The ledger must agree with the files that are there.
    """
    seen: list[dict[str, int]] = []
    suspend, directory = server.worker._suspend, server.worker._scratch.path

    def suspended(job) -> None:
        suspend(job)
        elsewhere = server.worker.memory.elsewhere()
        assert elsewhere.get("disk/swap", 0) == sum(file.stat().st_size for file in directory.glob("*"))
        seen.append(elsewhere)

    server.worker._suspend = suspended
    return seen


def test_swapped_requests_are_counted_and_shown(start, tmp_path):
    """While one client's answer waits in the swap, page and metrics say so."""
    space = 1 << 20
    server = start(max_num_seqs=2, swap_space=space, swap_dir=tmp_path)
    shown = []

    def ask(user: str) -> None:
        server.client().completions.create(
            model="tiny", prompt=prompt(300, 1), max_tokens=1200, user=user, extra_body=BODY
        )

    threads = [threading.Thread(target=ask, args=(user,)) for user in ("a", "a", "b")]
    for thread in threads[:2]:
        thread.start()
    while len(server.worker.running()) < 2:
        time.sleep(0.01)
    threads[2].start()
    with server.http() as http:
        while any(thread.is_alive() for thread in threads):
            state = http.get("/stats").json()
            if state["swapped"]:
                shown.append((state, http.get("/metrics").text))
            time.sleep(0.02)
    assert server.worker.counters.preemptions > 0
    state, _ = shown[0]
    assert 0 < state["kv_elsewhere"]["swap/packed"] <= space == state["swap_space"]
    name = '{model_name="tiny"}'
    lines = [line for _, text in shown for line in text.splitlines()]
    assert f"vllm:num_requests_swapped{name} 1.0" in lines
    assert any(line.startswith(f"vllm:cpu_cache_usage_perc{name} 0.") for line in lines)
    assert any('tier="swap"' in line and 'codec="packed"' in line for line in lines)
    server.idle()
    with server.http() as http:
        end = http.get("/metrics").text
    assert f"vllm:num_requests_swapped{name} 0.0" in end
    assert 'tier="swap"' not in end


@pytest.mark.parametrize(("kind", "space"), [("swap/packed", 1 << 20), ("disk/swap", 0)])
def test_a_client_that_goes_away_while_its_request_is_swapped_frees_it(start, tmp_path, kind, space):
    server = start(max_num_seqs=2, swap_space=space, swap_dir=tmp_path)
    options = {
        "model": "tiny",
        "prompt": prompt(300, 1),
        "max_tokens": 1500,
        "stream": True,
        "extra_body": BODY,
    }
    crowd = []
    for _ in range(2):
        crowd.append(server.client().completions.create(user="a", **options))
        next(iter(crowd[-1]))
    modest = server.client().completions.create(user="b", **options)
    chunks = iter(modest)
    next(chunks)  # it could only start because the younger of the others made way
    assert set(server.worker.memory.elsewhere()) == {kind}
    crowd[1].response.close()
    end = time.monotonic() + 5
    while server.between_steps(server.worker.memory.elsewhere):
        assert time.monotonic() < end, "the swap still holds a request that nobody waits for"
        next(chunks)
    assert not list(tmp_path.rglob("*.kv"))
    assert sorted(job.client for job in server.worker.running()) == ["user:a", "user:b"]
    assert server.worker.counters.ended == {"cancelled": 1}
    for stream in (crowd[0], modest):
        stream.response.close()
    server.idle(5)
    assert server.worker.counters.ended == {"cancelled": 3}
    assert set(server.worker.memory.by_kind()) == {"host/pool"}


def test_where_the_disk_fails_only_the_preempted_fail(start):
    server = start(kv_memory=5 << 18, prefix_caching=False)
    server.worker._scratch.close()
    options = [{"model": "tiny", "prompt": prompt(20, i), "max_tokens": 400} for i in range(6)]

    def ask(one: dict) -> int:
        try:
            server.client().completions.create(extra_body=BODY, **one)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(ask, options))
    assert set(statuses) == {200, 503}
    assert server.worker.failure is None
    server.idle()
    assert server.worker.memory.held() == 0
    assert ask(options[0]) == 200


def test_what_a_killed_server_left_in_the_swap_is_removed(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from winnow.serve.scratch import Scratch; "
        "one = Scratch(Path(sys.argv[1])); (one.path / '7.kv').write_bytes(bytes(100)); "
        "print(one.path, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        left = Path(other.stdout.readline().strip())
        os.utime(left, (1, 1))  # old enough
        living = Scratch(tmp_path)
        assert (left / "7.kv").exists()  # its process lives
        other.kill()
        other.wait()
    os.utime(left, (1, 1))
    with contextlib.closing(Scratch(tmp_path)):
        assert not left.exists()
        assert living.path.exists()
    living.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--swap-dir"):
        Scratch(tmp_path / "missing")


def test_what_can_never_fit_is_refused_at_once(start):
    server = start(kv_memory=1 << 20)
    begin = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="KV memory"):
        server.client().completions.create(model="tiny", prompt=prompt(1500, 1), max_tokens=500)
    assert time.monotonic() - begin < 5


def test_a_prompt_that_is_being_computed_is_not_computed_twice(start):
    server = start(max_num_batched_tokens=64)
    shared = prompt(640, 1)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(
                lambda i: server.client().completions.create(
                    model="tiny", prompt=[*shared, *prompt(5, i)], max_tokens=2
                ),
                range(6),
            )
        )
    cached = sorted(a.usage.prompt_tokens_details.cached_tokens for a in answers)
    assert cached == [0, 640, 640, 640, 640, 640]
