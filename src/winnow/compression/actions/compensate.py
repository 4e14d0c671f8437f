"""One entry per head stands for all that was dropped: their mean, weighted by their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.compression.actions.drop import kept
from winnow.compression.protocol import Plain, Stored
from winnow.types import Budget, Observation, Plan, Rewrite, Scores

__all__ = ["Compensate"]


@dataclass
class _Gone:
    """What one head dropped: the sums of keys and values, how many, and where its entry lies."""

    k: Tensor
    v: Tensor
    count: int
    position: int


@dataclass
class CompensateState:
    """Per layer and head what was dropped so far."""

    gone: dict[tuple[int, int], _Gone] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Compensate(Plain):
    """RazorAttention's compensation token.

    Source: RazorAttention (arXiv 2407.15891), equations 4 and 5.

    Entries are dropped as ``Drop`` does, but for one per head: it holds the mean key and the mean
    value of all ``n`` that are gone, itself included, and ``log n`` is added to its logit, so that it
    weighs as ``n`` equal entries would. Later drops are folded in. It counts against the budget.
    """

    exempt = {  # noqa: RUF012 (read by the contract suite)
        "best stay": "the entry that stands for the dropped ones is one of them",
    }

    def state(self) -> CompensateState:
        """Nothing is gone yet."""
        return CompensateState()

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: CompensateState) -> Plan:
        """Keep what fits, and rewrite one entry per head that dropped something."""
        lengths, rooms = scores.lengths.tolist(), budget.entries.tolist()
        if all(n <= room for n, room in zip(lengths, rooms, strict=True)):
            return Plan()
        keep: list[Tensor] = []
        rewrite: list[Rewrite | None] = []
        for h, (n, room) in enumerate(zip(lengths, rooms, strict=True)):
            if n <= room:
                keep.append(torch.arange(n))
                rewrite.append(None)
                continue
            stays, change = self._head(seen, scores, h, n, room, state)
            keep.append(stays)
            rewrite.append(change)
        return Plan(keep=tuple(keep), rewrite=tuple(rewrite))

    def truncated(self, layer: int, left: Sequence[Stored], tokens: int, state: CompensateState) -> None:
        """An entry that stood for dropped ones may have gone too."""
        for key in [k for k, gone in state.gone.items() if k[0] == layer and gone.position >= tokens]:
            del state.gone[key]

    def _head(
        self, seen: Observation, scores: Scores, h: int, n: int, room: int, state: CompensateState
    ) -> tuple[Tensor, Rewrite]:
        gone = state.gone.get((seen.layer, h))
        protected_S, value_S = scores.protected[h, :n].clone(), scores.value[h, :n]
        slot = None
        if gone is not None:
            # Its own place is not up for choice.
            slot = int(torch.searchsorted(seen.segment.positions_of(h), gone.position))
            protected_S[slot] = False
            value_S = value_S.clone()
            value_S[slot] = -torch.inf
        own = Scores(
            value=value_S[None], protected=protected_S[None], lengths=torch.tensor([n], dtype=torch.int32)
        )
        (stays,) = kept(own, Budget(entries=torch.tensor([room - 1], dtype=torch.int32))) or ()
        goes_S = torch.ones(n, dtype=torch.bool)
        goes_S[stays] = False
        if slot is None:
            slot = int(goes_S.nonzero()[0])
        else:
            goes_S[slot] = False
        goes = goes_S.nonzero().flatten()
        k_D = seen.segment.k[h, goes].float().sum(0)
        v_D = seen.segment.v[h, goes].float().sum(0)
        count = goes.numel()
        if gone is not None:
            k_D, v_D, count = k_D + gone.k, v_D + gone.v, count + gone.count
        position = int(seen.segment.positions_of(h)[slot])
        state.gone[seen.layer, h] = _Gone(k=k_D, v=v_D, count=count, position=position)
        entry = torch.tensor([slot])
        return torch.cat([stays, entry]).sort().values, Rewrite(
            entries=entry,
            k=(k_D / count)[None].to(seen.segment.k.dtype),
            v=(v_D / count)[None].to(seen.segment.v.dtype),
            bias=torch.tensor([math.log(count)]),
        )
