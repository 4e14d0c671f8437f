"""Which entries score highest: exact selection of the k largest of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.backend import Backend, choose

from . import native, reference

__all__ = ["top_k"]


def top_k(
    scores_RS: Tensor, lengths_R: Tensor, k: int | Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Select the ``k`` largest scores of every row, as a set.

    Of equal scores the larger index, which is the more recent entry, is taken. ``-inf`` and NaN are
    never selected, so a row may give fewer than ``k``.

    Parameters
    ----------
    scores_RS : Tensor
        ``[R, S]`` float32, the last dimension contiguous.
    lengths_R : Tensor
        ``[R]`` int32 on the CPU: scores behind ``lengths[r]`` are not looked at.
    k : int or Tensor
        For all rows, or ``[R]`` int32 on the CPU, one for each. Not negative.
    backend : Backend

    Returns
    -------
    indices : Tensor
        ``[R, max k]`` int32, ascending within a row; -1 behind the row's count.
    counts : Tensor
        ``[R]`` int32. Together with ``indices`` they make a :class:`winnow.types.Selection`.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or a length lies outside its row.
    """
    if scores_RS.dim() != 2 or scores_RS.dtype != torch.float32 or scores_RS.stride(1) != 1:
        raise ValueError(
            f"top_k takes contiguous float32 scores [R, S], got {scores_RS.dtype} {tuple(scores_RS.shape)}; "
            "convert them"
        )
    rows = scores_RS.shape[0]
    if isinstance(k, int):
        least = most = k
        k_R = torch.full((rows,), k, dtype=torch.int32)
    else:
        k_R = k
        wanted = k.tolist() or [0]
        least, most = min(wanted), max(wanted)
    for t, name in ((lengths_R, "lengths"), (k_R, "k")):
        if t.dtype != torch.int32 or t.shape != (rows,):
            raise ValueError(
                f"top_k takes {name} as int32 [{rows}], got {t.dtype} {tuple(t.shape)}; convert it"
            )
    if least < 0:
        raise ValueError(f"top_k cannot select {least} entries; ask for 0 or more")
    chosen = choose("top_k", backend, scores_RS.device)
    if chosen == "native":
        return native.top_k(scores_RS, lengths_R.contiguous(), k_R.contiguous(), most)
    if chosen == "triton":
        from . import triton

        return triton.top_k(scores_RS, lengths_R, k_R, most)
    return reference.top_k(scores_RS, lengths_R, k_R, most)
