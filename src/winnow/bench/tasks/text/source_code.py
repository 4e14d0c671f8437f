"""Functions of Python's standard library with what they do, from a corpus file.

The corpus is shipped (``functions.jsonl``, extracted by `winnow.bench.tasks.text.extract` from
Python 3.11; docstrings and blank lines are taken out; Python Software Foundation licence, see
``functions.LICENSE``), because the library changes with every release of Python and an example's
bytes must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from winnow.models.embedded.dice import Dice

__all__ = ["CORPUS", "FENCE", "Function", "functions", "haystack", "listing", "parse", "pick"]

CORPUS = Path(__file__).with_name("functions.jsonl")
#: how an answer is written
FENCE = "```python\n{code}\n```"
#: between the blocks of a context; nowhere inside one
GAP = "\n\n\n"


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


def pick(dice: Dice, n: int, room: int) -> list[Function]:
    """``n`` functions that together take no more than ``room`` characters.

    Raises
    ------
    ValueError
        If not even the smallest ones do.
    """
    # A fair share each, and never fewer candidates than three times what is wanted.
    by_size = sorted(functions(), key=lambda function: len(listing(function)))
    small = [function for function in by_size if len(listing(function)) <= room // max(1, n)]
    chosen = dice.sample(small if len(small) >= 3 * n else by_size[: 3 * n], n)
    if sum(len(listing(function)) + len(GAP) for function in chosen) > room:
        raise ValueError(
            f"{n} functions do not fit into {room} characters; ask for more tokens or fewer turns"
        )
    return chosen


def haystack(dice: Dice, room: int, without: Sequence[Function]) -> list[Function]:
    """Other functions in random order that fill ``room`` characters as well as they can.

    After the whole corpus it starts again with renamed copies (``name_2`` in ``module_2``).
    """
    hidden = {function.name for function in without}
    others = [function for function in functions() if function.name not in hidden]
    found: list[Function] = []
    edition = 1
    smallest = min(len(listing(function)) + len(GAP) for function in others)
    while room >= smallest + 8:
        for function in dice.sample(others, len(others)):
            copy = function if edition == 1 else _edition(function, edition)
            size = len(listing(copy)) + len(GAP)
            if size <= room:
                room -= size
                found.append(copy)
        edition += 1
    return found


def _edition(function: Function, edition: int) -> Function:
    name = f"{function.name}_{edition}"
    code = re.sub(rf"\b{function.name}\b", name, function.code)
    return Function(f"{function.module}_{edition}", name, function.description, code)


def listing(function: Function) -> str:
    """How a function stands in a context: under the name of its file."""
    return f"# {function.module}.py\n{function.code}"


def parse(context: str) -> dict[str, str]:
    """The functions of a context: source by name."""
    blocks = (block.split("\n", 1) for block in context.split(GAP) if block.startswith("# "))
    found: dict[str, str] = {}
    for _, code in blocks:
        name = re.search(r"^\s*def (\w+)", code, re.MULTILINE)
        assert name is not None, code
        found[name[1]] = code
    return found
