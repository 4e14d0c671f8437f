"""Decode attention over codes: every instruction set against decoding first, for every form there is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.tolerances import CODED
from winnow.kernels import backend
from winnow.kernels.coded_decode import (
    PAGE,
    Coded,
    Codes,
    Extremes,
    Product,
    coded_decode,
    is_fast,
    native,
    reference,
)
from winnow.types import AttentionSpec, Partial

ISAS = backend.isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the extension was not built")


@dataclass(frozen=True)
class Form:
    """What a codec of a family keeps."""

    bits: int
    share: str
    groups: int = 1
    channel: bool = False
    rank: int = 0
    extremes: bool = False


FORMS = {
    "int8": Form(8, "entry"),
    "int4": Form(4, "page", groups=2),
    "int2": Form(2, "page", groups=2),
    "separable:8": Form(8, "batch", channel=True),
    "separable:4": Form(4, "batch", channel=True),
    "separable:2": Form(2, "batch", channel=True),
    "gear4:4": Form(4, "page", groups=2, rank=4, extremes=True),
    "gear2:3": Form(2, "page", groups=2, rank=3, extremes=True),
    "gear-l4:17": Form(4, "page", groups=2, rank=17),
}


def made(
    form: Form,
    pages: list[int],
    *,
    width: int = 64,
    group: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Tensor, Coded]:
    """Queries and tables of random content; whatever no entry may read is NaN, or a place that is nowhere."""
    g = torch.Generator().manual_seed(seed)
    heads, most, batches = len(pages), max(pages) + 2, 3

    def table(rows: int, columns: int, low: float, high: float, per: int = 0) -> Tensor:
        x = (torch.rand(heads, rows, columns, generator=g) * (high - low) + low).bfloat16()
        return poisoned(x, per)

    def poisoned(x: Tensor, per: int) -> Tensor:
        for head, n in enumerate(pages):
            x[head, n * per if per else batches :] = torch.nan if x.is_floating_point() else 255
        return x

    def places(rows: int, columns: int, below: int, per: int) -> Tensor:
        return poisoned(torch.randint(below, (heads, rows, columns), generator=g).to(torch.uint8), per)

    step = 3.0 / 2**form.bits  # numbers of unit scale, whatever the bits
    entries, codes = most * PAGE, width * form.bits // 8
    of_k = {"entry": (entries, 1, PAGE), "page": (most, width, 1), "batch": (batches + 1, width, 0)}[
        form.share
    ]
    symmetric = form.share == "entry"
    k = Codes(
        codes=places(entries, codes, 256, PAGE),
        scale=table(*of_k[:2], 0.2 * step, step, of_k[2]),
        zero=None if symmetric else table(*of_k[:2], -2.0, 0.5, of_k[2]),
    )
    v = Codes(
        codes=places(entries, codes, 256, PAGE),
        scale=table(entries, form.groups, 0.2 * step, step, PAGE),
        zero=None if symmetric else table(entries, form.groups, -2.0, 0.5, PAGE),
    )
    of_batch = torch.randint(batches, (heads, most), generator=g).int()
    for head, n in enumerate(pages):
        of_batch[head, n:] = 1 << 30
    products = [
        Product(
            left=table(entries, form.rank, -0.1, 0.1, PAGE),
            right=table(batches + 1, width * form.rank, -1, 1),
        )
        for _ in range(2 if form.rank else 0)
    ]
    extremes = []
    if form.extremes:
        for rows, columns, below, per in ((most, 2 * width, PAGE, 1), (entries, 2, width, PAGE)):
            values, where = table(rows, columns, -4, 4, per).to(dtype), places(rows, columns, below, per)
            # Where the largest is the smallest, too, they are one value.
            same = where[..., : columns // 2] == where[..., columns // 2 :]
            values[..., columns // 2 :] = torch.where(
                same, values[..., : columns // 2], values[..., columns // 2 :]
            )
            extremes.append(Extremes(values=values, where=where))
    coded = Coded(
        bits=form.bits,
        k=k,
        v=v,
        share=form.share,  # type: ignore[arg-type]
        v_channel=table(batches + 1, width, 0.5, 1.5) if form.channel else None,
        k_product=products[0] if products else None,
        v_product=products[1] if products else None,
        k_extremes=extremes[0] if extremes else None,
        v_extremes=extremes[1] if extremes else None,
        batches=of_batch if form.share == "batch" or form.rank else None,
        lengths=torch.tensor(pages, dtype=torch.int32) * PAGE,
        start=7,
    )
    return torch.randn(heads * group, width, generator=g).to(dtype), coded


def same(q: Tensor, coded: Coded, spec: AttentionSpec, position: int) -> Partial:
    assert is_fast(q, coded, spec, "auto")
    ours = coded_decode(q, coded, spec=spec, position=position, backend="native")
    # Over what the queries were rounded to, in float32: the oracle rounds nothing itself.
    oracle = reference.coded_decode(q.float(), widened(coded), spec, position)
    output, log_sum = CODED[q.dtype]
    assert ours.pairs == oracle.pairs
    assert ours.out.dtype == q.dtype
    torch.testing.assert_close(ours.out.float(), oracle.out, rtol=output[0], atol=output[1])
    torch.testing.assert_close(ours.lse, oracle.lse, rtol=log_sum[0], atol=log_sum[1])
    return ours


def widened(coded: Coded) -> Coded:
    extremes = (
        None if one is None else replace(one, values=one.values.float())
        for one in (coded.k_extremes, coded.v_extremes)
    )
    return replace(coded, **dict(zip(("k_extremes", "v_extremes"), extremes, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pages", [[1, 1], [3, 20]], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_native_equals_decoding_first(isa: str, name: str, pages: list[int], dtype: torch.dtype) -> None:
    q, coded = made(FORMS[name], pages, dtype=dtype)
    same(q, coded, AttentionSpec(scale=0.125), position=5000)


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_any_shape_position_and_window(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FORMS)))
    form = FORMS[name]
    width = data.draw(st.sampled_from([32, 64, 96, 128, 224] if form.groups > 1 else [16, 48, 64, 80, 256]))
    if form.groups > 1:
        form = replace(form, groups=width // data.draw(st.sampled_from([16, 32])))
    pages = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    if not max(pages):
        pages[0] = 1
    q, coded = made(
        form,
        pages,
        width=width,
        group=data.draw(st.integers(1, 9)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=data.draw(st.integers(0, 1000)),
    )
    longest = max(pages) * PAGE
    position = data.draw(st.integers(0, longest + 20))
    if data.draw(st.booleans()):
        apart = torch.randint(1, 4, (len(pages), longest), generator=torch.Generator().manual_seed(1))
        coded = replace(coded, positions=apart.cumsum(1).int())
        position *= 2
    window = data.draw(st.none() | st.integers(1, longest + 40))
    chosen = data.draw(st.sampled_from(ISAS))
    backend.force_isa(chosen)
    try:
        same(q, coded, AttentionSpec(scale=width**-0.5, window=window), position)
    finally:
        backend.force_isa(ISAS[0])


def test_enough_for_several_threads(isa: str) -> None:
    q, coded = made(FORMS["gear4:4"], [150, 90, 151])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        same(q, coded, AttentionSpec(scale=0.125), position=1 << 20)
    finally:
        torch.set_num_threads(threads)


def test_who_sees_nothing_gets_nothing(isa: str) -> None:
    q, coded = made(FORMS["int4"], [2, 3])
    ours = coded_decode(q, coded, spec=AttentionSpec(scale=1.0), position=3)  # the first is at 7
    assert ours.pairs == 0
    assert not bool(ours.out.any())
    assert bool(torch.isneginf(ours.lse).all())


def test_what_the_kernel_cannot_take_is_said() -> None:
    q, coded = made(FORMS["int4"], [2])
    spec = AttentionSpec(scale=1.0)
    assert not is_fast(q, coded, replace(spec, softcap=20.0), "auto")
    assert not is_fast(q, coded, spec, "reference")
    with pytest.raises(ValueError, match="capped"):
        coded_decode(q, coded, spec=replace(spec, softcap=20.0), position=99, backend="native")
    with pytest.raises(ValueError, match="no Triton kernel"):
        coded_decode(q, coded, spec=spec, position=99, backend="triton")
    with pytest.raises(ValueError, match="do not fit"):
        coded_decode(q[:, :32], coded, spec=spec, position=99, backend="native")
    broken = replace(coded, lengths=coded.lengths - 1)
    with pytest.raises(ValueError, match="whole pages"):
        coded_decode(q, broken, spec=spec, position=99, backend="native")
    assert "differ in dtype" in native.unsupported(q.float(), made(FORMS["gear4:4"], [1])[1], spec)
