"""Prefix reuse: a compressed radix tree over pages of tokens.

What RadixAttention of SGLang does (arXiv 2312.07104), for entries that live in host memory: a
node owns compact copies of the entries of its tokens, a match locks the path to the root, unlocked
leaves go in the order of their last use. A split makes views; the memory of a node is given back
when that node goes, whoever shares its allocation. Reuse is exact unless the recipe has the pool hold
entries in a codec.
"""

from __future__ import annotations

import heapq
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from winnow.retrieval.protocol import Match
from winnow.retrieval.slab import Form, Slab, checked
from winnow.store.codecs import CODECS, ENTRIES, EncodedSegment
from winnow.types import Segment

__all__ = ["Radix", "RadixPool"]

_TOKEN = 8  # bytes of a token in a key
_Key = bytes  # RadixPool.bytes hides the name


@dataclass(frozen=True, kw_only=True)
class Radix:
    """Reuse of prefixes.

    Parameters
    ----------
    page : int
        Tokens of a page; prefixes are shared in whole pages.
    capacity_bytes : int
        Most memory that the pool may hold.
    codec : str
        Form in which the pool holds entries: ``raw`` as they were computed, so that reuse is exact. In
        ``int8``, ``int4`` or ``int2`` the pool holds more, and what is reused is approximate.
    """

    page: int = 64
    capacity_bytes: int = 1 << 30
    codec: str = "raw"

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"a page has at least one token, not {self.page}; the default is 64")
        if self.codec not in CODECS:
            raise ValueError(f"radix: a pool has no codec {self.codec!r}; give {', '.join(CODECS)}")
        if self.codec != "raw" and self.page % ENTRIES:
            raise ValueError(
                f"radix: in {self.codec}, entries come in pages of {ENTRIES} and page={self.page} is no "
                "multiple of it; raise it"
            )
        if self.capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {self.capacity_bytes}; give 0 or more bytes")

    def pool(self) -> RadixPool:
        """An empty pool."""
        return RadixPool(self)


@dataclass(eq=False)
class _Node:
    """Tokens on an edge of the tree, and their entries ``first .. first + tokens - 1`` of a slab."""

    key: bytes
    start: int
    parent: _Node | None
    slab: Slab | None = None
    first: int = 0
    children: dict[bytes, _Node] = field(default_factory=dict)
    locks: int = 0
    stamp: int = 0
    alive: bool = True

    @property
    def tokens(self) -> int:
        return len(self.key) // _TOKEN

    def segments(self, tokens: int) -> tuple[Segment | EncodedSegment, ...]:
        """Per layer the entries of the first ``tokens`` tokens."""
        slab = self.slab
        assert slab is not None
        return tuple(
            slab.segment(layer, self.first, self.first + tokens, self.start)
            for layer in range(len(slab.form.heads))
        )


@dataclass(eq=False)
class _Lock:
    """The handle of a match."""

    node: _Node
    held: bool = True


class RadixPool:
    """A living pool. Every method may be called from any thread; one lock serves all."""

    def __init__(self, part: Radix):
        self._page = part.page * _TOKEN
        self._capacity = part.capacity_bytes
        self._roots: dict[str, tuple[_Node, Form]] = {}
        self._idle: list[tuple[int, int, _Node]] = []  # a heap; entries may be out of date
        self._clock = 0
        self._offers = 0
        self._nodes = 0
        self._bytes = 0
        self._mutex = threading.Lock()

    # ------------------------------------------------------------------ the protocol

    def match(self, tokens: Sequence[int], namespace: str) -> Match:
        """Longest reusable prefix in whole pages, never all of ``tokens``."""
        with self._mutex:
            if namespace not in self._roots:
                return Match(length=0, layers=(), handle=None)
            root, form = self._roots[namespace]
            key = _key(tokens[: max(0, len(tokens) - 1)])
            path = self._walk(root, key)
            if not path:
                return Match(length=0, layers=(), handle=None)
            self._clock += 1
            for node, _ in path:
                node.stamp = self._clock
            self._lock(path[-1][0])
            found = [node.segments(used // _TOKEN) for node, used in path]
            return Match(
                length=sum(used for _, used in path) // _TOKEN,
                layers=tuple(tuple(of_node[layer] for of_node in found) for layer in range(len(form.heads))),
                handle=_Lock(path[-1][0]),
            )

    def release(self, match: Match) -> None:
        """Allow the entries of a match to be evicted again; a second call does nothing."""
        lock = match.handle
        if lock is None:
            return
        with self._mutex:
            assert isinstance(lock, _Lock), "the match is of another pool"
            if not lock.held:
                return
            lock.held = False
            self._unlock(lock.node)

    def insert(
        self,
        tokens: Sequence[int],
        namespace: str,
        layers: Sequence[Sequence[Segment | EncodedSegment]],
        codec: str = "raw",
    ) -> int:
        """Copy the entries of ``tokens`` into the pool, whole pages only; encode what is not in its codec.

        Returns
        -------
        int
            Tokens that were new. Where memory does not suffice, a beginning is taken.

        Raises
        ------
        ValueError
            If the entries are in another codec, evicted, biased, moved, or of another model.
        """
        key = _key(tokens)
        key = key[: len(key) // self._page * self._page]
        if not key:
            return 0
        entries, form = checked(layers, len(key) // _TOKEN, codec)
        with self._mutex:
            if namespace in self._roots and self._roots[namespace][1] != form:
                raise ValueError(
                    f"the name space {namespace!r} holds entries of another model or codec; use another one"
                )
            root, _ = self._roots.setdefault(namespace, (_Node(key=b"", start=0, parent=None), form))
            return self._insert(root, key, entries, form)

    def bytes(self) -> int:
        """Bytes of memory pages that the pool's nodes hold."""
        with self._mutex:
            return self._bytes

    def bytes_on_disk(self) -> int:
        """None: this pool keeps no files."""
        return 0

    def resize(self, capacity_bytes: int) -> None:
        """Set the most memory that the pool may hold; what exceeds it and is not locked goes now."""
        with self._mutex:
            self._capacity = capacity_bytes
            while self._bytes > capacity_bytes and self._evict():
                pass
            self._drop_empty_roots()

    def clear(self) -> None:
        """Forget everything that is not locked."""
        with self._mutex:
            while self._evict():
                pass
            self._drop_empty_roots()

    # ------------------------------------------------------------------ the tree

    def _insert(
        self, root: _Node, key: _Key, layers: Sequence[Sequence[Segment | EncodedSegment]], form: Form
    ) -> int:
        path = self._walk(root, key)
        at = sum(used for _, used in path)
        if path and at < len(key) and path[-1][1] < len(path[-1][0].key):
            node, used = path[-1]
            path[-1] = (self._split(node, used), used)  # the lower part was not used now
        parent = path[-1][0] if path else root
        self._clock += 1
        for node, _ in path:
            node.stamp = self._clock
        if at == len(key):
            self._offer(parent)
            return 0
        self._lock(parent)  # making room must not take the place where the new leaf goes
        try:
            start = at // _TOKEN
            new = self._make_room(form, (len(key) - at) // _TOKEN)
            if new:
                slab = Slab(form, new)
                for layer, segments in enumerate(layers):
                    slab.fill(layer, segments, start)
                leaf = _Node(
                    key=key[at : at + new * _TOKEN], start=start, parent=parent, slab=slab, stamp=self._clock
                )
                parent.children[leaf.key[: self._page]] = leaf
                self._nodes += 1
                self._bytes += slab.nbytes()
                self._offer(leaf)
        finally:
            self._unlock(parent)
            self._drop_empty_roots()
        return new

    def _walk(self, root: _Node, key: _Key) -> list[tuple[_Node, int]]:
        """Nodes below the root that ``key`` runs through, each with the bytes of its key that agree."""
        path: list[tuple[_Node, int]] = []
        node, at = root, 0
        while at + self._page <= len(key):
            child = node.children.get(key[at : at + self._page])
            if child is None:
                break
            used = self._common(child.key, key, at)
            path.append((child, used))
            at += used
            if used < len(child.key):
                break
            node = child
        return path

    def _common(self, edge: _Key, key: _Key, at: int) -> int:
        if key.startswith(edge, at):
            return len(edge)
        used = self._page  # the first page was the key of the child
        while key[at + used : at + used + self._page] == edge[used : used + self._page]:
            used += self._page
        return used

    def _split(self, node: _Node, used: int) -> _Node:
        """Put the first ``used`` bytes of a node's key into a new parent; views, no copy."""
        assert node.slab is not None
        assert node.parent is not None
        upper = _Node(
            key=node.key[:used],
            start=node.start,
            parent=node.parent,
            slab=node.slab,
            first=node.first,
            locks=node.locks,
            stamp=node.stamp,
        )
        tokens = used // _TOKEN
        before = node.slab.nbytes()
        node.slab.split(node.first, node.first + tokens, node.first + node.tokens)
        assert node.slab.nbytes() == before
        node.parent.children[upper.key[: self._page]] = upper
        node.key, node.parent = node.key[used:], upper
        node.start, node.first = node.start + tokens, node.first + tokens
        upper.children[node.key[: self._page]] = node
        self._nodes += 1
        return upper

    # ------------------------------------------------------------------ eviction

    def _make_room(self, form: Form, tokens: int) -> int:
        """Evict until ``tokens`` fit; return how many, in whole pages, do."""
        page = self._page // _TOKEN
        while tokens and form.cost(tokens) > self._capacity:
            tokens -= page
        while tokens and self._bytes + form.cost(tokens) > self._capacity and self._evict():
            pass
        while tokens and self._bytes + form.cost(tokens) > self._capacity:
            tokens -= page
        return max(0, tokens)

    def _evict(self) -> bool:
        """Drop the unlocked leaf that was not used for longest; False where there is none."""
        while self._idle:
            stamp, _, node = heapq.heappop(self._idle)
            if not (node.alive and stamp == node.stamp and self._evictable(node)):
                continue
            assert node.slab is not None
            assert node.parent is not None
            before = node.slab.nbytes()
            node.slab.free(node.first, node.first + node.tokens)
            self._bytes -= before - node.slab.nbytes()
            self._nodes -= 1
            node.alive = False
            del node.parent.children[node.key[: self._page]]
            self._offer(node.parent)
            return True
        return False

    @staticmethod
    def _evictable(node: _Node) -> bool:
        return node.slab is not None and not node.children and node.locks == 0

    def _offer(self, node: _Node) -> None:
        """Enter an unlocked leaf into the heap, whose order its last use decides."""
        if not self._evictable(node):
            return
        self._offers += 1
        heapq.heappush(self._idle, (node.stamp, self._offers, node))
        if len(self._idle) > 4 * self._nodes + 64:
            self._idle = [
                e for e in self._idle if e[2].alive and e[0] == e[2].stamp and self._evictable(e[2])
            ]
            heapq.heapify(self._idle)

    def _lock(self, node: _Node) -> None:
        above: _Node | None = node
        while above is not None:
            above.locks += 1
            above = above.parent

    def _unlock(self, node: _Node) -> None:
        above: _Node | None = node
        while above is not None:
            above.locks -= 1
            assert above.locks >= 0
            self._offer(above)
            above = above.parent

    def _drop_empty_roots(self) -> None:
        for name in [name for name, (root, _) in self._roots.items() if not root.children]:
            del self._roots[name]


def _key(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()
