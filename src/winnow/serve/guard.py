"""What every request passes before a route sees it: size, key, name; and the log line after it."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from winnow.serve.errors import ApiError

__all__ = ["Guard", "send_error"]

_log = logging.getLogger("winnow.serve.access")

# Probes of an orchestrator carry no key, and the page asks its user for one.
_OPEN = {"/", "/health", "/ready", "/version"}


class Guard:
    """ASGI middleware.

    Parameters
    ----------
    app : ASGI application
    api_keys : sequence of str
        Empty opens everything.
    max_body : int
        Bytes.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_body: int) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, begin, status = f"req-{uuid.uuid4().hex[:16]}", time.monotonic(), 500
        scope.setdefault("state", {})["request"] = name

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            scope["state"]["client"] = self._client(scope)
            await self._app(scope, await self._bounded(scope, receive), named)
        except ApiError as error:
            await send_error(named, error)
        finally:
            client = scope["state"].get("client", "")
            _log.info(
                "request",
                extra={
                    "request": name,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "client": client,
                    "seconds": round(time.monotonic() - begin, 4),
                },
            )

    def _client(self, scope: Scope) -> str:
        """Who asks: a digest of the key, or the address where no keys are set."""
        if not self._keys:
            address = scope.get("client")
            return f"address:{address[0]}" if address else "address:local"
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # Every key is compared in full, so that time tells nothing about them.
        known = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        if kind.lower() == b"bearer" and any(known):
            return f"key:{hashlib.sha256(key.strip()).hexdigest()[:8]}"
        if scope["path"] in _OPEN:
            return "open"
        raise ApiError(
            401,
            "no valid API key; send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
        )

    async def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """The body read whole, within the limit; what comes after it is passed on."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break  # gone before its body was there; the route finds it incomplete
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise ApiError(413, f"the body exceeds {self._max_body} bytes; send less", code="too_large")
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        whole: Message | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                first, whole = whole, None
                return first
            return await receive()

        return replay


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    headers = {"content-type": "application/json", **error.headers()}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(key.lower().encode(), value.encode()) for key, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
