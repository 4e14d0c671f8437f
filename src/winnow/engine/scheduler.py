"""Who advances in a step, and by how many tokens."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "share"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one step may hold.

    Attributes
    ----------
    max_num_batched_tokens : int
        New tokens of all sequences together in one step. A longer prompt is prefilled in
        chunks of what decoding sequences leave of it.
    max_num_seqs : int
        Sequences that run at a time; further ones wait.
    """

    max_num_batched_tokens: int = 4096
    max_num_seqs: int = 64

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < 1 or self.max_num_seqs < 1:
            raise ValueError("max_num_batched_tokens and max_num_seqs must be at least 1")


def share(pending: list[tuple[int, int, int]], limits: Limits, block: int = 0) -> list[int]:
    """Tokens by which each running sequence advances in the next step.

    Decoding sequences go first with one token each: a long prompt never stalls them. What is
    left goes to prompts in order of arrival, in whole multiples of what their pattern asks.

    Parameters
    ----------
    pending : list of (tokens, multiple, computed)
        Per running sequence, in order of arrival: tokens that wait to be computed (1 while
        decoding), the chunk multiple of its recipe, and how many are computed already.
    limits : Limits
    block : int
        No prompt goes beyond the next multiple of so many tokens in one step; 0 for no such borders.

    Returns
    -------
    list of int
        Same order; 0 where a sequence waits for the next step. At least one is not 0 where
        anything is pending.
    """
    decoding = sum(1 for tokens, _, _ in pending if tokens == 1)
    left = max(limits.max_num_batched_tokens - decoding, 0)
    shares = []
    for tokens, multiple, computed in pending:
        if tokens <= 1:
            shares.append(tokens)
            continue
        border = (computed // block + 1) * block - computed if block else tokens
        take = min(tokens, left, border)
        if take < min(tokens, border):
            # Borders stand at multiples counted from position 0, so that chunks line up.
            take = max((computed + take) // multiple * multiple - computed, 0)
        shares.append(take)
        left -= take
    if not any(shares):
        # One multiple is larger than the limit: the oldest prompt takes a whole one anyway,
        # because a smaller chunk would change its result.
        for i, (tokens, multiple, computed) in enumerate(pending):
            if tokens:
                border = (computed // block + 1) * block - computed if block else tokens
                shares[i] = min(tokens, border, (computed // multiple + 1) * multiple - computed)
                break
    return shares
