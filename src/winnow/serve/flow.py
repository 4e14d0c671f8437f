"""One HTTP request's jobs, and what the worker's thread says about them, on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from winnow.serve.errors import ApiError
from winnow.serve.job import Ended, Failed, Job, Piece, Update
from winnow.serve.worker import Worker

__all__ = ["ClientGoneError", "Flow"]


class ClientGoneError(Exception):
    """Nobody is there any more to hear the answer."""


class Flow:
    """Jobs that belong to one request.

    Make it on the event loop, give :meth:`listener` to the jobs, then :meth:`submit` them.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()
        self.stats: list[dict[str, object]] = []

    def listener(self, number: int) -> Callable[[Update], None]:
        """What job ``number`` calls; safe from another thread, also after the loop has ended."""

        def listen(update: Update) -> None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (number, update))

        return listen

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs, or none where one is refused."""
        self._jobs = jobs
        try:
            for job in jobs:
                self._worker.submit(job)
        except ApiError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what still runs."""
        for job in self._jobs:
            if job.state != "ended":
                self._worker.cancel(job)

    async def pieces(self, gone: asyncio.Future[None] | None = None) -> AsyncIterator[tuple[int, Piece]]:
        """Tokens with the number of their job, until all jobs have ended; then :attr:`stats` is full.

        Raises
        ------
        ApiError
            A job failed. The others are cancelled.
        ClientGone
            ``gone`` came true first; cancel it to leave that to others.
        """
        left = len(self._jobs)
        try:
            while left:
                number, update = await self._next(gone)
                if isinstance(update, Piece):
                    yield number, update
                elif isinstance(update, Ended):
                    self.stats.append(update.stats)
                    left -= 1
                else:
                    assert isinstance(update, Failed)
                    raise update.error
        finally:
            if left:
                self.cancel()

    async def _next(self, gone: asyncio.Future[None] | None) -> tuple[int, Update]:
        if gone is None or not self._updates.empty():
            return await self._updates.get()
        get = asyncio.ensure_future(self._updates.get())
        try:
            await asyncio.wait((get, gone), return_when=asyncio.FIRST_COMPLETED)
            if not get.done() and not gone.cancelled():
                raise ClientGoneError
            return await get
        finally:
            get.cancel()
