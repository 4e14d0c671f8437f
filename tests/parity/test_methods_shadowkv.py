"""ShadowKV against its paper's formulas, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import winnow
from tests.parity.one_layer import HalfSplit
from winnow.compression.actions.demote import Demote
from winnow.compression.actions.factor_keys import FactorKeys, factorised
from winnow.engine.compress import Compression
from winnow.engine.request import Stats
from winnow.kernels.decode import decode
from winnow.kernels.merge import merge
from winnow.loading.landmarks import Landmarks
from winnow.loading.protocol import DecodeLayer
from winnow.methods import load
from winnow.models.random import random_model
from winnow.store import SequenceStore, files
from winnow.store.codecs import ENTRIES, EncodedSegment
from winnow.types import AttentionSpec, Demotion, Factors, Plan, Rewrite, Selection

HEADS, GROUP, SIZE = 2, 3, 16
SPEC = AttentionSpec(scale=SIZE**-0.5)
ROTARY = HalfSplit()


class Model:
    """What a compression asks of a model of one layer."""

    specs, slots = (SPEC,), (0,)

    def rotary(self, layer: int) -> HalfSplit:
        return ROTARY


def streams(tokens: int, *, rank: int | None = None, seed: int = 0, dtype=torch.float32):
    """Keys before rotation ``[T, H, D]`` (of a given rank, over both heads), turned ones, and values."""
    make = torch.Generator().manual_seed(seed)
    pre = torch.randn(tokens, HEADS * SIZE, generator=make)
    if rank is not None:
        pre = torch.randn(tokens, rank, generator=make) @ torch.randn(rank, HEADS * SIZE, generator=make)
    pre = pre.view(tokens, HEADS, SIZE)
    turned = ROTARY.turn(pre.transpose(0, 1), torch.arange(tokens)).transpose(0, 1)
    return pre, turned.to(dtype), torch.randn(tokens, HEADS, SIZE, generator=make).to(dtype)


def compressed(k: Tensor, v: Tensor, *, directory: Path | None = None, **options) -> SequenceStore:
    """A store of one layer after the end of its prefill."""
    n = len(k)
    store = SequenceStore(
        layers=1, heads=HEADS, head_dim=SIZE, dtype=k.dtype, capacity=n + 300, directory=directory
    )
    store.append(0, k, v, torch.arange(n, dtype=torch.int32))
    store.advance(n)
    Compression(load("shadowkv", **options).compression, None).act(store, Model(), Stats())
    return store


def grown(store: SequenceStore, tokens: int, seed: int = 9) -> tuple[Tensor, Tensor]:
    """Append generated tokens, and say which."""
    _, k, v = streams(store.length + tokens, seed=seed)
    k, v = k[-tokens:].to(store.shape.dtype), v[-tokens:].to(store.shape.dtype)
    at = torch.arange(store.length, store.length + tokens, dtype=torch.int32)
    store.append(0, k, v, at)
    store.advance(tokens)
    return k, v


def read(store: SequenceStore, q: Tensor, keep: int) -> tuple[Tensor, list]:
    """What a decode step computes, as the engine does, and the selections."""
    segments, position = store.segments(0), store.length - 1
    part = Landmarks(keep=keep)
    ctx = DecodeLayer(layer=0, layers=1, q=q, position=position, segments=segments, spec=SPEC)
    view = part.select(ctx, part.state())
    selections = view.selections or (None,) * len(segments)
    partials = []
    for segment, chosen in zip(segments, selections, strict=True):
        options = {"spec": SPEC, "position": position}
        direct = None
        if isinstance(segment, EncodedSegment):
            direct = segment.attend(q, selection=chosen, **options)
        if direct is not None:
            partials.append(direct)
        elif chosen is None:
            partials += [decode(q, tile, **options) for tile in segment.tiles(1024)]
        else:
            partials.append(decode(q, segment.gather(chosen), **options))
    return merge(partials).out[0], list(selections)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """``[H * G, D]`` attention of one query, written out; ``seen`` is ``[H, S]``."""
    k, v = (x.transpose(0, 1).repeat_interleave(GROUP, 0).double() for x in (k, v))
    logits = torch.einsum("nd,nsd->ns", q.double(), k) * SPEC.scale
    if seen is not None:
        logits = logits.masked_fill(~seen.repeat_interleave(GROUP, 0), -torch.inf)
    return torch.einsum("ns,nsd->nd", logits.softmax(-1), v).float()


def query(seed: int = 5) -> Tensor:
    return 2 * torch.randn(HEADS * GROUP, SIZE, generator=torch.Generator().manual_seed(seed))


def low_rank(store: SequenceStore) -> EncodedSegment:
    (found,) = [s for s in store.segments(0) if isinstance(s, EncodedSegment)]
    return found


def expected_partition(k: Tensor, outliers: int, local: int) -> tuple[int, list[set[int]]]:
    """Where the local part begins, and the outlier chunks of every head, in plain loops."""
    chunks = len(k) // 8 - local
    while (chunks - outliers) % 8:
        chunks -= 1
    found = []
    for h in range(HEADS):
        worst = []
        for c in range(chunks):
            keys = k[8 * c : 8 * c + 8, h].double()
            mean = keys.mean(0)
            cosines = [float(one @ mean / one.norm() / mean.norm()) for one in keys]
            worst.append((min(cosines), c))
        found.append({c for _, c in sorted(worst)[:outliers]})
    return chunks * 8, found


# ------------------------------------------------------------------------ (1) the limit


@pytest.mark.parametrize("tokens", [200, 333, 1000])
def test_full_rank_and_every_chunk_equals_full_attention(tokens: int) -> None:
    _, k, v = streams(tokens)
    with compressed(k, v, rank=HEADS * SIZE, outliers=3, local=2) as store:
        more = grown(store, 5)
        k, v = torch.cat([k, more[0]]), torch.cat([v, more[1]])
        segment, expected = low_rank(store), dense(query(), k, v)
        torch.testing.assert_close(read(store, query(), 10_000)[0], expected, atol=2e-5, rtol=0)
        # The same through a list of every chunk, in place of whole pages.
        chunks = int(segment.lengths[0]) // 8
        every = Selection(
            indices=torch.arange(chunks, dtype=torch.int32).repeat(HEADS, 1),
            counts=torch.full((HEADS,), chunks, dtype=torch.int32),
            page=8,
        )
        options = {"spec": SPEC, "position": store.length - 1}
        listed = segment.attend(query(), selection=every, **options)
        assert listed is not None
        assert listed.pairs == HEADS * GROUP * chunks * 8
        rest = [decode(query(), s, **options) for s in store.segments(0) if s is not segment]
        torch.testing.assert_close(merge([listed, *rest]).out[0], expected, atol=2e-5, rtol=0)


def test_keys_of_the_rank_that_is_kept_are_exact_through_the_lists() -> None:
    """Rank 6 of 32 loses nothing here, so that a list differs from full attention by what it leaves out."""
    _, k, v = streams(700, rank=6)
    with compressed(k, v, rank=6, outliers=5, local=2) as store:
        more = grown(store, 3)
        out, selections = read(store, query(), 80)
        k, v = torch.cat([k, more[0]]), torch.cat([v, more[1]])
        seen = torch.zeros(HEADS, len(k), dtype=torch.bool)
        for segment, chosen in zip(store.segments(0), selections, strict=True):
            for h in range(HEADS):
                where = segment.positions_of(h).long()
                if chosen is not None:
                    listed = chosen.indices[h, : int(chosen.counts[h])].long()
                    assert len(listed) == 10
                    where = where[(listed[:, None] * 8 + torch.arange(8)).flatten()]
                seen[h, where] = True
        assert int(seen.sum(1).max()) < 250
        torch.testing.assert_close(out, dense(query(), k, v, seen), atol=2e-5, rtol=0)


# ------------------------------------------------------------------------ (2), (3) the product


@pytest.mark.parametrize("rank", [4, 11, 32])
def test_the_error_of_keys_is_the_tail_of_singular_values(rank: int) -> None:
    pre, k, v = streams(520, seed=3)
    pre = pre * torch.linspace(0.1, 2, HEADS * SIZE).view(HEADS, SIZE)
    k = ROTARY.turn(pre.transpose(0, 1), torch.arange(520)).transpose(0, 1)
    with compressed(k, v, rank=rank, outliers=0, local=1) as store:
        segment = low_rank(store)
        n = int(segment.lengths[0])
        got = segment.decode()
        error = (got.k.transpose(0, 1) - k[:n]).double().square().sum()
        singular = torch.linalg.svdvals(pre[:n].flatten(1).double())
        tail = singular[rank:].square().sum()
        torch.testing.assert_close(error, tail, rtol=1e-4, atol=1e-6)
        assert torch.equal(got.v, v[:n].transpose(0, 1)), "values are exact"


def test_factors_are_those_of_the_singular_value_decomposition() -> None:
    pre, _, _ = streams(300, seed=4)
    left, right = factorised(pre, 7)
    u, s, vh = torch.linalg.svd(pre.flatten(1).double(), full_matrices=False)
    best = (u[:, :7] * s[:7]) @ vh[:7]
    got = torch.einsum("nr,hrd->nhd", left.double(), right.double()).flatten(1)
    torch.testing.assert_close(got, best, atol=1e-4, rtol=0)


def test_rank_is_lower_before_rotation_than_after() -> None:
    pre, k, v = streams(512, rank=6)
    scores = []
    for keys in (pre, k):
        singular = torch.linalg.svdvals(keys.flatten(1).double())
        scores.append(float(singular[6:].square().sum() / singular.square().sum()))
    assert scores[0] < 1e-9
    assert scores[1] > 0.2
    with compressed(k, v, rank=6, outliers=0, local=1) as store:
        segment = low_rank(store)
        n = int(segment.lengths[0])
        torch.testing.assert_close(segment.decode().k.transpose(0, 1), k[:n], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------ (4) the partition


@pytest.mark.parametrize(
    ("tokens", "outliers", "local"), [(600, 4, 4), (333, 3, 1), (1001, 48, 4), (700, 0, 2)]
)
def test_local_outlier_and_landmark_chunks_are_disjoint_and_cover_the_prompt(
    tokens: int, outliers: int, local: int
) -> None:
    _, k, v = streams(tokens, seed=tokens)
    k[100:103] *= -3  # a chunk that its mean does not stand for
    begin, found = expected_partition(k, outliers, local)
    with compressed(k, v, rank=8, outliers=outliers, local=local) as store:
        assert [s.codec for s in store.segments(0)].count("low-rank:8") == 1
        raw = [s for s in store.segments(0) if s.codec == "raw"]
        for h in range(HEADS):
            with_landmarks = low_rank(store).positions_of(h).tolist()
            whole = [p for s in raw for p in s.positions_of(h).tolist()]
            assert sorted(with_landmarks + whole) == list(range(tokens))
            assert {p // 8 for p in whole if p < begin} == found[h]
            assert [p for p in whole if p >= begin] == list(range(begin, tokens))
            assert 8 * local <= tokens - begin < 8 * (local + 8)
            kept = torch.cat([s.decode().k[h, : int(s.lengths[h])] for s in raw])
            assert torch.equal(kept, k[sorted(whole), h]), "outliers and local chunks stay as they were"


def test_a_prompt_no_longer_than_the_rank_stays_as_it_is() -> None:
    _, k, v = streams(200)
    with compressed(k[:100], v[:100], rank=160, outliers=0, local=0) as store:
        # 64 tokens would go; all 32 dimensions of two heads of 16 are fewer than that.
        assert low_rank(store).codec == "low-rank:32"
    with compressed(k[:100], v[:100], rank=32, outliers=3, local=2) as store:
        assert [s.codec for s in store.segments(0)] == ["raw"]


# ------------------------------------------------------------------------ choice


def test_chunks_are_chosen_by_the_largest_softmax_of_the_group() -> None:
    _, k, v = streams(900, seed=8)
    with compressed(k, v, rank=10, outliers=4, local=3) as store:
        grown(store, 2)
        _, selections = read(store, query(), 96)
        chosen = next(s for s in selections if s is not None)
        segment = low_rank(store)
        for h in range(HEADS):
            where = segment.positions_of(h).long().view(-1, 8)
            landmarks = k[where, h].double().mean(1)
            logits = query()[h * GROUP : (h + 1) * GROUP].double() @ landmarks.T * SPEC.scale
            score = logits.softmax(-1).amax(0)
            best = set(score.topk(12).indices.tolist())
            assert set(chosen.indices[h, : int(chosen.counts[h])].tolist()) == best


# ------------------------------------------------------------------------ (5) and what is stored


def test_values_are_the_same_from_the_page_cache_and_from_the_disk(tmp_path: Path) -> None:
    _, k, v = streams(900, seed=8)
    with (
        compressed(k, v, rank=10, outliers=4, local=3, directory=tmp_path) as store,
        compressed(k, v, rank=10, outliers=4, local=3, tier=None) as other,
    ):
        assert (low_rank(store).tier, low_rank(other).tier) == ("disk", "host")
        miss, hit = (read(store, query(), 96)[0] for _ in range(2))
        assert torch.equal(miss, hit)
        assert torch.equal(hit, read(other, query(), 96)[0])
        k_all, v_all = low_rank(store).decode().k, low_rank(store).decode().v
        lists = read(store, query(), 96)[1]
        (chosen,) = [one for one in lists if one is not None]
        gathered = low_rank(store).gather(chosen)
        for h in range(HEADS):
            at = (chosen.indices[h].long()[:, None] * 8 + torch.arange(8)).flatten()
            assert torch.equal(gathered.v[h], v_all[h, at])
            torch.testing.assert_close(gathered.k[h], k_all[h, at], atol=1e-6, rtol=0)


def test_memory_holds_no_raw_keys_and_no_values_of_what_was_demoted(tmp_path: Path) -> None:
    tokens, rank = 40 * ENTRIES, 6
    _, k, v = streams(tokens, seed=1, dtype=torch.bfloat16)
    with compressed(k, v, rank=rank, outliers=8, local=4, directory=tmp_path) as store:
        n = int(low_rank(store).lengths[0])
        assert n > 0.9 * tokens
        held = store.bytes()
        page = 4096  # every table holds whole pages of memory
        values = HEADS * n * SIZE * 2
        side = HEADS * n * 4  # positions, since outliers leave gaps
        assert values + side <= held["disk", "low-rank:6"] <= values + side + 2 * HEADS * page
        exact = n * rank * 2 + HEADS * (n // 8) * SIZE * 2 + HEADS * rank * SIZE * 2
        assert exact <= held["host", "low-rank:6"] <= exact + 8 * ENTRIES * rank * 2 + 5 * HEADS * page
        raw = HEADS * (tokens - n) * (2 * SIZE * 2 + 4)
        assert held["host", "raw"] <= raw + 6 * HEADS * page
        before = HEADS * tokens * 2 * SIZE * 2
        assert sum(b for (tier, _), b in held.items() if tier == "host") < 0.45 * before
        assert low_rank(store).bytes_per_entry == SIZE * 2 + rank * 2


def test_every_reader_of_the_store_sees_the_same_keys(tmp_path: Path) -> None:
    _, k, v = streams(500, seed=2)
    with compressed(k, v, rank=9, outliers=4, local=2, directory=tmp_path) as store:
        segment, whole = low_rank(store), store.decoded(0)
        n = int(segment.lengths[0])
        one = segment.decode()
        for h in range(HEADS):
            assert torch.equal(segment.read(h, 70, 200)[0], segment.read(h, 0, n)[0][70:200])
            torch.testing.assert_close(one.k[h], segment.read(h, 0, n)[0], atol=1e-6, rtol=0)
            where = segment.positions_of(h).long()
            torch.testing.assert_close(whole.k[h, where], one.k[h], atol=1e-6, rtol=0)
            part = segment.narrow(ENTRIES, 2 * ENTRIES)
            torch.testing.assert_close(part.decode().k[h], one.k[h, ENTRIES : 2 * ENTRIES], atol=1e-6, rtol=0)
        path = tmp_path / "saved.kv"
        files.save(store, path, {})
        with pytest.raises(files.StoreFileError, match="rotary"):
            files.load(path)
        again, _ = files.load(path, rotary=lambda layer: ROTARY)
        with (
            again,
            SequenceStore(layers=1, heads=HEADS, head_dim=SIZE, dtype=torch.float32, capacity=700) as fork,
        ):
            fork.adopt([store.segments(0)], store.length)
            for other in (again, fork):
                assert torch.equal(other.decoded(0).k, whole.k)
                assert torch.equal(other.decoded(0).v, whole.v)
            # A rollback into the demoted part, in the owner and in one that borrowed it.
            for other in (again, fork):
                other.truncate(203)
                left = other.decoded(0)
                assert left.positions_of(0).tolist() == list(range(203))
                torch.testing.assert_close(left.k[:, :203], whole.k[:, :203], atol=1e-6, rtol=0)
                assert torch.equal(left.v[:, :203], whole.v[:, :203])
        moved = store.bytes()["host", "low-rank:9"]
        store.truncate(203)
        assert store.bytes()["host", "low-rank:9"] <= moved
        # A plan that drops entries of the demoted part leaves the others what they were.
        keep = torch.arange(203)[torch.arange(203) % 5 != 0]
        store.apply(0, Plan(keep=(keep,) * HEADS))
        torch.testing.assert_close(store.decoded(0).k[:, : len(keep)], whole.k[:, keep], atol=1e-5, rtol=0)


def test_values_can_move_on_and_keys_can_be_quantised_after_all(tmp_path: Path) -> None:
    _, k, v = streams(500, seed=2)
    with compressed(k, v, rank=9, outliers=0, local=2, tier=None, directory=tmp_path) as store:
        whole, n = store.decoded(0), int(low_rank(store).lengths[0])
        store.apply(0, Plan(demote=(Demotion(oldest=2 * ENTRIES, tier="disk"),)))
        forms = [(s.codec, s.tier, s.lengths.tolist()[0]) for s in store.segments(0)]
        assert forms[:2] == [("low-rank:9", "disk", 128), ("low-rank:9", "host", n - 128)]
        torch.testing.assert_close(store.decoded(0).k, whole.k, atol=1e-6, rtol=0)
        assert torch.equal(store.decoded(0).v, whole.v)
        store.apply(0, Plan(demote=(Demotion(oldest=n, codec="int4"),)))
        assert [s.codec for s in store.segments(0)][:2] == ["int4", "int4"]
        assert ("host", "low-rank:9") not in {kind for kind, size in store.bytes().items() if size}


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    _, k, v = streams(300)
    with compressed(k, v, rank=9, outliers=0, local=2) as store:
        entries = torch.arange(3)
        change = Rewrite(entries=entries, k=torch.zeros(3, SIZE), v=torch.zeros(3, SIZE))
        with pytest.raises(ValueError, match="before they are demoted"):
            store.apply(0, Plan(rewrite=(change, None)))
        with pytest.raises(ValueError, match="factor-keys"):
            store.apply(0, Plan(demote=(Demotion(oldest=64, codec="low-rank:4"),)))
        factors = Factors(left=torch.zeros(300, 4), right=torch.zeros(HEADS, 5, SIZE), start=0, rotary=None)
        with pytest.raises(ValueError, match="takes factors"):
            store.apply(0, Plan(demote=(Demotion(oldest=64, codec="low-rank:4", factors=factors),)))
    with pytest.raises(ValueError, match="factor-keys"):
        Demote(codec="low-rank:8")
    with pytest.raises(ValueError, match="raw=True"):
        Landmarks(chunk=4)
    with pytest.raises(ValueError, match="slower"):
        FactorKeys(tier="device")


# ------------------------------------------------------------------------ through the engine


def test_later_turns_rebuild_every_key_and_files_bring_them_back(tmp_path: Path) -> None:
    """At full rank nothing is lost, so three turns, a save and a fork answer as full attention does."""
    model = random_model("tiny", dtype=torch.float32)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    options = {"rank": heads * size, "outliers": 2, "local": 1, "keep": 10_000}
    make = torch.Generator().manual_seed(0)
    turns = [
        torch.randint(model.config.vocab_size, (n,), generator=make).tolist()
        for n in (heads * size + 300, 40)
    ]
    answers = []
    for recipe in (None, load("shadowkv", **options)):
        with winnow.load(model, recipe=recipe).session() as session:
            session.generate(turns[0], max_new_tokens=4, ignore_eos=True)
            answers.append(session.generate(turns[1], max_new_tokens=6, ignore_eos=True, logprobs=3))
            if recipe is not None:
                assert any("low-rank" in kind for kind in session.bytes_stored())
                session.save(tmp_path / "s.kv")
                answers.append(session.fork().generate([1, 2], max_new_tokens=3, ignore_eos=True))
    full, low, forked = answers
    assert full.token_ids == low.token_ids
    for a, b in zip(full.samples[0].logprobs, low.samples[0].logprobs, strict=True):
        assert a["logprob"] == pytest.approx(b["logprob"], abs=2e-3)
    llm = winnow.load(model, recipe=load("shadowkv", **options))
    with llm.load_session(tmp_path / "s.kv") as session:
        again = session.generate([1, 2], max_new_tokens=3, ignore_eos=True)
    assert again.token_ids == forked.token_ids


def test_a_step_reads_rows_of_the_left_factor_from_memory_and_values_from_the_disk() -> None:
    model = random_model("tiny", dtype=torch.float32)
    heads, size, layers = 2, 16, 4
    prompt = torch.randint(512, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    recipe = load("shadowkv", rank=12, outliers=4, local=2, keep=80)
    stats = winnow.load(model, recipe=recipe).generate(prompt, max_new_tokens=4, ignore_eos=True).stats
    begin = expected_partition(torch.randn(700, HEADS, SIZE), 4, 2)[0]
    chunks, steps = begin // 8 - 4, 3
    read, each = stats.bytes_read, steps * layers * heads
    assert read["disk/low-rank:12"] == each * 80 * size * 4
    assert read["host/low-rank:12"] == each * 80 * 12 * 4
    whole = 700 - chunks * 8
    assert read["host/raw"] == layers * heads * sum(whole + n for n in range(1, steps + 1)) * 2 * size * 4
    assert read["host/index"] == each * (chunks * size + 12 * size) * 4
