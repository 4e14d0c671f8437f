"""Drawing one token from a row of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.engine.request import SamplingParams

__all__ = ["filtered", "generator", "logprob_record", "sample"]


def generator(params: SamplingParams, index: int) -> torch.Generator | None:
    """The random stream of sample ``index``; None where nothing is drawn at random."""
    if params.temperature == 0.0:
        return None
    stream = torch.Generator()
    if params.seed is None:
        stream.seed()
    else:
        stream.manual_seed(params.seed + index)
    return stream


def filtered(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """``[V]`` probabilities after temperature, top-k, top-p and min-p, in that order."""
    logits_V = logits_V.double()
    # Less their maximum, which changes nothing: by a tiny temperature they would become infinite.
    scaled_V = (logits_V - logits_V.max()) / params.temperature
    if 0 < params.top_k < scaled_V.numel():
        kth = torch.topk(scaled_V, params.top_k).values[-1]
        scaled_V = scaled_V.masked_fill(scaled_V < kth, -torch.inf)
    probs_V = torch.softmax(scaled_V, -1)
    if params.top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        # A token stays while the mass before it is still short of top_p: the first always does.
        drop_V = sorted_V.cumsum(0) - sorted_V >= params.top_p
        probs_V = probs_V.masked_fill(torch.zeros_like(drop_V).scatter(0, order_V, drop_V), 0.0)
    if params.min_p > 0.0:
        probs_V = probs_V.masked_fill(probs_V < params.min_p * probs_V.max(), 0.0)
    return probs_V / probs_V.sum()


def sample(logits_V: Tensor, params: SamplingParams, stream: torch.Generator | None) -> int:
    """Draw a token id from ``[V]`` float logits; greedy where ``stream`` is None."""
    if stream is None:
        return int(logits_V.argmax())
    return int(torch.multinomial(filtered(logits_V.cpu(), params), 1, generator=stream))


def logprob_record(logits_V: Tensor, token: int, alternatives: int) -> dict[str, Any]:
    """Log-probability of a drawn token and of the likeliest ones, before any filtering."""
    logprobs_V = torch.log_softmax(logits_V.float(), -1)
    top = torch.topk(logprobs_V, min(alternatives, logprobs_V.numel())) if alternatives else None
    return {
        "token_id": token,
        "logprob": float(logprobs_V[token]),
        "top": [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    }
