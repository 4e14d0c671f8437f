"""The journal of a run: JSON Lines, one per finished example, that a killed run goes on from."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Journal", "entries", "open_journal"]

NAME = "lifecycle.jsonl"


class Journal:
    """Appends lines that are on the disk when :meth:`write` returns."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, kind: str, data: Mapping[str, Any]) -> None:
        """Append one line; after a crash it is there whole or, being last and torn, dropped."""
        line = json.dumps({"kind": kind, **data}, separators=(",", ":"), ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def open_journal(
    directory: Path, header: Mapping[str, Any], *, resume: bool
) -> Iterator[tuple[Journal, list[dict[str, Any]]]]:
    """Open the journal of a directory, and what it holds already.

    A file that is there is only touched with ``resume``, and only where its configuration's
    ``fingerprint`` is the header's; a torn last line is then cut off.

    Parameters
    ----------
    directory : Path
        Made where it is missing.
    header : mapping
        Written as first line of a new journal and, as ``resumed``, where a run goes on.
    resume : bool
        Go on with what is there.

    Raises
    ------
    ValueError
        The directory holds another run, is in use by one, or its journal is damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / NAME
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {path}; wait for it or give another directory"
            ) from None
        earlier = _read(path)
        if earlier and not resume:
            raise ValueError(f"{directory} holds a run; go on with it (--resume) or give another --out")
        if earlier and earlier[0]["fingerprint"] != header["fingerprint"]:
            raise ValueError(
                f"the run in {directory} was asked for something else (its configuration differs); "
                "repeat its options or give another --out"
            )
        whole = _whole_length(path)
        file.truncate(whole)
        journal = Journal(file)
        journal.write("resumed" if earlier else "header", header)
        _sync_directory(directory)
        yield journal, earlier


def entries(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of a directory's journal; none where there is no journal."""
    path = directory / NAME
    return _read(path) if path.exists() else []


def _whole_length(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    last = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return end if _parse(data[last:end]) is not None else last


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes()[: _whole_length(path)].split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        entry = _parse(line)
        if entry is None or (number == 1) != (entry["kind"] == "header"):
            raise ValueError(f"line {number} of {path} is damaged; delete it or give another --out")
        found.append(entry)
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "kind" in entry else None


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
