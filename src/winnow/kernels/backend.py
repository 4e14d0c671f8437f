"""Which implementation of a kernel runs: explicit, logged, never silently another one."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch  # imported before the extension, which shares its OpenMP threads

__all__ = ["Backend", "choose", "extension", "force_isa", "interpreted", "isas"]

Backend = Literal["auto", "reference", "native", "triton"]

_log = logging.getLogger("winnow.kernels")


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and why not (said once)."""
    try:
        return import_module("winnow._native"), ""
    except ModuleNotFoundError:
        why = "were not built; install a C++ compiler and reinstall winnow-llm to get them"
    except ImportError as error:  # there is a file, and this system's loader refuses it
        why = f"cannot be loaded ({error}); reinstall winnow-llm from its source on this machine"
    _log.warning("running on the reference kernels: the native kernels %s", why)
    return None, why


def extension() -> ModuleType | None:
    """The compiled extension, or None where it was not built or cannot be loaded (said once)."""
    return _load()[0]


def isas() -> list[str]:
    """Instruction sets that the extension can run here, best first; empty without it."""
    native = extension()
    return list(native.available_isas()) if native is not None else []


def force_isa(name: str) -> None:
    """Run the native kernels on one instruction set (tests force each in turn)."""
    native = extension()
    if native is None:
        raise ValueError(f"there is nothing to force: the native kernels {_load()[1]}")
    native.force_isa(name)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (for tests; slow)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _say(op: str, backend: str, why: str) -> None:
    _log.info("%s runs on %s%s", op, backend, f" ({why})" if why else "")


def choose(op: str, backend: Backend, device: torch.device, *, unsupported: str = "") -> Backend:
    """Return the implementation to run.

    Parameters
    ----------
    op : str
        Name of the operation, for the log and for errors.
    backend : Backend
        ``auto`` takes the fastest that can run; any other name is a demand.
    device : torch.device
        Where the operands lie.
    unsupported : str
        Why the native kernel cannot take these operands; empty where it can.

    Raises
    ------
    ValueError
        If the demanded implementation cannot run.
    """
    if backend == "reference":
        return "reference"
    if backend == "native":
        if device.type != "cpu":
            unsupported = f"operands lie on {device}"
        elif extension() is None:
            raise ValueError(f"{op}: the native kernels {_load()[1]}")
        if unsupported:
            raise ValueError(f"{op}: the native kernel cannot run: {unsupported}; use backend='auto'")
        return "native"
    if backend == "triton":
        if device.type != "cuda" and not interpreted():
            raise ValueError(
                f"{op}: the Triton kernel needs a GPU, operands lie on {device}; use backend='auto'"
            )
        return "triton"
    if backend != "auto":
        raise ValueError(f"unknown backend {backend!r}; choose auto, reference, native or triton")
    if device.type == "cuda":
        _say(op, "triton", "")
        return "triton"
    if device.type == "cpu" and extension() is not None and not unsupported:
        _say(op, "native", "")
        return "native"
    _say(
        op, "reference", unsupported or ("no extension" if device.type == "cpu" else f"device {device.type}")
    )
    return "reference"
