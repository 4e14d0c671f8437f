"""Who is next: deficit round robin over clients, priorities within each of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

__all__ = ["FairQueue"]


class Waiting(Protocol):
    """What the queue needs to know of a request."""

    @property
    def client(self) -> str:
        """Whose it is."""
        ...

    @property
    def priority(self) -> int:
        """Smaller goes first among requests of one client."""
        ...

    @property
    def arrival(self) -> int:
        """Number in order of arrival; one that comes back (it was preempted) keeps it."""
        ...

    @property
    def cost(self) -> int:
        """Tokens that it may take."""
        ...


T = TypeVar("T", bound=Waiting)


@dataclass
class _Client(Generic[T]):
    deficit: int = 0
    heap: list[tuple[int, int, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Requests that wait.

    Deficit round robin (Shreedhar and Varghese, 1995): clients take turns; each turn adds ``quantum``
    tokens to what a client may spend, and its first request starts when that covers the request's
    cost. A client with many or long requests therefore gets the same tokens per turn as one with few.
    ``priority`` orders the requests of one client only, so nobody can buy the place of others with it.

    Parameters
    ----------
    quantum : int
        Tokens per turn.
    """

    def __init__(self, quantum: int = 512) -> None:
        self._quantum = quantum
        self._clients: dict[str, _Client[T]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(len(client.heap) for client in self._clients.values())

    def __iter__(self) -> Iterator[T]:
        """Every request, client by client."""
        for client in self._clients.values():
            yield from (one for *_, one in sorted(client.heap, key=lambda entry: entry[:2]))

    def push(self, request: T) -> None:
        """Add a request to its client's queue."""
        client = self._clients.setdefault(request.client, _Client())
        heapq.heappush(client.heap, (request.priority, request.arrival, request))

    def order(self) -> Iterator[T]:
        """First requests of the clients in the order in which they may start; changes nothing."""
        turns: list[tuple[int, int, T]] = []
        for place, client in enumerate(self._clients.values()):
            first = client.heap[0][2]
            missing = max(first.cost - client.deficit, 0)
            turns.append((-(-missing // self._quantum), place, first))
        yield from (first for _, _, first in sorted(turns, key=lambda turn: turn[:2]))

    def take(self, request: T) -> bool:
        """Start a request that :meth:`order` gave: it is paid for, and its client's turn is over.

        False where it is not its client's first any more: it was turned away, or another one came.
        """
        client = self._clients.get(request.client)
        if client is None or client.heap[0][2] is not request:
            return False
        missing = max(request.cost - client.deficit, 0)
        turns = -(-missing // self._quantum)
        # Everybody has had as many turns as this one needed.
        for other in self._clients.values():
            other.deficit += turns * self._quantum
        client.deficit -= request.cost
        heapq.heappop(client.heap)
        del self._clients[request.client]
        if client.heap:
            self._clients[request.client] = client  # to the end of the round
        return True

    def refund(self, client: str, tokens: int) -> None:
        """Give back what a request did not use; a client that waits for nothing keeps no credit."""
        if client in self._clients:
            self._clients[client].deficit += tokens

    def remove(self, request: T) -> bool:
        """Take a request out (it was cancelled); False where it does not wait."""
        client = self._clients.get(request.client)
        if client is None:
            return False
        left = [entry for entry in client.heap if entry[2] is not request]
        if len(left) == len(client.heap):
            return False
        client.heap = left
        heapq.heapify(left)
        if not left:
            del self._clients[request.client]
        return True

    def crowd(self, client: str) -> T | None:
        """The request to turn away when the queue is full and ``client`` brings one more.

        The newest of the client with the most requests, where that is another one with more than
        this client would then have; None where this client itself is the crowd.
        """
        mine = len(self._clients[client].heap) if client in self._clients else 0
        name, most = max(
            ((name, len(one.heap)) for name, one in self._clients.items()),
            key=lambda pair: pair[1],
            default=("", 0),
        )
        if name == client or most <= mine + 1:
            return None
        return max(self._clients[name].heap, key=lambda entry: entry[1])[2]
