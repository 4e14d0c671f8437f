"""From an operator's options to a running server."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

import winnow
from winnow import methods
from winnow.engine.embedding import Embedder
from winnow.engine.engine import Engine
from winnow.engine.scheduler import Limits
from winnow.kernels.backend import Backend
from winnow.models.swiftkv.model import transformed
from winnow.models.text import Text
from winnow.recipe import Recipe
from winnow.retrieval.protocol import Pool
from winnow.retrieval.radix import Radix
from winnow.serve.app import Service, make_app
from winnow.serve.config import Settings
from winnow.serve.embeddings import EMBEDDINGS, Embeddings
from winnow.serve.kv_dir import FilePool
from winnow.serve.metrics import Metrics
from winnow.serve.translate import Translator
from winnow.serve.worker import Worker
from winnow.types import LanguageModel

__all__ = ["build", "named_recipes", "serve"]

_log = logging.getLogger("winnow.serve")


def named_recipes(given: Sequence[str]) -> dict[str, Recipe]:
    """Recipes by the names that requests use.

    Parameters
    ----------
    given : sequence of str
        ``name``, ``path.yaml`` or ``alias=either``. Empty is full attention, called ``full``.

    Raises
    ------
    ValueError
        Unknown recipe, or two of one name.
    """
    recipes: dict[str, Recipe] = {}
    for one in given or ("full",):
        alias, equals, source = one.partition("=")
        if not equals:
            alias, source = Path(one).stem, one
        if alias in recipes:
            raise ValueError(f"two recipes are called {alias!r}; rename one with NAME={source}")
        recipes[alias] = Recipe() if source == "full" else methods.load(source)
    return recipes


def _pooled(recipe: Recipe, radix: Radix) -> Recipe:
    """The recipe with exact prefix reuse, unless it decides reuse itself or forbids it."""
    if recipe.retrieval is not None:
        return recipe
    try:
        return dataclasses.replace(recipe, retrieval=radix)
    except ValueError as reason:
        _log.info("no prefix reuse: %s", reason)
        return recipe


def build(
    model: LanguageModel,
    text: Text | None,
    settings: Settings,
    *,
    prefix_caching: bool = True,
    backend: Backend = "auto",
) -> FastAPI:
    """The application for a model in memory.

    Parameters
    ----------
    model : LanguageModel
    text : Text or None
        None serves token ids only.
    settings : Settings
    prefix_caching : bool
        Give recipes without a pool one in memory. All recipes share it: exact entries of one salt are
        exact for every recipe that computes them alike, and those of a codec have a name space of theirs.
    backend : Backend

    Raises
    ------
    ValueError
        A recipe that the model cannot serve, or a directory that cannot be used.
    """
    radix = Radix(capacity_bytes=settings.kv_memory)

    def limits(recipe: Recipe) -> Limits:
        return Limits(
            max_num_batched_tokens=settings.step_tokens(model.device, recipe),
            # The worker admits requests; each may have several samples.
            max_num_seqs=settings.max_num_seqs * settings.max_n,
        )

    shared: Pool | None = None
    engines: dict[str, Engine] = {}
    for name, recipe in settings.recipes.items():
        pooled = _pooled(recipe, radix) if prefix_caching else recipe
        engine = Engine(
            transformed(model, pooled.generation),
            pooled,
            limits=limits(recipe),
            backend=backend,
            words=None if text is None else text.stream,
        )
        if isinstance(pooled.retrieval, Radix):
            if pooled.retrieval.page == radix.page:
                shared = shared or _pool(engine, settings, radix)
                engine.pool = shared
            elif settings.kv_dir is not None:
                raise ValueError(
                    f"recipe {name!r} has a pool of pages of {pooled.retrieval.page} tokens, and files keep "
                    f"pages of {radix.page}; give it page: {radix.page}, or leave --kv-dir out"
                )
        engines[name] = engine
    about = _about(model, settings, engines)
    translator = Translator(settings, model, text)
    embeddings = Embeddings(settings, translator, model)
    if embeddings.pooling is not None:
        if EMBEDDINGS in engines:
            raise ValueError(f"this model embeds, so no recipe may be called {EMBEDDINGS!r}; rename it")
        engines[EMBEDDINGS] = Embedder(model, limits=limits(Recipe()), backend=backend)
        about["embeddings"] = embeddings.about()
    metrics = Metrics(settings.served_model_name)
    worker = Worker(
        engines,
        kv_memory=settings.kv_memory,
        max_num_seqs=settings.max_num_seqs,
        max_queue=settings.max_queue,
        swap_space=settings.swap_space,
        swap_dir=settings.swap_dir,
        on_end=metrics.ended,
        on_stop=shared.close if isinstance(shared, FilePool) else None,
    )
    metrics.attach(worker)
    service = Service(
        settings=settings,
        translator=translator,
        embeddings=embeddings,
        worker=worker,
        metrics=metrics,
        about=about,
    )
    app = make_app(service)
    app.state.service = service
    return app


def _pool(engine: Engine, settings: Settings, radix: Radix) -> Pool:
    assert engine.pool is not None
    if settings.kv_dir is None:
        return engine.pool
    return FilePool(
        engine.pool,
        settings.kv_dir,
        settings.kv_dir_bytes,
        engine.model,
        page=radix.page,
        capacity=radix.capacity_bytes,
    )


def _about(model: LanguageModel, settings: Settings, engines: Mapping[str, Engine]) -> dict[str, Any]:
    limits = dataclasses.asdict(settings)
    for private in ("api_keys", "recipes", "kv_dir", "swap_dir"):
        del limits[private]
    return {
        "started": int(time.time()),
        "version": winnow.__version__,
        "model": {
            "name": settings.served_model_name,
            "layers": model.layers,
            "kv_heads": model.kv_heads,
            "query_heads": model.query_heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocab_size,
            "max_length": model.max_length,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "fingerprint": model.fingerprint,
            "kv_bytes_per_token": 2 * model.layers * model.kv_heads * model.head_dim * model.dtype.itemsize,
        },
        "recipes": {name: engine.recipe.to_dict() for name, engine in engines.items()},
        "limits": limits,
        "machine": {"threads": torch.get_num_threads(), "process": os.getpid()},
    }


class _Server(uvicorn.Server):
    """Says "not ready" from the first signal on, before connections drain."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        # Not through super(), which would raise the signal again once all is done: a server that was
        # asked to end and did so has not failed.
        self._service.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(app: FastAPI, *, host: str, port: int, grace: float = 30.0) -> None:
    """Serve until a signal; requests that run get ``grace`` seconds to end.

    Raises
    ------
    ValueError
        The port is taken or may not be used.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        server_header=False,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
            ) from error
        bound = listener.getsockname()[1]
        _log.info("serving", extra={"host": host, "port": bound})
        _Server(config, app.state.service).run(sockets=[listener])
