"""A few queries stand for all of them, and every entry is judged by those that could see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow._check import integer
from winnow.compression.protocol import Plain
from winnow.kernels.mass import mass
from winnow.kernels.merge import add_sinks
from winnow.kernels.prefill import prefill
from winnow.types import Needs, Observation, Scores, Segment

__all__ = ["ProbeAttention"]


@dataclass(frozen=True, kw_only=True)
class ProbeAttention(Plain):
    """ZipCache's normalised saliency: mean attention that probe queries give an entry.

    Source: ZipCache (arXiv 2405.14256), ``zipcache/models/modeling_llama.py``.

    ``p_j = sum over probes i of A[i, j] / number of probes that see j``, summed over the query heads of
    a KV head. The probes are the last ``recent`` prompt tokens and ``random`` others; while decoding,
    the latest queries. Nothing is protected.

    Attributes
    ----------
    recent : int
        Probes at the end of the prompt, at least 1.
    random : int
        Probes elsewhere in it, drawn without replacement.

    Notes
    -----
    Deviations from the official code:

    - Its divisor is the number of all later tokens, although a tenth of the rows were summed: early
      entries, which only the random probes see less often, come out up to ten times too small against
      recent ones. Here each entry is divided by the probes that see it, as the paper's formula says.
    - Probes are a number, not a share of the prompt, and no random one is drawn twice.
    """

    recent: int = 128
    random: int = 128

    def __post_init__(self) -> None:
        integer("probe-attention", "recent", self.recent, 1, "queries")
        integer("probe-attention", "random", self.random, 0, "queries")

    @property
    def needs(self) -> Needs:
        """The probes."""
        return Needs(window_queries=self.recent, random_queries=self.random)

    def score(self, seen: Observation, state: None) -> Scores:
        """Score the entries of one layer."""
        assert seen.queries is not None, "the probes were not observed"
        assert seen.query_positions is not None, "the probes' positions were not observed"
        segment, spec, q_WND, at_W = seen.segment, seen.spec, seen.queries, seen.query_positions
        H, S = segment.heads, int(segment.lengths.max())
        partial = prefill(q_WND, segment, spec=spec, query_positions=at_W)
        if spec.sinks is not None:
            partial = add_sinks(partial, spec.sinks)
        mass_NS = mass(q_WND, segment, spec=spec, query_positions=at_W, lse=partial.lse)
        value_HS = mass_NS[:, :S].view(H, -1, S).sum(1)
        for h, n in enumerate(segment.lengths.tolist()):
            value_HS[h, :n] /= _probes_of(segment, h, at_W, spec.window).to(value_HS.device)
            value_HS[h, n:] = -torch.inf
        protected_HS = torch.zeros(H, S, dtype=torch.bool, device=value_HS.device)
        return Scores(value=value_HS, protected=protected_HS, lengths=segment.lengths)


def _probes_of(segment: Segment, head: int, at_W: Tensor, window: int | None) -> Tensor:
    """``[S]`` how many probes see each entry of a head; 1 where none does."""
    where_S = segment.positions_of(head).cpu().contiguous()
    probes_S = at_W.numel() - torch.searchsorted(at_W, where_S)
    if window is not None:
        probes_S -= at_W.numel() - torch.searchsorted(at_W, where_S + window)
    return probes_S.clamp(min=1)
