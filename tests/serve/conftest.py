"""Servers on real sockets, with a tiny random model that speaks the embedded model's words."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from winnow.models import embedded
from winnow.models.load import load_model
from winnow.models.text import Text
from winnow.recipe import Recipe
from winnow.serve.app import Service
from winnow.serve.config import Settings
from winnow.serve.run import build

VOCABULARY, END = 1023, 260


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)


@pytest.fixture(scope="session")
def module() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        eos_token_id=END,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model(module):
    return load_model(module)[0]


@pytest.fixture(scope="session")
def text(tokenizer):
    return Text(tokenizer)


@dataclass
class Running:
    """A server that listens."""

    url: str
    service: Service
    server: uvicorn.Server

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 60, **options})

    @property
    def worker(self):
        return self.service.worker

    def between_steps(self, look: Callable[[], Any]) -> Any:
        """What ``look`` gives when the worker does nothing else, so that lists, counters and bytes agree."""
        seen: Future[Any] = Future()
        self.worker.errand(lambda: seen.set_result(look()))
        return seen.result(timeout=20)

    def idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing runs or waits."""
        end = time.monotonic() + seconds
        while self.between_steps(lambda: self.worker.running() or self.worker.waiting()):
            assert time.monotonic() < end, "requests are stuck"
            time.sleep(0.01)


Start = Callable[..., Running]


@contextlib.contextmanager
def running(model: Any, text: Any, grace: int = 2, **options: Any) -> Iterator[Running]:
    """A server that listens; when it stops, requests have ``grace`` seconds to end."""
    build_options = {name: options.pop(name) for name in ("prefix_caching",) if name in options}
    settings = Settings(
        **{
            "served_model_name": "tiny",
            "recipes": {"full": Recipe()},
            "max_model_len": 2048,
            "kv_memory": 256 << 20,
            **options,
        }
    )
    app = build(model, text, settings, **build_options)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=grace)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = listener.getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def server(model, text) -> Iterator[Running]:
    """One server for the tests of a module that leave nothing behind."""
    with running(model, text) as one:
        yield one


@pytest.fixture
def start(model, text) -> Iterator[Start]:
    """Start servers with settings of their own."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(running(model, text, **options))
