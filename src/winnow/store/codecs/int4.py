"""Four bits: 3.4 times smaller than bfloat16 at a head size of 64, scales counted."""

from winnow.store.codecs.kivi import Kivi

__all__ = ["Int4"]


class Int4(Kivi):
    """K and V in 4 bits."""

    name = "int4"
    bits = 4
