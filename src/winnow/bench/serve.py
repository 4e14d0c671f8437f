"""``winnow bench serve``: the same load on Winnow's server and on its peers, one after the other."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from winnow.bench import serve_load
from winnow.bench.machine import describe
from winnow.bench.serve_load import Exchange
from winnow.bench.serve_model import words, write_model
from winnow.models.random import PRESETS

__all__ = ["SERVERS", "draw", "launched", "run", "table"]

_TIMEOUT = 3600.0
SERVERS = ("winnow", "transformers", "transformers batching")


def _command(name: str, model: Path, port: int, options: Sequence[str]) -> list[str]:
    if name == "winnow":
        program = "from winnow.cli import main; main()"
        patient = ["--request-timeout", str(_TIMEOUT)]  # peers have no limit
        return [sys.executable, "-c", program, "serve", str(model), "--port", str(port), *patient, *options]
    found = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    # Its own default takes nine tenths of the machine for the cache, used or not.
    batching = ["--continuous-batching", "--cb-max-memory-percent", "0.25"] if "batching" in name else []
    return [found, "serve", str(model), "--port", str(port), "--device", "cpu", "--dtype", "auto", *batching]


def _shown(command: Sequence[str], model: Path) -> str:
    """A command without what is this machine's own."""
    words = ["MODEL" if word == str(model) else word for word in command]
    if words[1] == "-c":
        return " ".join(["winnow", *words[3:]])
    return " ".join([Path(words[0]).name, *words[1:]])


def _missing(name: str) -> str | None:
    """Why a peer cannot run here."""
    for package in () if name == "winnow" else ("accelerate", "fastapi", "uvicorn"):
        if find_spec(package) is None:
            return f"{package} is missing; install winnow-llm[serve,peers]"
    return None


@contextlib.contextmanager
def launched(
    command: Sequence[str], port: int, log: Path, *, patience: float = 600.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that answers on ``port``; it is ended afterwards.

    Parameters
    ----------
    command : sequence of str
    port : int
    log : Path
        Gets what the process prints.
    patience : float
        Seconds until it must answer.

    Raises
    ------
    ValueError
        It ended or did not answer in time; the end of its log is in the message.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if process.poll() is not None or time.monotonic() > end:
                said = log.read_text(errors="replace")[-600:]
                raise ValueError(f"the server {command[0]} did not start; it said: {said}")
            time.sleep(0.1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _peak(process: subprocess.Popen[bytes]) -> int:
    """Most resident bytes that a process ever had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next(one for one in status.splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


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
            serve_load.ask(port, model, messages, 2, exchange, _TIMEOUT)
            if exchange.error:
                return {"error": exchange.error}
            times[kind].append(exchange.first)
    cold, hit = median(times["cold"]), median(times["hit"])
    return {**times, "ratio": cold / hit}


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
    progress: Any = None,
) -> dict[str, Any]:
    """Start each server in turn on the same weights, probe it, load it, end it.

    Parameters
    ----------
    servers : sequence of str
        Names from :data:`SERVERS`.
    workload, clients, turns, prefix, question, answer, rate
        See :func:`winnow.bench.serve_load.workload`.
    preset : {"1b", "tiny"}
    first_deadline, token_deadline : float
        Seconds; see :func:`winnow.bench.serve_load.summary`.
    repeats : int
        Of the probe on the idle server.
    options : sequence of str
        Further options of ``winnow serve``.
    model : Path or None
        Directory of an earlier run to take again, or to write; None writes a temporary one.
    progress : callable or None
        Called with a text, a count and a total.

    Returns
    -------
    dict
        Configuration, machine, and per server the summary with raw samples; JSON-ready.
    """
    for name in servers:
        if name not in SERVERS:
            raise ValueError(f"unknown server {name!r}; choose {', '.join(SERVERS)}")
    # A peer that is not installed is left out of a run of all, and said to be.
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
            port = free_port()
            log = Path(temporary) / f"{number}.log"
            if (why := _missing(name)) is not None:
                report["missing"][name] = why
                continue
            command = _command(name, directory, port, options if name == "winnow" else ())
            with launched(command, port, log) as process:
                warm = Exchange(conversation=-1, turn=0, begin=0.0)
                hello = [{"role": "user", "content": "w20 w21 w22"}]
                serve_load.ask(port, str(directory), hello, 2, warm, _TIMEOUT)
                found: dict[str, Any] = {"command": _shown(command, directory)}
                found["probe"] = _probe(port, str(directory), prefix, question, vocabulary, repeats)
                exchanges, seconds = serve_load.drive(port, str(directory), conversations)
                found |= serve_load.summary(
                    exchanges, seconds, first_deadline=first_deadline, token_deadline=token_deadline
                )
                found["peak_bytes"] = _peak(process)
            report["servers"][name] = found
    best = report["servers"].get("winnow")
    for name, found in report["servers"].items():
        if best is not None and name != "winnow" and found["goodput_per_second"]:
            found["winnow_goodput_times"] = best["goodput_per_second"] / found["goodput_per_second"]
    return report


def _cell(spread: dict[str, float] | None) -> str:
    return "none" if spread is None else f"{spread['median']:.3g} / {spread['p95']:.3g}"


def table(report: dict[str, Any]) -> Table:
    """One row per server."""
    config = report["config"]
    drawn = Table(
        title=(
            f"{config['workload']}, {config['clients']} clients, {config['turns']} turns, prefix of "
            f"{config['prefix']} tokens, {config['preset']}"
        ),
        caption=(
            f"good: first token within {config['first_deadline']:g} s and {config['token_deadline']:g} s "
            "per token; times: median / 95th percentile; hit: how much sooner the first token of a known "
            "prefix comes on an idle server"
        ),
    )
    for name in ("server", "good/s", "first token, s", "per token, s", "reused", "hit", "GiB", "failed"):
        drawn.add_column(name, justify="left" if name == "server" else "right")
    for name, found in report["servers"].items():
        ratio = found["probe"].get("ratio")
        drawn.add_row(
            name,
            f"{found['goodput_per_second']:.3g}",
            _cell(found["first_token"]),
            _cell(found["per_token"]),
            "" if found["hit_rate"] is None else f"{found['hit_rate']:.0%}",
            "" if ratio is None else f"{ratio:.1f} x",
            f"{found['peak_bytes'] / 2**30:.1f}",
            str(found["failed"]),
        )
    return drawn


def draw(report: dict[str, Any], path: Path) -> None:
    """First-token times of every request over time, one colour per server, and the goodput beside it.

    Raises
    ------
    ValueError
        Without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing; install winnow-llm[plot] for the figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    names = list(report["servers"])
    colours = [f"C{i}" for i in range(len(names))]
    for name, colour in zip(names, colours, strict=True):
        samples = [one for one in report["servers"][name]["samples"] if not one["error"]]
        times.scatter(
            [one["begin"] for one in samples], [one["first"] for one in samples], s=14, c=colour, label=name
        )
    times.axhline(report["config"]["first_deadline"], color="0.5", lw=1, ls="--")
    times.set(xlabel="request sent, s after the start", ylabel="first token after, s", yscale="log")
    times.legend(frameon=False)
    rates = [report["servers"][name]["goodput_per_second"] for name in names]
    bars.bar(names, rates, color=colours)
    bars.set(ylabel="good answers per second")
    bars.tick_params(axis="x", rotation=15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None} if os.fspath(path).endswith("png") else None)
