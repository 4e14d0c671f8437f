"""SwiftKV as a recipe names it: how many layers prompt tokens pass, and by which adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from winnow._check import integer
from winnow.generation.protocol import Generation, PrefillLayer
from winnow.types import Dense, Needs, Pattern

__all__ = ["SwiftKV"]


@dataclass(frozen=True, kw_only=True)
class SwiftKV:
    """Prompt tokens pass the first layers only; the entries of the others come from what leaves these.

    Source: SwiftKV (arXiv 2410.03960); see :func:`winnow.methods.swiftkv.swiftkv`. The model is
    transformed when it is loaded (:mod:`winnow.models.swiftkv`); this part names the transformation, and
    the pattern of the layers that prompts still pass.

    Attributes
    ----------
    layers : int or None
        Layers that every prompt token passes, at least 1; None is half of the model's.
    group : int
        Later layers that share one set of entries (AcrossKV), at least 1; it divides their number.
    adapter : str or None
        File that distillation wrote, or None for the one beside the model's weights, or else the start of
        distillation, untrained.
    pattern : Generation or None
        Which scores the first layers compute; None computes all.
    """

    layers: int | None = None
    group: int = 1
    adapter: str | None = None
    pattern: Generation | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            integer("swiftkv", "layers", self.layers, 1, "layers")
        integer("swiftkv", "group", self.group, 1, "layers")

    def first(self, layers: int) -> int:
        """Layers that prompt tokens pass, of a model of ``layers`` layers.

        Raises
        ------
        ValueError
            If the model has fewer layers, or the later ones do not divide into groups.
        """
        first = max(layers // 2, 1) if self.layers is None else self.layers
        if first > layers or (layers - first) % self.group:
            raise ValueError(
                f"swiftkv: the model has {layers} layers; {first} and groups of {self.group} do not fit, "
                "give layers so that a multiple of group is left"
            )
        return first

    @property
    def needs(self) -> Needs:
        """What the pattern of the first layers needs."""
        return Needs() if self.pattern is None else self.pattern.needs

    @property
    def chunk_multiple(self) -> int:
        """That of the pattern of the first layers."""
        return 1 if self.pattern is None else self.pattern.chunk_multiple

    @property
    def tail(self) -> int | None:
        """That of the pattern of the first layers."""
        return 0 if self.pattern is None else self.pattern.tail

    def state(self) -> Any:
        """That of the pattern of the first layers."""
        return None if self.pattern is None else self.pattern.state()

    def patterns(self, ctx: PrefillLayer, state: Any) -> tuple[Pattern, ...]:
        """The pattern in the first layers; in the later ones the prompt's last row reads everything."""
        if ctx.layer < self.first(ctx.layers):
            if self.pattern is not None:
                return self.pattern.patterns(ctx, state)
        elif ctx.q.shape[0] > 1:
            raise ValueError(
                "swiftkv: prompt tokens pass the later layers of this model, so it is not transformed; "
                "load it with winnow.load(model, recipe=...)"
            )
        return tuple(Pattern(form=Dense()) for _ in ctx.segments)
