"""How much each layer's keys change when tokens see only their neighbourhood (EpiCache's profile)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from winnow.kernels.prefill import prefill
from winnow.tune.reading import Look, Reading
from winnow.types import AttentionSpec, Dense, Form, LanguageModel, Partial, Profile, Window

__all__ = ["KIND", "layer_sensitivity"]

KIND = "layer-sensitivity"


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

    def attention(reading: Reading, form: Form) -> Look:
        def look(layer: int, q_NHD: Tensor, at_N: Tensor, spec: AttentionSpec) -> Partial:
            (segment,) = (one.decode() for one in reading.store.segments(layer))
            return prefill(q_NHD, segment, spec=spec, query_positions=at_N, form=form)

        return look

    def told(base: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(base + done, 2 * total) if progress is not None else None

    tokens_T = torch.tensor(list(text))
    local = Window(init=sinks, local=window, align=window // 2)
    with Reading(model, len(text)) as full, Reading(model, len(text)) as near:
        full.read(tokens_T, attention(full, Dense()), told(0))
        near.read(tokens_T, attention(near, local), told(len(text)))
        cosine = []
        for layer in range(model.layers):
            whole, block = (one.store.decoded(layer).k[:, : len(text)].float() for one in (full, near))
            cosine.append(float(torch.cosine_similarity(whole, block, dim=-1).mean()))
    return Profile(kind=KIND, model=model.fingerprint, tensors={"cosine": torch.tensor(cosine)})
