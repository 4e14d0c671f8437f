"""The format of quantised entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Axis", "Quantized", "check_form", "check_out", "levels", "shapes"]

Axis = Literal["token", "channel"]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Values in 8, 4 or 2 bits: ``(code - offset) * scale + zero``.

    The asymmetric form has a ``zero`` and no offset; its codes run from 0 to ``2^bits - 1``. The
    symmetric form has no ``zero``; its codes are centred on the offset ``2^(bits - 1)`` and reach
    ``2^(bits - 1) - 1`` to either side.

    Attributes
    ----------
    codes : Tensor
        ``[..., n, D * bits / 8]`` uint8; neighbouring channels share a byte, the first in its
        low bits.
    scale : Tensor
        bfloat16. Axis ``token``: ``[..., n, D / group]``; axis ``channel``: ``[..., n / group, D]``.
    zero : Tensor or None
        As ``scale``.
    bits : {8, 4, 2}
    axis : {"token", "channel"}
    group : int
        Values that share a scale: consecutive channels of one token, or consecutive tokens of one
        channel.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    axis: Axis
    group: int

    @property
    def width(self) -> int:
        """Channels ``D``."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and zeros together."""
        metadata = self.scale.numel() * (1 if self.zero is None else 2)
        return self.codes.numel() + metadata * self.scale.element_size()

    def copy_(self, other: Quantized) -> Quantized:
        """Take over the contents of another one of the same form."""
        self.codes.copy_(other.codes)
        self.scale.copy_(other.scale)
        if self.zero is not None and other.zero is not None:
            self.zero.copy_(other.zero)
        return self


def levels(bits: int, symmetric: bool) -> int:
    """Largest code of the asymmetric form, largest magnitude of the symmetric one."""
    return (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1


def check_form(tokens: int, width: int, bits: int, axis: Axis, group: int) -> None:
    """Refuse what the format cannot express, saying what would work."""
    if bits not in (8, 4, 2):
        raise ValueError(f"bits must be 8, 4 or 2, not {bits}")
    if width * bits % 8:
        raise ValueError(f"{width} channels of {bits} bits do not fill whole bytes; pad the channels")
    if axis not in ("token", "channel"):
        raise ValueError(f"axis must be 'token' or 'channel', not {axis!r}")
    length, what = (width, "channels") if axis == "token" else (tokens, "tokens")
    if group < 1 or length % group:
        raise ValueError(
            f"{length} {what} do not divide into groups of {group}; keep the remainder unquantised until "
            f"a group is full, or choose a group that divides {length}"
        )


def shapes(x: Sequence[int], bits: int, axis: Axis, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and of the scale of values of shape ``x``."""
    *lead, n, width = x
    factors = (n, width // group) if axis == "token" else (n // group, width)
    return (*lead, n, width * bits // 8), (*lead, *factors)


def check_out(out: Quantized, x: Sequence[int], bits: int, axis: Axis, group: int, symmetric: bool) -> None:
    """Refuse a place that values of shape ``x`` cannot be written to in this form."""
    codes, scale = shapes(x, bits, axis, group)
    right = (
        (out.bits, out.axis, out.group) == (bits, axis, group)
        and out.codes.shape == codes
        and out.scale.shape == scale
        and (out.zero is None) == symmetric
        and (out.zero is None or out.zero.shape == scale)
        and out.codes.dtype == torch.uint8
        and all(t.dtype == torch.bfloat16 for t in (out.scale, out.zero) if t is not None)
    )
    if not right:
        raise ValueError(
            f"out does not fit: codes must be uint8 {list(codes)}, scale and zero bfloat16 {list(scale)}, "
            "bits, axis and group as asked for"
        )
