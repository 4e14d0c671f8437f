"""Filler: English sentences without any fact that a task asks for."""

from __future__ import annotations

from winnow.models.embedded import language as lang
from winnow.models.embedded.dice import Dice

__all__ = ["sentence"]


def sentence(dice: Dice) -> str:
    """One sentence: who did what to which thing, where, and perhaps when."""
    subject = dice.pick(lang.OPENERS) + (dice.pick(lang.ADJECTIVES) if dice.chance(0.6) else "")
    thing = dice.pick((" the", " one", " some")) + (dice.pick(lang.ADJECTIVES) if dice.chance(0.4) else "")
    where = dice.pick(lang.LINKS) + " the" + dice.pick(lang.PLACES)
    when = dice.pick(lang.TIMES) if dice.chance(0.5) else ""
    return (
        subject + dice.pick(lang.SUBJECTS) + dice.pick(lang.VERBS) + thing + dice.pick(lang.OBJECTS)
    ) + f"{where}{when}."
