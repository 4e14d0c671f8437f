"""Servers of the load test: how each is started on the same weights, and when it is ready.

==========================  ==================================================================
``winnow``                  this package
``transformers``            ``transformers serve``, one request at a time
``transformers batching``   the same with continuous batching
``llama.cpp``               the server of ``llama-cpp-python``: one sequence at a time, which keeps
                            the prefix of the one before it
``vllm``                    vLLM's server, by an interpreter of its own (its pins exclude others')
==========================  ==================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from winnow.bench.llama_cpp import write_gguf
from winnow.models.random import random_model

__all__ = ["SERVERS", "TIMEOUT", "Start", "free_port", "launched", "missing", "peak", "shown", "start"]

TIMEOUT = 3600.0  # seconds of one request
SERVERS = ("winnow", "transformers", "transformers batching", "llama.cpp", "vllm")

# Neither a package name nor its module can tell the other.
_NEEDED = {
    "transformers": ("accelerate", "fastapi", "uvicorn"),
    "llama.cpp": ("llama_cpp", "gguf", "sse_starlette", "starlette_context", "pydantic_settings"),
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a server is started.

    Attributes
    ----------
    command : list of str
    port : int
    ready : str
        Path that answers as soon as it takes requests.
    environment : dict
        What is set for it beside this process's own.
    """

    command: list[str]
    port: int
    ready: str = "/health"
    environment: dict[str, str] = field(default_factory=dict)


def missing(name: str, pythons: Mapping[str, str]) -> str | None:
    """Why a server cannot run here, with the remedy; None where it can."""
    if name == "vllm" and "vllm" not in pythons:
        return "it wants an environment of its own; give --peer-python vllm=PATH"
    for package in _NEEDED.get(name.partition(" ")[0], ()):
        if find_spec(package) is None:
            return f"{package} is missing; install winnow-llm[serve,peers]"
    return None


def start(
    name: str,
    model: Path,
    port: int,
    *,
    preset: str,
    context: int,
    options: Sequence[str] = (),
    pythons: Mapping[str, str],
) -> Start:
    """How to start a server on a model that :func:`winnow.bench.serve_model.write_model` wrote.

    Parameters
    ----------
    name : str
        Of :data:`SERVERS`.
    model : Path
        Its directory; what a peer needs in another form is written there.
    port : int
    preset : str
        Of the model.
    context : int
        Most tokens of a conversation, for servers that reserve memory for it.
    options : sequence of str
        Further options of ``winnow serve``.
    pythons : mapping
        Interpreter by peer.
    """
    if name == "winnow":
        program = "from winnow.cli import main; main()"
        patient = ["--request-timeout", str(TIMEOUT)]  # peers have no limit
        words = ["serve", str(model), "--port", str(port), *patient, *options]
        return Start(command=[sys.executable, "-c", program, *words], port=port)
    if name == "llama.cpp":
        config = _llama_cpp(model, port, preset=preset, context=context)
        return Start(
            command=[sys.executable, "-m", "llama_cpp.server", "--config_file", str(config)],
            port=port,
            ready="/v1/models",
        )
    if name == "vllm":
        words = ["--model", str(model), "--port", str(port), "--max-model-len", str(context)]
        return Start(
            command=[pythons["vllm"], "-m", "vllm.entrypoints.openai.api_server", *words],
            port=port,
            # By default it leaves one core to the rest of the machine; the others leave none.
            environment={"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"},
        )
    program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    # Its own default takes nine tenths of the machine for the cache, used or not.
    batching = ["--continuous-batching", "--cb-max-memory-percent", "0.25"] if "batching" in name else []
    words = ["serve", str(model), "--port", str(port), "--device", "cpu", "--dtype", "auto", *batching]
    return Start(command=[program, *words], port=port)


def _llama_cpp(model: Path, port: int, *, preset: str, context: int) -> Path:
    """Weights and configuration for llama.cpp's server, beside the model."""
    weights = model / "model.gguf"
    if not weights.exists():
        write_gguf(random_model(preset), weights)
    threads = torch.get_num_threads()
    config = {
        "host": "127.0.0.1",
        "port": port,
        "interrupt_requests": False,  # by default a newcomer ends the request that runs
        "models": [
            {
                "model": str(weights),
                "model_alias": str(model),
                "n_ctx": -(-context // 256) * 256,
                "n_batch": 512,
                "n_threads": threads,
                "n_threads_batch": threads,
                "logits_all": False,  # true by default, which keeps a row of the vocabulary per token
                "flash_attn": True,
                # The file has no vocabulary: text and tokens are those of the others.
                "hf_pretrained_model_name_or_path": str(model),
                "chat_format": "hf-autotokenizer",
                "chat_template_kwargs": {"add_generation_prompt": True},
                "verbose": False,
            }
        ],
    }
    path = model / "llama_cpp_server.json"
    path.write_text(json.dumps(config))
    return path


def shown(command: Sequence[str], model: Path) -> str:
    """A command without what is this machine's own."""
    words = [word.replace(str(model), "MODEL") for word in command]
    if words[1] == "-c":
        return " ".join(["winnow", *words[3:]])
    return " ".join([Path(words[0]).name, *words[1:]])


@contextlib.contextmanager
def launched(start: Start, log: Path, *, patience: float = 600.0) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that takes requests; it is ended afterwards.

    Parameters
    ----------
    start : Start
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
        process = subprocess.Popen(
            start.command, stdout=file, stderr=file, env={**os.environ, **start.environment}
        )
    url = f"http://127.0.0.1:{start.port}{start.ready}"
    try:
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url):
                break
            if process.poll() is not None or time.monotonic() > end:
                said = log.read_text(errors="replace")[-600:]
                raise ValueError(f"the server {start.command[0]} did not start; it said: {said}")
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


def peak(process: subprocess.Popen[bytes]) -> int:
    """Most resident bytes that a process and its children, each for itself, ever had."""
    return sum(_high_water(number) for number in _family(process.pid))


def _high_water(number: int) -> int:
    lines = Path(f"/proc/{number}/status").read_text().splitlines()
    found = next((line for line in lines if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(found.split()[1]) * 1024


def _family(number: int) -> list[int]:
    children: list[int] = []
    for thread in Path(f"/proc/{number}/task").iterdir():
        children += map(int, (thread / "children").read_text().split())
    return [number, *(one for child in children for one in _family(child))]
