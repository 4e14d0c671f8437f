"""What the parts of a compression remember of a sequence, as plain data: to be counted, saved and read back.

A state is made of numbers, text, tensors, lists, tuples and dicts, and of dataclasses with such fields.
Which ones says the annotation of what the part's ``state`` returns; nothing in a file chooses a type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

__all__ = ["plain", "restored", "tensors"]


def plain(state: Any) -> Any:
    """A state as what JSON knows, and tensors. Keys of dicts need not be text: they become pairs."""
    if is_dataclass(state) and not isinstance(state, type):
        return {field.name: plain(getattr(state, field.name)) for field in fields(state)}
    if isinstance(state, dict):
        return [[plain(key), plain(value)] for key, value in state.items()]
    if isinstance(state, list | tuple):
        return [plain(one) for one in state]
    if isinstance(state, torch.dtype):
        return str(state).removeprefix("torch.")
    assert state is None or isinstance(state, bool | int | float | str | Tensor), (
        f"{type(state).__name__} cannot be saved; keep states of parts to plain data"
    )
    return state


def restored(hint: Any, value: Any) -> Any:
    """What :func:`plain` made of a state of the annotated type ``hint``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is dict:
        return {restored(args[0], key): restored(args[1], one) for key, one in value}
    if origin is list:
        return [restored(args[0], one) for one in value]
    if origin is tuple:
        return tuple(restored(arg, one) for arg, one in zip(args, value, strict=True))
    if is_dataclass(hint):
        made: Any = hint
        hints = get_type_hints(hint)
        return made(**{name: restored(hints[name], one) for name, one in value.items()})
    if hint is torch.dtype:
        return getattr(torch, value)
    if hint is float and isinstance(value, int):
        return float(value)
    # A part without a state inherits a method that may return anything, and returns None.
    if not isinstance(value, NoneType if hint is Any else hint):
        raise TypeError(f"{value!r} is no {hint}")
    return value


def tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a state."""

    def within(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                yield from within(one)

    return within(plain(state))
