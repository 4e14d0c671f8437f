"""The data that passes between the parts, and the legend of their shapes.

Everything here is plain data: no part, no engine and no store is known in this file.
Counts are integers, positions are the logical positions that RoPE sees.

Shape legend (used as suffixes in dense tensor code, and in every docstring)::

    B   sequences in a batch          T   new tokens of one sequence in this step
    S   stored entries of one head    H   KV heads
    G   query heads per KV head       D   head size
    L   layers                        C   reserved capacity of a segment, in entries

Query heads are numbered ``h * G + g``: the ``G`` query heads of KV head ``h`` are adjacent.
"""

from __future__ import annotations

from winnow.types.attention import AttentionSpec, Partial, Segment, Selection, Tier
from winnow.types.compression import Budget, Demotion, Factors, Plan, Rewrite, Scores
from winnow.types.generation import Blocks, Dense, Form, Pattern, Stripes, Window
from winnow.types.loading import EVERYTHING, View
from winnow.types.models import Attend, LanguageModel, LayerWalk
from winnow.types.observation import Glimpse, Needs, Observation, Profile, Rotary

__all__ = [
    "EVERYTHING",
    "Attend",
    "AttentionSpec",
    "Blocks",
    "Budget",
    "Demotion",
    "Dense",
    "Factors",
    "Form",
    "Glimpse",
    "LanguageModel",
    "LayerWalk",
    "Needs",
    "Observation",
    "Partial",
    "Pattern",
    "Plan",
    "Profile",
    "Rewrite",
    "Rotary",
    "Scores",
    "Segment",
    "Selection",
    "Stripes",
    "Tier",
    "View",
    "Window",
]
