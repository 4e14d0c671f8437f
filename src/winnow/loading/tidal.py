"""TidalDecode: choose entries at a few layers, read only those in the layers below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow._check import integer
from winnow.loading.lists import Carried, choose
from winnow.loading.protocol import DecodeLayer
from winnow.types import EVERYTHING, Needs, View

__all__ = ["Tidal"]


@dataclass
class TidalState:
    """What passes between the layers of one step.

    Attributes
    ----------
    due : bool
        The next layer without a sliding window selects.
    chosen : Carried
        The last selection of this step.
    """

    due: bool = False
    chosen: Carried = field(default_factory=Carried)


@dataclass(frozen=True, kw_only=True)
class Tidal:
    """Position-persistent sparse decoding: the important positions hardly change over layers.

    Source: TidalDecode (arXiv 2410.05076), ``src/tidal_build/modify_llama.py``.

    Each decode step: layers before ``dense_layers`` read everything; a selecting layer reads
    everything too, and its ``keep`` largest logits per KV head choose the positions that the
    layers below read, until the next selecting layer. Prefill is not touched.

    Attributes
    ----------
    keep : int
        Positions per KV head, the current token's included (``k``; 256 in the README's
        example).
    dense_layers : int
        First layers that read everything.
    select_layers : tuple of int, or None
        Layers that select, ascending, none before ``dense_layers``. None takes
        ``dense_layers`` and a *correction layer* at two fifths of the depth: (2, 13) of 32
        layers, as in the published scripts.

    Notes
    -----
    Deviations from the official code:

    - Scope: one list per KV head, by the largest logit in its group of query heads. The Python
      code selects per query head after repeating keys (and masks dense logits, so saves
      nothing).
    - The current token is always read; the code drops it where its logit ranks low. Nothing
      else is forced.
    - What travels between layers are positions, not entry numbers. Where a compression kept
      different entries in different layers, a layer reads those of the chosen positions that it
      still has.
    - A layer with a sliding window of the model reads its window; if it was to select, the next
      layer without one does.
    """

    keep: int = 256
    dense_layers: int = 2
    select_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        integer("tidal", "keep", self.keep, 1)
        integer("tidal", "dense_layers", self.dense_layers, 0, "layers")
        if self.select_layers is None:
            return
        object.__setattr__(self, "select_layers", tuple(self.select_layers))
        for layer in self.select_layers:
            integer("tidal", "select_layers", layer, 0, "a layer's number")
        if not self.select_layers or list(self.select_layers) != sorted(set(self.select_layers)):
            raise ValueError(
                f"tidal: select_layers={self.select_layers} will not do; list at least one layer, "
                f"ascending and once each"
            )
        if self.select_layers[0] < self.dense_layers:
            raise ValueError(
                f"tidal: layer {self.select_layers[0]} selects but the first {self.dense_layers} layers read "
                f"everything; give dense_layers={self.select_layers[0]} or a later selecting layer"
            )

    @property
    def needs(self) -> Needs:
        """Nothing but the logits that its views ask for."""
        return Needs()

    def check(self, layers: int) -> None:
        """Refuse selecting layers that a model of ``layers`` layers does not have."""
        if self.select_layers is not None and self.select_layers[-1] >= layers:
            raise ValueError(
                f"tidal: select_layers={self.select_layers} but the model has {layers} layers, "
                f"numbered from 0; leave select_layers out to have them chosen, here {self._default(layers)}"
            )

    def _default(self, layers: int) -> tuple[int, ...]:
        correction = max(self.dense_layers, round(0.4 * layers))
        return tuple(sorted({self.dense_layers, correction}))

    def state(self) -> TidalState:
        """Empty state for one sequence."""
        return TidalState()

    def select(self, ctx: DecodeLayer, state: TidalState) -> View:
        """Everything, everything with logits, or the chosen positions."""
        if ctx.layer == 0:
            self.check(ctx.layers)
            state.due = False
            state.chosen.clear()
        if ctx.layer in (self.select_layers or self._default(ctx.layers)):
            state.due = True
        if ctx.spec.window is not None or ctx.layer < self.dense_layers:
            return EVERYTHING
        if state.due:
            return View(want_logits=True)
        return View(selections=state.chosen.read(ctx.segments)) if state.chosen else EVERYTHING

    def observe(self, ctx: DecodeLayer, logits: Sequence[Tensor], state: TidalState) -> None:
        """Choose the positions for the layers below from this layer's logits."""
        state.due = False
        H, widths = ctx.segments[0].heads, [one.shape[1] for one in logits]
        best_HS = torch.cat([one.view(H, -1, one.shape[1]).amax(1) for one in logits], 1)
        # The entry of the current token is the last of the last segment.
        own_H = ctx.segments[-1].lengths.to(best_HS.device).long() - 1 + sum(widths[:-1])
        best_HS.scatter_(1, own_H[:, None], torch.inf)
        state.chosen.put(ctx.segments, choose(best_HS, widths, self.keep, backend=ctx.backend))

    def state_bytes(self, state: TidalState) -> int:
        """Nothing outlives a step but the last choice, which is not worth counting: 0."""
        return 0
