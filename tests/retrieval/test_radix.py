"""The prefix tree against a dictionary of prefixes, and what eviction and splits must preserve."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from winnow.retrieval.protocol import Match
from winnow.retrieval.radix import Radix, RadixPool, _Node
from winnow.retrieval.radix import _key as keyed
from winnow.retrieval.slab import Slab
from winnow.store import SequenceStore
from winnow.store.codecs import CODECS, EncodedSegment
from winnow.types import Plan, Segment

LAYERS, HEADS, D = 2, 2, 8
PAGE_BYTES = LAYERS * HEADS * 2 * 4096  # the least a node can hold: one memory page per table row


def entries(tokens: list[int], salt: int = 0) -> list[list[Segment]]:
    """Entries that name their token, position, layer and name space, as real ones would."""
    n = len(tokens)
    layers = []
    for layer in range(LAYERS):
        k = torch.zeros(HEADS, n, D)
        if n:
            k += torch.tensor(tokens, dtype=torch.float32)[None, :, None]
        k[:, :, 1] = torch.arange(n)
        k[:, :, 2] = layer
        k[:, :, 3] = torch.arange(HEADS)[:, None]
        k[:, :, 4] = salt
        # What came before decides an entry: a running sum stands for it.
        k[:, :, 5] = torch.tensor(tokens, dtype=torch.float32).cumsum(0)
        layers.append([Segment(k=k, v=-k, lengths=torch.full((HEADS,), n, dtype=torch.int32))])
    return layers


def check_content(match: Match, tokens: list[int], salt: int = 0) -> None:
    wanted = entries(tokens[: match.length], salt)
    assert len(match.layers) == (LAYERS if match.length else 0)
    for layer, segments in enumerate(match.layers):
        at = 0
        for segment in segments:
            n = int(segment.lengths[0])
            assert segment.start == at
            assert segment.positions is None
            assert torch.equal(segment.k[:, :n], wanted[layer][0].k[:, at : at + n])
            assert torch.equal(segment.v[:, :n], wanted[layer][0].v[:, at : at + n])
            at += n
        assert at == match.length


def held_by_nodes(pool: RadixPool) -> tuple[int, int]:
    """Bytes by walking the tree (independent of the pool's own count), and the number of nodes."""
    slabs: dict[int, tuple[Slab, list[set[int]]]] = {}
    nodes = 0
    todo = [root for root, _ in pool._roots.values()]
    while todo:
        node = todo.pop()
        todo.extend(node.children.values())
        for child in node.children.values():
            assert child.parent is node
            assert child.start == node.start + node.tokens
            assert child.locks <= node.locks
        if node.slab is None:
            continue
        nodes += 1
        planes = node.slab.form.planes
        _, held = slabs.setdefault(id(node.slab), (node.slab, [set() for _ in planes]))
        for plane, pages in zip(planes, held, strict=True):
            row = plane.width * plane.dtype.itemsize
            for token in range(node.first, node.first + node.tokens):
                first = token // plane.entries * row
                pages.update(range(first // 4096, (first + row - 1) // 4096 + 1))
    total = sum(len(p) * 4096 * sum(slab.form.heads) for slab, held in slabs.values() for p in held)
    resident = sum(slab.resident() for slab, _ in slabs.values())
    assert resident == total
    return total, nodes


def all_nodes(pool: RadixPool) -> list[_Node]:
    todo = [root for root, _ in pool._roots.values()]
    for node in todo:
        todo.extend(node.children.values())
    return [node for node in todo if node.slab is not None]


PAGE = 4
tokens_of = st.lists(st.integers(0, 1), max_size=7 * PAGE)


class AgainstDictionary(RuleBasedStateMachine):
    """With room for everything, a match is as long as the longest inserted common prefix."""

    matches = Bundle("matches")

    def __init__(self) -> None:
        super().__init__()
        self.pool = Radix(page=PAGE, capacity_bytes=1 << 30).pool()
        self.known: set[tuple[str, tuple[int, ...]]] = set()

    def longest(self, tokens: list[int], namespace: str) -> int:
        n = len(tokens) // PAGE * PAGE
        while n and (namespace, tuple(tokens[:n])) not in self.known:
            n -= PAGE
        return n

    @rule(tokens=tokens_of, namespace=st.sampled_from("ab"))
    def insert(self, tokens: list[int], namespace: str) -> None:
        before = self.longest(tokens, namespace)
        layers = entries(tokens, ord(namespace))
        copies = [[s.k.clone() for s in segments] for segments in layers]
        new = self.pool.insert(tokens, namespace, layers)
        assert new == len(tokens) // PAGE * PAGE - before
        assert all(
            torch.equal(s.k, c)
            for segments, cs in zip(layers, copies, strict=True)
            for s, c in zip(segments, cs, strict=True)
        )
        for n in range(PAGE, len(tokens) + 1, PAGE):
            self.known.add((namespace, tuple(tokens[:n])))

    @rule(target=matches, tokens=tokens_of, namespace=st.sampled_from("ab"))
    def match(self, tokens: list[int], namespace: str) -> tuple[Match, list[int], str]:
        match = self.pool.match(tokens, namespace)
        assert match.length == self.longest(tokens[: max(0, len(tokens) - 1)], namespace)
        check_content(match, tokens, ord(namespace))
        return match, tokens, namespace

    @rule(held=consumes(matches))
    def release(self, held: tuple[Match, list[int], str]) -> None:
        match, tokens, namespace = held
        check_content(match, tokens, ord(namespace))  # splits since then moved nothing
        self.pool.release(match)
        self.pool.release(match)

    @invariant()
    def counted(self) -> None:
        assert self.pool.bytes() == held_by_nodes(self.pool)[0]


class UnderPressure(RuleBasedStateMachine):
    """With little room: never above capacity, never a wrong entry, locked paths survive."""

    matches = Bundle("matches")

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 5 * PAGE_BYTES
        self.pool = Radix(page=PAGE, capacity_bytes=self.capacity).pool()
        self.held: list[tuple[Match, list[int]]] = []

    @rule(tokens=tokens_of)
    def insert(self, tokens: list[int]) -> None:
        whole = len(tokens) // PAGE * PAGE
        found = self.pool.match([*tokens, 0], "a")
        self.pool.release(found)
        new = self.pool.insert(tokens, "a", entries(tokens))
        assert new % PAGE == 0
        assert 0 <= new <= whole - found.length
        if new < whole - found.length:  # then nothing was left to evict
            path = [
                node
                for root, _ in self.pool._roots.values()
                for node, _ in self.pool._walk(root, keyed(tokens))
            ]
            for node in all_nodes(self.pool):
                assert node.children or node.locks or node in path

    @rule(tokens=tokens_of)
    def match(self, tokens: list[int]) -> None:
        match = self.pool.match(tokens, "a")
        assert match.length < max(1, len(tokens))
        check_content(match, tokens)
        self.held.append((match, tokens))

    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        if self.held:
            self.pool.release(self.held.pop(which % len(self.held))[0])

    @invariant()
    def sound(self) -> None:
        total, _ = held_by_nodes(self.pool)
        assert self.pool.bytes() == total <= self.capacity
        for match, tokens in self.held:
            check_content(match, tokens)
            again = self.pool.match(tokens, "a")
            assert again.length >= match.length
            self.pool.release(again)

    def teardown(self) -> None:
        for match, _ in self.held:
            self.pool.release(match)
        todo = [root for root, _ in self.pool._roots.values()]
        while todo:
            node = todo.pop()
            assert node.locks == 0
            todo.extend(node.children.values())


TestAgainstDictionary = AgainstDictionary.TestCase
TestAgainstDictionary.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestUnderPressure = UnderPressure.TestCase
TestUnderPressure.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_one_token_is_always_left() -> None:
    pool = Radix(page=4).pool()
    tokens = list(range(8))
    assert pool.insert(tokens, "a", entries(tokens)) == 8
    assert pool.match(tokens, "a").length == 4
    assert pool.match([*tokens, 9], "a").length == 8
    assert pool.match([], "a").length == 0
    assert pool.match([0], "a").length == 0


def test_least_recently_used_leaf_goes_first() -> None:
    pool = Radix(page=4, capacity_bytes=3 * PAGE_BYTES).pool()
    first, second, third, fourth = ([n] * 4 for n in range(4))
    for tokens in (first, second, third):
        assert pool.insert(tokens, "a", entries(tokens)) == 4
    pool.release(pool.match([*first, 9], "a"))
    assert pool.insert(fourth, "a", entries(fourth)) == 4
    lengths = [pool.match([*tokens, 9], "a").length for tokens in (first, second, third, fourth)]
    assert lengths == [4, 0, 4, 4]


def test_nothing_is_taken_from_locked_paths() -> None:
    pool = Radix(page=4, capacity_bytes=2 * PAGE_BYTES).pool()
    a, b, c = [1] * 4, [2] * 4, [3] * 4
    for tokens in (a, b):
        pool.insert(tokens, "a", entries(tokens))
    held = [pool.match([*tokens, 9], "a") for tokens in (a, b)]
    assert pool.insert(c, "a", entries(c)) == 0
    pool.release(held[0])
    assert pool.insert(c, "a", entries(c)) == 4
    check_content(held[1], b)
    assert pool.match([*a, 9], "a").length == 0


def test_a_beginning_is_taken_where_memory_does_not_suffice() -> None:
    tokens = [n % 50 for n in range(1024)]  # 1024 x 32 bytes are eight memory pages per table row
    pool = Radix(page=128, capacity_bytes=3 * PAGE_BYTES).pool()
    assert pool.insert(tokens, "a", entries(tokens)) == 3 * 128
    match = pool.match(tokens, "a")
    assert match.length == 3 * 128
    check_content(match, tokens)


def test_evicting_half_of_a_split_node_frees_its_memory_and_spares_the_other_half() -> None:
    long = [n % 50 for n in range(512)]
    other = [*long[:256], *[7] * 256]
    pool = Radix(page=128, capacity_bytes=6 * PAGE_BYTES).pool()
    pool.insert(long, "a", entries(long))
    pool.insert(other, "a", entries(other))
    assert held_by_nodes(pool)[1] == 3
    kept = pool.match([*other, 0], "a")
    fresh = [9] * 128
    assert pool.insert(fresh, "a", entries(fresh)) == 128  # needs the lower half of the first node
    assert pool.match([*long, 0], "a").length == 256
    check_content(kept, other)
    assert pool.bytes() == held_by_nodes(pool)[0] == 5 * PAGE_BYTES


def test_two_identical_inserts_at_once_store_one_copy() -> None:
    tokens = [n % 50 for n in range(2048)]
    pool = Radix(page=64).pool()
    new: list[int] = []
    gate = threading.Barrier(8)

    def work() -> None:
        layers = entries(tokens)
        gate.wait()
        new.append(pool.insert(tokens, "a", layers))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(new) == [0] * 7 + [2048]
    assert pool.bytes() == held_by_nodes(pool)[0] == 16 * PAGE_BYTES


def test_a_match_becomes_the_front_of_a_store_and_comes_back() -> None:
    tokens = list(range(192))
    pool = Radix(page=64).pool()
    pool.insert(tokens[:128], "a", entries(tokens[:128]))
    pool.insert(tokens, "a", entries(tokens))
    match = pool.match([*tokens, 0], "a")
    with SequenceStore(layers=LAYERS, heads=HEADS, head_dim=D, dtype=torch.float32, capacity=1024) as store:
        store.adopt(match.layers, match.length)
        more = entries([*tokens, *range(64)])
        for layer, (segment,) in enumerate(more):
            new = segment.k[:, 192:].transpose(0, 1)
            store.append(layer, new, -new, torch.arange(192, 256))
        store.advance(64)
        assert len(store.segments(0)) == 3
        assert store.shared_bytes() == 192 * HEADS * LAYERS * 2 * D * 4
        layers = [store.segments(layer) for layer in range(LAYERS)]
        assert pool.insert([*tokens, *range(64)], "a", layers) == 64
        check_content(pool.match([*tokens, *range(64), 0], "a"), [*tokens, *range(64)])


def test_only_exact_entries_are_taken() -> None:
    pool = Radix(page=4).pool()
    tokens = list(range(8))
    dropped = entries(tokens)
    positions = torch.arange(8, dtype=torch.int32).expand(HEADS, 8)
    for broken, said in [
        ({"positions": positions}, "not consecutive"),
        ({"start": 1}, "not consecutive"),
        ({"lengths": torch.tensor([8, 7], dtype=torch.int32)}, "not consecutive"),
        ({"bias": torch.zeros(HEADS, 8)}, "biased"),
        ({"lengths": torch.tensor([7, 7], dtype=torch.int32)}, "7 entries for 8 tokens"),
    ]:
        one = dropped[1][0]
        segment = Segment(**{"k": one.k, "v": one.v, "lengths": one.lengths, **broken})
        with pytest.raises(ValueError, match=said):
            pool.insert(tokens, "a", [dropped[0], [segment]])
    assert pool.bytes() == 0
    pool.insert(tokens, "a", entries(tokens))
    with pytest.raises(ValueError, match="another model"):
        pool.insert(tokens, "a", entries(tokens)[:1])


def test_a_store_that_dropped_entries_is_refused() -> None:
    pool = Radix(page=4).pool()
    with SequenceStore(layers=1, heads=HEADS, head_dim=D, dtype=torch.float32, capacity=64) as store:
        k = torch.randn(16, HEADS, D)
        store.append(0, k, k, torch.arange(16))
        store.advance(16)
        store.apply(0, Plan(keep=(torch.arange(0, 16, 2), torch.arange(0, 16, 2))))
        with pytest.raises(ValueError, match="not consecutive"):
            pool.insert(list(range(8)), "a", [store.segments(0)])


@pytest.mark.parametrize(("field", "value"), [("page", 0), ("capacity_bytes", -1)])
def test_impossible_parameters(field: str, value: int) -> None:
    with pytest.raises(ValueError):
        Radix(**{field: value})


def test_a_memory_page_that_two_nodes_share_lives_as_long_as_either() -> None:
    pool = Radix(page=4, capacity_bytes=3 * PAGE_BYTES).pool()
    for tokens in ([1] * 8, [1] * 4 + [2] * 4, [3] * 4):
        pool.insert(tokens, "a", entries(tokens))  # eight tokens are a sixteenth of a memory page
    held = pool.match([1, 1, 1, 1, 9], "a")
    assert pool.bytes() == 3 * PAGE_BYTES
    assert pool.insert([4] * 4, "a", entries([4] * 4)) == 4
    # The oldest leaf gave nothing back, its parent lies in the same memory page; so another went too.
    assert pool.match([1] * 9, "a").length == 4
    assert pool.match([1] * 4 + [2] * 5, "a").length == 4
    check_content(held, [1] * 4)
    assert pool.bytes() == held_by_nodes(pool)[0] == 3 * PAGE_BYTES


# --------------------------------------------------------------------------- in a codec

WIDE = 64  # a codec's groups are this wide


def wide(tokens: list[int]) -> list[list[Segment]]:
    """Entries of every token and what came before it, as random as real ones."""
    layers = []
    for layer in range(LAYERS):
        sums = torch.tensor(tokens, dtype=torch.float32).cumsum(0)
        phase = sums[None, :, None] * 0.37 + torch.arange(WIDE) + torch.arange(HEADS)[:, None, None] + layer
        k, v = phase.sin().bfloat16(), phase.cos().bfloat16()
        layers.append([Segment(k=k, v=v, lengths=torch.full((HEADS,), len(tokens), dtype=torch.int32))])
    return layers


def check_coded(match: Match, tokens: list[int], codec: str) -> None:
    """The pool holds what the codec makes of the entries, page by page, and nothing was rounded twice."""
    form = CODECS[codec]
    for wanted, segments in zip(wide(tokens), match.layers, strict=True):
        at = 0
        for segment in segments:
            assert isinstance(segment, EncodedSegment)
            n = int(segment.lengths[0])
            assert segment.codec == codec
            assert segment.start == at
            for head in range(HEADS):
                rows = form.encode(wanted[0].k[head, at : at + n], wanted[0].v[head, at : at + n])
                for table, row in zip(segment.rows, rows, strict=True):
                    assert torch.equal(table[head, : len(row)], row)
            at += n
        assert at == match.length


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "raw"])
def test_a_pool_in_a_codec_splits_evicts_and_counts(codec: str) -> None:
    pool = Radix(codec=codec).pool()
    long = [n % 50 for n in range(1024)]
    other = [*long[:448], *[7] * 320]
    assert pool.insert(long, "a", wide(long), codec) == 1024
    assert pool.insert(other, "a", wide(other), codec) == 320
    assert pool.bytes() == held_by_nodes(pool)[0]
    for tokens in (long, other):
        match = pool.match([*tokens, 0], "a")
        assert match.length == len(tokens)
        check_coded(match, tokens, codec)
        pool.release(match)
    kept = pool.match([*other, 0], "a")
    pool.clear()
    assert pool.match([*long, 0], "a").length == 448
    assert pool.bytes() == held_by_nodes(pool)[0]
    check_coded(kept, other, codec)


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "raw"])
def test_a_pool_in_a_codec_holds_more(codec: str) -> None:
    tokens = [n % 50 for n in range(16384)]
    raw, coded = Radix().pool(), Radix(codec=codec).pool()
    raw.insert(tokens, "a", wide(tokens))
    coded.insert(tokens, "a", wide(tokens), codec)
    most = {"int8": 0.53, "int4": 0.32, "int2": 0.2}[codec]
    assert coded.bytes() < most * raw.bytes()


def test_what_a_pool_gave_in_its_codec_goes_back_as_it_is() -> None:
    """A sequence that read a prefix from the pool offers it again, after the pool has lost it."""
    tokens = [n % 50 for n in range(320)]
    pool = Radix(codec="int4").pool()
    pool.insert(tokens[:192], "a", wide(tokens[:192]), "int4")
    match = pool.match(tokens, "a")
    assert match.length == 192
    with SequenceStore(
        layers=LAYERS, heads=HEADS, head_dim=WIDE, dtype=torch.bfloat16, capacity=1024
    ) as store:
        store.adopt(match.layers, match.length)
        for layer, (segment,) in enumerate(wide(tokens)):
            k, v = (side[:, 192:].transpose(0, 1) for side in (segment.k, segment.v))
            store.append(layer, k, v, torch.arange(192, 320))
        store.advance(128)
        fresh = Radix(codec="int4").pool()
        layers = [store.segments(layer) for layer in range(LAYERS)]
        assert fresh.insert(tokens, "a", layers, "int4") == 320
        check_coded(fresh.match([*tokens, 0], "a"), tokens, "int4")
        with pytest.raises(ValueError, match="in int4"):
            Radix().pool().insert(tokens, "a", layers)
        with pytest.raises(ValueError, match="model or codec"):
            fresh.insert(tokens, "a", wide(tokens))


def test_codecs_and_pages_that_will_not_do_are_refused() -> None:
    with pytest.raises(ValueError, match="no codec 'thin:16'"):
        Radix(codec="thin:16")
    with pytest.raises(ValueError, match="multiple"):
        Radix(codec="int8", page=16)
