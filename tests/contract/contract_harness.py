"""What the contract's checks share: the parts, found by walking the package, samples of each, and data."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from tests.parity.one_layer import HalfSplit
from torch import Tensor

import winnow.compression
import winnow.generation
import winnow.loading
import winnow.retrieval
from winnow.compression.actions.compensate import Compensate
from winnow.compression.actions.demote import Demote
from winnow.compression.actions.drop import Drop
from winnow.compression.actions.factor_keys import FactorKeys
from winnow.compression.actions.grade import Grade
from winnow.compression.actions.merge_similar import MergeSimilar
from winnow.compression.actions.slide import Slide
from winnow.compression.actions.thin_keys import ThinKeys
from winnow.compression.budgets.adaptive import Adaptive
from winnow.compression.budgets.density import Density
from winnow.compression.budgets.everything import Everything
from winnow.compression.budgets.retrieval_heads import RetrievalHeads
from winnow.compression.budgets.sensitivity import Sensitivity
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.scorers.accumulated import Accumulated
from winnow.compression.scorers.peak_attention import PeakAttention
from winnow.compression.scorers.probe_attention import ProbeAttention
from winnow.compression.scorers.recency import Recency
from winnow.compression.scorers.recurrence import Recurrence
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.generation.a_shape import AShape
from winnow.generation.anchor import Anchor
from winnow.generation.permuted_blocks import PermutedBlocks
from winnow.generation.protocol import PrefillLayer
from winnow.generation.swiftkv import SwiftKV
from winnow.generation.tri_shape import TriShape
from winnow.kernels.merge import merge
from winnow.kernels.prefill import prefill
from winnow.loading.landmarks import Landmarks
from winnow.loading.page_bounds import PageBounds
from winnow.loading.sketch import Sketch
from winnow.loading.tidal import Tidal
from winnow.recipe import PARTS
from winnow.retrieval.blend import Blend
from winnow.retrieval.radix import Radix
from winnow.types import AttentionSpec, Partial, Pattern, Profile, Segment

MARKS = {
    "generation": "patterns",
    "scorer": "score",
    "budget": "allocate",
    "action": "plan",
    "retrieval": "pool",
    "loading": "select",
}
"""The method by which a class is known to fill a slot."""


def walk() -> dict[type, str]:
    """Every part class that the four stages define, with its slot: found, not listed."""
    found: dict[type, str] = {}
    for package in (winnow.generation, winnow.compression, winnow.retrieval, winnow.loading):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            for value in vars(module).values():
                if not (isinstance(value, type) and value.__module__ == module.__name__):
                    continue
                if not dataclasses.is_dataclass(value):
                    continue
                for slot, mark in MARKS.items():
                    if callable(getattr(value, mark, None)):
                        found[value] = slot
    return found


class Sample(NamedTuple):
    """A part that bites on a few dozen entries, and one at its limit, where it must change nothing."""

    tight: Any
    limit: Any


SAMPLES: dict[type, Sample] = {
    AShape: Sample(AShape(init=3, local=9), AShape(init=0, local=10_000)),
    Anchor: Sample(
        Anchor(theta=0.5, block=4, step=3, init=2), Anchor(theta=math.inf, block=4, step=3, init=2)
    ),
    TriShape: Sample(TriShape(init=3, local=9, last=4), TriShape(init=0, local=9, last=10_000)),
    PermutedBlocks: Sample(
        PermutedBlocks(block=2, segment=12, share=0.5), PermutedBlocks(block=2, segment=12, share=1.0)
    ),
    SwiftKV: Sample(SwiftKV(layers=1, pattern=AShape(init=3, local=9)), SwiftKV(layers=1)),
    WindowAttention: Sample(WindowAttention(window=4, pool=3), WindowAttention(window=4, pool=1)),
    PeakAttention: Sample(PeakAttention(), PeakAttention()),
    ProbeAttention: Sample(ProbeAttention(recent=3, random=2), ProbeAttention()),
    Recency: Sample(Recency(sinks=2), Recency(sinks=0)),
    Accumulated: Sample(Accumulated(recent=4, sinks=1), Accumulated(recent=4)),
    Recurrence: Sample(Recurrence(recent=4, alpha=0.05), Recurrence(recent=4)),
    Uniform: Sample(Uniform(keep=11), Uniform(keep=10_000)),
    Everything: Sample(Everything(), Everything()),
    Adaptive: Sample(Adaptive(keep=11, floor=2), Adaptive(keep=10_000)),
    Density: Sample(
        Density(keep=11, dense_first=0, dense_last=0, least=6),
        Density(keep=10_000, dense_first=0, dense_last=0, least=6),
    ),
    RetrievalHeads: Sample(
        RetrievalHeads(induction=25, echo=0, sinks=2, buffer=8, divisor=1000),
        RetrievalHeads(buffer=10_000),
    ),
    Sensitivity: Sample(Sensitivity(keep=24), Sensitivity(keep=10_000)),
    Drop: Sample(Drop(), Drop()),
    Slide: Sample(Slide(sinks=3), Slide(sinks=3)),
    MergeSimilar: Sample(MergeSimilar(), MergeSimilar()),
    Compensate: Sample(Compensate(), Compensate()),
    ThinKeys: Sample(ThinKeys(percent=40, recent=3, window=4), ThinKeys(percent=0)),
    Grade: Sample(Grade(recent=3), Grade(recent=10_000)),
    Demote: Sample(Demote(codec="raw", recent=3), Demote(codec="raw", recent=10_000)),
    FactorKeys: Sample(FactorKeys(rank=8, outliers=2, local=1), FactorKeys(local=10_000)),
    Blend: Sample(Blend(recompute=(30,)), Blend(recompute=(100,))),
    Radix: Sample(Radix(page=4, capacity_bytes=1 << 20), Radix(page=1)),
    Sketch: Sample(Sketch(keep=7, recent=2, sinks=1, every=2), Sketch(keep=10_000)),
    PageBounds: Sample(PageBounds(keep=6, page=2, dense_layers=0), PageBounds(keep=10_000)),
    Landmarks: Sample(Landmarks(keep=6, chunk=2, raw=True), Landmarks(keep=10_000)),
    Tidal: Sample(Tidal(keep=7, dense_layers=1), Tidal(keep=10_000, dense_layers=1)),
}


ROTARY = HalfSplit()

PROFILES = {
    "RetrievalHeads": Profile(
        kind="retrieval-heads",
        model="",
        tensors={name: torch.arange(8.0).view(4, 2) for name in ("induction", "echo")},
    ),
    "Sensitivity": Profile(
        kind="layer-sensitivity", model="", tensors={"cosine": torch.tensor([0.9, 0.5, 0.7, 0.8])}
    ),
}
"""What parts that read an offline profile are given, by class."""


def parts(slot: str, check: str) -> Any:
    """Parametrise over the parts of a slot; a part's exemptions become strict expected failures.

    A part is exempt where its class says so: ``exempt = {"check": "reason"}``.
    """
    cases = []
    for cls, of in sorted(walk().items(), key=lambda item: item[0].__name__):
        if of != slot:
            continue
        reason = getattr(cls, "exempt", {}).get(check)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        cases.append(pytest.param(cls, id=cls.__name__, marks=marks))
    return pytest.mark.parametrize("part", cases)


def everywhere(check: str) -> Any:
    """Parametrise over the parts of all slots."""
    cases = []
    for cls in sorted(walk(), key=lambda c: c.__name__):
        reason = getattr(cls, "exempt", {}).get(check)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        cases.append(pytest.param(cls, id=cls.__name__, marks=marks))
    return pytest.mark.parametrize("part", cases)


GROUPS = pytest.mark.parametrize("group", [1, 3], ids=["mha", "gqa"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LENGTHS = pytest.mark.parametrize("length", [1, 63, 1000])

# float32 differs by the order of additions only; bfloat16 by one rounding of each output and, where
# several partials are merged, of each partial's output (values are of the order of 1).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def names() -> dict[type, str]:
    """The YAML name of every part in the table."""
    return {cls: name for table in PARTS.values() for name, cls in table.items()}


class Data(NamedTuple):
    q: Tensor  # [T, H * G, D]
    positions: Tensor  # [T]
    segment: Segment
    spec: AttentionSpec


def data(
    *,
    stored: int,
    new: int | None = None,
    heads: int = 2,
    group: int = 1,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Data:
    """Random queries for the last ``new`` of ``stored`` entries; memory behind the entries is NaN."""
    make = torch.Generator().manual_seed(seed)
    new = stored if new is None else new
    k = torch.full((heads, stored + 5, size), torch.nan)
    v = torch.full((heads, stored + 5, size), torch.nan)
    k[:, :stored] = torch.randn(heads, stored, size, generator=make)
    v[:, :stored] = torch.randn(heads, stored, size, generator=make)
    q = 2 * torch.randn(new, heads * group, size, generator=make)
    return Data(
        q=q.to(dtype),
        positions=torch.arange(stored - new, stored, dtype=torch.int32),
        segment=Segment(
            k=k.to(dtype), v=v.to(dtype), lengths=torch.full((heads,), stored, dtype=torch.int32)
        ),
        spec=AttentionSpec(scale=size**-0.5),
    )


def cut(segment: Segment, first: int, last: int) -> Segment:
    """Entries ``first .. last - 1`` of every head as a segment of their own."""
    return dataclasses.replace(
        segment,
        k=segment.k[:, first:last],
        v=segment.v[:, first:last],
        lengths=torch.full_like(segment.lengths, last - first),
        start=segment.start + first,
    )


def attend(
    part: Any,
    d: Data,
    segments: tuple[Segment, ...] | None = None,
    state: Any = None,
    prompt_end: int | None = None,
) -> Partial:
    """What the engine does with a generation part: patterns, kernel, merge."""
    segments = (d.segment,) if segments is None else segments
    ctx = PrefillLayer(
        layer=0,
        layers=1,
        q=d.q,
        query_positions=d.positions,
        segments=segments,
        spec=d.spec,
        prompt_end=int(d.positions[-1]) + 1 if prompt_end is None else prompt_end,
    )
    patterns = part.patterns(ctx, part.state() if state is None else state)
    return merge(list(_partials(patterns, d, segments)))


def _partials(patterns: tuple[Pattern, ...], d: Data, segments: tuple[Segment, ...]) -> Iterator[Partial]:
    assert len(patterns) == len(segments)
    for pattern, segment in zip(patterns, segments, strict=True):
        if pattern.done is not None:
            yield pattern.done
        if pattern.form is not None:
            yield prefill(d.q, segment, spec=d.spec, query_positions=d.positions, form=pattern.form)


def plain(d: Data, seen_HTS: Tensor | None = None) -> Tensor:
    """``[T, H * G, D]`` float32 attention under a boolean mask, written out; causal without one."""
    H, S = d.segment.heads, int(d.segment.lengths[0])
    group = d.q.shape[1] // H
    k = d.segment.k[:, :S].float().repeat_interleave(group, 0)
    v = d.segment.v[:, :S].float().repeat_interleave(group, 0)
    logits = torch.einsum("tnd,nsd->nts", d.q.float(), k) * d.spec.scale
    if seen_HTS is None:
        seen_HTS = (d.positions[:, None] >= torch.arange(S)[None]).expand(logits.shape)
    probs = logits.masked_fill(~seen_HTS, -torch.inf).softmax(-1)
    return torch.einsum("nts,nsd->tnd", probs, v)


def probe(run: Callable[[Segment], Tensor], segment: Segment) -> Tensor:
    """``[H * G, T, S]`` attention weights, read off by giving entries one-hot values.

    Whatever a part says of itself, a weight above zero is an entry that was read, and an entry
    that is counted twice has too large a weight.
    """
    H, S, D = segment.heads, int(segment.lengths.max()), segment.v.shape[2]
    weights = []
    for first in range(0, S, D):
        v = torch.zeros_like(segment.v)
        n = min(D, S - first)
        v[:, torch.arange(first, first + n), torch.arange(n)] = 1
        weights.append(run(dataclasses.replace(segment, v=v))[..., :n])
    assert H > 0
    return torch.cat(weights, -1).permute(1, 0, 2)


def snapshot(value: Any) -> list[Tensor]:
    """Copies of every tensor inside a dataclass or tuple, to prove that none was written to."""
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, (tuple, list)):
        return [t for one in value for t in snapshot(one)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in snapshot(getattr(value, f.name))]
    return []


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(before, after, strict=True)
    )
