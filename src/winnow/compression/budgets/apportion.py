"""Share a whole number of entries out by weights, exactly."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["apportion"]


def apportion(weights: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Integers in proportion to ``weights``, none above its cap, that add up to ``total``.

    What a cap cuts off goes to the others by their weights, and what rounding leaves goes to the
    largest fractions, earlier ones first: no share is lost, as in several published allocators.

    Parameters
    ----------
    weights : sequence of float
        Not negative, finite. Where all that can still take something are 0, they count alike.
    total : int
        At least 0; where the caps add up to less, that is what is shared out.
    caps : sequence of int
        At least 0 each.

    Returns
    -------
    list of int
    """
    total = min(total, sum(caps))
    shares = [0.0] * len(caps)
    open_ = [i for i, cap in enumerate(caps) if cap > 0]
    left = float(total)
    while open_ and left > 0:
        weight = sum(weights[i] for i in open_)
        part = {i: (weights[i] / weight if weight > 0 else 1 / len(open_)) * left for i in open_}
        full = [i for i in open_ if shares[i] + part[i] >= caps[i]]
        if not full:
            for i in open_:
                shares[i] += part[i]
            break
        for i in full:
            left -= caps[i] - shares[i]
            shares[i] = float(caps[i])
            open_.remove(i)
    whole = [int(share) for share in shares]
    order = sorted(range(len(caps)), key=lambda i: whole[i] - shares[i])
    at = 0
    while (missing := total - sum(whole)) > 0:
        i = order[at % len(order)]
        if whole[i] < caps[i]:
            whole[i] += 1
        at += 1
        assert missing > 0
    return whole
