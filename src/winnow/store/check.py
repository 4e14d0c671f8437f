"""Whether a plan fits a layer, said before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.store.codecs import ENTRIES, codec_named
from winnow.types import Demotion, Plan

__all__ = ["check_plan"]


def check_plan(plan: Plan, lengths: Sequence[int], head_dim: int, dtype: torch.dtype) -> None:
    """Refuse a plan that does not fit heads of ``lengths`` entries.

    Raises
    ------
    ValueError
        Saying which list is wrong.
    """
    if plan.keep is not None:
        _check_lists("keeps", plan.keep, lengths)
    if plan.rewrite is not None:
        none = torch.empty(0, dtype=torch.int64)
        lists = [none if change is None else change.entries for change in plan.rewrite]
        _check_lists("rewrites", lists, lengths)
        _check_stay("rewrites", lists, plan.keep)
        for change in plan.rewrite:
            if change is None:
                continue
            shape = (len(change.entries), head_dim)
            if change.k.shape != shape or change.v.shape != shape:
                raise ValueError(
                    f"a plan rewrites with K {list(change.k.shape)} and V {list(change.v.shape)}; "
                    f"give {list(shape)}"
                )
            if change.bias is not None and change.bias.shape != shape[:1]:
                raise ValueError(f"a plan sets biases {list(change.bias.shape)}; give {list(shape[:1])}")
    for demotion in plan.demote:
        _check_demotion(demotion, plan.keep, lengths, head_dim, dtype)


def _check_demotion(
    how: Demotion,
    keep: Sequence[Tensor] | None,
    lengths: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    if how.entries is None:
        counts = [how.oldest]
    else:
        _check_lists("demotes", how.entries, lengths)
        _check_stay("demotes", how.entries, keep)
        counts = [how.oldest, *map(len, how.entries)]
        if how.oldest:
            raise ValueError("a plan demotes the oldest entries and a list; give one of them")
    for count in counts:
        if count % ENTRIES or count < 0:
            raise ValueError(f"a plan demotes {count} entries; make it a multiple of {ENTRIES}")
    channels = None
    if how.codec is not None:
        codec = codec_named(how.codec)
        codec.planes(head_dim, dtype)
        channels = codec.channels
        _check_factors(how, codec.key_rank, (len(lengths), head_dim))
    if how.channels is None:
        return
    if channels is None:
        raise ValueError(f"a plan lists channels, but {how.codec!r} stores all of them; leave the list out")
    shape, found = (len(lengths), channels), how.channels
    sound = found.shape == shape and not bool((found.diff() <= 0).any())
    if not sound or int(found.min()) < 0 or int(found.max()) >= head_dim:
        raise ValueError(
            f"{how.codec!r} takes {list(shape)} channels below {head_dim}, ascending in every head"
        )


def _check_factors(how: Demotion, rank: int | None, shape: tuple[int, int]) -> None:
    if (rank is None) != (how.factors is None):
        need = "stores keys as a product" if how.factors is None else "stores no product"
        raise ValueError(
            f"{how.codec!r} {need}: give factors with a codec of that form (the action factor-keys)"
        )
    if how.factors is None:
        return
    heads, size = shape
    left, right = how.factors.left, how.factors.right
    if right.shape != (heads, rank, size) or left.ndim != 2 or left.shape[1] != rank:
        raise ValueError(
            f"{how.codec!r} takes factors [n, {rank}] and {[heads, rank, size]}, "
            f"not {list(left.shape)} and {list(right.shape)}"
        )


def _check_lists(does: str, lists: Sequence[Tensor], lengths: Sequence[int]) -> None:
    if len(lists) != len(lengths):
        raise ValueError(f"a plan {does} entries of {len(lists)} heads, the layer has {len(lengths)}")
    for head, (listed, n) in enumerate(zip(lists, lengths, strict=True)):
        if head and listed is lists[head - 1] and n == lengths[head - 1]:
            continue  # one list for all heads, as windows have it
        if len(listed) and (int(listed[0]) < 0 or int(listed[-1]) >= n or bool((listed.diff() <= 0).any())):
            raise ValueError(
                f"the plan's list for head {head} must be ascending, unique and below {n}; sort it"
            )


def _check_stay(does: str, lists: Sequence[Tensor], keep: Sequence[Tensor] | None) -> None:
    if keep is None:
        return
    for head, (listed, kept) in enumerate(zip(lists, keep, strict=True)):
        if len(listed) and not bool(torch.isin(listed, kept).all()):
            raise ValueError(f"a plan {does} entries of head {head} that it drops; list entries that stay")
