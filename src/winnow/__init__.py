"""Winnow: compute, keep, reuse and load only the key-value entries that matter.

>>> import winnow
>>> llm = winnow.load("embedded", recipe="snapkv")  # doctest: +SKIP
>>> llm.generate("A long document ... Q: ...").text  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Chunks",
    "Hogwild",
    "Recipe",
    "Result",
    "SamplingParams",
    "__version__",
    "load",
    "load_session",
]

if TYPE_CHECKING:
    from winnow.api import LLM, load, load_session
    from winnow.chunks import Chunks
    from winnow.engine.request import Result, SamplingParams
    from winnow.engine.workers import Hogwild
    from winnow.recipe import Recipe

_HOMES = {
    "Chunks": "winnow.chunks",
    "Hogwild": "winnow.engine.workers",
    "LLM": "winnow.api",
    "load": "winnow.api",
    "load_session": "winnow.api",
    "Result": "winnow.engine.request",
    "SamplingParams": "winnow.engine.request",
    "Recipe": "winnow.recipe",
}


def __getattr__(name: str) -> Any:
    # Importing torch and transformers takes seconds: `winnow --help` must not wait for them.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'winnow' has no attribute {name!r}")
