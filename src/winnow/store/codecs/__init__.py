"""Codecs: the forms in which the store can hold a page of entries. The table is explicit."""

from __future__ import annotations

import difflib

from winnow.store.codecs.encoded import EncodedSegment
from winnow.store.codecs.int2 import Int2
from winnow.store.codecs.int4 import Int4
from winnow.store.codecs.int8 import Int8
from winnow.store.codecs.protocol import ENTRIES, Codec, Plane, bytes_per_entry
from winnow.store.codecs.raw import Raw

__all__ = ["CODECS", "ENTRIES", "Codec", "EncodedSegment", "Plane", "bytes_per_entry", "codec_named"]

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), Int8(), Int4(), Int2())}


def codec_named(name: str) -> Codec:
    """Return a codec by name.

    Raises
    ------
    ValueError
        If there is none, with the nearest name.
    """
    if name not in CODECS:
        near = difflib.get_close_matches(name, CODECS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(CODECS)}"
        raise ValueError(f"unknown codec {name!r}; {hint}")
    return CODECS[name]
