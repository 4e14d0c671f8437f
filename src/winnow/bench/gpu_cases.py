"""Inputs for the GPU benchmark, and the check of every Triton kernel against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.decode import decode
from winnow.kernels.key_scan import Bits, KeyCodes, key_scan, quantize_keys
from winnow.kernels.matvec import matvec, quantize_weight
from winnow.kernels.prefill import prefill
from winnow.kernels.quantize import Axis, dequantize, quantize
from winnow.kernels.top_k import top_k
from winnow.types import AttentionSpec, Blocks, Dense, Form, Partial, Segment, Selection, Stripes, Window

__all__ = ["Check", "check_all", "int32", "random_blocks", "random_selection", "random_stripes", "segment"]

# Largest ||got - want|| / ||want||, and largest difference of a log-sum-exp, by dtype.
ALLOWED = {
    torch.float32: (1e-5, 2e-5),
    torch.float16: (2e-3, 2e-4),
    torch.bfloat16: (1e-2, 2e-4),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the reference.

    Attributes
    ----------
    name : str
        Operation, options and dtype.
    error : float
        Relative error of the output in norm; 0 where equality was asked for and held.
    passed : bool
    """

    name: str
    error: float
    passed: bool


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def segment(
    lengths: Sequence[int],
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    gaps: bool = False,
    bias: bool = False,
) -> Segment:
    """Random entries; what lies behind a head's length is NaN."""
    H, C = len(lengths), max(lengths) + 5
    k, v = (torch.randn(H, C, D, device=device).to(dtype) for _ in range(2))
    positions = torch.randint(1, 4, (H, C), device=device).cumsum(1).int() if gaps else None
    values = torch.randn(H, C, device=device) if bias else None
    for h, n in enumerate(lengths):
        k[h, n:], v[h, n:] = torch.nan, torch.nan
        if values is not None:
            values[h, n:] = torch.nan
    return Segment(k=k, v=v, lengths=int32(lengths), positions=positions, bias=values)


def _lists(picked: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and columns of ``[heads, lists, limit]`` bool."""
    heads, lists, _ = picked.shape
    ends = picked.sum(-1).flatten().cumsum(0).view(heads, lists)
    before = torch.cat([torch.zeros_like(ends[:1, -1]), ends[:-1, -1]])
    return torch.cat([before[:, None], ends], 1).int(), picked.nonzero()[:, 2].int()


def random_blocks(heads: int, T: int, S: int, block: int, percent: int, device: torch.device) -> Blocks:
    """About ``percent`` of the causal key blocks per row, the diagonal among them; rows end at ``S``."""
    rows, columns = -(-T // block), -(-S // block)
    # The last entry that a row of blocks sees.
    last = ((torch.arange(rows, device=device) + 1) * block + S - T - 1).clamp_max(S - 1) // block
    column = torch.arange(columns, device=device)
    picked = torch.rand(heads, rows, columns, device=device) * 100 < percent
    picked = picked & (column <= last[:, None]) | (column == last[:, None])
    offsets, listed = _lists(picked)
    return Blocks(block=block, offsets=offsets, columns=listed)


def random_stripes(heads: int, T: int, S: int, rows: int, percent: int, device: torch.device) -> Stripes:
    """About ``percent`` of the columns before each run of rows."""
    runs = -(-T // rows)
    first = torch.arange(runs, device=device) * rows + S - T
    picked = torch.rand(heads, runs, S, device=device) * 100 < percent
    offsets, listed = _lists(picked & (torch.arange(S, device=device) <= first[:, None]))
    return Stripes(rows=rows, phase=0, offsets=offsets, columns=listed)


def random_selection(rows: int, length: int, page: int, n: int, device: torch.device) -> Selection:
    """``n`` entries or pages per row, ascending, with counts on the device."""
    order = torch.rand(rows, -(-length // page), device=device).argsort(1)[:, :n]
    indices = order.sort(1).values.int().contiguous()
    counts = torch.full((rows,), indices.shape[1], dtype=torch.int32, device=device)
    return Selection(indices=indices, counts=counts, page=page)


def _difference(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def _compare(name: str, got: Partial, want: Partial, dtype: torch.dtype) -> Check:
    allowed, allowed_lse = ALLOWED[dtype]
    error = _difference(got.out, want.out)
    blind = torch.isneginf(want.lse)
    same_blind = torch.equal(torch.isneginf(got.lse), blind)
    lse = (got.lse - want.lse).masked_fill(blind, 0.0).abs().max()
    passed = error <= allowed and same_blind and bool(lse <= allowed_lse) and got.pairs == want.pairs
    for mine, theirs in ((got.row_max, want.row_max), (got.logits, want.logits)):
        if mine is not None and theirs is not None:
            same = torch.allclose(mine, theirs, rtol=1e-5, atol=allowed_lse)
            passed = passed and same
    return Check(name=f"{name} {dtype}".replace("torch.", ""), error=error, passed=passed)


def _equal(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Check:
    same = all(torch.equal(got, want) for got, want in pairs)
    worst = max(_difference(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)) for got, want in pairs)
    return Check(name=name, error=worst, passed=same)


def _prefill_checks(device: torch.device, dtype: torch.dtype, S: int) -> Iterator[Check]:
    T, heads = S * 3 // 4, 4
    for D in (64, 128, 80):
        q = torch.randn(T, heads, D, device=device).to(dtype)
        plain = AttentionSpec(scale=D**-0.5)
        full = replace(plain, window=S // 2, softcap=4.0)
        forms: dict[str, Form] = {
            "dense": Dense(),
            "window": Window(init=5, local=S // 8),
            "window aligned": Window(init=64, local=128, align=64),
            "blocks 64": random_blocks(heads, T, S - 3, 64, 30, device),
            "blocks 128": random_blocks(heads, T, S - 3, 128, 30, device),
            "stripes": random_stripes(heads, T, S - 3, 100, 30, device),
        }
        simple = segment([S, S - 3], D, dtype, device)
        rich = segment([S, S - 3], D, dtype, device, gaps=True, bias=True)
        if D != 128:  # every form once; the other sizes where tiles differ most
            forms = {name: forms[name] for name in ("dense", "blocks 64")}
        for name, form in forms.items():
            for label, spec, s, first in (("", plain, simple, S - T), (" all options", full, rich, S)):
                call: dict[str, Any] = {
                    "spec": spec,
                    "query_positions": torch.arange(first, first + T, dtype=torch.int32),
                    "form": form,
                    "want_row_max": True,
                }
                got, want = (prefill(q, s, backend=b, **call) for b in ("triton", "reference"))
                yield _compare(f"prefill {name}{label} D={D}", got, want, dtype)


def _decode_checks(device: torch.device, dtype: torch.dtype, S: int) -> Iterator[Check]:
    for D, group in ((64, 4), (128, 8), (80, 1)):
        q = torch.randn(2 * group, D, device=device).to(dtype)
        plain = AttentionSpec(scale=D**-0.5)
        full = replace(plain, window=S, softcap=4.0)
        simple = segment([S, S - 3], D, dtype, device)
        rich = segment([S, S // 2], D, dtype, device, gaps=True, bias=True)
        selections = {
            "everything": None,
            "entries": random_selection(2, S // 2, 1, S // 9, device),
            "entries per query head": random_selection(2 * group, S // 2, 1, S // 9, device),
            "pages of 16": random_selection(2, S // 2, 16, 9, device),
            "pages of 64": random_selection(2 * group, S // 2, 64, 3, device),
        }
        if D != 128:
            selections = {name: selections[name] for name in ("everything", "pages of 64")}
        for name, selection in selections.items():
            for label, spec, s, position in (("", plain, simple, S - 1), (" all options", full, rich, S)):
                call: dict[str, Any] = {
                    "spec": spec,
                    "position": position,
                    "selection": selection,
                    "want_logits": True,
                }
                got, want = (decode(q, s, backend=b, **call) for b in ("triton", "reference"))
                yield _compare(f"decode {name}{label} D={D} G={group}", got, want, dtype)


def _matvec_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for rows in (1, 3, 20):
        x = torch.randn(rows, 1000, device=device).to(dtype)
        w = torch.randn(501, 1000, device=device).to(dtype)
        got, want = (matvec(x, w, backend=b) for b in ("triton", "reference"))
        error = _difference(got, want)
        name = f"matvec {rows} rows {dtype}".replace("torch.", "")
        yield Check(name=name, error=error, passed=error <= ALLOWED[dtype][0])
        weight = quantize_weight(w)
        got, want = (matvec(x, weight, backend=b) for b in ("triton", "reference"))
        yield _equal(f"{name} int8", [(got, want)])


def _integer_checks(device: torch.device, dtype: torch.dtype, S: int) -> Iterator[Check]:
    """Kernels whose results are exact: the same bits are asked for."""
    bits: Bits
    for bits in (4, 8):
        k, q = (torch.randn(*shape, device=device).to(dtype) for shape in ((2, S, 128), (8, 128)))
        made = []
        for backend in ("triton", "reference"):
            keys = KeyCodes.empty(2, S, 128, bits, device)
            keys.codes.fill_(7)
            keys.scales.fill_(7.0)
            quantize_keys(k, int32([0, 5]), int32([S, S - 3]), keys, backend=backend)
            scores = key_scan(q, keys, int32([S, S - 3]), backend=backend)
            made.append((keys.codes, keys.scales, scores))
        name = f"key scan {bits} bits {dtype}".replace("torch.", "")
        yield _equal(name, list(zip(*made, strict=True)))
    axis: Axis
    for axis, group in (("token", 64), ("channel", 32)):
        x = torch.randn(2, 64, 128, device=device).to(dtype)
        for width in (8, 4, 2):
            call: dict[str, Any] = {"bits": width, "axis": axis, "group": group}
            got, want = (quantize(x, backend=b, **call) for b in ("triton", "reference"))
            back = [dequantize(want, dtype, backend=b) for b in ("triton", "reference")]
            assert got.zero is not None
            assert want.zero is not None
            name = f"quantise {width} bits by {axis} {dtype}".replace("torch.", "")
            yield _equal(
                name,
                [(got.codes, want.codes), (got.scale, want.scale), (got.zero, want.zero), (back[0], back[1])],
            )


def _top_k_checks(device: torch.device, S: int) -> Iterator[Check]:
    for name, scores in (
        ("random", torch.randn(4, S, device=device)),
        ("ties", torch.randn(4, S, device=device).round()),
    ):
        lengths = int32([S, S - 3, 0, S // 2])
        got, want = (top_k(scores, lengths, S // 20, backend=b) for b in ("triton", "reference"))
        yield _equal(f"top-k {name}", [(got[0], want[0]), (got[1], want[1])])


def check_all(
    device: torch.device,
    *,
    entries: int = 1000,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16),
) -> Iterator[Check]:
    """Every Triton kernel against the reference, on fresh random operands.

    Parameters
    ----------
    device : torch.device
        A GPU, or the CPU under Triton's interpreter.
    entries : int
        Entries of a head.
    dtypes : sequence of torch.dtype
        Of the operands; the interpreter cannot multiply bfloat16.

    Yields
    ------
    Check
    """
    for dtype in dtypes:
        yield from _prefill_checks(device, dtype, entries)
        yield from _decode_checks(device, dtype, entries)
        yield from _matvec_checks(device, dtype)
        yield from _integer_checks(device, dtype, entries)
    yield from _top_k_checks(device, entries)
