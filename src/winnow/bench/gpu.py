"""The Triton kernels on a GPU: checked against the reference, timed beside PyTorch and the card's limits.

``python -m winnow.bench.gpu --out benchmarks/results`` prints a table and writes one JSON. Every timing
stands beside a limit measured in the same run: the bytes that must move at the rate of a large copy, or
the products at the rate of a large bfloat16 matrix product.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from winnow.bench.gpu_cases import (
    check_all,
    int32,
    random_blocks,
    random_selection,
    random_stripes,
    segment,
)
from winnow.bench.machine import describe
from winnow.kernels.decode import decode
from winnow.kernels.key_scan import Bits, KeyCodes, key_scan, quantize_keys
from winnow.kernels.matvec import matvec, quantize_weight
from winnow.kernels.prefill import prefill
from winnow.kernels.quantize import dequantize, quantize
from winnow.kernels.top_k import top_k
from winnow.types import AttentionSpec, Dense, Form, Window

__all__ = ["Limits", "Timing", "main"]

Runs = dict[str, Callable[[], object]]

BF16 = torch.bfloat16
REPEATS = 20
FLUSH_BYTES = 1 << 30  # several times the second-level cache; its time also hides the launch of what follows


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the card can do: bytes per second of a copy, operations per second of a product."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One operation on one backend.

    Attributes
    ----------
    name, backend : str
    call_ms : list of float
        Raw samples between two events around the call, which includes the host's share where the
        call waits for the device.
    kernel_ms : float
        Time that the card spent in the call's kernels, by the profiler.
    limit_ms : float
        The shortest time that bytes and products allow.
    """

    name: str
    backend: str
    call_ms: list[float]
    kernel_ms: float
    limit_ms: float

    @property
    def median_ms(self) -> float:
        return statistics.median(self.call_ms)


class _Clock:
    """Times calls on an otherwise idle card, with a cold second-level cache."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def call_ms(self, run: Callable[[], object]) -> list[float]:
        for _ in range(3):  # compiles and tunes
            run()
        samples = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self.flush.zero_()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end))
        return samples

    def kernel_ms(self, run: Callable[[], object]) -> float:
        """Of one call, from a median of five, copies and fills included."""
        samples: list[float] = []
        for _ in range(5):
            self.flush.zero_()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run()
                torch.cuda.synchronize()
            samples.append(sum(e.self_device_time_total for e in profile.key_averages()) / 1e3)
        return statistics.median(samples)


def _limits(clock: _Clock, device: torch.device) -> Limits:
    source, target = (torch.empty(1 << 31, dtype=torch.int8, device=device) for _ in range(2))
    source.random_()
    copy = statistics.median(clock.call_ms(lambda: target.copy_(source)))
    a, b = (torch.randn(8192, 8192, device=device, dtype=BF16) for _ in range(2))
    product = statistics.median(clock.call_ms(lambda: a @ b))
    return Limits(bytes_per_s=2 * source.numel() / copy * 1e3, operations_per_s=2 * 8192**3 / product * 1e3)


class _Timer:
    """Collects timings of operations and their peers beside one limit each."""

    def __init__(self, device: torch.device) -> None:
        self.clock = _Clock(device)
        self.limits = _limits(self.clock, device)

    def __call__(
        self, name: str, backends: Runs, *, bytes: float = 0, operations: float = 0
    ) -> Iterator[Timing]:
        limit = max(bytes / self.limits.bytes_per_s, operations / self.limits.operations_per_s) * 1e3
        for backend, run in backends.items():
            try:
                samples = self.clock.call_ms(run)
            except RuntimeError as error:  # a peer that does not take these shapes; ours must
                if backend == "triton":
                    raise
                print(f"{name}: {backend} cannot run: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            kernel = self.clock.kernel_ms(run)
            yield Timing(name=name, backend=backend, call_ms=samples, kernel_ms=kernel, limit_ms=limit)


def _sdpa(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return run


def _prefill(time: _Timer, device: torch.device) -> Iterator[Timing]:
    for D, S in ((64, 16384), (128, 8192), (128, 16384)):
        s = segment([S] * 8, D, BF16, device)
        q = torch.randn(S, 32, D, device=device, dtype=BF16)
        spec, q_pos = AttentionSpec(scale=D**-0.5), torch.arange(S, dtype=torch.int32)
        forms: dict[str, Form] = {"dense": Dense()}
        if S == 16384:
            forms["window 128 + 2048"] = Window(init=128, local=2048)
            forms["blocks of 128, 25 %"] = random_blocks(32, S, S, 128, 25, device)
            forms["blocks of 128, 10 %"] = random_blocks(32, S, S, 128, 10, device)
            forms["blocks of 64, 10 %"] = random_blocks(32, S, S, 64, 10, device)
            forms["stripes of 128 rows, 10 %"] = random_stripes(32, S, S, 128, 10, device)
        batch_q = q.transpose(0, 1)[None].contiguous()
        batch_k, batch_v = (x[None, :, :S].contiguous() for x in (s.k, s.v))
        for name, form in forms.items():
            ours = partial(prefill, q, s, spec=spec, query_positions=q_pos, form=form, backend="triton")
            runs: Runs = {"triton": ours}
            if isinstance(form, Dense):
                runs["sdpa flash"] = _sdpa(SDPBackend.FLASH_ATTENTION, batch_q, batch_k, batch_v, True)
                runs["sdpa cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION, batch_q, batch_k, batch_v, True)
            yield from time(f"prefill {S} D={D} {name}", runs, operations=4 * D * ours().pairs)


def _decode(time: _Timer, device: torch.device) -> Iterator[Timing]:
    D = 128
    for S in (8192, 65536, 524288):
        s = segment([S] * 8, D, BF16, device)
        q = torch.randn(32, D, device=device, dtype=BF16)
        spec = AttentionSpec(scale=D**-0.5)
        per_entry = 8 * 2 * D * 2
        k, v = (x[None, :, :S].contiguous() for x in (s.k, s.v))
        grouped, folded = q[None, :, None], q.view(1, 8, 4, D)
        ours = partial(decode, q, s, spec=spec, position=S - 1, backend="triton")
        runs: Runs = {
            "triton": ours,
            "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION, grouped, k, v, False),
            "sdpa flash, group folded": _sdpa(SDPBackend.FLASH_ATTENTION, folded, k, v, False),
            "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, grouped, k, v, False),
        }
        yield from time(f"decode {S} everything", runs, bytes=S * per_entry)
        for page in (1, 64):
            selection = random_selection(8, S, page, S // 20 // page, device)
            what = "entries" if page == 1 else f"pages of {page}"
            read = int(selection.counts[0]) * page * per_entry
            listed: Runs = {"triton": partial(ours, selection=selection)}
            yield from time(f"decode {S}, 5 % in {what}", listed, bytes=read)


def _matvec(time: _Timer, device: torch.device) -> Iterator[Timing]:
    for N, K in ((4096, 4096), (14336, 4096), (4096, 14336)):
        w = torch.randn(N, K, device=device, dtype=BF16)
        small = quantize_weight(w)
        for rows in (1, 8):
            x = torch.randn(rows, K, device=device, dtype=BF16)
            runs: Runs = {
                "triton": partial(matvec, x, w, backend="triton"),
                "linear": partial(linear, x, w),
            }
            yield from time(f"matvec {N}x{K}, {rows} rows", runs, bytes=2 * N * K)
            int8: Runs = {"triton": partial(matvec, x, small, backend="triton")}
            yield from time(f"matvec {N}x{K} int8, {rows} rows", int8, bytes=N * K)


def _scan(time: _Timer, device: torch.device) -> Iterator[Timing]:
    S, D = 65536, 128
    q, k = torch.randn(32, D, device=device, dtype=BF16), torch.randn(8, S, D, device=device, dtype=BF16)
    lengths, none = int32([S] * 8), int32([0] * 8)
    all_bits: tuple[Bits, ...] = (8, 4)
    for bits in all_bits:
        keys = KeyCodes.empty(8, S, D, bits, device)

        moved = 8 * S * keys.bytes_per_entry
        fill: Runs = {"triton": partial(quantize_keys, k, none, lengths, keys, backend="triton")}
        yield from time(f"quantise keys to {bits} bits, 8x{S}", fill, bytes=moved + 2 * k.numel())
        scan: Runs = {"triton": partial(key_scan, q, keys, lengths, backend="triton")}
        yield from time(f"key scan {bits} bits, 8x{S}", scan, bytes=moved + 4 * 8 * S)
    scores = torch.randn(8, S, device=device)
    runs: Runs = {
        "triton": partial(top_k, scores, lengths, S // 20, backend="triton"),
        "torch.topk": partial(torch.topk, scores, S // 20),
    }
    yield from time(f"top-k 5 % of 8x{S}", runs, bytes=4 * 8 * S)


def _quantize(time: _Timer, device: torch.device) -> Iterator[Timing]:
    x = torch.randn(8, 65536, 128, device=device, dtype=BF16)
    for bits in (8, 4, 2):
        for axis, group in (("token", 64), ("channel", 32)):
            call: dict[str, Any] = {"bits": bits, "axis": axis, "group": group, "backend": "triton"}
            made = quantize(x, **call)
            moved = made.bytes + 2 * x.numel()
            name = f"{bits} bits by {axis}, 8x65536x128"
            runs: Runs = {"triton": partial(quantize, x, **call)}
            yield from time(f"quantise {name}", runs, bytes=moved)
            back: Runs = {"triton": partial(dequantize, made, backend="triton")}
            yield from time(f"dequantise {name}", back, bytes=moved)


OPERATIONS: dict[str, Callable[[_Timer, torch.device], Iterator[Timing]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "matvec": _matvec,
    "scan": _scan,
    "quantize": _quantize,
}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 where every check passed, 1 where one failed, 2 where none can run."""
    parser = argparse.ArgumentParser(prog="python -m winnow.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--only", choices=OPERATIONS, nargs="+", default=list(OPERATIONS))
    parser.add_argument("--no-checks", action="store_true", help="time only")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device was found; run this on a machine with an NVIDIA GPU", file=sys.stderr)
        return 2
    try:
        from winnow.kernels.triton_support import tuning
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.manual_seed(0)

    checks = []
    with tuning(False):
        for check in () if chosen.no_checks else check_all(device):
            checks.append(check)
            if not check.passed:
                print(f"WRONG  {check.name}: error {check.error:.2e}", flush=True)
    failed = sum(not c.passed for c in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")

    time = _Timer(device)
    limits = time.limits
    print(f"limits: {limits.bytes_per_s / 1e12:.2f} TB/s, {limits.operations_per_s / 1e12:.0f} TFLOP/s")
    machine = describe()
    path = chosen.out / f"gpu-{re.sub('[^a-z0-9]+', '-', str(machine['gpu']).lower())}.json"
    chosen.out.mkdir(parents=True, exist_ok=True)
    timings: list[Timing] = []
    for operation in chosen.only:
        for t in OPERATIONS[operation](time, device):
            timings.append(t)
            share = 100 * t.limit_ms / t.kernel_ms if t.kernel_ms else float("nan")
            print(
                f"{t.name:44} {t.backend:26} call {t.median_ms:8.4f} ms  kernels {t.kernel_ms:8.4f} ms"
                f"  limit {t.limit_ms:8.4f} ms  {share:3.0f} %",
                flush=True,
            )
        # After every operation: a run that is cut short keeps what it measured.
        result = {
            "machine": machine,
            "limits": asdict(time.limits),
            "checks": [asdict(c) for c in checks],
            "timings": [asdict(t) | {"median_ms": t.median_ms} for t in timings],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
