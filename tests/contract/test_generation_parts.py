"""The contract of generation parts (patterns)."""

from __future__ import annotations

import pytest
import torch
from contract_harness import (
    DTYPES,
    GROUPS,
    LENGTHS,
    SAMPLES,
    TOLERANCE,
    Data,
    attend,
    cut,
    data,
    parts,
    plain,
    probe,
    same,
    snapshot,
)


@parts("generation", "everything equals dense")
@LENGTHS
@GROUPS
@DTYPES
def test_compute_everything_equals_dense(part, length, group, dtype):
    d = data(stored=length, group=group, dtype=dtype)
    out = attend(SAMPLES[part].limit, d)
    torch.testing.assert_close(out.out.float(), plain(d), atol=TOLERANCE[dtype], rtol=0)
    assert out.pairs == 2 * group * length * (length + 1) // 2


@parts("generation", "rows see themselves")
@LENGTHS
def test_every_row_sees_at_least_itself(part, length):
    d = data(stored=length, group=1, size=32)
    # Own keys match the queries so well that nothing else has weight, if they are read at all.
    keys = torch.nn.functional.normalize(d.segment.k[:, :length], dim=-1)
    d.segment.k[:, :length] = keys
    d = d._replace(q=600 * keys.transpose(0, 1).contiguous())
    out = attend(SAMPLES[part].tight, d).out
    torch.testing.assert_close(out, d.segment.v[:, :length].transpose(0, 1), atol=1e-3, rtol=0)


@parts("generation", "equals masked dense")
@pytest.mark.parametrize(("stored", "new"), [(1, 1), (63, 63), (101, 101), (101, 37), (64, 1)])
@GROUPS
@DTYPES
def test_sparse_equals_dense_under_the_mask_it_reads(part, stored, new, group, dtype):
    d = data(stored=stored, new=new, group=group, dtype=dtype)
    tight = SAMPLES[part].tight
    weights = probe(lambda s: attend(tight, d._replace(segment=s)).out.float(), d.segment)
    seen = weights > 0
    causal = d.positions[:, None] >= torch.arange(stored)[None]
    assert not (seen & ~causal).any()
    result = attend(tight, d)
    torch.testing.assert_close(result.out.float(), plain(d, seen), atol=TOLERANCE[dtype], rtol=0)
    # The pairs that are reported are those that were computed; float32 loses no weight to zero.
    if dtype == torch.float32:
        assert result.pairs == int(seen.sum())
    if stored == 101:
        assert result.pairs < int(causal.sum()) * group * 2, "the sample is not tight"


@parts("generation", "inputs unmutated")
def test_inputs_are_not_written_to(part):
    d = data(stored=63, group=3)
    before = snapshot(d)
    attend(SAMPLES[part].tight, d)
    assert same(before, snapshot(d))


@parts("generation", "segments")
@pytest.mark.parametrize("which", ["tight", "limit"])
@pytest.mark.parametrize("border", [1, 40, 62])
def test_two_segments_equal_one(part, which, border):
    d = data(stored=63, group=3)
    sample = getattr(SAMPLES[part], which)
    two = attend(sample, d, (cut(d.segment, 0, border), cut(d.segment, border, 63)))
    one = attend(sample, d)
    torch.testing.assert_close(two.out, one.out, atol=TOLERANCE[torch.float32], rtol=0)
    assert two.pairs == one.pairs


@parts("generation", "chunked equals whole")
@pytest.mark.parametrize("chunks", [1, 2, 5])
@GROUPS
def test_chunked_prefill_equals_whole_prefill(part, chunks, group):
    tight = SAMPLES[part].tight
    d = data(stored=101, group=group)
    whole = attend(tight, d)
    step, outs, pairs = chunks * tight.chunk_multiple, [], 0
    for first in range(0, 101, step):
        last = min(first + step, 101)
        chunk = Data(d.q[first:last], d.positions[first:last], cut(d.segment, 0, last), d.spec)
        one = attend(tight, chunk, prompt_end=101)
        outs.append(one.out)
        pairs += one.pairs
    torch.testing.assert_close(torch.cat(outs), whole.out, atol=TOLERANCE[torch.float32], rtol=0)
    assert pairs == whole.pairs


@parts("generation", "state does not leak")
def test_state_of_one_sequence_never_leaks_into_the_next(part):
    tight = SAMPLES[part].tight
    a, b = data(stored=63, seed=1), data(stored=50, seed=2)
    alone = attend(tight, b)
    attend(tight, a)
    torch.testing.assert_close(attend(tight, b).out, alone.out, atol=0, rtol=0)


@parts("generation", "sliding window")
def test_the_models_window_is_honoured(part):
    d = data(stored=63, group=3)
    d = d._replace(spec=type(d.spec)(scale=d.spec.scale, window=10))
    gap = d.positions[:, None] - torch.arange(63)[None]
    seen = ((gap >= 0) & (gap < 10)).expand(6, 63, 63)
    out = attend(SAMPLES[part].limit, d).out
    torch.testing.assert_close(out, plain(d, seen), atol=TOLERANCE[torch.float32], rtol=0)
