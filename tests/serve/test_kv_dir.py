"""Finished sequences outlive the process: packed without loss, bounded, and torn files go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch

from winnow.engine.engine import Engine
from winnow.engine.request import Result, SamplingParams
from winnow.methods import load
from winnow.recipe import Recipe
from winnow.retrieval.radix import Radix
from winnow.serve.kv_dir import FilePool
from winnow.store import files
from winnow.store.form import stored_rows

PAGE = 64
RECIPE = load("prefix-reuse")


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, 900, (length,), generator=generator).tolist()


def opened(model, directory: Path, limit: int = 1 << 30, capacity: int = 64 << 20) -> FilePool:
    memory = Radix(page=PAGE, capacity_bytes=capacity).pool()
    return FilePool(memory, directory, limit, model, page=PAGE, capacity=capacity)


def finished(model, pool: FilePool, tokens: list[int], salt: str = "", recipe: Recipe = RECIPE) -> Result:
    engine = Engine(model, recipe)
    engine.pool = pool
    params = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=0)
    result = engine.submit(tokens, params, salt=salt)
    while engine.busy:
        engine.step()
    return result


def answer(model, pool: FilePool, tokens: list[int], salt: str = "") -> tuple[list[int], int]:
    result = finished(model, pool, tokens, salt)
    return result.token_ids, result.stats.tokens_reused


def test_another_process_finds_what_this_one_left(model, tmp_path):
    tokens = prompt(400, 1)
    first = opened(model, tmp_path)
    cold, reused = answer(model, first, tokens)
    assert reused == 0
    first.close()
    second = opened(model, tmp_path)
    assert second.bytes() == 0
    assert second.bytes_on_disk() == sum(f.stat().st_size for f in tmp_path.iterdir())
    warm, reused = answer(model, second, [*tokens[:300], 5, *tokens[301:]])
    assert reused == 256  # whole pages of what both have in common
    warm, reused = answer(model, second, tokens)
    assert (warm, reused) == (cold, 384)
    second.close()


def test_a_longer_sequence_replaces_its_beginning(model, tmp_path):
    pool = opened(model, tmp_path)
    tokens = prompt(200, 1)
    answer(model, pool, tokens)
    pool.flush()
    (short,) = tmp_path.iterdir()
    answer(model, pool, [*tokens, *prompt(200, 2)])
    pool.flush()
    (long,) = tmp_path.iterdir()
    assert long != short
    assert answer(model, pool, tokens)[1] == 192
    pool.close()


def test_files_are_smaller_than_memory_and_lose_nothing(model, tmp_path):
    tokens = prompt(1000, 1)
    pool = opened(model, tmp_path)
    answer(model, pool, tokens)
    held = pool.bytes()
    before = entries(pool, tokens)
    pool.close()
    second = opened(model, tmp_path)
    assert second.bytes_on_disk() < 0.9 * held  # float32: of four bytes, one shrinks
    answer(model, second, tokens)
    for one, other in zip(before, entries(second, tokens), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    second.close()


def entries(pool: FilePool, tokens: list[int]) -> list[torch.Tensor]:
    """Copies of every table that the pool in memory has for a prompt."""
    (namespace,) = pool._memory._roots
    match = pool._memory.match([*tokens, 0], namespace)
    rows = [stored_rows(segment).planes for layer in match.layers for segment in layer]
    pool.release(match)
    return [table.clone() for planes in rows for plane in planes for table in plane]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_pool_in_a_codec_keeps_files_in_it_and_reuse_is_called_approximate(model, tmp_path, codec):
    tokens, recipe = prompt(1000, 1), load("prefix-reuse", codec=codec)
    first = opened(model, tmp_path)
    exact = finished(model, first, tokens, "raw").samples[0]
    cold = finished(model, first, tokens, recipe=recipe)
    assert cold.samples[0].logprobs == exact.logprobs  # what was computed is not rounded
    warm = finished(model, first, tokens, recipe=recipe)
    assert (warm.stats.tokens_reused, warm.stats.tokens_approximate) == (0, 960)
    first.close()
    sizes = {files.read_header(file)["codec"]: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes[codec] < {"int8": 0.4, "int4": 0.25}[codec] * sizes["raw"]
    second = opened(model, tmp_path)
    again = finished(model, second, tokens, recipe=recipe)
    assert again.stats.tokens_approximate == 960
    # The file holds the codec's bytes: nothing was decoded and encoded on the way.
    assert again.samples[0].logprobs == warm.samples[0].logprobs
    assert finished(model, second, tokens, "raw").samples[0].logprobs == exact.logprobs
    second.close()


def test_raw_files_of_earlier_versions_are_served(model, tmp_path, monkeypatch):
    tokens = prompt(400, 1)
    save = files.save
    monkeypatch.setattr(
        files, "save", lambda store, path, header, **_: save(store, path, {"pages": header["pages"]})
    )
    pool = opened(model, tmp_path)
    cold = answer(model, pool, tokens)[0]
    pool.close()
    monkeypatch.undo()
    again = opened(model, tmp_path)
    assert answer(model, again, tokens) == (cold, 384)
    again.close()


def test_a_codec_is_served_beside_exact_reuse_and_told_apart(start, tmp_path):
    recipes = {"full": Recipe(), "small": load("prefix-reuse", codec="int8")}
    server = start(recipes=recipes, kv_dir=tmp_path)
    client, body = server.client(), {"model": "tiny", "prompt": prompt(400, 1), "max_tokens": 2}

    def told(recipe: str) -> tuple[int, int]:
        details = client.completions.create(**body, extra_body={"recipe": recipe}).usage.prompt_tokens_details
        return details.cached_tokens, details.approximate_tokens

    assert [told("small"), told("full")] == [(0, 0), (0, 0)]
    assert [told("small"), told("full")] == [(0, 384), (384, 0)]
    server.worker.memory.pools[0].flush()
    assert {files.read_header(file)["codec"] for file in tmp_path.iterdir()} == {"raw", "int8"}
    with server.http() as http:
        deadline = time.monotonic() + 10
        while "disk/pool" not in (kinds := http.get("/stats").json()["kv_elsewhere"]):
            assert time.monotonic() < deadline
            client.completions.create(**body)
        assert kinds["disk/pool"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    with pytest.raises(ValueError, match="page: 64"):
        start(recipes={"odd": load("prefix-reuse", page=16)}, kv_dir=tmp_path / "other")


def test_salts_and_models_do_not_meet(model, tmp_path):
    tokens = prompt(200, 1)
    pool = opened(model, tmp_path)
    answer(model, pool, tokens, salt="a")
    pool.close()
    again = opened(model, tmp_path)
    assert answer(model, again, tokens, salt="b")[1] == 0
    assert answer(model, again, tokens, salt="a")[1] == 192
    again.close()
    assert not any(b"salt" in f.name.encode() for f in tmp_path.iterdir())


def test_the_least_recently_used_go_first(model, tmp_path):
    pool = opened(model, tmp_path)
    prompts = [prompt(300, i) for i in range(4)]
    for one in prompts[:3]:
        answer(model, pool, one)
        pool.flush()
    size = pool.bytes_on_disk() // 3
    pool.close()
    old = time.time()
    for age, file in enumerate(sorted(tmp_path.iterdir(), key=lambda f: f.stat().st_mtime)):
        os.utime(file, (old - 100 + age, old - 100 + age))
    pool = opened(model, tmp_path, limit=3 * size + size // 2)
    assert answer(model, pool, prompts[0])[1] == 256  # the oldest is used, so it is not the oldest any more
    answer(model, pool, prompts[3])
    pool.close()
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 3 * size + size // 2
    pool = opened(model, tmp_path)
    assert [answer(model, pool, one)[1] for one in prompts] == [256, 0, 256, 256]
    pool.close()


def test_the_size_limit_holds_while_a_file_takes_its_name(model, tmp_path, monkeypatch):
    pool = opened(model, tmp_path)
    answer(model, pool, prompt(300, 0))
    pool.close()
    limit, most = 3 * pool.bytes_on_disk(), 0
    replace = os.replace

    def watched(source, target) -> None:
        nonlocal most
        replace(source, target)
        most = max(most, sum(f.stat().st_size for f in tmp_path.iterdir()))

    monkeypatch.setattr(os, "replace", watched)
    pool = opened(model, tmp_path, limit=limit)
    for seed in range(8):
        answer(model, pool, prompt(300, seed))
        pool.flush()
    pool.close()
    assert limit / 2 < most <= limit


@pytest.mark.parametrize("damage", ["short", "flipped", "foreign", "header", "part"])
def test_damage_is_dropped_and_the_rest_served(model, tmp_path, damage):
    pool = opened(model, tmp_path)
    good, bad = prompt(200, 1), prompt(200, 2)
    cold = answer(model, pool, bad)[0]
    pool.flush()
    (file,) = tmp_path.iterdir()
    answer(model, pool, good)
    pool.close()
    data = bytearray(file.read_bytes())
    if damage == "short":
        file.write_bytes(data[:-500])
    elif damage == "flipped":
        data[-500] ^= 1
        file.write_bytes(data)
    elif damage == "foreign":
        file.write_bytes(b"something else")
    elif damage == "header":
        data[30] ^= 1
        file.write_bytes(data)
    else:
        file.rename(tmp_path / f".{file.name}.x.part")
    pool = opened(model, tmp_path)
    assert answer(model, pool, bad) == (cold, 0)
    assert pool.dropped == 1
    assert answer(model, pool, good)[1] == 192
    pool.close()
    assert not list(tmp_path.glob(".*"))


def test_reading_a_file_stays_within_the_memory(model, tmp_path):
    tokens = prompt(400, 1)
    pool = opened(model, tmp_path)
    answer(model, pool, tokens)
    pool.close()
    size = files.read_header(next(iter(tmp_path.iterdir())))["memory"]
    pool = opened(model, tmp_path, capacity=2 * size - 1)  # too little for the file and its copy at a time
    assert answer(model, pool, tokens)[1] == 0
    pool.close()
    pool = opened(model, tmp_path, capacity=2 * size)
    peak = 0
    insert = pool._memory.insert

    def watched(*arguments) -> int:
        nonlocal peak
        new = insert(*arguments)
        peak = max(peak, pool.bytes())
        return new

    pool._memory.insert = watched
    assert answer(model, pool, tokens)[1] == 384
    assert size < peak <= 2 * size
    pool.close()


def test_reset_forgets_the_files_too(start, tmp_path):
    server = start(kv_dir=tmp_path)
    options = {"model": "tiny", "prompt": prompt(200, 1), "max_tokens": 1}
    client = server.client()
    client.completions.create(**options)
    assert client.completions.create(**options).usage.prompt_tokens_details.cached_tokens == 192
    server.worker.memory.pools[0].flush()
    with server.http() as http:
        http.post("/reset_prefix_cache")
    assert not list(tmp_path.iterdir())
    assert client.completions.create(**options).usage.prompt_tokens_details.cached_tokens == 0


def test_a_file_that_is_being_written_does_not_outlive_a_reset(model, tmp_path, monkeypatch):
    pool = opened(model, tmp_path)
    save, begun = files.save, threading.Event()

    def slowly(*arguments, **options) -> None:
        begun.set()
        time.sleep(0.2)
        save(*arguments, **options)

    monkeypatch.setattr(files, "save", slowly)
    for seed in range(3):
        answer(model, pool, prompt(200, seed))
    assert begun.wait(10)
    pool.clear()
    pool.flush()
    assert not list(tmp_path.iterdir())
    assert pool.bytes() == pool.bytes_on_disk() == 0
    pool.close()


def launch(directory: Path, log: Path) -> tuple[subprocess.Popen, str]:
    program = "from winnow.cli import main; main()"
    options = ["serve", "embedded", "--port", "0", "--kv-dir", str(directory)]
    command = [sys.executable, "-c", program, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=log.open("w"), env=environment)
    end = time.monotonic() + 120
    while '"message": "serving"' not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.05)
    line = next(one for one in log.read_text().splitlines() if '"message": "serving"' in one)
    return process, f"http://127.0.0.1:{json.loads(line)['port']}"


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_writes_starts_again_and_serves_the_rest(tmp_path):
    """kill -9 with files half written, from outside, on the real command."""
    directory, log = tmp_path / "kv", tmp_path / "log"
    process, url = launch(directory, log)
    body = {"model": "embedded", "max_tokens": 2, "temperature": 0}
    known = prompt(1500, 0)
    with httpx.Client(base_url=url, timeout=60) as http:
        first = http.post("/v1/completions", json={**body, "prompt": known}).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        while not list(directory.glob("*.kv")):
            time.sleep(0.01)
        whole = set(directory.glob("*.kv"))
        # A half-written file is there for a moment only: stop the process where one is seen.
        for seed in range(1, 60):
            http.post("/v1/completions", json={**body, "prompt": prompt(3000, seed)})
            for _ in range(200):
                if list(directory.glob(".*.part")):
                    break
                time.sleep(0.0005)
            os.kill(process.pid, signal.SIGSTOP)
            if half := list(directory.glob(".*.part")):
                break
            os.kill(process.pid, signal.SIGCONT)
        assert half, "no file was ever half written"
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert half == list(directory.glob(".*.part"))
    torn = directory / f"{'0' * 32}.kv"
    torn.write_bytes(next(iter(whole)).read_bytes()[:-4096])
    process, url = launch(directory, log)
    try:
        assert not list(directory.glob(".*.part"))
        assert not torn.exists()
        assert '"dropped a KV file"' in log.read_text()
        with httpx.Client(base_url=url, timeout=60) as http:
            again = http.post("/v1/completions", json={**body, "prompt": known}).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 1472
        assert again["choices"] == first["choices"]
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
