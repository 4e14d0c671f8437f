"""How much each layer's keys change when tokens see only their neighbourhood (EpiCache's profile)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from winnow.kernels.prefill import prefill
from winnow.store.sequence import SequenceStore
from winnow.types import AttentionSpec, Dense, Form, LanguageModel, Profile, Window

__all__ = ["KIND", "layer_sensitivity"]

KIND = "layer-sensitivity"
_CHUNK = 1024


def layer_sensitivity(
    model: LanguageModel,
    text: Sequence[int],
    *,
    window: int = 4096,
    sinks: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Mean cosine, per layer, between keys under full and under block-local attention.

    Source: EpiCache (arXiv 2509.17396), ``data/layer_scores/layer_profile.py`` of apple/ml-epicache.
    Blocks overlap by half: a token sees the first ``sinks`` tokens and the last ``window / 2`` to
    ``window`` ones.

    Parameters
    ----------
    model : LanguageModel
    text : sequence of int
        Tokens of one long text (16K of a book in the code).
    window, sinks : int
        Of block-local attention; ``window`` is even.
    progress : callable or None
        Called with tokens done and tokens in all, over both passes.

    Returns
    -------
    Profile
        ``cosine``: ``[L]`` float32.

    Raises
    ------
    ValueError
        If the text is not longer than window and sinks, or longer than the model takes.
    """
    if window < 2 or window % 2 or sinks < 0:
        raise ValueError(f"layer-sensitivity: window={window} must be even, sinks={sinks} not negative")
    if not window + sinks < len(text) <= model.max_length:
        raise ValueError(
            f"the text has {len(text)} tokens; give more than {window + sinks} (or a smaller window) and at "
            f"most the {model.max_length} that {model.name} takes"
        )

    def told(base: int) -> Callable[[int], None]:
        return lambda done: progress(base + done, 2 * len(text)) if progress is not None else None

    local = Window(init=sinks, local=window, align=window // 2)
    with _Run(model, text, Dense()) as full, _Run(model, text, local) as near:
        full.read(told(0))
        near.read(told(len(text)))
        cosine = [
            float(torch.cosine_similarity(full.keys(layer).float(), near.keys(layer).float(), dim=-1).mean())
            for layer in range(model.layers)
        ]
    return Profile(kind=KIND, model=model.fingerprint, tensors={"cosine": torch.tensor(cosine)})


class _Run:
    """A prefill under one form of attention, whose keys stay."""

    def __init__(self, model: LanguageModel, text: Sequence[int], form: Form) -> None:
        self._model = model
        self._text = torch.tensor(list(text))
        self._form = form
        self._store = SequenceStore(
            layers=model.layers,
            heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            capacity=len(text),
            device=str(model.device),
        )

    def read(self, told: Callable[[int], None]) -> None:
        device = self._model.device
        with torch.inference_mode():
            for first in range(0, self._text.numel(), _CHUNK):
                chunk = self._text[first : first + _CHUNK].to(device)
                at = torch.arange(first, first + chunk.numel(), device=device)
                self._model.forward(chunk, at, torch.empty(0, dtype=torch.long, device=device), self._attend)
                self._store.advance(chunk.numel())
                told(first + chunk.numel())

    def _attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec) -> Tensor:
        first = self._store.length
        at_N = torch.arange(first, first + q_NHD.shape[0], dtype=torch.int32)
        self._store.append(layer, k_NHD, v_NHD, at_N)
        (segment,) = (one.decode() for one in self._store.segments(layer))
        return prefill(q_NHD, segment, spec=spec, query_positions=at_N, form=self._form).out.to(q_NHD.dtype)

    def keys(self, layer: int) -> Tensor:
        """``[H, T, D]``."""
        return self._store.decoded(layer).k[:, : self._text.numel()]

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
