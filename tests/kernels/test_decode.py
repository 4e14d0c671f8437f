"""Native decode attention against the reference, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.tolerances import LOG_SUM_EXP, MASS, OUTPUT
from winnow.kernels import backend
from winnow.kernels.decode import decode, decode_mass
from winnow.types import AttentionSpec, Partial, Segment, Selection

ISAS = backend.isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(
    lengths: list[int],
    *,
    group: int = 4,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    reserve: int = 7,
    seed: int = 0,
) -> tuple[torch.Tensor, Segment, AttentionSpec]:
    """Queries, a segment whose reserve is NaN, and its plain spec."""
    gen = torch.Generator().manual_seed(seed)
    heads, capacity = len(lengths), max(lengths) + reserve
    k = torch.randn(heads, capacity, dim, generator=gen).to(dtype)
    v = torch.randn(heads, capacity, dim, generator=gen).to(dtype)
    for h, n in enumerate(lengths):
        k[h, n:] = torch.nan
        v[h, n:] = torch.nan
    q = torch.randn(heads * group, dim, generator=gen).to(dtype)
    segment = Segment(k=k, v=v, lengths=torch.tensor(lengths, dtype=torch.int32))
    return q, segment, AttentionSpec(scale=dim**-0.5)


def check(
    q: torch.Tensor,
    segment: Segment,
    spec: AttentionSpec,
    position: int,
    selection: Selection | None = None,
    want_logits: bool = False,
) -> Partial:
    def run(backend_name: backend.Backend) -> Partial:
        return decode(
            q,
            segment,
            spec=spec,
            position=position,
            selection=selection,
            want_logits=want_logits,
            backend=backend_name,
        )

    got, want = run("native"), run("reference")
    assert got.out.dtype == q.dtype
    assert got.pairs == want.pairs
    rtol, atol = OUTPUT[q.dtype]
    torch.testing.assert_close(got.out, want.out, rtol=rtol, atol=atol)
    rtol, atol = LOG_SUM_EXP[q.dtype]
    torch.testing.assert_close(got.lse, want.lse, rtol=rtol, atol=atol)
    if want_logits:
        assert got.logits is not None
        torch.testing.assert_close(got.logits, want.logits, rtol=rtol, atol=atol)
    else:
        assert got.logits is None
    check_mass(q, segment, spec, position, selection)
    return got


def check_mass(
    q: torch.Tensor, segment: Segment, spec: AttentionSpec, position: int, selection: Selection | None
) -> None:
    """The native kernel's mass, and what comes with it, against the reference."""
    call = {"spec": spec, "position": position, "selection": selection}
    got, mass = decode_mass(q, segment, backend="native", **call)
    want, want_mass = decode_mass(q, segment, backend="reference", **call)
    assert got.pairs == want.pairs
    for one, other, (rtol, atol) in (
        (got.out, want.out, OUTPUT[q.dtype]),
        (got.lse, want.lse, LOG_SUM_EXP[q.dtype]),
        (mass, want_mass, MASS[q.dtype]),
    ):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    seeing = (~torch.isneginf(got.lse[0])).view(segment.heads, -1).sum(1)
    torch.testing.assert_close(mass.sum(1), seeing.float(), rtol=1e-3, atol=0)


def random_selection(lengths: list[int], group: int, *, page: int, per_query: bool, seed: int) -> Selection:
    """Unsorted unique lists with garbage behind their counts."""
    gen = torch.Generator().manual_seed(seed)
    pages = [-(-n // page) for n in lengths for _ in range(group if per_query else 1)]
    counts = [int(torch.randint(0, n + 1, (), generator=gen)) for n in pages]
    indices = torch.full((len(pages), max(pages) + 3), 2**31 - 1, dtype=torch.int32)
    for r, (n, count) in enumerate(zip(pages, counts, strict=True)):
        indices[r, :count] = torch.randperm(n, generator=gen)[:count].int()
    return Selection(indices=indices, counts=torch.tensor(counts, dtype=torch.int32), page=page)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (128, 2), (64, 3), (128, 4), (80, 4), (16, 6), (256, 9)])
def test_dense_equals_reference(isa: str, dtype: torch.dtype, dim: int, group: int) -> None:
    q, segment, spec = make([1, 0, 63, 300], group=group, dim=dim, dtype=dtype)
    check(q, segment, spec, position=1000)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_everything_at_once_equals_reference(isa: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 700), min_size=1, max_size=3), label="lengths")
    group = data.draw(st.integers(1, 9), label="group")
    dim = data.draw(st.sampled_from([16, 32, 64, 96, 128]), label="dim")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]), label="dtype")
    seed = data.draw(st.integers(0, 99), label="seed")
    q, segment, spec = make(lengths, group=group, dim=dim, dtype=dtype, seed=seed)
    capacity = segment.k.shape[1]
    gen = torch.Generator().manual_seed(seed)
    if data.draw(st.booleans(), label="gaps"):
        steps = torch.randint(1, 5, (len(lengths), capacity), generator=gen)
        segment = replace(segment, positions=steps.cumsum(1).int())
    else:
        segment = replace(segment, start=data.draw(st.sampled_from([0, 5]), label="start"))
    if data.draw(st.booleans(), label="bias"):
        segment = replace(segment, bias=torch.randn(len(lengths), capacity, generator=gen))
    window = data.draw(st.sampled_from([None, 1, 64, 333]), label="window")
    softcap = data.draw(st.sampled_from([None, 1.5, 30.0]), label="softcap")
    spec = replace(spec, window=window, softcap=softcap)
    page = data.draw(st.sampled_from([None, 1, 16, 64]), label="page")
    selection = None
    if page is not None:
        per_query = data.draw(st.booleans(), label="per_query")
        selection = random_selection(lengths, group, page=page, per_query=per_query, seed=seed)
    position = data.draw(st.integers(0, 1200), label="position")
    check(q, segment, spec, position, selection, want_logits=data.draw(st.booleans(), label="logits"))


@pytest.mark.parametrize("lengths", [[20_000, 123, 9_999], [9_000, 9_001]])
@pytest.mark.parametrize("page", [None, 1, 64])
def test_split_over_threads(isa: str, two_threads: None, page: int | None, lengths: list[int]) -> None:
    q, segment, spec = make(lengths, dim=64)
    selection = page and random_selection(lengths, 4, page=page, per_query=False, seed=3)
    check(q, segment, spec, position=30_000, selection=selection or None)


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("per_query", [False, True])
def test_everything_selected_equals_dense(isa: str, page: int, per_query: bool) -> None:
    lengths, group = [130, 7, 257], 4
    q, segment, spec = make(lengths, group=group)
    rows = [n for n in lengths for _ in range(group if per_query else 1)]
    counts = torch.tensor([-(-n // page) for n in rows], dtype=torch.int32)
    indices = torch.arange(int(counts.max()), dtype=torch.int32).repeat(len(rows), 1)
    selection = Selection(indices=indices, counts=counts, page=page)
    dense = decode(q, segment, spec=spec, position=999, backend="native")
    listed = decode(q, segment, spec=spec, position=999, selection=selection, backend="native")
    torch.testing.assert_close(listed.out, dense.out, rtol=0, atol=0)
    torch.testing.assert_close(listed.lse, dense.lse, rtol=0, atol=1e-6)
    assert listed.pairs == dense.pairs


def test_nothing_selected_and_nothing_visible(isa: str) -> None:
    q, segment, spec = make([40, 41])
    empty = Selection(indices=torch.empty(2, 0, dtype=torch.int32), counts=torch.zeros(2, dtype=torch.int32))
    for partial in (
        check(q, segment, spec, position=100, selection=empty),
        check(q, segment, spec, position=-1),
        check(q, segment, replace(spec, window=3), position=200),
    ):
        assert partial.pairs == 0
        assert not partial.out.any()
        assert torch.isneginf(partial.lse).all()


def test_strided_storage(isa: str) -> None:
    q, segment, spec = make([50, 60], dim=32)
    wide = torch.full((2, 67, 3, 32), torch.nan, dtype=torch.bfloat16)
    wide[:, :, 0], wide[:, :, 2] = segment.k, segment.v
    check(q, replace(segment, k=wide[:, :, 0], v=wide[:, :, 2]), spec, position=99)


def test_extreme_logits(isa: str) -> None:
    q, segment, spec = make([500], dtype=torch.float32)
    segment = replace(segment, bias=torch.full((1, 507), -torch.inf))
    assert segment.bias is not None
    segment.bias[0, ::7] = torch.linspace(-300, 300, 73)
    check(q * 30, segment, spec, position=600)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"lengths": torch.tensor([50, 99], dtype=torch.int32)}, "outside the reserve"),
        ({"lengths": torch.tensor([50, 60])}, "int32"),
        ({"v": torch.zeros(2, 67, 32).bfloat16()}, "do not fit"),
        ({"bias": torch.zeros(2, 67, dtype=torch.float64)}, "float32"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, torch.Tensor], remedy: str) -> None:
    q, segment, spec = make([50, 60])
    with pytest.raises(ValueError, match=remedy):
        decode(q, replace(segment, **change), spec=spec, position=99, backend="native")


def test_refuses_a_count_beyond_its_list() -> None:
    q, segment, spec = make([50, 60])
    selection = Selection(
        indices=torch.zeros(2, 4, dtype=torch.int32), counts=torch.tensor([4, 5], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="outside its list"):
        decode(q, segment, spec=spec, position=99, selection=selection, backend="native")
    bad = Selection(indices=torch.zeros(3, 4, dtype=torch.int32), counts=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="one list per KV head"):
        decode(q, segment, spec=spec, position=99, selection=bad, backend="native")


def test_unsupported_operands_are_named() -> None:
    q, segment, spec = make([50], dtype=torch.float32)
    half = replace(segment, k=segment.k.half(), v=segment.v.half())
    with pytest.raises(ValueError, match="bfloat16 nor float32"):
        decode(q.half(), half, spec=spec, position=99, backend="native")
    assert decode(q.half(), half, spec=spec, position=99).out.dtype == torch.float16
