"""What parts ask for, and what they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from winnow.types.attention import AttentionSpec, Segment

__all__ = ["Glimpse", "Needs", "Observation", "Profile", "Rotary"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a part asks of the engine; nothing is computed that nobody asked for.

    Attributes
    ----------
    window_queries : int
        Keep the post-RoPE queries of the last so many prompt tokens.
    random_queries : int
        Keep those of so many other prompt tokens, drawn without replacement from a fixed seed.
    probe : bool
        Where the sequence has a probe text: before acting on a prompt, read it over the entries and keep
        its queries, all of them, in place of the prompt's; its entries are not kept.
    mass : {"none", "decode", "all"}
        Hand every call's attention mass to the part: of decode steps, or of prefill chunks too
        (which takes a second pass over the scores).
    rotary : bool
        The part turns keys or queries to other positions.
    profile : bool
        The part reads an offline profile, which the recipe must name.
    layer_walk : bool
        The runner must walk the layers itself (the token set changes inside the stack).
    """

    window_queries: int = 0
    random_queries: int = 0
    probe: bool = False
    mass: Literal["none", "decode", "all"] = "none"
    rotary: bool = False
    profile: bool = False
    layer_walk: bool = False

    def __or__(self, other: Needs) -> Needs:
        order: tuple[Literal["none", "decode", "all"], ...] = ("none", "decode", "all")
        return Needs(
            window_queries=max(self.window_queries, other.window_queries),
            random_queries=max(self.random_queries, other.random_queries),
            probe=self.probe or other.probe,
            mass=max(self.mass, other.mass, key=order.index),
            rotary=self.rotary or other.rotary,
            profile=self.profile or other.profile,
            layer_walk=self.layer_walk or other.layer_walk,
        )


class Rotary(Protocol):
    """How one layer of the model turns keys and queries; layers without rotation turn nothing."""

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Turn ``x`` on by ``by`` positions (negative: back), at unit scale.

        Parameters
        ----------
        x : Tensor
            ``[..., n, D]`` keys or queries.
        by : Tensor
            ``[n]`` integers, broadcast over the leading dimensions.

        Returns
        -------
        Tensor
            As ``x``; angles are computed in float32 or better. ``turn(x, 0)`` is ``x``.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was learnt about a model offline; saved beside a recipe, read by the parts.

    Attributes
    ----------
    kind : str
        Which command made it, such as ``"retrieval-heads"``.
    model : str
        Fingerprint of the model that it was made on.
    tensors : mapping of str to Tensor
    """

    kind: str
    model: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """What one attention call showed of one layer, to a part that asked for ``mass``.

    Attributes
    ----------
    layer : int
    prompt : bool
        A chunk of a prefill; else a decode step.
    positions : Tensor
        ``[T]`` int32 positions of the call's queries.
    lengths : Tensor
        ``[H]`` int32 entries of the layer, those of this call included.
    mass : Tensor
        ``[H, S]`` float32: attention probability that the ``T`` queries gave each entry, summed over
        the queries and over the ``G`` query heads of the KV head. Entries in the order of the store; 0
        behind the end of a shorter head and where a decode step did not read.
    group : int
        ``G``.
    """

    layer: int
    prompt: bool
    positions: Tensor
    lengths: Tensor
    mass: Tensor
    group: int


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Tensors that were asked for, of one layer of one sequence, when compression acts.

    Attributes
    ----------
    layer, layers : int
        Number of this layer, and how many there are.
    spec : AttentionSpec
    segment : Segment
        Every entry that the layer holds now, in ascending position, in one decoded segment.
    tokens : int
        Tokens of the sequence so far, dropped ones included.
    queries : Tensor or None
        ``[W, H * G, D]`` post-RoPE queries that were asked for, in ascending position.
    query_positions : Tensor or None
        ``[W]`` int32.
    rotary : Rotary or None
        Where it was asked for and the layer has one.
    profile : Profile or None
        Where it was asked for.
    """

    layer: int
    layers: int
    spec: AttentionSpec
    segment: Segment
    tokens: int
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    rotary: Rotary | None = None
    profile: Profile | None = None
