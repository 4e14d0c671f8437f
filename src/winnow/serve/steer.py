"""Biases and penalties on logits, as OpenAI's interface defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from winnow.engine.steer import Steer

__all__ = ["Bias", "Chain", "Penalties", "chain"]


class Bias:
    """``logit_bias``: a constant on the logits of some tokens; -100 all but bans a token.

    Parameters
    ----------
    by_token : mapping of int to float
        Token ids inside the vocabulary.
    """

    def __init__(self, by_token: Mapping[int, float]) -> None:
        self._tokens = torch.tensor(list(by_token), dtype=torch.long)
        self._values = torch.tensor(list(by_token.values()))

    def __call__(self, logits_V: Tensor, drawn: Sequence[int]) -> Tensor:
        """See :class:`winnow.engine.steer.Steer`."""
        tokens = self._tokens.to(logits_V.device)
        return logits_V.index_add(0, tokens, self._values.to(logits_V))


class Penalties:
    """``presence_penalty`` once per token that was drawn, ``frequency_penalty`` each time it was.

    ``mu[j] - c[j] * frequency - (c[j] > 0) * presence``, where ``c[j]`` counts token ``j`` in the answer.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence = presence
        self._frequency = frequency
        self._counts: dict[int, int] = {}
        self._seen = 0

    def __call__(self, logits_V: Tensor, drawn: Sequence[int]) -> Tensor:
        """See :class:`winnow.engine.steer.Steer`."""
        for token in drawn[self._seen :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._seen = len(drawn)
        if not self._counts:
            return logits_V
        tokens = torch.tensor(list(self._counts), device=logits_V.device)
        counts = torch.tensor(list(self._counts.values())).to(logits_V)
        return logits_V.index_add(0, tokens, -(counts * self._frequency + self._presence))


class Chain:
    """Several, one after the other."""

    def __init__(self, links: Sequence[Steer]) -> None:
        self._links = links

    def __call__(self, logits_V: Tensor, drawn: Sequence[int]) -> Tensor:
        """See :class:`winnow.engine.steer.Steer`."""
        for link in self._links:
            logits_V = link(logits_V, drawn)
        return logits_V


def chain(makers: Sequence[Callable[[], Steer]]) -> Callable[[], Steer] | None:
    """A maker of all of them together, or None where there is nothing to do."""
    if not makers:
        return None
    return lambda: Chain([make() for make in makers])
