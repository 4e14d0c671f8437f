"""Functions of Python's standard library with what they do, from a corpus file.

The corpus is shipped (``functions.jsonl``; Python Software Foundation licence, see
``functions.LICENSE``) because the sources change with every release of Python and an example's
bytes must not.  `winnow.bench.tasks.text.extract` made it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["CORPUS", "Function", "functions"]

CORPUS = Path(__file__).with_name("functions.jsonl")


@dataclass(frozen=True)
class Function:
    """A function without its docstring, and the docstring's first paragraph."""

    module: str
    name: str
    description: str
    code: str


@cache
def functions() -> tuple[Function, ...]:
    """All functions of the corpus in its order."""
    lines = CORPUS.read_text(encoding="ascii").splitlines()
    return tuple(Function(**json.loads(line)) for line in lines)
