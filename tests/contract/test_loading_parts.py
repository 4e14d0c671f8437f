"""The contract of loading parts (selectors)."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from contract_harness import DTYPES, GROUPS, LENGTHS, SAMPLES, TOLERANCE, cut, data, parts, same, snapshot
from torch import Tensor

from winnow.kernels.decode import decode
from winnow.kernels.merge import merge
from winnow.loading.protocol import DecodeLayer
from winnow.types import AttentionSpec, Partial, Segment

LAYERS = 5
HEADS = 2


class Model:
    """Entries and queries of every layer, growing by one entry a step."""

    def __init__(self, *, group: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 16):
        self.group, self.size = group, size
        self.whole = [
            data(
                stored=1100, new=1, heads=HEADS, group=group, dtype=dtype, seed=seed * 100 + layer, size=size
            )
            for layer in range(LAYERS)
        ]

    def layer(
        self, layer: int, length: int, borders: tuple[int, ...] = ()
    ) -> tuple[Tensor, tuple[Segment, ...]]:
        """Queries ``[H * G, D]`` and the first ``length`` entries, cut at ``borders``."""
        d = self.whole[layer]
        make = torch.Generator().manual_seed(1000 * length + layer)
        q = (2 * torch.randn(d.q.shape[1:], generator=make)).to(d.q.dtype)
        ends = (0, *(b for b in borders if b < length), length)
        return q, tuple(cut(d.segment, a, b) for a, b in itertools.pairwise(ends))


@dataclasses.dataclass
class Read:
    """What one layer of one step read."""

    out: Tensor  # [H * G, D]
    mask: Tensor  # [H * G, S] bool
    q: Tensor
    segments: tuple[Segment, ...]
    pairs: int


def entries_of(segment: Segment, selection, group: int) -> Tensor:
    """``[H * G, S]`` bool, written out from the meaning of a selection."""
    S = int(segment.lengths.max())
    rows = segment.heads * group
    mask = torch.zeros(rows, S, dtype=torch.bool)
    for n in range(rows):
        length = int(segment.lengths[n // group])
        if selection is None:
            mask[n, :length] = True
            continue
        row = n if selection.indices.shape[0] == rows else n // group
        listed = selection.indices[row, : int(selection.counts[row])].tolist()
        assert len(set(listed)) == len(listed), "listed twice"
        for one in listed:
            first = one * selection.page
            assert 0 <= first < length, "lists an entry that is not there"
            mask[n, first : min(first + selection.page, length)] = True
    return mask


def step(
    part,
    state,
    model: Model,
    length: int,
    *,
    borders: tuple[int, ...] = (),
    spec: AttentionSpec | None = None,
    alter=lambda layer, segments: segments,
) -> list[Read]:
    """One decode step through all layers, as the engine does it."""
    reads = []
    for layer in range(LAYERS):
        q, segments = model.layer(layer, length, borders)
        segments = alter(layer, segments)
        ctx = DecodeLayer(
            layer=layer,
            layers=LAYERS,
            q=q,
            position=length - 1,
            segments=segments,
            spec=spec or model.whole[0].spec,
        )
        view = part.select(ctx, state)
        selections = view.selections or (None,) * len(segments)
        assert len(selections) == len(segments)
        partials: list[Partial] = [
            decode(
                q,
                segment,
                spec=ctx.spec,
                position=ctx.position,
                selection=chosen,
                want_logits=view.want_logits,
            )
            for segment, chosen in zip(segments, selections, strict=True)
        ]
        if view.want_logits:
            part.observe(ctx, [p.logits for p in partials], state)
        result = merge(partials)
        reads.append(
            Read(
                out=result.out[0],
                mask=torch.cat(
                    [entries_of(s, c, model.group) for s, c in zip(segments, selections, strict=True)], 1
                ),
                q=q,
                segments=segments,
                pairs=result.pairs,
            )
        )
    return reads


def masked(read: Read, spec: AttentionSpec) -> Tensor:
    """``[H * G, D]`` float32 attention over the entries in the mask, written out."""
    group = read.q.shape[0] // HEADS
    k, v = (
        torch.cat([getattr(s, x)[:, : int(s.lengths.max())] for s in read.segments], 1).float() for x in "kv"
    )
    k, v = k.nan_to_num().repeat_interleave(group, 0), v.nan_to_num().repeat_interleave(group, 0)
    logits = torch.einsum("nd,nsd->ns", read.q.float(), k) * spec.scale
    return torch.einsum("ns,nsd->nd", logits.masked_fill(~read.mask, -torch.inf).softmax(-1), v)


@parts("loading", "everything equals dense")
@LENGTHS
@GROUPS
@DTYPES
def test_read_everything_equals_dense(part, length, group, dtype):
    limit, model = SAMPLES[part].limit, Model(group=group, dtype=dtype)
    for read in step(limit, limit.state(), model, length):
        full = dataclasses.replace(read, mask=torch.ones_like(read.mask))
        torch.testing.assert_close(
            read.out.float(), masked(full, model.whole[0].spec), atol=TOLERANCE[dtype], rtol=0
        )
        assert read.mask.all()


@parts("loading", "equals masked dense")
@LENGTHS
@GROUPS
@DTYPES
@pytest.mark.parametrize("borders", [(), (40,)], ids=["one", "two"])
def test_sparse_equals_dense_under_the_mask_it_reads(part, length, group, dtype, borders):
    tight, model = SAMPLES[part].tight, Model(group=group, dtype=dtype)
    reads = step(tight, tight.state(), model, length, borders=borders)
    for read in reads:
        torch.testing.assert_close(
            read.out.float(), masked(read, model.whole[0].spec), atol=TOLERANCE[dtype], rtol=0
        )
        assert read.pairs == int(read.mask.sum())
    if length == 1000:
        assert min(int(r.mask.sum()) for r in reads) < HEADS * group * 500, "the sample is not tight"


@parts("loading", "reads itself")
@pytest.mark.parametrize("borders", [(), (40,), (62,)])
def test_the_current_token_is_always_read(part, borders):
    tight = SAMPLES[part].tight
    state, model = tight.state(), Model()
    for length in (60, 61, 62, 63, 64):
        for read in step(tight, state, model, length, borders=borders):
            assert read.mask[:, -1].all()


@parts("loading", "budget met exactly")
def test_lists_hold_exactly_what_is_to_be_kept(part):
    tight, model = SAMPLES[part].tight, Model()
    sparse = [r for r in step(tight, tight.state(), model, 500) if not r.mask.all()]
    assert sparse
    for read in sparse:
        assert read.mask.sum(1).tolist() == [tight.keep] * (HEADS * model.group)


@parts("loading", "segments")
def test_where_segments_are_cut_does_not_matter(part):
    tight, model = SAMPLES[part].tight, Model()
    one = step(tight, tight.state(), model, 500)
    for borders in ((1,), (137,), (499,), (100, 300)):
        for a, b in zip(one, step(tight, tight.state(), model, 500, borders=borders), strict=True):
            assert torch.equal(a.mask, b.mask)


@parts("loading", "inputs unmutated")
def test_selecting_writes_to_nothing(part):
    tight, model = SAMPLES[part].tight, Model()
    before = snapshot([d.segment for d in model.whole])
    step(tight, tight.state(), model, 300)
    assert same(before, snapshot([d.segment for d in model.whole]))


@parts("loading", "order of entries")
def test_attention_does_not_depend_on_the_order_of_a_list(part):
    tight, model = SAMPLES[part].tight, Model()
    for read in step(tight, tight.state(), model, 300):
        order = torch.randperm(300)
        turned = dataclasses.replace(
            read,
            mask=read.mask[:, order],
            segments=(
                dataclasses.replace(
                    read.segments[0], k=read.segments[0].k[:, order], v=read.segments[0].v[:, order]
                ),
            ),
        )
        torch.testing.assert_close(
            read.out, masked(turned, model.whole[0].spec), atol=TOLERANCE[torch.float32], rtol=0
        )


@parts("loading", "state does not leak")
def test_sequences_do_not_influence_each_other(part):
    tight = SAMPLES[part].tight
    a, b = Model(seed=1), Model(seed=2)
    alone = [step(tight, state, b, n) for state in [tight.state()] for n in (200, 201, 202)]
    state_a, state_b = tight.state(), tight.state()
    mixed = []
    for n in (200, 201, 202):
        step(tight, state_a, a, n + 150)
        mixed.append(step(tight, state_b, b, n))
    for x, y in zip(alone, mixed, strict=True):
        for read, other in zip(x, y, strict=True):
            assert torch.equal(read.mask, other.mask)
            assert torch.equal(read.out, other.out)


@parts("loading", "cached equals uncached")
def test_step_by_step_equals_a_fresh_state(part):
    tight, model = SAMPLES[part].tight, Model()
    state = tight.state()
    for length in range(90, 100):
        grown = step(tight, state, model, length)
        fresh = step(tight, tight.state(), model, length)
        for a, b in zip(grown, fresh, strict=True):
            assert torch.equal(a.mask, b.mask)


@parts("loading", "follows a gather")
def test_side_data_follows_a_change_of_the_entries(part):
    """After a compression the layers hold other entries each; the version says so."""
    tight, model = SAMPLES[part].tight, Model()
    state = tight.state()
    step(tight, state, model, 200)

    def gather(layer: int, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        (segment,) = segments
        make = torch.Generator().manual_seed(layer)
        n = int(segment.lengths[0])
        lengths = [100 + layer, 90]
        k = torch.full((HEADS, 128, model.size), torch.nan)
        v, positions = k.clone(), torch.full((HEADS, 128), -7, dtype=torch.int32)
        for h, count in enumerate(lengths):
            old = torch.randperm(n - 1, generator=make)[: count - 1].sort().values
            listed = torch.cat([old, torch.tensor([n - 1])])
            k[h, :count], v[h, :count] = segment.k[h, listed], segment.v[h, listed]
            positions[h, :count] = listed.int()
        return (
            dataclasses.replace(
                segment,
                k=k,
                v=v,
                positions=positions,
                lengths=torch.tensor(lengths, dtype=torch.int32),
                version=segment.version + 1,
            ),
        )

    after = step(tight, state, model, 201, alter=gather)
    fresh = step(tight, tight.state(), model, 201, alter=gather)
    for read, other in zip(after, fresh, strict=True):
        assert torch.equal(read.mask, other.mask)
        torch.testing.assert_close(
            read.out, masked(read, model.whole[0].spec), atol=TOLERANCE[torch.float32], rtol=0
        )
        lengths = read.segments[0].lengths
        for n in range(read.mask.shape[0]):
            assert read.mask[n, int(lengths[n // model.group]) - 1]


@parts("loading", "sliding window")
def test_layers_with_a_sliding_window_read_their_window(part):
    tight, model = SAMPLES[part].tight, Model()
    spec = AttentionSpec(scale=model.whole[0].spec.scale, window=20)
    for read in step(tight, tight.state(), model, 300, spec=spec):
        window = torch.zeros_like(read.mask)
        window[:, 280:] = True
        torch.testing.assert_close(
            read.out,
            masked(dataclasses.replace(read, mask=window), spec),
            atol=TOLERANCE[torch.float32],
            rtol=0,
        )


@parts("loading", "bytes are measured")
def test_state_bytes_are_a_count(part):
    tight = SAMPLES[part].tight
    state = tight.state()
    assert tight.state_bytes(state) == 0
    step(tight, state, Model(), 300)
    assert tight.state_bytes(state) >= 0
