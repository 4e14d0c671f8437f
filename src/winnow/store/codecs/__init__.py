"""Codecs: the forms in which the store can hold a page of entries. The table is explicit."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.gear import Gear
from winnow.store.codecs.int2 import Int2
from winnow.store.codecs.int4 import Int4
from winnow.store.codecs.int8 import Int8
from winnow.store.codecs.low_rank import LowRank
from winnow.store.codecs.mustafar import Mustafar
from winnow.store.codecs.protocol import ENTRIES, Codec, Decoded, Plane, bytes_per_entry
from winnow.store.codecs.raw import Raw
from winnow.store.codecs.separable import Separable
from winnow.store.codecs.thin import Thin

__all__ = [
    "CODECS",
    "ENTRIES",
    "FAMILIES",
    "Codec",
    "Decoded",
    "EncodedSegment",
    "Plane",
    "bytes_per_entry",
    "codec_named",
    "is_codec",
]

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Int8(), Int4(), Int2())}
"""Codecs without parameters, by name."""

FAMILIES: dict[str, Callable[[int], Codec]] = {
    "thin": Thin,
    "separable": Separable,
    "mustafar": Mustafar,
    "gear4": lambda rank: Gear(4, rank),
    "gear2": lambda rank: Gear(2, rank),
    "gear-l4": lambda rank: Gear(4, rank, outliers=False),
    "gear-l2": lambda rank: Gear(2, rank, outliers=False),
    "low-rank": LowRank,
}
"""Codecs with a number, written ``name:number``."""

_MADE: dict[str, Codec] = {}


def is_codec(name: str) -> bool:
    """Whether :func:`codec_named` knows the name."""
    try:
        codec_named(name)
    except ValueError:
        return False
    return True


def codec_named(name: str) -> Codec:
    """Return a codec by name, always the same object for the same name.

    Raises
    ------
    ValueError
        If there is none, with the nearest name.
    """
    if name in CODECS:
        return CODECS[name]
    if name not in _MADE:
        family, _, number = name.partition(":")
        if family not in FAMILIES or not number.isdecimal():
            known = (*CODECS, *(f"{one}:n" for one in FAMILIES))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
            raise ValueError(f"unknown codec {name!r}; {hint}")
        _MADE[name] = FAMILIES[family](int(number))
    return _MADE[name]
