"""What the tests of prefill and mass share: kernels of many queries over one segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from winnow.kernels import backend
from winnow.types import Segment

ISAS = backend.isas()
F32, BF16 = torch.float32, torch.bfloat16
Result = TypeVar("Result")


@contextmanager
def forced(isa: str) -> Iterator[None]:
    before = backend.extension().current_isa()
    backend.force_isa(isa)
    try:
        yield
    finally:
        backend.force_isa(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """The reference's products are too small to share; the native kernel then gets its threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(
    T: int,
    lengths: list[int],
    *,
    G: int = 2,
    D: int = 32,
    dtype: torch.dtype = F32,
    start: int = 0,
    gaps: bool = False,
    bias: bool = False,
    ahead: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Segment, Tensor]:
    """Queries at the last ``T`` positions (``ahead`` further on), and a segment with poisoned reserve."""
    g = torch.Generator().manual_seed(seed)
    H, C = len(lengths), max(lengths) + 5
    q = torch.randn(T, H * G, D, generator=g).to(dtype)
    k, v = (torch.randn(H, C, D, generator=g).to(dtype) for _ in range(2))
    positions, last = None, start + max(lengths) - 1
    if gaps:
        steps = torch.randint(1, 4, (H, C), generator=g)
        positions = (steps.cumsum(1) - 1 + start).to(torch.int32)
        last = int(max([positions[h, n - 1] for h, n in enumerate(lengths) if n], default=start))
    values = torch.randn(H, C, generator=g) if bias else None
    for h, n in enumerate(lengths):
        k[h, n:], v[h, n:] = torch.nan, torch.nan
        if values is not None:
            values[h, n:] = torch.nan
    first = max(0, last + 1 - T) + ahead
    segment = Segment(
        k=k,
        v=v,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        start=start,
        positions=positions,
        bias=values,
    )
    return q, segment, torch.arange(first, first + T, dtype=torch.int32)


def on_every_isa(run: Callable[[], Result], *operands: Tensor) -> list[tuple[str, Result]]:
    """What a kernel gives on each instruction set, best first; it may not change its operands."""
    before, results = [x.clone() for x in operands], []
    for name in ISAS:
        with forced(name):
            results.append((name, run()))
        for old, new in zip(before, operands, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    return results


def halves(whole: Segment, cut: int) -> tuple[Segment, Segment]:
    """The first ``cut`` entries of a segment of one head, and the others."""
    S, positions = int(whole.lengths), whole.positions
    first, second = (
        Segment(
            k=whole.k[:, a:],
            v=whole.v[:, a:],
            lengths=torch.tensor([b - a], dtype=torch.int32),
            start=a,
            positions=None if positions is None else positions[:, a:],
        )
        for a, b in ((0, cut), (cut, S))
    )
    return first, second


def strided(q: Tensor, segment: Segment) -> tuple[Tensor, Segment]:
    """The same operands as parts of wider ones, and the keys with entries outermost."""
    wide = q.new_full((q.shape[0], 3, *q.shape[1:]), torch.nan)
    wide[:, 1] = q
    return wide[:, 1], replace(segment, k=segment.k.transpose(0, 1).contiguous().transpose(0, 1))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` gives NaN: what a kernel does not write shows."""
    empty = torch.empty

    def nan(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", nan)
