"""What ``winnow bench kernels`` measures: operands, contenders and the work that each one needs.

Members of a group share operands and are measured in turn, repetition by repetition. Each group names
its limit: the bfloat16 matrix product, or reading the group's own operands once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from winnow.kernels.decode import decode
from winnow.kernels.key_scan import Bits, KeyCodes, key_scan, quantize_keys
from winnow.kernels.mass import mass
from winnow.kernels.matmul import gated_matmul, matmul
from winnow.kernels.matvec import Int8Weight, matvec, quantize_weight
from winnow.kernels.prefill import prefill
from winnow.kernels.quantize import Axis, Quantized, dequantize, quantize
from winnow.kernels.top_k import top_k
from winnow.store.arena import open_arena
from winnow.store.huge_pages import collapse
from winnow.types import AttentionSpec, Blocks, Dense, Form, Segment, Selection, Stripes, Window

__all__ = ["OPS", "Contender", "Group", "groups"]

OPS = ("prefill", "mass", "decode", "key_scan", "top_k", "matmul", "matvec", "quantize")

Versus = Literal["limit", "pytorch", "dense"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that is timed.

    Attributes
    ----------
    name : str
    op : str
        One of :data:`OPS`.
    run : callable
        One repetition: ``calls`` calls, over different operands where one set would fit the caches.
    work : float
        Operations or bytes that one call needs, in the unit of the group's limit.
    calls : int
    baselines : tuple of str
        PyTorch's forms of it, the fastest of which counts; contenders of the same group.
    floors : tuple of (str, float)
        What it must reach: a share of the limit, or times as fast as ``pytorch`` or as our own
        ``dense`` kernel of the group.
    """

    name: str
    op: str
    run: Callable[[], object]
    work: float
    calls: int = 1
    baselines: tuple[str, ...] = ()
    floors: tuple[tuple[Versus, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Contenders on shared operands.

    Attributes
    ----------
    limit : {"matrix product", "read"}
    reads : tuple of Tensor
        What the limit reads, where it is reading.
    config : dict
        Shapes, for the JSON.
    """

    name: str
    limit: Literal["matrix product", "read"]
    contenders: tuple[Contender, ...]
    config: dict[str, object]
    reads: tuple[Tensor, ...] = field(default=())


def _normal(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16).normal_()


def _settled(tensor: Tensor) -> Tensor:
    """In huge pages, as the engine holds entries and weights: for every contender that reads it."""
    collapse(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _each(call: Callable[[Any], object], operands: Iterable[Any]) -> None:
    """Call it with each; what it returns is dropped at once, as the engine drops it after use."""
    for one in operands:
        call(one)


def _stored(heads: int, entries: int, dim: int) -> Tensor:
    """``[H, S, D]`` in an arena of the store."""
    arena = open_arena(heads, entries, dim, torch.bfloat16)
    for head in range(heads):
        arena.prepare(head, 0, entries)
        arena.data[head].normal_()
    return arena.data


# --------------------------------------------------------------------------- prefill


def _random_blocks(heads: int, tokens: int, block: int, percent: int) -> Blocks:
    """For every block row its own block and others at random: ``percent`` of the causal ones."""
    rows = -(-tokens // block)
    offsets: list[list[int]] = []
    columns: list[int] = []
    for _ in range(heads):
        offsets.append([len(columns)])
        for r in range(rows):
            others = torch.randperm(r)[: max(0, round((r + 1) * percent / 100) - 1)]
            columns += [*sorted(others.tolist()), r]
            offsets[-1].append(len(columns))
    return Blocks(
        block=block,
        offsets=torch.tensor(offsets, dtype=torch.int32),
        columns=torch.tensor(columns, dtype=torch.int32),
    )


def _random_stripes(heads: int, tokens: int, rows: int, percent: int) -> Stripes:
    """For every run of ``rows`` queries, ``percent`` of the columns up to its end."""
    offsets: list[list[int]] = []
    columns: list[Tensor] = []
    count = 0
    for _ in range(heads):
        offsets.append([count])
        for end in range(rows, tokens + rows, rows):
            end = min(end, tokens)
            chosen = torch.randperm(end)[: max(1, end * percent // 100)].sort().values
            columns.append(chosen.to(torch.int32))
            count += chosen.numel()
            offsets[-1].append(count)
    return Stripes(
        rows=rows, phase=0, offsets=torch.tensor(offsets, dtype=torch.int32), columns=torch.cat(columns)
    )


def _prefill(tokens: int, dim: int) -> Group:
    heads, kv_heads = 8, 2
    q_THD = _normal(tokens, heads, dim)
    k_HCD, v_HCD = _normal(kv_heads, tokens, dim), _normal(kv_heads, tokens, dim)
    segment = Segment(k=k_HCD, v=v_HCD, lengths=torch.full((kv_heads,), tokens, dtype=torch.int32))
    spec = AttentionSpec(scale=dim**-0.5)
    positions = torch.arange(tokens, dtype=torch.int32)
    q_1HTD = q_THD.transpose(0, 1)[None].contiguous()

    def ours(name: str, form: Form, floors: tuple[tuple[Versus, float], ...] = ()) -> Contender:
        def run() -> object:
            return prefill(q_THD, segment, spec=spec, query_positions=positions, form=form, backend="native")

        pairs = prefill(
            q_THD, segment, spec=spec, query_positions=positions, form=form, backend="native"
        ).pairs
        return Contender(
            name=name, op="prefill", run=run, work=4.0 * dim * pairs, baselines=("SDPA",), floors=floors
        )

    def sdpa() -> object:
        return scaled_dot_product_attention(q_1HTD, k_HCD[None], v_HCD[None], is_causal=True, enable_gqa=True)

    dense = ours("dense", Dense(), (("limit", 0.85),))
    sparse = (
        ours(
            "blocks of 64, 10 %",
            _random_blocks(heads, tokens, 64, 10),
            (("limit", 0.75), ("pytorch", 30.0)),
        ),
        ours("blocks of 64, 25 %", _random_blocks(heads, tokens, 64, 25), (("limit", 0.85),)),
        ours("stripes, 10 %", _random_stripes(heads, tokens, 512, 10)),
        ours("window 64 + 1024", Window(init=64, local=1024)),
    )
    lse_TH = prefill(q_THD, segment, spec=spec, query_positions=positions, backend="native").lse

    def blocks_of_columns() -> object:
        sums = torch.zeros(heads, tokens)
        for n in range(heads):
            k_SD = k_HCD[n // (heads // kv_heads)]
            for first in range(0, tokens, 1024):
                end = min(first + 1024, tokens)
                logits = (q_THD[first:end, n] @ k_SD[:end].T).float().mul_(spec.scale)
                sums[n, :end] += logits.sub_(lse_TH[first:end, n, None]).exp_().tril_(first).sum(0)
        return sums

    def columns() -> object:
        return mass(q_THD, segment, spec=spec, query_positions=positions, lse=lse_TH, backend="native")

    return Group(
        name=f"prefill {tokens // 1024}K, D {dim}",
        limit="matrix product",
        contenders=(
            dense,
            *sparse,
            # Products of queries and keys alone: half of the attention's.
            Contender(
                name="mass",
                op="mass",
                run=columns,
                work=dense.work / 2,
                baselines=("column sums of blocks",),
                floors=(("limit", 0.75),),
            ),
            Contender(name="column sums of blocks", op="mass", run=blocks_of_columns, work=dense.work / 2),
            Contender(name="SDPA", op="prefill", run=sdpa, work=dense.work),
        ),
        config={"tokens": tokens, "query_heads": heads, "kv_heads": kv_heads, "head_size": dim},
    )


# --------------------------------------------------------------------------- decode


def _decode(entries: int) -> Group:
    heads, kv_heads, dim = 32, 8, 128
    group, keep = heads // kv_heads, entries // 20
    # Where the engine holds them.
    k_HCD, v_HCD = _stored(kv_heads, entries, dim), _stored(kv_heads, entries, dim)
    lengths = torch.full((kv_heads,), entries, dtype=torch.int32)
    segment = Segment(k=k_HCD, v=v_HCD, lengths=lengths)
    spec, q_HD = AttentionSpec(scale=dim**-0.5), _normal(heads, dim)
    q_HGD = q_HD.view(kv_heads, group, dim)

    def attend(selection: Selection | None) -> object:
        return decode(q_HD, segment, spec=spec, position=entries, selection=selection, backend="native")

    def selection(page: int) -> Selection:
        pages = entries // page
        lists = [torch.randperm(pages)[: keep // page].sort().values.to(torch.int32) for _ in range(kv_heads)]
        return Selection(
            indices=torch.stack(lists),
            counts=torch.full((kv_heads,), keep // page, dtype=torch.int32),
            page=page,
        )

    # What one list reads would stay in the cache; these take turns.
    turns = 4
    lists, pages = [selection(1) for _ in range(turns)], [selection(64) for _ in range(turns)]
    entry_bytes = 2 * dim * k_HCD.element_size()
    dense_bytes = kv_heads * entries * entry_bytes
    listed_bytes = kv_heads * keep * (entry_bytes + 4)
    paged_bytes = kv_heads * (keep // 64) * (64 * entry_bytes + 4)

    codes: dict[Bits, KeyCodes] = {}
    both: tuple[Bits, Bits] = (8, 4)
    for bits in both:
        codes[bits] = KeyCodes.empty(kv_heads, entries, dim, bits)
        quantize_keys(k_HCD, torch.zeros_like(lengths), lengths, codes[bits], backend="native")
    scores_HS = key_scan(q_HD, codes[4], lengths, backend="native")
    score_bytes = scores_HS.numel() * 4
    # Together beyond any cache, in turn, as other heads' and layers' scores evict each other's.
    copies = max(1, (64 << 20) // score_bytes)
    scores = _settled(torch.stack([scores_HS.roll(97 * i, 1) for i in range(copies)]))

    def scan_bytes(bits: Bits) -> int:
        return kv_heads * entries * codes[bits].bytes_per_entry + score_bytes

    def search() -> object:
        found, counts = top_k(
            key_scan(q_HD, codes[4], lengths, backend="native"), lengths, keep, backend="native"
        )
        return attend(Selection(indices=found, counts=counts))

    # PyTorch gets what suits it: with gaps between heads its products take many times as long.
    k_HSD, v_HSD = _settled(k_HCD.contiguous()), _settled(v_HCD.contiguous())

    def folded_matmul() -> object:
        logits = torch.matmul(q_HGD, k_HSD.transpose(1, 2)).mul_(spec.scale)
        return torch.matmul(torch.softmax(logits, -1), v_HSD)

    def folded_sdpa() -> object:
        return scaled_dot_product_attention(q_HGD[None], k_HSD[None], v_HSD[None])

    def torch_scan() -> object:
        return torch.matmul(q_HGD, k_HSD.transpose(1, 2)).amax(1)

    decoding = ("folded matmul", "folded SDPA")
    return Group(
        name=f"decode over {entries // 1024}K entries",
        limit="read",
        reads=(*k_HCD, *v_HCD),  # head by head: between heads an arena has a gap
        contenders=(
            Contender(
                name="dense",
                op="decode",
                run=lambda: attend(None),
                work=dense_bytes,
                baselines=decoding,
                floors=(("limit", 0.75), ("pytorch", 2.1)),
            ),
            Contender(
                name="5 % by list",
                op="decode",
                run=lambda: _each(attend, lists),
                calls=turns,
                work=listed_bytes,
                baselines=decoding,
                floors=(("dense", 10.0),),
            ),
            Contender(
                name="5 % in pages of 64",
                op="decode",
                run=lambda: _each(attend, pages),
                calls=turns,
                work=paged_bytes,
                baselines=decoding,
                floors=(("dense", 14.0),),
            ),
            Contender(
                name="4-bit scan, top-k, 5 %",
                op="decode",
                run=search,
                work=scan_bytes(4) + score_bytes + listed_bytes,
                baselines=decoding,
                floors=(("dense", 3.0),),
            ),
            *(
                Contender(
                    name=f"key scan, {bits} bits",
                    op="key_scan",
                    run=partial(key_scan, q_HD, codes[bits], lengths, backend="native"),
                    work=scan_bytes(bits),
                    baselines=("bf16 scores",),
                    floors=(("limit", 0.6),),
                )
                for bits in both
            ),
            Contender(
                name="top-k",
                op="top_k",
                run=lambda: _each(lambda s: top_k(s, lengths, keep, backend="native"), scores),
                calls=copies,
                work=score_bytes + kv_heads * keep * 4,
                baselines=("torch.topk",),
                floors=(("limit", 0.6),),
            ),
            Contender(name="folded matmul", op="decode", run=folded_matmul, work=dense_bytes),
            Contender(name="folded SDPA", op="decode", run=folded_sdpa, work=dense_bytes),
            Contender(name="bf16 scores", op="key_scan", run=torch_scan, work=dense_bytes / 2 + score_bytes),
            Contender(
                name="torch.topk",
                op="top_k",
                run=lambda: _each(lambda s: torch.topk(s, keep, sorted=False), scores),
                calls=copies,
                work=score_bytes + kv_heads * keep * 8,
            ),
        ),
        config={
            "entries": entries,
            "query_heads": heads,
            "kv_heads": kv_heads,
            "head_size": dim,
            "selected": keep,
        },
    )


# --------------------------------------------------------------------------- products


def _matmul(rows: int, inner: int, outer: int) -> Group:
    """The linear layers of a prompt; as gate and up weights too, where there are as many."""
    x_RK, w_NK = _normal(rows, inner), _settled(_normal(outer, inner))
    work = 2.0 * rows * inner * outer

    def pair(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> Iterator[Contender]:
        yield Contender(name=name, op="matmul", run=ours, work=work, baselines=(f"torch {name}",))
        yield Contender(name=f"torch {name}", op="matmul", run=theirs, work=work)

    def torch_gated(gate_up_RN: Tensor) -> Tensor:
        gate_RI, up_RI = gate_up_RN.chunk(2, 1)
        return silu(gate_RI) * up_RI

    plain = pair("product", lambda: matmul(x_RK, w_NK, backend="native"), lambda: linear(x_RK, w_NK))
    gated = pair(
        "gated product",
        lambda: gated_matmul(x_RK, w_NK, backend="native"),
        lambda: torch_gated(linear(x_RK, w_NK)),
    )

    return Group(
        name=f"{rows} rows, {inner} to {outer}",
        limit="matrix product",
        contenders=(*plain, *(gated if outer > 4 * inner else ())),
        config={"rows": rows, "inner": inner, "outer": outer},
    )


def _matvec(inner: int, outer: int, memory: int) -> Group:
    """Several weights of the shape, together beyond any cache, are read in turn."""
    copies = max(1, memory // (2 * inner * outer))
    weights = [_settled(_normal(outer, inner)) for _ in range(copies)]
    # The same memory again as 8-bit weights: what codes hold does not change how fast they are read.
    codes = quantize_weight(weights[0])
    narrow = [
        Int8Weight(half, codes.scale, codes.row_sum)
        for w in weights
        for half in w.view(torch.int8).view(2, outer, inner)
    ]
    x = {rows: _normal(rows, inner) for rows in (1, 4, 8)}

    def ours(rows: int, floors: tuple[tuple[Versus, float], ...] = ()) -> Contender:
        return Contender(
            name=f"bf16, {rows} row{'s' * (rows > 1)}",
            op="matvec",
            run=lambda: _each(lambda w: matvec(x[rows], w, backend="native"), weights),
            calls=copies,
            work=2.0 * inner * outer,
            baselines=(f"F.linear, {rows}",),
            floors=floors,
        )

    def torch_form(rows: int) -> Contender:
        return Contender(
            name=f"F.linear, {rows}",
            op="matvec",
            run=lambda: _each(lambda w: linear(x[rows], w), weights),
            calls=copies,
            work=2.0 * inner * outer,
        )

    return Group(
        name=f"matrix-vector {inner} to {outer}",
        limit="read",
        reads=tuple(weights),
        contenders=(
            ours(1, (("limit", 0.85),)),
            ours(4),
            ours(8),
            Contender(
                name="int8, 1 row",
                op="matvec",
                run=lambda: _each(lambda w: matvec(x[1], w, backend="native"), narrow),
                calls=2 * copies,
                work=1.0 * inner * outer + 8 * outer,
                baselines=("F.linear, 1",),
                floors=(("limit", 0.85),),
            ),
            torch_form(1),
            torch_form(4),
            torch_form(8),
        ),
        config={"inner": inner, "outer": outer, "matrices": copies},
    )


# --------------------------------------------------------------------------- quantise


def _quantize(tokens: int) -> Group:
    heads, dim = 8, 128
    x_HSD = _settled(_normal(heads, tokens, dim))
    out_HSD = _settled(torch.zeros_like(x_HSD))
    granularities: tuple[tuple[str, Axis, int], ...] = (
        ("per token", "token", dim),
        ("groups of 32", "token", 32),
        ("per channel, 64 tokens", "channel", 64),
    )
    contenders: list[Contender] = []
    for what, axis, group in granularities:
        for bits in (8, 4, 2):
            q = quantize(x_HSD, bits=bits, axis=axis, group=group, backend="native")
            _settled(q.codes)
            contenders += _both_ways(f"{bits} bits {what}", x_HSD, out_HSD, q, with_torch=bits == 4)
    return Group(
        name="quantise and dequantise",
        limit="read",
        reads=(x_HSD,),
        # PyTorch's forms leave the caches full of what must be written back: they come last.
        contenders=tuple(sorted(contenders, key=lambda c: not c.floors)),
        config={"heads": heads, "tokens": tokens, "head_size": dim},
    )


def _both_ways(
    what: str, x_HSD: Tensor, out_HSD: Tensor, q: Quantized, *, with_torch: bool
) -> Iterator[Contender]:
    """To codes and back; bytes read and written count alike. PyTorch's form is the reference."""
    bits, axis, group = q.bits, q.axis, q.group
    moved = float(x_HSD.numel() * x_HSD.element_size() + q.bytes)

    def there(backend: Literal["native", "reference"]) -> Callable[[], object]:
        return lambda: quantize(x_HSD, bits=bits, axis=axis, group=group, out=q, backend=backend)

    def back(backend: Literal["native", "reference"]) -> Callable[[], object]:
        return lambda: dequantize(q, out=out_HSD, backend=backend)

    for verb, way in (("quantise", there), ("dequantise", back)):
        name = f"{verb} {what}"
        yield Contender(
            name=name,
            op="quantize",
            run=way("native"),
            work=moved,
            baselines=(f"torch {name}",) if with_torch else (),
            floors=(("limit", 0.6),),
        )
        if with_torch:
            yield Contender(name=f"torch {name}", op="quantize", run=way("reference"), work=moved)


# --------------------------------------------------------------------------- all of it


def groups(*, quick: bool, ops: tuple[str, ...]) -> Iterator[Callable[[], Group]]:
    """Builders of the groups that hold any of these operations; one is built at a time."""
    if {"prefill", "mass"} & set(ops):
        for tokens in (2048,) if quick else (8192, 16384):
            for dim in (64, 128):
                yield partial(_prefill, tokens, dim)
    if {"decode", "key_scan", "top_k"} & set(ops):
        yield partial(_decode, 8192 if quick else 65536)
    if "matmul" in ops:
        shapes = [
            (4096, 2048, 16384),
            (4096, 8192, 2048),
            (4096, 2048, 3072),
            (64, 2048, 16384),
            (16, 2048, 16384),
        ]
        for rows, inner, outer in shapes[-1:] if quick else shapes:
            yield partial(_matmul, rows, inner, outer)
    if "matvec" in ops:
        every = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048), (2048, 128256)]
        for inner, outer in every[:1] if quick else every:
            yield partial(_matvec, inner, outer, (48 if quick else 256) << 20)
    if "quantize" in ops:
        yield partial(_quantize, 4096 if quick else 32768)
