"""``winnow bench kernels``: each kernel beside the machine's limit and PyTorch's best form, in one run.

Contenders and the limit take turns, repetition by repetition. Quotients are taken within a repetition,
and their median is reported, because the speed of a shared machine drifts between repetitions. All raw
samples are in the JSON.
"""

from __future__ import annotations

import difflib
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from winnow.bench import machine, report
from winnow.bench.kernel_cases import OPS, Contender, Group, groups
from winnow.bench.output import save
from winnow.kernels.backend import extension

__all__ = ["OPS", "run", "table"]

Progress = Callable[[str, int, int], None]

table = report.table

_REPETITIONS = (3, 25)  # fewest and most
_SECONDS = 9.0  # of one group, where the fewest repetitions take no longer


class _Limit:
    """The limit of a group, in operations or bytes per second."""

    def __init__(self, group: Group, size: int) -> None:
        self._group, self._size = group, size
        if group.limit == "matrix product":
            self._a, self._b = (torch.empty(size, size, dtype=torch.bfloat16).normal_() for _ in range(2))

    def rate(self) -> float:
        if self._group.limit == "matrix product":
            return 2 * self._size**3 / machine.matrix_seconds(self._a, self._b)
        moved = sum(t.numel() * t.element_size() for t in self._group.reads)
        return moved / machine.read_seconds(*self._group.reads)


def _seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender.run()
    return (time.perf_counter() - start) / contender.calls


def _measure(group: Group, chosen: tuple[Contender, ...], *, quick: bool) -> dict[str, Any]:
    """Interleaved samples of a group: seconds per call of each contender, rates of the limit."""
    limit = _Limit(group, 1024 if quick else 4096)
    limit.rate()
    start = time.perf_counter()
    for contender in chosen:
        contender.run()  # warm: threads, caches, the allocator
    once = time.perf_counter() - start
    fewest, most = (3, 5) if quick else _REPETITIONS
    repetitions = max(fewest, min(most, int(_SECONDS / max(once, 1e-3))))
    samples: dict[str, list[float]] = {c.name: [] for c in chosen}
    rates: list[float] = []
    for _ in range(repetitions):
        limit.rate()  # the first only settles what the last contender left in the caches
        rates.append(limit.rate())
        for contender in chosen:
            samples[contender.name].append(_seconds(contender))
    return {"limit": rates, "contenders": samples}


def _quotient(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _rows(group: Group, chosen: tuple[Contender, ...], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per contender: what the samples say, and whether it reached its floors."""
    samples: dict[str, list[float]] = measured["contenders"]
    rows = []
    dense_op = next((c.op for c in chosen if c.name == "dense"), None)
    for c in chosen:
        seconds = samples[c.name]
        against: dict[str, float | None] = {
            "limit": _quotient([c.work / s for s in seconds], measured["limit"]),
            "pytorch": None,
            "dense": None,
        }
        best = min(
            (b for b in c.baselines if b in samples),
            key=lambda b: statistics.median(samples[b]),
            default=None,
        )
        if best is not None:
            against["pytorch"] = _quotient(samples[best], seconds)
        if "dense" in samples and c.op == dense_op and c.baselines and c.name != "dense":
            against["dense"] = _quotient(samples["dense"], seconds)
        floors = []
        for versus, wanted in c.floors:
            got = against[versus]
            if got is not None:
                floors.append({"versus": versus, "wanted": wanted, "got": got, "met": got >= wanted})
        rows.append(
            {
                "group": group.name,
                "name": c.name,
                "op": c.op,
                "ours": bool(c.baselines or c.floors),
                "seconds": statistics.median(seconds),
                "work": c.work,
                "unit": "operations" if group.limit == "matrix product" else "bytes",
                "limit": group.limit,
                "of_limit": against["limit"],
                "pytorch": best,
                "versus_pytorch": against["pytorch"],
                "versus_dense": against["dense"],
                "floors": floors,
            }
        )
    return rows


def _machine_limits(*, quick: bool) -> dict[str, float]:
    """The two limits by themselves; what arithmetic alone allows, and PyTorch's own way of reading."""
    size, moved, times = (1024, 64 << 20, 1000) if quick else (4096, 256 << 20, 100_000)
    a = torch.empty(size, size, dtype=torch.bfloat16).normal_()
    data = torch.ones(moved // 8, dtype=torch.int64)

    def torch_sum() -> float:
        start = time.perf_counter()
        data.sum()
        return time.perf_counter() - start

    rounds = [
        (
            machine.matrix_seconds(a, a),
            machine.multiply_rate(times),
            machine.read_seconds(data),
            torch_sum(),
        )
        for _ in range(5)
    ]
    product, peak, read, summed = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "bf16_matrix_product_flops": 2 * size**3 / product,
        "bf16_multiply_flops": peak,
        "read_bytes_per_second": moved / read,
        "torch_sum_bytes_per_second": moved / summed,
    }


def run(
    quick: bool = False,
    ops: list[str] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the kernels.

    Parameters
    ----------
    quick : bool
        Small shapes, under half a minute: it shows that everything runs; the caches flatter it, so
        it judges no floors.
    ops : list of str or None
        Only these of :data:`OPS`.
    out : Path or None
        Write the JSON here, and the figure beside it where Matplotlib is installed.
    progress : callable or None
        Called with what runs, groups done, and groups in all.

    Returns
    -------
    dict
        ``config``, ``machine``, ``limits``, ``rows`` (one per contender) and ``samples`` (raw, seconds
        per call, and rates of the limit, per group).

    Raises
    ------
    ValueError
        If an operation is unknown or the native kernels were not built.
    """
    wanted = tuple(ops) if ops else OPS
    for op in wanted:
        if op not in OPS:
            near = difflib.get_close_matches(op, OPS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(OPS)}"
            raise ValueError(f"unknown operation {op!r}; {hint}")
    if extension() is None:
        raise ValueError("there are no native kernels to measure; install a C++ compiler and reinstall")
    tell = progress or (lambda what, done, total: None)
    torch.manual_seed(0)
    builders = list(groups(quick=quick, ops=wanted))
    tell("limits of the machine", 0, len(builders))
    result: dict[str, Any] = {
        "kind": "kernels",
        "config": {"quick": quick, "ops": list(wanted), "groups": {}},
        "machine": machine.describe(),
        "limits": _machine_limits(quick=quick),
        "rows": [],
        "samples": {},
    }
    start = time.perf_counter()
    for done, build in enumerate(builders):
        group = build()
        tell(group.name, done, len(builders))
        asked = [c for c in group.contenders if c.op in wanted]
        # What others are compared with runs too, whatever was asked for.
        needed = {c.name for c in asked} | {b for c in asked for b in c.baselines}
        if any(versus == "dense" for c in asked for versus, _ in c.floors):
            needed.add("dense")
        chosen = tuple(c for c in group.contenders if c.name in needed)
        measured = _measure(group, chosen, quick=quick)
        rows = _rows(group, chosen, measured)
        if quick:
            for row in rows:
                row["floors"] = []
        result["rows"] += rows
        result["samples"][group.name] = measured
        result["config"]["groups"][group.name] = group.config
        del group, chosen, asked
        gc.collect()
    result["config"]["seconds"] = time.perf_counter() - start
    tell("done", len(builders), len(builders))
    if out is not None:
        save(result, out)
        report.draw_beside(out)
    return result
