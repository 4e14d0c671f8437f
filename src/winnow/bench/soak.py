"""``winnow bench soak``: many mixed requests with random cancels; nothing may leak, stick or be lost."""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from winnow.bench.machine import describe
from winnow.bench.serve_model import words, write_model
from winnow.bench.serve_servers import Start, free_port, launched
from winnow.methods import load
from winnow.models.random import PRESETS

__all__ = ["check", "run"]

# PR_SET_NAME: what a list of processes calls the server.
_PROGRAM = (
    "import ctypes; ctypes.CDLL(None).prctl(15, b'winnow_soak', 0, 0, 0); from winnow.cli import main; main()"
)
_KV_MEMORY = 5 << 19  # tight: the pools give way all the time, and requests are preempted
_SWAP_SPACE = 96 << 10  # takes some of them; the rest go to disk
_KV_DIR = 1 << 20  # files go, too
_BLEND = "blend"
_PATIENCE = 300.0  # seconds within which everything must have ended


def _request(dice: random.Random, vocabulary: int, shared: str) -> tuple[str, dict[str, Any]]:
    """A request of a random kind: path and body."""
    body: dict[str, Any] = {
        "model": "soak",
        "max_tokens": dice.choice([dice.randint(1, 40), dice.randint(1, 300)]),
        "temperature": dice.choice([0, 1.0]),
        "stream": dice.random() < 0.5,
        "cache_salt": dice.choice(["", "a", "b"]),
        "priority": dice.randint(-1, 1),
        "user": f"client-{dice.randrange(6)}",
        "recipe": dice.choice(["full", "snapkv", "small"]),
    }
    own = words(dice.randint(1, 600), vocabulary, dice)
    text = f"{shared} {own}" if dice.random() < 0.6 else own
    if dice.random() < 0.15:
        pieces = [words(40, vocabulary, random.Random(dice.randrange(8))) for _ in range(3)]
        return "/v1/completions", {**body, "recipe": _BLEND, "prompt": " # ".join([*pieces, text])}
    if dice.random() < 0.5:
        return "/v1/completions", {**body, "prompt": text, "logprobs": dice.choice([None, 2])}
    if body["temperature"]:
        body["n"] = dice.randint(1, 3)
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}


def _recipes(root: Path) -> list[str]:
    """Recipes for the server: everything kept, entries dropped, a pool in a codec, a pool of chunks."""
    for name, made in (
        ("small", load("prefix-reuse", codec="int8")),
        (_BLEND, load("cacheblend", separator=" # ")),
    ):
        (root / f"{name}.yaml").write_text(made.to_yaml())
    return ["full", "snapkv", str(root / "small.yaml"), str(root / f"{_BLEND}.yaml")]


def _send(port: int, seed: int, vocabulary: int, shared: str, ends: Counter[str]) -> None:
    """Send one request; a fifth of the clients hang up before they have their answer."""
    dice = random.Random(seed)
    path, body = _request(dice, vocabulary, shared)
    leaves = dice.random() < 0.2
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        if leaves:
            time.sleep(dice.random() * 0.3)
            ends["left"] += 1
            return
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != 200:
            ends[f"status {reply.status}"] += 1
        elif body["stream"]:
            ends["whole" if text.endswith(b"data: [DONE]\n\n") else "cut short"] += 1
        else:
            ends["whole" if json.loads(text)["usage"]["completion_tokens"] else "empty"] += 1
    except (OSError, http.client.HTTPException) as error:
        ends[type(error).__name__] += 1
    finally:
        connection.close()


def _get(port: int, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as reply:
        found: dict[str, Any] = json.load(reply)
        return found


def _idle(port: int) -> dict[str, Any]:
    """The server's state once nothing runs or waits."""
    end = time.monotonic() + _PATIENCE
    while True:
        state = _get(port, "/stats")
        # The bytes are measured between steps: those of the last one are meant.
        measured = state["kv_bytes_at_step"] == state["counters"]["steps"]
        if measured and not state["running"] and not state["waiting"]:
            return state
        if time.monotonic() > end:
            stuck = [one for one in state["requests"] if one["ended"] is None]
            raise ValueError(f"requests are stuck: {stuck}")
        time.sleep(0.05)


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(one for one in status.splitlines() if one.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def run(
    *,
    requests: int = 2000,
    clients: int = 8,
    batch: int = 100,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Send ``requests`` from ``clients`` threads to a server of its own; look at it after each batch.

    Returns
    -------
    dict
        Counts of how requests ended, resident bytes after each batch, and the ledger at the end.
    """
    vocabulary = PRESETS["tiny"]["vocab_size"]
    shared = words(300, vocabulary, random.Random(seed))
    with tempfile.TemporaryDirectory(prefix="winnow-soak-") as temporary:
        root, port = Path(temporary), free_port()
        write_model(root / "model", "tiny")
        swap, kept = root / "swap", root / "kept"
        swap.mkdir()
        recipes = _recipes(root)
        command = [
            *(sys.executable, "-c", _PROGRAM, "serve", str(root / "model")),
            *("--port", str(port), "--served-model-name", "soak", "--kv-memory", str(_KV_MEMORY)),
            *(option for recipe in recipes for option in ("--recipe", recipe)),
            *("--max-num-seqs", "6", "--max-num-batched-tokens", "256", "--log-level", "warning"),
            *("--swap-space", f"{_SWAP_SPACE}B", "--swap-dir", str(swap)),
            *("--kv-dir", str(kept), "--kv-dir-size", str(_KV_DIR)),
        ]
        ends: Counter[str] = Counter()
        resident: list[int] = []
        files: list[int] = []
        with launched(Start(command=command, port=port), root / "log") as process:
            for first in range(0, requests, batch):
                seeds = list(range(first, min(first + batch, requests)))
                lock = threading.Lock()

                def work(seeds: list[int] = seeds, lock: threading.Lock = lock) -> None:
                    while True:
                        with lock:
                            if not seeds:
                                return
                            number = seeds.pop()
                        _send(port, seed * 1_000_003 + number, vocabulary, shared, ends)

                threads = [threading.Thread(target=work) for _ in range(clients)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                state = _idle(port)
                resident.append(_resident(process.pid))
                files.append(sum(one.stat().st_size for one in kept.glob("*.kv")))
                if progress is not None:
                    progress("soak", min(first + batch, requests), requests)
            urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/reset_prefix_cache", method="POST")
            ).close()
            after = _get(port, "/stats")
            swapped = [str(one.relative_to(swap)) for one in swap.rglob("*.kv")]
            left = [one.name for one in kept.iterdir()]
            log = (root / "log").read_text(errors="replace")
    return {
        "command": "winnow bench soak",
        "config": {"requests": requests, "clients": clients, "batch": batch, "seed": seed},
        "machine": describe(),
        "ends": dict(ends),
        "server_ends": state["counters"]["ended"],
        "preemptions": state["counters"]["preemptions"],
        "resident": resident,
        "kv_limit": state["kv_limit"],
        "kv_peak": state["kv_peak"],
        "kv_idle": state["kv_bytes"],
        "kv_idle_elsewhere": state["kv_elsewhere"],
        "kv_after_reset": {**after["kv_bytes"], **after["kv_elsewhere"]},
        "swap_space": state["swap_space"],
        "swap_peak": state["swap_peak"],
        "swap_files": swapped,
        "kv_dir_limit": _KV_DIR,
        "kv_dir_bytes": files,
        "kv_dir_files_after_reset": left,
        "log": log[-2000:],
    }


def check(report: dict[str, Any]) -> list[str]:
    """What is wrong with a soak; empty where it passed."""
    wrong = []
    asked = report["config"]["requests"]
    if sum(report["ends"].values()) != asked:
        wrong.append(f"{asked} requests were sent and {sum(report['ends'].values())} ended")
    if bad := {end: n for end, n in report["ends"].items() if end not in ("whole", "left")}:
        wrong.append(f"requests ended badly: {bad}")
    if not 0 < report["kv_peak"] <= report["kv_limit"]:
        wrong.append(f"KV memory peaked at {report['kv_peak']} of {report['kv_limit']}")
    if set(report["kv_idle"]) != {"host/pool", "host/chunks"}:
        wrong.append(f"sequences still hold memory: {report['kv_idle']}")
    if not 0 < report["kv_idle"]["host/chunks"] + report["kv_idle"]["host/pool"] <= report["kv_limit"]:
        wrong.append(f"the pools hold {report['kv_idle']} of {report['kv_limit']}")
    if set(report["kv_idle_elsewhere"]) != {"disk/pool"}:
        wrong.append(f"preempted sequences still wait somewhere: {report['kv_idle_elsewhere']}")
    if any(report["kv_after_reset"].values()):
        wrong.append(f"KV memory is not accounted for: {report['kv_after_reset']}")
    if not 0 < report["swap_peak"] <= report["swap_space"]:
        wrong.append(f"the swap peaked at {report['swap_peak']} of {report['swap_space']}")
    if report["swap_files"]:
        wrong.append(f"files of preempted sequences are left: {report['swap_files']}")
    if not 0 < max(report["kv_dir_bytes"]) <= report["kv_dir_limit"]:
        wrong.append(f"the files took {max(report['kv_dir_bytes'])} of {report['kv_dir_limit']} bytes")
    if report["kv_dir_files_after_reset"]:
        wrong.append(f"files are left after a reset: {report['kv_dir_files_after_reset']}")
    resident = report["resident"]
    if len(resident) >= 8:
        plateau, last = median(resident[len(resident) // 2 :]), resident[-1]
        if last > 1.05 * plateau or plateau > 1.05 * median(
            resident[len(resident) // 4 : len(resident) // 2]
        ):
            wrong.append(f"resident memory grows: {resident}")
    if report["log"].strip():
        wrong.append(f"the server complained: {report['log']}")
    return wrong
