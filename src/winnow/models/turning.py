"""Turning keys and queries on to other positions.

How a family pairs the dimensions of a head, which of them it turns and by which table is found out by
asking it: keys of one hidden state at several positions are compared with what each form would give.
Angles are differences of positions times the unscaled table, so the factor that YaRN and longrope put on
their cosines stays in a key exactly once, however often it is moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from winnow.models.refuse import unsupported
from winnow.types import LayerWalk, Rotary

__all__ = ["PairRotary", "find_rotary", "tables"]

# Largest root-mean-square error of a turned key, relative to it. A wrong form is off by about one. What
# remains in float32 is the rounding of angles, up to 0.008 rad at position 131072; in half precision the
# model rounds cosines and keys too.
_TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class PairRotary:
    """One layer's rotation; satisfies :class:`winnow.types.Rotary`.

    Attributes
    ----------
    frequencies : Tensor
        ``[E]`` radians per position of each pair of dimensions.
    first : int
        First of the ``2 * E`` dimensions that turn; the others are left alone.
    interleaved : bool
        Pairs are neighbours (``2 m`` with ``2 m + 1``), else half a table apart (``m`` with ``m + E``).
    """

    frequencies: Tensor
    first: int
    interleaved: bool

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """See :meth:`winnow.types.Rotary.turn`."""
        # Entries that move together share their angles: few rows of them, whatever the number of entries.
        steps_u, of_n = torch.unique(by.to(self.frequencies.device), return_inverse=True)
        angles_uE = steps_u.double()[:, None] * self.frequencies.double()
        cos_nE, sin_nE = angles_uE.cos().float(), angles_uE.sin().float()
        if len(steps_u) > 1:
            cos_nE, sin_nE = cos_nE[of_n], sin_nE[of_n]
        half, out = len(self.frequencies), x.clone()
        turned = out[..., self.first : self.first + 2 * half]
        low, high = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        a, b = low.float(), high.float()  # of float32 these are the same memory: write when both are read
        pair = (a * cos_nE - b * sin_nE, b * cos_nE + a * sin_nE)
        low.copy_(pair[0])
        high.copy_(pair[1])
        return out


def tables(model: nn.Module) -> list[Tensor]:
    """Every different table of rotary frequencies ``[E]`` (float32) that a model holds."""
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not any(torch.equal(buffer.float(), one) for one in found):
            found.append(buffer.float().clone())
    return found


@torch.inference_mode()
def find_rotary(
    walk: LayerWalk,
    known: list[Tensor],
    *,
    layers: int,
    head_dim: int,
    max_length: int,
    dtype: torch.dtype,
    name: str,
) -> list[Rotary | None]:
    """Each layer's rotation; None for a layer whose keys do not know their positions.

    Parameters
    ----------
    walk : LayerWalk
        Of the model.
    known : list of Tensor
        Tables ``[E]`` of which every layer uses one or none.
    layers, head_dim, max_length : int
    dtype : torch.dtype
        Of the keys.
    name : str
        Model type, for the message.

    Raises
    ------
    ValueError
        If embeddings carry positions, or a layer turns its keys in no form that is known.
    """
    far = max_length - 1
    positions = torch.tensor(sorted({0, min(1, far), min(7, far), far // 3, far}))
    token = torch.ones(len(positions), dtype=torch.long)
    hidden_NK = walk.embed(token, positions)
    remedy = "use a recipe that leaves entries where they were computed"
    if not torch.equal(hidden_NK, hidden_NK[:1].expand_as(hidden_NK)):
        raise unsupported(name, "its embeddings carry positions, so keys cannot move to other ones", remedy)
    found: list[Rotary | None] = []
    for layer in range(layers):
        keys_HND = walk.keys_values(layer, hidden_NK, positions)[0].transpose(0, 1).clone()
        from_zero_HND = keys_HND[:, :1].expand_as(keys_HND)
        # Not bit by bit: a product that is shared by threads rounds equal rows differently.
        if _distance(from_zero_HND, keys_HND) <= _TOLERANCE[dtype]:
            found.append(None)
            continue
        tried = [
            (_distance(form.turn(from_zero_HND, positions), keys_HND), form)
            for form in _forms(known, head_dim)
        ]
        error, best = min(tried, key=lambda one: one[0], default=(torch.inf, None))
        if not error <= _TOLERANCE[dtype]:
            raise unsupported(
                name,
                f"layer {layer} turns its keys in a form that is not known (nearest: off by {error:.1e})",
                remedy,
            )
        found.append(best)
    return found


def _forms(known: list[Tensor], head_dim: int) -> Iterator[PairRotary]:
    for table in known:
        for first in sorted({0, head_dim - 2 * len(table)}):
            if first >= 0:
                for interleaved in (False, True):
                    yield PairRotary(frequencies=table, first=first, interleaved=interleaved)


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative to what is wanted."""
    gap = (got.float() - wanted.float()).square().mean().sqrt()
    return float(gap / wanted.float().square().mean().sqrt())
