"""Read one text with a model under attention of one's own, keeping the entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from winnow.store.sequence import SequenceStore
from winnow.types import Attend, AttentionSpec, LanguageModel, Partial

__all__ = ["Look", "Reading"]

_CHUNK = 1024

Look = Callable[[int, Tensor, Tensor, AttentionSpec], Partial]
"""``look(layer, q_NHD, positions_N, spec)``: attention of a chunk whose entries are in the store already."""


class Reading:
    """A prefill of one text, chunk by chunk, whose attention the caller computes.

    Parameters
    ----------
    model : LanguageModel
    length : int
        Tokens of the text.

    Attributes
    ----------
    store : SequenceStore
        The entries so far; freed by :meth:`close`.
    """

    def __init__(self, model: LanguageModel, length: int) -> None:
        self._model = model
        self.store = SequenceStore(
            layers=model.layers,
            heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            capacity=length,
            device=str(model.device),
        )

    def read(self, text_T: Tensor, look: Look, progress: Callable[[int, int], None] | None) -> None:
        """Read ``[T]`` tokens; ``progress`` is called with tokens done and tokens in all."""
        device = self._model.device
        with torch.inference_mode():
            for first in range(0, text_T.numel(), _CHUNK):
                chunk = text_T[first : first + _CHUNK].to(device)
                at = torch.arange(first, first + chunk.numel(), device=device)
                none = torch.empty(0, dtype=torch.long, device=device)
                self._model.forward(chunk, at, none, self._attend(look))
                self.store.advance(chunk.numel())
                if progress is not None:
                    progress(first + chunk.numel(), text_T.numel())

    def _attend(self, look: Look) -> Attend:
        def attend(layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec) -> Tensor:
            first = self.store.length
            at_N = torch.arange(first, first + q_NHD.shape[0], dtype=torch.int32)
            self.store.append(layer, k_NHD, v_NHD, at_N)
            return look(layer, q_NHD, at_N, spec).out.to(q_NHD.dtype)

        return attend

    def close(self) -> None:
        """Free the entries."""
        self.store.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
