"""A directory for files that end with the process, also where it is killed."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
import time
from pathlib import Path

__all__ = ["Scratch"]

_log = logging.getLogger("winnow.serve")
_PREFIX = "winnow-swap-"
_LOCK = "lock"
# A directory that is younger may belong to a server that is just about to lock it.
_AGE = 60.0


class Scratch:
    """A directory of this process alone; those that killed processes left in the same place are removed.

    Parameters
    ----------
    parent : Path or None
        Where to make it; None is the system's temporary directory.

    Attributes
    ----------
    path : Path

    Raises
    ------
    ValueError
        It cannot be made there.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            # The system lets go of the lock when the process ends, however it does.
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"cannot use {parent} for preempted requests: {error.strerror}; give another --swap-dir"
            ) from error
        for other in parent.glob(f"{_PREFIX}*"):
            if other != self.path:
                _remove_where_left(other)

    def close(self) -> None:
        """Remove the directory and what is in it; may be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_where_left(directory: Path) -> None:
    try:
        if time.time() - directory.stat().st_mtime < _AGE:
            return
        with (directory / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    except OSError:
        return  # locked, without a lock, or somebody else's
    _log.info("removed what a killed server left", extra={"directory": directory.name})
