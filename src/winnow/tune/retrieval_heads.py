"""Which KV heads retrieve: RazorAttention's offline search on a repeated random sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from winnow.kernels.dense import dense
from winnow.store.sequence import SequenceStore
from winnow.types import AttentionSpec, LanguageModel, Profile

__all__ = ["KIND", "retrieval_heads"]

KIND = "retrieval-heads"
_CHUNK = 1024


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
    watch = _Pairs(model, tokens, text.numel())
    with torch.inference_mode():
        for first in range(0, text.numel(), _CHUNK):
            chunk = text[first : first + _CHUNK].to(model.device)
            at = torch.arange(first, first + chunk.numel(), device=model.device)
            model.forward(chunk, at, torch.empty(0, dtype=torch.long, device=model.device), watch)
            watch.store.advance(chunk.numel())
            if progress is not None:
                progress(first + chunk.numel(), text.numel())
    watch.store.close()
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

    def __init__(self, model: LanguageModel, period: int, length: int) -> None:
        self.store = SequenceStore(
            layers=model.layers,
            heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            capacity=length,
            device=str(model.device),
        )
        self.echo = torch.zeros(model.layers, model.query_heads, dtype=torch.float64)
        self.induction = torch.zeros_like(self.echo)
        self._period = period

    def __call__(
        self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """As ``types.Attend``, for one sequence."""
        first = self.store.length
        at_N = torch.arange(first, first + q_NHD.shape[0], dtype=torch.int32)
        self.store.append(layer, k_NHD, v_NHD, at_N)
        partial = dense(q_NHD, self.store.segments(layer), spec=spec, query_positions=at_N)
        whole = self.store.decoded(layer)
        for back in range(self._period, first + q_NHD.shape[0], self._period):
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
        return partial.out.to(q_NHD.dtype)
