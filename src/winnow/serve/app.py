"""The routes; see :mod:`winnow.serve.translate` and :mod:`winnow.serve.replies` for what is in them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

import winnow
from winnow.engine.request import SamplingParams
from winnow.serve import live, tools
from winnow.serve.config import Settings
from winnow.serve.embeddings import EMBEDDINGS, Embeddings, ReadingJob
from winnow.serve.errors import ApiError
from winnow.serve.flow import ClientGoneError, Flow
from winnow.serve.guard import Guard
from winnow.serve.job import Job, Piece
from winnow.serve.metrics import Metrics
from winnow.serve.replies import ChatReply, CompletionReply, Reply, usage
from winnow.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    ToolChoice,
)
from winnow.serve.translate import Asked, Translator
from winnow.serve.worker import Worker

__all__ = ["Service", "make_app"]


@dataclass(kw_only=True)
class Service:
    """What the routes share.

    Attributes
    ----------
    settings : Settings
    translator : Translator
    embeddings : Embeddings
    worker : Worker
    metrics : Metrics
    about : dict
        What ``/server_info`` tells of model and machine.
    draining : bool
        A shutdown has begun: not ready, though alive.
    """

    settings: Settings
    translator: Translator
    embeddings: Embeddings
    worker: Worker
    metrics: Metrics
    about: dict[str, Any]
    draining: bool = False


def make_app(service: Service) -> FastAPI:
    """The ASGI application; its lifespan starts and stops the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            service.draining = True
            await run_in_threadpool(service.worker.stop)

    # The pages with Swagger and ReDoc load their code from elsewhere; the description itself stays.
    app = FastAPI(
        title="Winnow", version=winnow.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, api_keys=service.settings.api_keys, max_body=service.settings.max_body)
    _errors(app)
    _inference(app, service)
    _operation(app, service)
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    return app


# --------------------------------------------------------------------------- errors


def _reply(error: ApiError) -> Response:
    return Response(
        json.dumps(error.body()), error.status, headers=error.headers(), media_type="application/json"
    )


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        where = f"{place}: " if place else ""
        return _reply(ApiError(400, f"{where}{first['msg']}", param=place or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        known = ApiError(error.status_code, str(error.detail))
        answer = _reply(known)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _reply(ApiError(500, "the server failed on this request; its log says why"))


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, text in (
        (400, "The request will not do."),
        (401, "No valid API key."),
        (404, "No such model."),
        (408, "It took too long."),
        (413, "The body is too large."),
        (429, "The queue is full."),
        (500, "The server failed."),
        (503, "Shutting down, or out of memory."),
    )
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _description(app: FastAPI) -> dict[str, Any]:
    """OpenAPI as the server behaves: validation errors are 400 in OpenAI's form, not FastAPI's 422."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = _ERROR_SCHEMA
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = found
    return app.openapi_schema


# --------------------------------------------------------------------------- inference


def _inference(app: FastAPI, service: Service) -> None:
    translator = service.translator

    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        _check_model(service, body.model)
        asked = await run_in_threadpool(translator.chat, body)
        forced = tools.demanded(body) is not None

        def reader() -> tools.Reader | None:
            if forced:
                return tools.Json()
            if not body.tools or body.tool_choice == "none":
                return None
            return tools.reader(service.settings.tool_parser, translator.template)

        reply = ChatReply(
            service.settings.served_model_name,
            stream=body.stream,
            with_usage=_with_usage(body),
            choices=body.n,
            token_text=translator.token_text,
            reader=reader,
            named=isinstance(body.tool_choice, ToolChoice),
            most_calls=1 if body.parallel_tool_calls is False else None,
        )
        return await _answer(service, request, body, asked, reply)

    @app.post("/v1/completions", responses=_ERRORS, response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        _check_model(service, body.model)
        asked = await run_in_threadpool(translator.completion, body)
        shown = [translator.decode(prompt) if body.echo else "" for prompt in asked.prompts]
        reply = CompletionReply(
            service.settings.served_model_name,
            with_usage=_with_usage(body),
            echo=[text for text in shown for _ in range(body.n)],
            token_text=translator.token_text,
        )
        return await _answer(service, request, body, asked, reply)

    @app.post("/v1/embeddings", responses=_ERRORS, response_model=None)
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Vectors of texts, where the model embeds."""
        _check_model(service, body.model)
        return await _embed(service, request, body)

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        _check_model(service, model)
        return _model(service)

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text or a conversation."""
        _check_model(service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages")
        if body.prompt is not None:
            ids = await run_in_threadpool(translator.encode, body.prompt, special=body.add_special_tokens)
        else:
            ids = await run_in_threadpool(translator.conversation, body.messages or [])
        return {"tokens": ids, "count": len(ids), "max_model_len": service.settings.max_model_len}

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Text of token ids."""
        _check_model(service, body.model)
        return {"prompt": await run_in_threadpool(translator.decode, body.tokens)}


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.served_model_name,
        "object": "model",
        "created": service.about["started"],
        "owned_by": "winnow",
        "max_model_len": service.settings.max_model_len,
        "recipes": list(service.settings.recipes),
    }


def _check_model(service: Service, name: str | None) -> None:
    served = service.settings.served_model_name
    if name not in (None, served):
        raise ApiError(
            404,
            f"the model {name!r} is not served here; there is {served!r}",
            param="model",
            code="model_not_found",
        )


def _with_usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return body.stream_options is not None and body.stream_options.include_usage


def _client(service: Service, request: Request, user: str | None) -> str:
    """Whose a request is: without keys, clients may say so themselves."""
    if user and not service.settings.api_keys:
        return f"user:{user}"
    found: str = request.state.client
    return found


async def _embed(service: Service, request: Request, body: EmbeddingRequest) -> Response:
    readings = await run_in_threadpool(service.embeddings.readings, body)
    client, number = _client(service, request, body.user), 0
    deadline = time.monotonic() + service.settings.request_timeout
    gone = asyncio.ensure_future(_gone(request))
    try:
        for wave in service.embeddings.waves(readings):
            flow = Flow(service.worker)
            jobs = [
                ReadingJob(
                    name=f"{request.state.request}.{number + place}",
                    client=client,
                    tokens=reading.tokens,
                    params=SamplingParams(max_new_tokens=1),
                    recipe=EMBEDDINGS,
                    priority=body.priority,
                    listen=flow.listener(place),
                    deadline=deadline,
                    pool=reading.pool,
                )
                for place, reading in enumerate(wave)
            ]
            number += len(wave)
            flow.submit(jobs)
            async for _ in flow.pieces(gone):
                raise AssertionError("a text that is read gives no token")
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        gone.cancel()
    return JSONResponse(await run_in_threadpool(service.embeddings.reply, body, readings))


async def _answer(
    service: Service, request: Request, body: ChatRequest | CompletionRequest, asked: Asked, reply: Reply
) -> Response:
    flow = Flow(service.worker)
    client = _client(service, request, body.user)
    jobs = [
        Job(
            name=request.state.request if number == 0 else f"{request.state.request}.{number}",
            client=client,
            tokens=tokens,
            params=asked.params,
            recipe=asked.recipe,
            salt=body.cache_salt,
            priority=body.priority,
            steer=asked.steer,
            division=asked.divisions[number],
            listen=flow.listener(number),
            deadline=time.monotonic() + service.settings.request_timeout,
        )
        for number, tokens in enumerate(asked.prompts)
    ]
    flow.submit(jobs)

    def used() -> dict[str, Any]:
        return usage([len(tokens) for tokens in asked.prompts], flow.stats)

    gone = asyncio.ensure_future(_gone(request))
    pieces = flow.pieces(gone)
    try:
        if not body.stream:
            async for number, piece in pieces:
                reply.chunks(number * body.n + piece.index, piece)
            return JSONResponse(reply.whole(used()))
        # The status line waits for the first token: until then a refusal can still be one.
        first = await anext(pieces)
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        gone.cancel()
    last: Callable[[], dict[str, Any]] | None = None
    if _with_usage(body):
        last = lambda: reply.last(used())  # noqa: E731
    return StreamingResponse(
        _stream(first, pieces, flow, body.n, reply, last),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _stream(
    first: tuple[int, Piece],
    pieces: AsyncIterator[tuple[int, Piece]],
    flow: Flow,
    n: int,
    reply: Reply,
    last: Callable[[], dict[str, Any]] | None,
) -> AsyncIterator[str]:
    try:
        number, piece = first
        for chunk in reply.chunks(number * n + piece.index, piece):
            yield _event(chunk)
        async for number, piece in pieces:
            for chunk in reply.chunks(number * n + piece.index, piece):
                yield _event(chunk)
        if last is not None:
            yield _event(last())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    finally:
        flow.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --------------------------------------------------------------------------- operation


def _operation(app: FastAPI, service: Service) -> None:
    worker = service.worker

    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        """Alive: the process answers and its worker has not died."""
        if worker.failure is not None:
            raise ApiError(503, "the worker has died; restart the server")
        return {"status": "ok"}

    @app.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> dict[str, str]:
        """Ready: takes requests now."""
        if service.draining or not worker.alive:
            raise ApiError(503, "not taking requests", retry_after=5)
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Version of Winnow."""
        return {"version": winnow.__version__}

    @app.get("/metrics", response_class=Response, responses={401: _ERRORS[401]})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        text = await run_in_threadpool(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/server_info", responses={401: _ERRORS[401]})
    async def server_info() -> dict[str, Any]:
        """Model, limits and recipes."""
        return service.about

    @app.get("/stats", responses={401: _ERRORS[401]})
    async def stats() -> dict[str, Any]:
        """What the live page shows."""
        return live.state(service.worker)

    @app.post("/reset_prefix_cache", responses={401: _ERRORS[401], 503: _ERRORS[503]})
    async def reset_prefix_cache() -> dict[str, bool]:
        """Forget every reusable entry that nobody is using, in memory and on disk."""
        done = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def act() -> None:
            worker.forget()
            loop.call_soon_threadsafe(done.set_result, None)

        worker.errand(act)
        await done
        return {"success": True}

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The live page."""
        return HTMLResponse(live.page(), headers={"Content-Security-Policy": live.POLICY})
