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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

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

Tier = Literal["device", "host", "disk"]


# --------------------------------------------------------------------------- attention


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What a model fixes about one layer's attention, whatever the recipe.

    Attributes
    ----------
    scale : float
        Factor on the query-key products.
    window : int or None
        Sliding window of the model: entry at position ``j`` is visible to a query at ``i``
        only if ``i - j < window``.
    softcap : float or None
        Logits become ``softcap * tanh(logits / softcap)``.
    sinks : Tensor or None
        ``[H * G]`` learned sink logits: each head's softmax has one more term
        ``exp(sinks[h])`` whose value is zero (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Stored entries of one layer that share codec, tier and rotary table.

    Storage is ragged: head ``h`` holds ``lengths[h]`` entries, in ascending position, at the
    front of its own reserved region. Memory behind ``lengths[h]`` is reserved, not valid.

    Attributes
    ----------
    k, v : Tensor
        ``[H, C, D]``. Only the last dimension must be contiguous.
    lengths : Tensor
        ``[H]`` int32 on the CPU.
    start : int
        Position of entry 0 where ``positions`` is None: entry ``e`` is at ``start + e``.
    positions : Tensor or None
        ``[H, C]`` int32, ascending within each head; None where positions are consecutive.
    bias : Tensor or None
        ``[H, C]`` float32 added to the scaled logit of an entry (merged and compensating
        entries stand for several tokens).
    tier : {"device", "host", "disk"}
        Where the bytes lie.
    version : int
        Changes whenever anything but an append happened to the entries (a gather, a rollback,
        a move), so that side data kept beside a segment knows when it is stale.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    start: int = 0
    positions: Tensor | None = None
    bias: Tensor | None = None
    tier: Tier = "host"
    version: int = 0

    @property
    def heads(self) -> int:
        """KV heads ``H``."""
        return self.k.shape[0]

    @property
    def codec(self) -> str:
        """Form that the entries are stored in; ``"raw"`` is what the model computed."""
        return "raw"

    @property
    def bytes_per_entry(self) -> int:
        """Bytes that reading one entry (K and V of one head) moves."""
        return 2 * self.k.shape[2] * self.k.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the valid entries."""
        return int(self.lengths.sum()) * self.bytes_per_entry

    def positions_of(self, head: int) -> Tensor:
        """``[S]`` int32 positions of the valid entries of one head."""
        n = int(self.lengths[head])
        if self.positions is not None:
            return self.positions[head, :n]
        return torch.arange(self.start, self.start + n, dtype=torch.int32, device=self.k.device)

    def decode(self, first: int = 0, last: int | None = None) -> Segment:
        """Entries ``first .. last - 1`` of every head (all by default), decoded; here without a copy."""
        longest = int(self.lengths.max())
        if first == 0 and (last is None or last >= longest):
            return self
        last = longest if last is None else min(last, longest)
        return Segment(
            k=self.k[:, first:last],
            v=self.v[:, first:last],
            lengths=(self.lengths.clamp(max=last) - first).clamp_(min=0),
            start=self.start + first,
            positions=None if self.positions is None else self.positions[:, first:last],
            bias=None if self.bias is None else self.bias[:, first:last],
            tier=self.tier,
            version=self.version,
        )

    def narrow(self, first: int, last: int) -> Segment:
        """Entries ``first .. last - 1`` of every head, in the form they are stored in; no copy."""
        return self.decode(first, last)

    def tiles(self, entries: int) -> Iterator[Segment]:
        """Decoded segments that together hold all of it; a raw one, which takes no memory, is one.

        ``entries`` bounds what an encoded segment decodes at a time.
        """
        yield self

    def gather(self, selection: Selection) -> Segment:
        """The selected entries, copied into a decoded segment of one head per row of the selection.

        Row ``r`` of the result belongs to KV head ``r // (R // H)``; entries ascend.
        """
        entries, counts = selection.entries(self.lengths)
        heads = torch.arange(entries.shape[0]) // (entries.shape[0] // self.heads)
        rows, at = heads.to(self.k.device).unsqueeze(1), entries.to(self.k.device)
        positions = self.start + entries if self.positions is None else self.positions[rows, at]
        return Segment(
            k=self.k[rows, at],
            v=self.v[rows, at],
            lengths=counts,
            positions=positions.to(torch.int32),
            bias=None if self.bias is None else self.bias[rows, at],
            tier=self.tier,
            version=self.version,
        )


@dataclass(frozen=True, kw_only=True)
class Partial:
    """Attention over some of the entries, in a form that merges exactly with the rest.

    Attributes
    ----------
    out : Tensor
        ``[T, H * G, D]``; the softmax over *these* entries applied to their values. Zero
        where a query saw none of them.
    lse : Tensor
        ``[T, H * G]`` float32, natural logarithm of the sum of exponentials; ``-inf`` where a
        query saw none.
    pairs : int
        Query-key scores inside the mask, summed over query heads: the work done.
    row_max : Tensor or None
        ``[T, H * G]`` float32 largest scaled logit, only where it was asked for.
    logits : Tensor or None
        ``[H * G, S]`` float32 scaled logits of a decode step (``-inf`` where not read), only
        where they were asked for.
    """

    out: Tensor
    lse: Tensor
    pairs: int
    row_max: Tensor | None = None
    logits: Tensor | None = None


# --------------------------------------------------------------------------- generation


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every query reads every earlier entry."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The first ``init`` positions and the last ``local`` ones, the query's own included.

    Entry at position ``j`` is visible to a query at ``i`` iff ``j <= i`` and
    (``j < init`` or ``i - j < local``). With ``align`` above 1 the local part begins at the
    query's position rounded down to a multiple of ``align``, then ``local - align`` earlier.
    """

    init: int
    local: int
    align: int = 1


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block-sparse CSR per query head: which key blocks each query block reads.

    Query block ``r`` holds rows ``r * block .. r * block + block - 1`` of this call; key block
    ``c`` holds entries ``c * block .. c * block + block - 1`` of the segment. The causal mask
    is applied inside a block. Columns are ascending and unique within a row.

    Attributes
    ----------
    block : int
        Rows and columns of a block.
    offsets : Tensor
        ``[H * G, ceil(T / block) + 1]`` int32 into ``columns``.
    columns : Tensor
        ``[nnz]`` int32 key-block numbers.
    """

    block: int
    offsets: Tensor
    columns: Tensor


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """Single key columns shared by a run of queries (vertical stripes).

    Row ``t`` of this call reads the entries listed for super-block ``(t + phase) // rows``. The
    causal mask is applied.

    Attributes
    ----------
    rows : int
        Query rows that share a list.
    phase : int
        Rows of the first super-block that an earlier call already had (chunked prefill).
    offsets : Tensor
        ``[H * G, ceil((T + phase) / rows) + 1]`` int32 into ``columns``.
    columns : Tensor
        ``[nnz]`` int32 entry numbers, ascending and unique within a list.
    """

    rows: int
    phase: int
    offsets: Tensor
    columns: Tensor


Form = Dense | Window | Blocks | Stripes


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What a prefill computes over one segment.

    ``form`` is handed to the kernel. ``done`` is attention that the part already computed
    while choosing, over entries that ``form`` does not list; the two are merged. A part that
    needs nothing beyond ``done`` leaves ``form`` None. ``scored`` counts the query-key products
    that choosing took beside ``done`` (pooled queries count as queries).
    """

    form: Form | None
    done: Partial | None = None
    scored: int = 0


# --------------------------------------------------------------------------- compression


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
        ``[H * G, S]`` float32: attention probability that the ``T`` queries gave each entry, summed
        over the queries. Entries in the order of the store; 0 behind the end of a shorter head and
        where a decode step did not read.
    """

    layer: int
    prompt: bool
    positions: Tensor
    lengths: Tensor
    mass: Tensor


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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Importance of every entry of one layer.

    Attributes
    ----------
    value : Tensor
        ``[H, S]`` float32; ``-inf`` behind the end of a shorter head.
    protected : Tensor
        ``[H, S]`` bool: kept whatever its score. A mask, never a large score.
    lengths : Tensor
        ``[H]`` int32 valid entries per head.
    """

    value: Tensor
    protected: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many entries each KV head of one layer may hold: ``[H]`` int32."""

    entries: Tensor


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """New contents for some entries of one head: merged ones, and ones that stand for the dropped.

    Attributes
    ----------
    entries : Tensor
        ``[m]`` int64 entry numbers before the plan, ascending and unique; all of them stay.
    k, v : Tensor
        ``[m, D]``. An entry keeps its position.
    bias : Tensor or None
        ``[m]`` float32 added to the entry's scaled logits from now on; None leaves it as it was.
    """

    entries: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Keys of a layer, before rotation, as a product of two matrices.

    The key of KV head ``h`` at position ``start + i``, turned back to position 0, is
    ``left[i] @ right[h]``.

    Attributes
    ----------
    left : Tensor
        ``[n, r]``, the same for all heads.
    right : Tensor
        ``[H, r, D]``.
    start : int
        Position of row 0 of ``left``.
    rotary : Rotary or None
        What turns the product to its position; None for a layer without rotation.
    """

    left: Tensor
    right: Tensor
    start: int
    rotary: Rotary | None


@dataclass(frozen=True, kw_only=True)
class Demotion:
    """Entries that change their form or their tier.

    Attributes
    ----------
    oldest : int
        This many of the oldest entries of every head that stay, a multiple of the page size.
    entries : tuple of Tensor, or None
        In place of ``oldest``: per head ``[n]`` int64 entry numbers before the plan, ascending, a
        multiple of the page size (it may differ between heads).
    codec : str or None
        Codec that they are encoded in; None leaves their form.
    tier : Tier or None
        Tier that they move to; None leaves them where they are.
    channels : Tensor or None
        ``[H, C]`` int64 channels of the keys that are stored, ascending, for codecs that leave
        channels out.
    factors : Factors or None
        The keys, for codecs that store them as a product; a row for every position that is listed.
    """

    oldest: int = 0
    entries: tuple[Tensor, ...] | None = None
    codec: str | None = None
    tier: Tier | None = None
    channels: Tensor | None = None
    factors: Factors | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of the entries of one layer: first rewritten, then dropped, then demoted.

    Attributes
    ----------
    keep : tuple of Tensor, or None
        Per head ``[n]`` int64 entry numbers that stay, ascending and unique; the others are
        dropped. None keeps everything.
    rewrite : tuple of (Rewrite or None), or None
        Per head new contents of entries that stay.
    demote : tuple of Demotion
        Sets of entries that share none.
    """

    keep: tuple[Tensor, ...] | None = None
    rewrite: tuple[Rewrite | None, ...] | None = None
    demote: tuple[Demotion, ...] = ()


# --------------------------------------------------------------------------- loading


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Entries that a decode step reads from one segment, by list.

    Attributes
    ----------
    indices : Tensor
        ``[R, N]`` int32, ``R`` is ``H`` (one list per KV head) or ``H * G`` (one per query
        head). Entry numbers where ``page`` is 1, page numbers otherwise; page ``p`` holds
        entries ``p * page .. min((p + 1) * page, length) - 1``. Unique within a row.
    counts : Tensor
        ``[R]`` int32 valid indices per row.
    page : int
    """

    indices: Tensor
    counts: Tensor
    page: int = 1

    def entries(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Spell the lists out, for a segment whose heads hold ``lengths`` (``[H]``) entries.

        Returns
        -------
        entries : Tensor
            ``[R, N * page]`` int64 entry numbers, ascending; 0 behind the end of a row.
        counts : Tensor
            ``[R]`` int32 valid entries per row.
        """
        rows, width = self.indices.shape
        if rows % len(lengths):
            raise ValueError(f"a selection of {rows} rows fits no segment of {len(lengths)} KV heads")
        valid = torch.arange(width) < self.counts.cpu().unsqueeze(1)
        entries = self.indices.cpu().long().unsqueeze(2) * self.page + torch.arange(self.page)
        limit = lengths.long().repeat_interleave(rows // len(lengths)).view(-1, 1, 1)
        valid = (valid.unsqueeze(2) & (entries < limit)).flatten(1)
        far = torch.iinfo(torch.int64).max
        entries = torch.where(valid, entries.flatten(1), far).sort(dim=1).values
        return entries.masked_fill(entries == far, 0), valid.sum(1).to(torch.int32)


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
    done : tuple of Partial
        Attention that the part computed itself, over entries that no selection lists.
    scanned : int
        Bytes of side data that were read to make this choice; they count as read.
    """

    selections: tuple[Selection | None, ...] | None = None
    want_logits: bool = False
    done: tuple[Partial, ...] = ()
    scanned: int = 0


EVERYTHING = View()


# --------------------------------------------------------------------------- models

Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionSpec], Tensor]
"""``attend(layer, q_NHD, k_NHD, v_NHD, spec) -> out_NHD``: the one place where Winnow meets a model.

``q_NHD`` is ``[N, H * G, D]`` after RoPE, ``k_NHD`` (after RoPE) and ``v_NHD`` are ``[N, H, D]``, ``N``
the tokens of all packed sequences; only the last dimension is contiguous. The result is
``[N, H * G, D]`` in the dtype of the queries. It is called once per layer, in ascending order.
A layer that reads the entries of an earlier one gives no keys and values, and a layer that only rows with
logits pass gives the queries of those rows alone, in their order, beside the keys and values of all tokens.
"""


class LayerWalk(Protocol):
    """A model's layers one by one, on a set of tokens that may change between two of them.

    Hidden states are ``[N, K]`` in the model's dtype, as they lie between two layers. Every method
    leaves its arguments as they were. Not safe to use from two threads at once.
    """

    def embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """``[N, K]``: what the first layer is given for ``[N]`` tokens."""
        ...

    def keys_values(self, layer: int, hidden_NK: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values ``[N, H, D]`` that a layer computes from what it is given."""
        ...

    def layer(self, layer: int, hidden_NK: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """``[N, K]``: a whole layer; ``attend`` is called once."""
        ...

    def finish(self, hidden_MK: Tensor) -> Tensor:
        """``[M, V]`` float32 logits of what the last layer returned."""
        ...


class LanguageModel(Protocol):
    """What the engine needs of a model; it knows neither sequences nor lengths.

    Attributes
    ----------
    name : str
        For messages and reports.
    layers, kv_heads, query_heads, head_dim : int
        ``L``, ``H``, ``H * G`` and ``D``, equal in every layer.
    vocab_size : int
        Columns of the logits.
    max_length : int
        Positions that the model was made for: ``position_ids`` must stay below it.
    dtype : torch.dtype
        Of the weights, so of queries, keys and values.
    device : torch.device
    fingerprint : str
        Hexadecimal digest of configuration and weights; equal only for equal models.
    eos_token_ids : tuple of int
        Tokens that end a generation.
    specs : tuple of AttentionSpec
        What each layer's ``attend`` is called with.
    slots : tuple of int
        Per layer, the layer of the store that holds its entries: its own number, but where layers share
        one set of entries. They ascend from 0 without a gap.
    """

    name: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    specs: tuple[AttentionSpec, ...]
    slots: tuple[int, ...]

    def rotary(self, layer: int) -> Rotary | None:
        """How a layer turns keys and queries; None for a layer without rotation.

        Raises
        ------
        ValueError
            If the model's positions cannot be moved (learned or biased positions).
        """
        ...

    def forward(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Run all layers over packed tokens.

        Parameters
        ----------
        token_ids, position_ids : Tensor
            ``[N]`` int64, sequences one after the other without padding.
        rows : Tensor
            ``[M]`` int64: which of the ``N`` rows get logits; may be empty.
        attend : Attend

        Returns
        -------
        Tensor
            ``[M, V]`` float32 logits.
        """
        ...

    def walk(self) -> LayerWalk:
        """The same layers, one by one.

        Raises
        ------
        ValueError
            If this model's layers cannot be walked, with the reason.
        """
        ...
