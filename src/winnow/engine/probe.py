"""Read a probe text over a sequence's entries and observe its queries; nothing of it is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.engine.request import Stats
from winnow.engine.sequence import Sequence
from winnow.kernels.backend import Backend
from winnow.kernels.dense import dense
from winnow.types import AttentionSpec, LanguageModel, Segment

__all__ = ["probe"]


def probe(model: LanguageModel, sequence: Sequence, stats: Stats, backend: Backend = "auto") -> None:
    """Hand the queries of ``sequence.probe`` to the sequence's compression.

    The probe stands behind the entries that are there, sees all of them and itself, densely.

    Raises
    ------
    ValueError
        If the model has no room for it.
    """
    compression, store = sequence.compression, sequence.store
    assert compression is not None
    begin, end = store.length, store.length + len(sequence.probe)
    if end > model.max_length:
        raise ValueError(
            f"the probe ends at position {end} and {model.name} takes {model.max_length}; shorten it"
        )
    positions_T = torch.arange(begin, end, dtype=torch.int32)

    def attend(layer: int, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec) -> Tensor:
        compression.queries.see(layer, q_THD, positions_T)
        own = Segment(
            k=k_THD.transpose(0, 1),
            v=v_THD.transpose(0, 1),
            lengths=torch.full((k_THD.shape[1],), k_THD.shape[0], dtype=torch.int32),
            start=begin,
        )
        partial = dense(
            q_THD, (*store.segments(layer), own), spec=spec, query_positions=positions_T, backend=backend
        )
        stats.score_entries += partial.pairs
        return partial.out.to(q_THD.dtype)

    compression.queries.begin_probe()
    model.forward(
        torch.tensor(sequence.probe, device=model.device),
        positions_T.long().to(model.device),
        torch.empty(0, dtype=torch.long, device=model.device),
        attend,
    )
