"""What every ``triton.py`` shares: the import with its remedy, launch parameters, small functions.

On a GPU a kernel's tile sizes come from Triton's autotuner. Under Triton's interpreter
(``TRITON_INTERPRET=1``) there is nothing to time, so one fixed, small choice is used.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.backend import interpreted
from winnow.types import Segment

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError('the Triton kernels need Triton; pip install "winnow-llm[triton]"') from error

__all__ = [
    "DTYPES",
    "LN2",
    "LOG2E",
    "check_operands",
    "config",
    "count_below",
    "entries_before",
    "interpreted",
    "next_power_of_2",
    "on_device",
    "processors",
    "ptr",
    "rounded",
    "soft_capped",
    "tl",
    "triton",
    "tuned",
    "tuning",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few under the interpreter, so that work is still split."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``x`` as a contiguous tensor of the device, without waiting for the device."""
    return x.to(device=device, dtype=dtype, non_blocking=True).contiguous()


def ptr(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer argument for an operand that may be absent (a flag keeps the kernel off it)."""
    return stand_in if x is None else x


def check_operands(op: str, q: Tensor, segment: Segment) -> None:
    """Refuse what the attention kernels cannot read."""
    if q.dtype not in DTYPES:
        raise ValueError(f"{op}: no Triton kernel for {q.dtype}; use float32, float16 or bfloat16")
    if not q.dtype == segment.k.dtype == segment.v.dtype:
        raise ValueError(f"{op}: queries are {q.dtype}, entries {segment.k.dtype}; convert one of them")
    if q.device != segment.k.device:
        raise ValueError(f"{op}: queries lie on {q.device}, entries on {segment.k.device}; move one of them")
    assert q.stride(-1) == segment.k.stride(-1) == segment.v.stride(-1) == 1


def config(warps: int, stages: int, **tiles: int) -> Any:
    return triton.Config(tiles, num_warps=warps, num_stages=stages)


_tuning = True


@contextmanager
def tuning(enabled: bool) -> Iterator[None]:
    """Whether kernels called inside are timed for their tile sizes, or take the first that fits.

    Checks that touch many shapes once would otherwise spend minutes on compiling.
    """
    global _tuning
    before, _tuning = _tuning, enabled
    try:
        yield
    finally:
        _tuning = before


class _Tiled:
    """A kernel that gets its tile sizes when it is launched."""

    def __init__(
        self, kernel: Any, autotuned: Any, choose: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> None:
        self.kernel, self.autotuned, self.choose = kernel, autotuned, choose

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if self.autotuned is not None and _tuning:
            launch: Callable[..., Any] = self.autotuned[grid]
            return launch

        def launch_fixed(*args: Any, **kwargs: Any) -> Any:
            call = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            chosen = kwargs | self.choose(call)
            return self.kernel[grid(chosen) if callable(grid) else grid](*args, **chosen)

        return launch_fixed


def tuned(
    configs: Sequence[Any],
    *,
    key: Sequence[str],
    small: Mapping[str, int],
    keep: Callable[[Any, Mapping[str, Any]], bool] | None = None,
) -> Callable[[Any], Any]:
    """Decorate a kernel so that its tile sizes are timed once per ``key``.

    Parameters
    ----------
    configs : sequence of triton.Config
        What the autotuner may choose from.
    key : sequence of str
        Arguments whose values ask for a new timing (dtypes always do).
    small : mapping
        Tile sizes under the interpreter.
    keep : callable, optional
        ``keep(config, arguments)`` is False for configurations that do not fit the call; where
        none fits, the last one is taken, which is the smallest.
    """

    def fitting(candidates, call):
        return [c for c in candidates if keep is None or keep(c, call)] or candidates[-1:]

    def prune(candidates, arguments, **keywords):
        return fitting(candidates, {**arguments, **keywords})

    def decorate(kernel):
        if interpreted():
            return _Tiled(kernel, None, lambda call: dict(small))
        autotuned = triton.autotune(
            configs=list(configs),
            key=list(key),
            prune_configs_by={"early_config_prune": prune},
            cache_results=True,
        )(kernel)
        return _Tiled(kernel, autotuned, lambda call: fitting(list(configs), call)[0].all_kwargs())

    return decorate


@triton.jit
def count_below(values, n, bound):
    """How many of ``values[:n]``, ascending, are below ``bound``."""
    low = n * 0
    high = n
    while low < high:
        middle = (low + high) // 2
        below = tl.load(values + middle) < bound
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def entries_before(bound, S, start, positions, POSITIONS: tl.constexpr):
    """How many of the ``S`` entries of a head have a position below ``bound``."""
    if POSITIONS:
        return count_below(positions, S, bound)
    else:
        return tl.minimum(tl.maximum(bound - start, 0), S)


@triton.jit
def soft_capped(x, cap):
    """``cap * tanh(x / cap)``; the exponential saturates at both ends, so nothing overflows."""
    return cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / cap)))


@triton.jit
def rounded(x):
    """``x`` rounded to the nearest integer, ties to even; exact below 2^22 in magnitude.

    Adding 1.5 * 2^23 leaves no bits for a fraction. Compile the caller with
    ``enable_fp_fusion=False`` where ``x`` is a product.
    """
    return (x + 12582912.0) - 12582912.0
