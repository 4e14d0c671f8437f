"""Runs functions of `winnow` where Triton kernels are interpreted: in a process of its own.

Triton decides while it is imported whether kernels are compiled or interpreted, so the tests' own process,
which others share, must not import it. In the other process every new tensor is filled with NaN (integers
with their largest value) before a kernel writes it: what a kernel forgets to write shows.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import pytest

__all__ = ["interpreted", "needs_triton"]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason='Triton is not installed; pip install "winnow-llm[triton]"',
)


@cache
def _worker() -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    worker = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )
    assert worker.stdin is not None
    atexit.register(worker.stdin.close)  # the worker ends where its input does
    return worker


def interpreted(target: str, *args: Any, **kwargs: Any) -> Any:
    """Call ``target`` (``module:function``) in the interpreter's process and return its result."""
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    pickle.dump((target, args, kwargs), worker.stdin)
    worker.stdin.flush()
    ok, result = pickle.load(worker.stdout)
    if not ok:
        raise result
    return result


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # also fills new tensors
    assert torch.utils.deterministic.fill_uninitialized_memory
    while True:
        try:
            target, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            module, _, function = target.partition(":")
            answer = True, getattr(importlib.import_module(module), function)(*args, **kwargs)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = False, error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
