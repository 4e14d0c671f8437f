"""``winnow bench serve``: the same load on Winnow's server and on its peers, one after the other."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from winnow.bench import serve_load, serve_servers
from winnow.bench.machine import describe
from winnow.bench.serve_load import Conversation, Exchange
from winnow.bench.serve_model import words, write_model
from winnow.bench.serve_report import with_curves
from winnow.bench.serve_servers import SERVERS, TIMEOUT
from winnow.models.random import PRESETS

__all__ = ["SERVERS", "run"]

# Tokens of a conversation beside those that are asked for: roles of the messages, and the first request's.
_ROOM = 256


def _probe(
    port: int, model: str, prefix: int, question: int, vocabulary: int, repeats: int
) -> dict[str, Any]:
    """First-token times on an idle server: a prefix that is new, then the same with another question."""
    times: dict[str, list[float]] = {"cold": [], "hit": []}
    for repeat in range(repeats):
        dice = random.Random(1000 + repeat)
        system = words(prefix, vocabulary, dice)
        for kind in ("cold", "hit"):
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": words(question, vocabulary, dice)},
            ]
            exchange = Exchange(conversation=-1, turn=repeat, begin=0.0)
            serve_load.ask(port, model, messages, 2, exchange, TIMEOUT)
            if exchange.error:
                return {"error": exchange.error}
            times[kind].append(exchange.first)
    cold, hit = median(times["cold"]), median(times["hit"])
    return {**times, "ratio": cold / hit}


def _measured(
    port: int, model: str, conversations: Sequence[Conversation], config: Mapping[str, Any], repeats: int
) -> dict[str, Any]:
    """What a server that has just started does with the probe, and with the load."""
    warm = Exchange(conversation=-1, turn=0, begin=0.0)
    serve_load.ask(port, model, [{"role": "user", "content": "w20 w21 w22"}], 2, warm, TIMEOUT)
    vocabulary = PRESETS[config["preset"]]["vocab_size"]
    probe = _probe(port, model, config["prefix"], config["question"], vocabulary, repeats)
    exchanges, seconds = serve_load.drive(port, model, conversations)
    deadlines = {name: config[name] for name in ("first_deadline", "token_deadline")}
    return {"probe": probe, **serve_load.summary(exchanges, seconds, **deadlines)}


def run(
    *,
    servers: Sequence[str] = SERVERS,
    workload: str = "multi-turn",
    preset: str = "1b",
    clients: int = 16,
    turns: int = 3,
    prefix: int = 4096,
    question: int = 64,
    answer: int = 32,
    rate: float = 2.0,
    first_deadline: float = 10.0,
    token_deadline: float = 1.0,
    repeats: int = 3,
    options: Sequence[str] = (),
    model: Path | None = None,
    pythons: Mapping[str, str] | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Start each server in turn on the same weights, probe it, load it, end it.

    Parameters
    ----------
    servers : sequence of str
        Names from :data:`winnow.bench.serve_servers.SERVERS`; a peer that cannot run here is left out, and
        ``missing`` of the report says why.
    workload, clients, turns, prefix, question, answer, rate
        See :func:`winnow.bench.serve_load.workload`.
    preset : {"1b", "tiny"}
    first_deadline, token_deadline : float
        Seconds; see :func:`winnow.bench.serve_load.goodput`.
    repeats : int
        Of the probe on the idle server.
    options : sequence of str
        Further options of ``winnow serve``.
    model : Path or None
        Directory of an earlier run to take again, or to write; None writes a temporary one.
    pythons : mapping, optional
        Interpreter by peer, for peers in environments of their own.
    progress : callable or None
        Called with a text, a count and a total.

    Returns
    -------
    dict
        Configuration, machine, and per server the summary with raw samples and its goodput at several
        deadlines; JSON-ready.
    """
    for name in servers:
        if name not in SERVERS:
            raise ValueError(f"unknown server {name!r}; choose {', '.join(SERVERS)}")
    vocabulary = PRESETS[preset]["vocab_size"]
    load = {
        "clients": clients,
        "turns": turns,
        "prefix": prefix,
        "question": question,
        "answer": answer,
        "rate": rate,
    }
    conversations = serve_load.workload(workload, **load, vocabulary=vocabulary)  # type: ignore[arg-type]
    report: dict[str, Any] = {
        "command": "winnow bench serve",
        "config": {
            "workload": workload,
            "preset": preset,
            **load,
            "first_deadline": first_deadline,
            "token_deadline": token_deadline,
            "options": list(options),
        },
        "machine": describe(),
        "servers": {},
        "missing": {},
    }
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as temporary:
        directory = model or Path(temporary) / "model"
        if not (directory / "tokenizer_config.json").exists():
            write_model(directory, preset)
        for number, name in enumerate(servers):
            if progress is not None:
                progress(name, number, len(servers))
            if (why := serve_servers.missing(name, pythons or {})) is not None:
                report["missing"][name] = why
                continue
            start = serve_servers.start(
                name,
                directory,
                serve_servers.free_port(),
                preset=preset,
                context=prefix + turns * (question + answer) + _ROOM,
                options=options,
                pythons=pythons or {},
            )
            with contextlib.ExitStack() as stack:
                try:
                    process = stack.enter_context(
                        serve_servers.launched(start, Path(temporary) / f"{number}.log")
                    )
                except ValueError as error:
                    if name == "winnow":
                        raise
                    report["missing"][name] = str(error)
                    continue
                found: dict[str, Any] = {"command": serve_servers.shown(start.command, directory)}
                found |= _measured(start.port, str(directory), conversations, report["config"], repeats)
                found["peak_bytes"] = serve_servers.peak(process)
            report["servers"][name] = found
    return with_curves(report)
