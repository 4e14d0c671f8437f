"""Old entries move to a smaller form, or to a slower tier."""

from __future__ import annotations

from dataclasses import dataclass

from winnow._check import integer
from winnow.compression.actions.drop import kept
from winnow.compression.protocol import Plain
from winnow.store.codecs import ENTRIES, codec_named
from winnow.types import Budget, Demotion, Observation, Plan, Scores, Tier

__all__ = ["Demote"]


@dataclass(frozen=True, kw_only=True)
class Demote(Plain):
    """Drop what does not fit the budget, then demote all that stays but the newest ``recent``.

    With the budget ``Everything`` nothing is dropped and the part is a codec of the old
    entries alone. Demotion is by age: the oldest entries of every head, the same number in each
    head, in whole pages of the store (``winnow.store.codecs.ENTRIES``). Protection is from
    dropping; a protected entry that is old is demoted like the others.

    Attributes
    ----------
    codec : str or None
        Codec of the demoted entries (see ``winnow.store.codecs``); None leaves their form.
    recent : int
        Newest entries of every head that keep their form and tier, at least 0.
    tier : {"device", "host", "disk"} or None
        Tier of the demoted entries; None leaves them where they are.
    """

    codec: str | None = "int8"
    recent: int = 64
    tier: Tier | None = None

    def __post_init__(self) -> None:
        integer("demote", "recent", self.recent, 0)
        if self.codec is None and self.tier is None:
            raise ValueError("demote: neither a codec nor a tier is named; give codec='int8' or tier='disk'")
        if self.codec is not None and codec_named(self.codec).key_rank is not None:
            raise ValueError(
                f"demote: {self.codec!r} stores keys as a product that nobody makes here; "
                "use the action factor-keys"
            )
        if self.tier not in (None, "device", "host", "disk"):
            raise ValueError(f"demote: tier={self.tier!r} is unknown; give 'device', 'host' or 'disk'")

    def plan(self, seen: Observation, scores: Scores, budget: Budget, state: None) -> Plan:
        """Turn scores and a budget into a plan for one layer."""
        keep = kept(scores, budget)
        held = scores.lengths.tolist() if keep is None else [one.numel() for one in keep]
        old = max(0, min(held, default=0) - self.recent)
        demote = old // ENTRIES * ENTRIES
        if demote == 0:
            return Plan(keep=keep)
        return Plan(keep=keep, demote=(Demotion(oldest=demote, codec=self.codec, tier=self.tier),))
