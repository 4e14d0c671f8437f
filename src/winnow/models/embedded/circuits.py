"""Attention heads written by hand: each function makes one of a layer, in place.

A head looks back by a distance, rests on the first token, or searches: its query and its key
hold parts of the residual stream in rotary pairs so slow that position hardly matters, and its
value copies another part.  Strengths are given as logits and counted back to weights through
the lengths that the residual stream has where a head asks and where something is stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.models.embedded.shape import (
    CONSTANT,
    GROUP,
    HEAD,
    HIDDEN,
    LENGTH,
    LENGTHS,
    PAIRS,
    SHARED,
    SINK,
    THETA,
)

__all__ = ["Layer", "Match", "latest", "look_back", "rest", "search", "write"]

#: the query, key, value and output matrices of a layer by the names q, k, v and o
Layer = dict[str, Tensor]
Part = slice | int

#: weights of the fastest rotary pairs in an offset head: nearly the largest gap between the wanted
#: distance and any other up to 16K that a unit of logits can give (0.22; found by search)
OFFSET_WEIGHTS = (0.470, 0.074, 0.047, 0.072, 0.069, 0.046, 0.062, 0.041, 0.023, 0.046, 0.025, 0.026)
OFFSET_SHARPNESS = 45.0
#: the same for a local head, which fades over the last few tokens instead
LOCAL_WEIGHTS = (0.0, 0.02, 0.04, 0.15, 0.15, 0.15, 0.13, 0.12, 0.12, 0.12)
LOCAL_SHARPNESS = 60.0
#: the fifth to the thirteenth pair of a head for the latest of several places, with phases: it falls by
#: 0.012 or more from any distance up to 6K to one half as large again (and by 40), up to 16K (by search)
LATEST_WEIGHTS = (0.0079, 0.0108, 0.0068, 0.0252, 0.0497, 0.0114, 0.1637, 0.1108, 0.6136)
LATEST_PHASES = (1.159, 1.147, 0.885, 1.071, 0.949, 1.074, 1.053, 0.690, 0.816)
LATEST_FIRST, LATEST_BASE_PAIR, LATEST_BASE = 4, 24, 0.45
LATEST_SHARPNESS = 800.0
#: above the tokens without a flag, below the furthest with one
LATEST_RESTING = 60.0


#: the first token's SINK
AT_FIRST = math.sqrt(LENGTH**2 - SHARED**2)


def _constant(length: float) -> float:
    """The constant part of every token after the norm."""
    return SHARED * math.sqrt(HIDDEN) / length


def look_back(
    layer: Layer, head: int, distance: int, weights: tuple[float, ...], sharpness: float, length: float
) -> None:
    """Let a query head look back ``distance`` tokens."""
    angles = THETA ** (-torch.arange(len(weights)) / PAIRS) * distance
    # every pair adds sharpness * weight * cos(angle of the error) to the logit
    gain = (sharpness * HEAD**0.5 * torch.tensor(weights)).sqrt() / _constant(length)
    pairs = torch.arange(len(weights))
    layer["q"][head * HEAD + pairs, CONSTANT] = gain * angles.cos()
    layer["q"][head * HEAD + PAIRS + pairs, CONSTANT] = -gain * angles.sin()
    layer["k"][head // GROUP * HEAD + pairs, CONSTANT] = gain


def rest(layer: Layer, head: int, logit: float, length: float) -> None:
    """Let a query head rest on the first token with a logit of about ``logit``."""
    # from layer 1 on the first token is as long as others that have retrieved nothing
    at_first = AT_FIRST * HIDDEN**0.5 / min(length, LENGTHS[1])
    gain = (logit * HEAD**0.5 / (_constant(length) * at_first)) ** 0.5
    layer["q"][head * HEAD + HEAD - 1, CONSTANT] = gain
    layer["k"][head // GROUP * HEAD + HEAD - 1, SINK] = gain


def latest(layer: Layer, head: int, flag: int, length: float) -> None:
    """Let a query head find the latest of the tokens that carry a flag, up to 16K tokens back.

    Flags must be equally large to a hundredth, as they are in layer 0, whose inputs are all of one length.
    """
    pairs = LATEST_FIRST + torch.arange(len(LATEST_WEIGHTS))
    weights, phases = torch.tensor(LATEST_WEIGHTS), torch.tensor(LATEST_PHASES)
    # a slow pair lifts even a distant flag above the tokens that have none
    pairs = torch.cat([pairs, torch.tensor([LATEST_BASE_PAIR])])
    weights = torch.cat([weights, torch.tensor([LATEST_BASE])])
    phases = torch.cat([phases, torch.tensor([0.0])])
    flagged = HIDDEN**0.5 / length
    gain = (LATEST_SHARPNESS * HEAD**0.5 * weights / (_constant(length) * flagged)).sqrt()
    # every pair adds sharpness * weight * cos(angle of the distance + phase) to the logit
    layer["q"][head * HEAD + pairs, CONSTANT] = gain * phases.cos()
    layer["q"][head * HEAD + PAIRS + pairs, CONSTANT] = gain * phases.sin()
    layer["k"][head // GROUP * HEAD + pairs, flag] = gain


@dataclass(frozen=True)
class Match:
    """A part of the query's token that is compared with a part of the key's.

    Their product, where both are codes of length 1, adds ``logit``; ``slots`` are the dimensions of
    the head that hold them.
    """

    asked: Part
    told: Part
    slots: Tensor
    logit: float


def search(layer: Layer, head: int, matches: Sequence[Match], length: float, *, key: float) -> None:
    """Let a query head find the tokens that match.

    Query heads of one KV head, and matches in the same slots, share their keys; ``key`` says how
    strong these are: its root, as a share of a logit of ``key``.
    """
    asking, stating = HIDDEN**0.5 / length, HIDDEN**0.5 / LENGTHS[1]
    gain = (key * HEAD**0.5 / (asking * stating)) ** 0.5
    for match in matches:
        eye = gain * torch.eye(len(match.slots)).squeeze()
        layer["q"][head * HEAD + match.slots, match.asked] += match.logit / key * eye
        layer["k"][head // GROUP * HEAD + match.slots, match.told] = eye


def write(
    layer: Layer,
    head: int,
    told: slice,
    into: slice,
    amount: float,
    *,
    first: int = 0,
    length: float = LENGTHS[1],
) -> None:
    """Let a query head copy a part of what it looks at, in the value's dimensions from ``first`` on.

    ``amount`` is how large a part of length 1 arrives, ``length`` how long the stream is that it is
    taken from.
    """
    inside = torch.arange(first, first + told.stop - told.start)
    eye = torch.eye(len(inside))
    rows = head // GROUP * HEAD + inside
    layer["v"][rows] = 0.0
    layer["v"][rows, told] = eye
    layer["o"][into, head * HEAD + inside] += amount * length / HIDDEN**0.5 * eye
