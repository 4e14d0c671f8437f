"""Loading: what a decode step reads."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.types.attention import Selection

__all__ = ["EVERYTHING", "View"]


@dataclass(frozen=True, kw_only=True)
class View:
    """What one decode step reads of one layer.

    Attributes
    ----------
    selections : tuple of (Selection or None), or None
        One per segment of the layer; None reads the whole segment. The entry that this step
        appended is always among them.
    want_logits : bool
        Hand the scaled logits of this step to the selector's ``observe``.
    scanned : int
        Bytes of side data that were read to make this choice; they count as read.
    """

    selections: tuple[Selection | None, ...] | None = None
    want_logits: bool = False
    scanned: int = 0


EVERYTHING = View()
