"""A pool that outlives the process: finished sequences as files behind a pool in memory.

Every sequence that the pool in memory takes is also written to a file, whole pages only, by a thread of
its own, in the codec in which the pool holds it and packed without loss. A file takes its name only when it
is complete and on the disk, so a process that is killed leaves a ``.part`` behind, which the next start
removes; damage shows in the checksums when a file is read, and the file goes. What memory lacks comes back
from the longest file that the prompt begins with. Files carry a digest of the pool's name space, so they
cross neither models, salts nor codecs. The least recently used go where the size limit asks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from winnow.retrieval.protocol import Match, Pool
from winnow.store import files
from winnow.store.arena import PAGE
from winnow.store.codecs import EncodedSegment
from winnow.store.form import stored_rows
from winnow.store.sequence import SequenceStore
from winnow.types import LanguageModel, Segment

__all__ = ["FilePool"]

_log = logging.getLogger("winnow.serve.kv_dir")
_Digest = bytes  # FilePool.bytes hides the name
_SUFFIX = ".kv"
# After a file could not be taken into memory (no room), it is not read again for so many seconds.
_PATIENCE = 5.0
# Sequences that wait to be written; the pool in memory keeps serving those that do not get a file.
_BACKLOG = 64


@dataclass(eq=False)
class _File:
    path: Path
    size: int
    memory: int  # most bytes that its entries take in memory
    codec: str
    used: float
    pages: list[_Digest]  # chained digests, one per page of tokens
    refused: float = 0.0


class FilePool:
    """A :class:`winnow.retrieval.protocol.Pool` with files behind it.

    Parameters
    ----------
    memory : Pool
        The pool in memory; nobody else may use it.
    directory : Path
        Made where it is missing. One process at a time.
    limit : int
        Most bytes of files.
    model : LanguageModel
        Shape of the entries.
    page : int
        Tokens of a page of ``memory``.
    capacity : int
        Bytes that ``memory`` may hold, until :meth:`resize`.

    Raises
    ------
    ValueError
        The directory cannot be made or read.
    """

    def __init__(
        self, memory: Pool, directory: Path, limit: int, model: LanguageModel, *, page: int, capacity: int
    ) -> None:
        self._memory = memory
        self._directory = directory
        self._limit = limit
        self._model = model
        self._page = page
        self._capacity = capacity
        self._loading = 0
        self._files: dict[Path, _File] = {}
        self._by_page: dict[_Digest, list[_File]] = {}
        self._mutex = threading.Lock()
        self._writing = threading.Lock()
        self.dropped = 0
        self._read_directory()
        self._jobs: queue.Queue[tuple[list[int], str] | None] = queue.Queue(_BACKLOG)
        self._writer = threading.Thread(target=self._write_all, name="winnow-kv-dir", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------------ the protocol

    def match(self, tokens: Sequence[int], namespace: str) -> Match:
        """Longest prefix in memory, after the files have given what they have more of."""
        found = self._memory.match(tokens, namespace)
        file, length = self._longest(tokens, namespace)
        if file is None or length <= found.length:
            return found
        self._memory.release(found)
        self._read(file, tokens[:length], namespace)
        return self._memory.match(tokens, namespace)

    def release(self, match: Match) -> None:
        """See :class:`winnow.retrieval.protocol.Pool`."""
        self._memory.release(match)

    def insert(
        self,
        tokens: Sequence[int],
        namespace: str,
        layers: Sequence[Sequence[Segment | EncodedSegment]],
        codec: str = "raw",
    ) -> int:
        """Into memory now, into a file soon."""
        new = self._memory.insert(tokens, namespace, layers, codec)
        whole = len(tokens) // self._page * self._page
        if whole and not self._on_disk(tokens[:whole], namespace):
            try:
                self._jobs.put_nowait((list(tokens[:whole]), namespace))
            except queue.Full:
                _log.warning("the disk is too slow: a sequence stays in memory only")
        return new

    def bytes(self) -> int:
        """Bytes in memory, those of a file that is being read included."""
        return self._memory.bytes() + self._loading

    def resize(self, capacity_bytes: int) -> None:
        """See :class:`winnow.retrieval.protocol.Pool`."""
        self._capacity = capacity_bytes
        self._memory.resize(capacity_bytes)

    def clear(self) -> None:
        """Forget what is in memory, every file, and what waits to become one."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
                self._jobs.task_done()
        with self._writing:  # a file that is half written would come back
            self._memory.clear()
            with self._mutex:
                for file in list(self._files.values()):
                    self._remove(file)

    def bytes_on_disk(self) -> int:
        """Bytes of all files."""
        with self._mutex:
            return sum(file.size for file in self._files.values())

    # ------------------------------------------------------------------ beyond the protocol

    def flush(self) -> None:
        """Wait until everything that was inserted is on the disk."""
        self._jobs.join()

    def close(self) -> None:
        """Write what waits, then end the thread."""
        self._jobs.put(None)
        self._writer.join()

    # ------------------------------------------------------------------ the index

    def _digests(self, tokens: Sequence[int], namespace: str) -> list[_Digest]:
        """For every page the digest of all tokens up to its end, under the name space."""
        chain = hashlib.sha256(f"{namespace}\0{self._page}".encode()).digest()
        digests = []
        for first in range(0, len(tokens) - self._page + 1, self._page):
            page = array("q", tokens[first : first + self._page]).tobytes()
            chain = hashlib.sha256(chain + page).digest()
            digests.append(chain)
        return digests

    def _longest(self, tokens: Sequence[int], namespace: str) -> tuple[_File | None, int]:
        digests = self._digests(tokens[: max(len(tokens) - 1, 0)], namespace)
        now = time.monotonic()
        with self._mutex:
            for count in range(len(digests), 0, -1):
                for file in self._by_page.get(digests[count - 1], ()):
                    if now - file.refused > _PATIENCE:
                        return file, count * self._page
        return None, 0

    def _on_disk(self, tokens: Sequence[int], namespace: str) -> bool:
        digests = self._digests(tokens, namespace)
        with self._mutex:
            return bool(self._by_page.get(digests[-1]))

    def _add(self, file: _File) -> None:
        self._files[file.path] = file
        for digest in file.pages:
            self._by_page.setdefault(digest, []).append(file)

    def _remove(self, file: _File) -> None:
        if self._files.pop(file.path, None) is None:
            return
        for digest in file.pages:
            holders = self._by_page[digest]
            holders.remove(file)
            if not holders:
                del self._by_page[digest]
        file.path.unlink(missing_ok=True)

    def _read_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            found = sorted(self._directory.iterdir())
        except OSError as error:
            raise ValueError(
                f"cannot use {self._directory} for KV files: {error.strerror}; choose another directory"
            ) from error
        for path in found:
            if path.name.startswith(".") and path.name.endswith(".part"):
                path.unlink()
                self.dropped += 1
            elif path.suffix == _SUFFIX:
                self._read_header(path)
        with self._mutex:
            self._shrink()

    def _read_header(self, path: Path) -> None:
        try:
            header = files.read_header(path)
            pages = [_Digest.fromhex(digest) for digest in header["pages"]]
            size = path.stat().st_size
            memory, codec = int(header.get("memory", size)), str(header.get("codec", "raw"))
        except (files.StoreFileError, KeyError, TypeError, ValueError) as error:
            _log.warning("dropped a KV file", extra={"file": path.name, "reason": str(error)})
            path.unlink()
            self.dropped += 1
            return
        self._add(
            _File(path=path, size=size, memory=memory, codec=codec, used=path.stat().st_mtime, pages=pages)
        )

    def _shrink(self, coming: int = 0) -> None:
        """Remove the files that were not used for longest until the rest, and ``coming`` bytes, fit."""
        total = sum(file.size for file in self._files.values()) + coming
        for file in sorted(self._files.values(), key=lambda one: one.used):
            if total <= self._limit:
                return
            total -= file.size
            self._remove(file)

    # ------------------------------------------------------------------ files to memory

    def _read(self, file: _File, tokens: Sequence[int], namespace: str) -> None:
        """Take a file's entries into the pool in memory, which makes room for both for a while."""
        file.refused = time.monotonic()  # taken back once it has been of use
        if 2 * file.memory > self._capacity:
            return
        self._memory.resize(self._capacity - file.memory)
        self._loading = file.memory
        try:
            store, _ = files.load(file.path, {"pages": [digest.hex() for digest in file.pages]})
            try:
                layers = [store.segments(layer) for layer in range(store.layers)]
                self._memory.insert(tokens, namespace, layers, file.codec)
            finally:
                store.close()
            file.used, file.refused = time.time(), 0.0
            os.utime(file.path)
        except (files.StoreFileError, OSError) as error:
            _log.warning("dropped a KV file", extra={"file": file.path.name, "reason": str(error)})
            self.dropped += 1
            with self._mutex:
                self._remove(file)
        finally:
            self._loading = 0
            self._memory.resize(self._capacity)

    # ------------------------------------------------------------------ memory to files

    def _write_all(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                with self._writing:
                    self._write(*job)
            except (files.StoreFileError, OSError) as error:
                _log.warning("a sequence was not saved", extra={"reason": str(error)})
            finally:
                self._jobs.task_done()

    def _write(self, tokens: list[int], namespace: str) -> None:
        # One token more than asked for: a match never covers all of its tokens.
        match = self._memory.match([*tokens, 0], namespace)
        try:
            length = match.length
            if not length or self._on_disk(tokens[:length], namespace):
                return
            pages = self._digests(tokens[:length], namespace)
            model = self._model
            path = self._directory / f"{pages[-1].hex()[:32]}{_SUFFIX}"
            codec = match.layers[0][0].codec
            with SequenceStore(
                layers=len(match.layers),  # layers may share a set of entries
                heads=model.kv_heads,
                head_dim=model.head_dim,
                dtype=model.dtype,
                capacity=length,
            ) as store:
                store.adopt(match.layers, length)
                memory = _bytes_back(store)
                if memory > self._limit:
                    return  # the newest file would drive out every other, and then go itself
                with self._mutex:  # before the file is there: the limit holds at every moment
                    self._shrink(memory)
                header = {"pages": [digest.hex() for digest in pages], "memory": memory, "codec": codec}
                files.save(store, path, header, packed=True)
        finally:
            self._memory.release(match)
        with self._mutex:
            for digest in pages[:-1]:
                for shorter in list(self._by_page.get(digest, ())):
                    if len(shorter.pages) < len(pages) and shorter.pages[-1] == digest:
                        self._remove(shorter)  # the new file holds all of it
            self._add(
                _File(
                    path=path,
                    size=path.stat().st_size,
                    memory=memory,
                    codec=codec,
                    used=time.time(),
                    pages=pages,
                )
            )
            self._shrink()


def _bytes_back(store: SequenceStore) -> int:
    """Most bytes that a store takes once it is read back: tables begin on pages of their own."""
    segments = [segment for layer in range(store.layers) for segment in store.segments(layer)]
    planes = sum(len(stored_rows(segment).planes) * segment.heads for segment in segments)
    return store.shared_bytes() + planes * PAGE
