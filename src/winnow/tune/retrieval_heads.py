"""Which KV heads retrieve: RazorAttention's offline search on a repeated random sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from winnow.kernels.dense import dense
from winnow.tune.reading import Reading
from winnow.types import AttentionSpec, LanguageModel, Partial, Profile

__all__ = ["KIND", "retrieval_heads"]

KIND = "retrieval-heads"


def retrieval_heads(
    model: LanguageModel,
    *,
    tokens: int = 2500,
    repeats: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Score every KV head by how it attends to earlier occurrences of the token that it reads.

    Source: RazorAttention (arXiv 2407.15891), Algorithm 1. A random sequence of ``tokens`` tokens is
    repeated. *Echo* is the attention from a token to an earlier occurrence of itself, *induction* that to
    the token right behind one; both are means over all pairs, and the largest over the query heads of
    a KV head. Only those pairs are looked at, so the cost is that of one prefill.

    Parameters
    ----------
    model : LanguageModel
    tokens : int
        Length of the random sequence (``K``); shortened where the model takes fewer.
    repeats : int
        Times it occurs, at least 2.
    seed : int
    progress : callable or None
        Called with tokens done and tokens in all.

    Returns
    -------
    Profile
        ``echo`` and ``induction``, each ``[L, H]`` float32.

    Raises
    ------
    ValueError
        If the model's length holds no two repeats of 16 tokens.
    """
    tokens = min(tokens, (model.max_length - 1) // repeats)
    if repeats < 2 or tokens < 16:
        raise ValueError(
            f"the search repeats a sequence at least twice, of 16 tokens or more; {model.name} takes "
            f"{model.max_length} tokens: give fewer repeats"
        )
    dice = torch.Generator().manual_seed(seed)
    usual = torch.tensor([i for i in range(model.vocab_size) if i not in model.eos_token_ids])
    text = usual[torch.randint(usual.numel(), (tokens,), generator=dice)].repeat(repeats)
    with Reading(model, text.numel()) as reading:
        watch = _Pairs(model, reading, tokens)
        reading.read(text, watch, progress)
    pairs = tokens * repeats * (repeats - 1) // 2
    shape = (model.layers, model.kv_heads, -1)
    return Profile(
        kind=KIND,
        model=model.fingerprint,
        tensors={
            name: (sums / pairs).view(shape).amax(2).float()
            for name, sums in (("echo", watch.echo), ("induction", watch.induction))
        },
    )


class _Pairs:
    """Dense attention that adds up the probabilities of the pairs that matter.

    Attributes
    ----------
    echo, induction : Tensor
        ``[L, H * G]`` float64 sums over all pairs.
    """

    def __init__(self, model: LanguageModel, reading: Reading, period: int) -> None:
        self._store = reading.store
        self.echo = torch.zeros(model.layers, model.query_heads, dtype=torch.float64)
        self.induction = torch.zeros_like(self.echo)
        self._period = period

    def __call__(self, layer: int, q_NHD: Tensor, at_N: Tensor, spec: AttentionSpec) -> Partial:
        """As :data:`winnow.tune.reading.Look`."""
        partial = dense(q_NHD, self._store.segments(layer), spec=spec, query_positions=at_N)
        whole = self._store.decoded(layer)
        for back in range(self._period, int(at_N[-1]) + 1, self._period):
            for sums, ahead in ((self.echo, 0), (self.induction, 1)):
                rows = at_N - back >= 0
                key_n = (at_N[rows] - back + ahead).long()
                if spec.window is not None:
                    near = at_N[rows] - key_n < spec.window
                    rows = rows.clone()
                    rows[rows.clone()] = near
                    key_n = key_n[near]
                group = q_NHD.shape[1] // whole.heads
                k_nHD = whole.k[:, key_n].transpose(0, 1).repeat_interleave(group, 1)
                logits_nH = (q_NHD[rows].float() * k_nHD.float()).sum(2) * spec.scale
                if spec.softcap is not None:
                    logits_nH = spec.softcap * torch.tanh(logits_nH / spec.softcap)
                sums[layer] += torch.exp(logits_nH - partial.lse[rows]).sum(0).double().cpu()
        return partial
