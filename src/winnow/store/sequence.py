"""The store of one sequence: the single owner of its entries, lengths and positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from winnow.store.codecs import EncodedSegment
from winnow.store.layer import Layer
from winnow.store.run import Run, Shape
from winnow.types import Plan, Segment, Tier

__all__ = ["SequenceStore"]


class SequenceStore:
    """Entries of one sequence, ragged per layer and KV head, growing without copies.

    A step appends to every layer and then advances once; positions come from the caller, lengths
    from here. Not safe to use from two threads at once.

    Parameters
    ----------
    layers, heads, head_dim : int
        ``L``, ``H`` and ``D`` of the model.
    dtype : torch.dtype
        Type of K and V.
    capacity : int
        Most tokens the sequence may have. Address space is reserved for them, not memory.
    device : str or torch.device
        Where attention runs.
    directory : path, optional
        Where the disk tier puts its files; the system's temporary directory by default.

    Raises
    ------
    ValueError
        If a size is not positive or the address space cannot be reserved.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        capacity: int,
        device: str | torch.device = "cpu",
        directory: str | Path | None = None,
    ):
        if min(layers, heads, head_dim, capacity) < 1:
            raise ValueError("a store needs at least one layer, head, head dimension and entry of capacity")
        self.shape = Shape(
            heads=heads,
            head_dim=head_dim,
            capacity=capacity,
            dtype=dtype,
            device=torch.device(device),
            directory=Path(directory) if directory is not None else None,
        )
        self._layers = [Layer(self.shape) for _ in range(layers)]
        self._length = 0
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens of the sequence so far, dropped ones included: the next logical position."""
        return self._length

    @property
    def layers(self) -> int:
        """Layers ``L``."""
        return len(self._layers)

    @property
    def capacity(self) -> int:
        """Most tokens the sequence may have."""
        return self.shape.capacity

    # ------------------------------------------------------------------ a step

    def append(self, layer: int, k_THD: Tensor, v_THD: Tensor, positions_T: Tensor) -> None:
        """Copy the new entries of a layer into the store.

        Parameters
        ----------
        layer : int
        k_THD, v_THD : Tensor
            ``[T, H, D]``, keys with rotation applied.
        positions_T : Tensor
            ``[T]`` integers, ascending, above every position the layer holds.

        Raises
        ------
        ValueError
            If the sequence would outgrow its capacity.
        """
        state = self._layers[layer]
        if state.end + k_THD.shape[0] > self.shape.capacity:
            raise ValueError(
                f"the sequence would hold {state.end + k_THD.shape[0]} tokens, its store has room for "
                f"{self.shape.capacity}; shorten the prompt or raise the capacity"
            )
        state.append(k_THD, v_THD, positions_T)

    def advance(self, tokens: int) -> None:
        """Count the tokens of a step, after every layer has appended them."""
        self._length += tokens
        # A layer that owns no KV (it reads another layer's) never appends.
        assert all(state.end in (0, self._length) for state in self._layers), "a layer was left behind"

    def segments(self, layer: int) -> tuple[Segment | EncodedSegment, ...]:
        """Everything a layer holds, by the oldest entry of each; valid until the store changes or closes.

        Positions ascend within a segment; those of two segments may interleave. The last segment holds
        what was appended last.
        """
        return self._layers[layer].segments()

    def decoded(self, layer: int) -> Segment:
        """Everything a layer holds in one decoded segment; no copy where it is one raw segment already."""
        return self._layers[layer].decoded()

    def lengths(self, layer: int) -> list[int]:
        """Entries that each head of a layer holds."""
        return self._layers[layer].lengths()

    # ------------------------------------------------------------------ changes

    def apply(self, layer: int, plan: Plan) -> None:
        """Carry out what compression decided for a layer.

        First entries are rewritten; then kept entries move together and the memory behind them is
        given back at once; then demoted ones change their form and their tier (of the oldest, the whole
        pages, where a head has fewer). Entries that are already in a smaller codec or on a lower tier
        stay there.

        Raises
        ------
        ValueError
            If the plan does not fit the layer or the disk tier cannot take the entries. The failing
            one of the three steps, and of several demotions the failing one, then changed nothing.
        """
        self._layers[layer].apply(plan)

    def adopt(self, layers: Sequence[Sequence[Segment | EncodedSegment]], length: int) -> None:
        """Take read-only segments of a pool, or of another sequence, as the first ``length`` tokens.

        They are read in place and never written: a plan that drops some of them copies the rest.
        Their owner must not change or free them before this store is closed.

        Raises
        ------
        ValueError
            If the store is not empty or the segments do not fit this model and ``length``.
        """
        shape = self.shape
        if self._length or any(state.end for state in self._layers):
            raise ValueError("only an empty store can adopt a prefix; adopt before the first append")
        if len(layers) != len(self._layers):
            raise ValueError(f"the prefix has {len(layers)} layers, the model {len(self._layers)}")
        if length > shape.capacity:
            raise ValueError(
                f"a prefix of {length} tokens exceeds the capacity of {shape.capacity}; raise it"
            )
        for number, segments in enumerate(layers):
            for segment in segments:
                if not _fits(segment, shape):
                    raise ValueError(f"the prefix of layer {number} is of another model or type")
                for head in range(shape.heads):
                    positions = segment.positions_of(head)
                    if len(positions) and not 0 <= int(positions[0]) <= int(positions[-1]) < length:
                        raise ValueError(
                            f"the prefix of layer {number} has positions outside 0 to {length - 1}"
                        )
        for state, segments in zip(self._layers, layers, strict=True):
            state.adopt(segments)
            state.end = length
        self._length = length

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` tokens: entries at that position and above are dropped.

        Also takes back what an interrupted step appended to some layers: ``truncate(store.length)``.

        Raises
        ------
        ValueError
            If the sequence is shorter than that.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot roll back to {length} tokens, the sequence has {self._length}")
        for state in self._layers:
            state.truncate(length)
        self._length = length

    def restored_run(self, layer: int, codec: str, tier: Tier, follows: int | None) -> Run:
        """The run that entries from a file go to; for :mod:`winnow.store.files`.

        Raw entries at consecutive positions from ``follows`` on may go behind others of their kind.
        """
        return self._layers[layer].restored_run(codec, tier, follows)

    def restore(self, length: int) -> None:
        """Set the length after all runs have come from a file; for :mod:`winnow.store.files`."""
        for state in self._layers:
            state.restored(length)
        self._length = length

    # ------------------------------------------------------------------ memory

    def bytes(self) -> dict[tuple[Tier, str], int]:
        """Bytes that the sequence's own entries hold now, by tier and codec, in whole memory pages."""
        held: Counter[tuple[Tier, str]] = Counter()
        for state in self._layers:
            for run in state.owned():
                for tier, size in run.bytes().items():
                    held[tier, run.codec.name] += size
        return dict(held)

    def shared_bytes(self) -> int:
        """Bytes of the entries that belong to a pool."""
        return sum(run.nbytes() for state in self._layers for run in state.shared())

    def close(self) -> None:
        """Give all memory back now; segments handed out read as zeros from here on. Idempotent."""
        if not self._closed:
            self._closed = True
            for state in self._layers:
                state.close()

    def __enter__(self) -> SequenceStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fits(segment: Segment | EncodedSegment, shape: Shape) -> bool:
    part = segment.decode(0, 0) if isinstance(segment, EncodedSegment) else segment
    return part.heads == shape.heads and part.k.shape[2] == shape.head_dim and part.k.dtype == shape.dtype
