"""What a compression remembers of a sequence: counted, foreseen, saved, and cut where the sequence is."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
import torch

import winnow
from tests.engine.conftest import prompt
from winnow.compression.memory import plain, restored, tensors
from winnow.compression.tracks import Tracks
from winnow.engine.compress import Compression
from winnow.engine.request import SamplingParams
from winnow.methods import load as recipe_named
from winnow.recipe import PARTS, Recipe
from winnow.store import files
from winnow.store.files import StoreFileError
from winnow.store.swap import Swap

REMEMBERING = {
    "h2o": {"heavy": 24, "recent": 16, "every": 4},
    "d2o": {"heavy": 24, "recent": 16, "every": 4, "dense_first": 1},
    "lazy-eviction": {"keep": 40, "window": 4, "alpha": 0.02},
    "streaming-llm": {"sinks": 2, "recent": 30, "every": 4, "block": 32},
    "zipcache": {"every": 16, "recent": 16, "random": 8},
}


def model_of(module, name):
    return winnow.load(module, recipe=recipe_named(name, **REMEMBERING[name]))


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_loaded_session_remembers(module, tmp_path, name):
    """Later turns of a session that was saved are those of the session that went on, to the last bit."""
    path, turns = tmp_path / "context.kv", [prompt(150, 1), prompt(20, 2), prompt(10, 3)]
    with model_of(module, name).session() as session:
        session.generate(turns[0], max_new_tokens=21)
        session.save(path)
        assert session._session._sequence.compression.remembers
        went_on = [session.generate(turn, max_new_tokens=40, logprobs=0) for turn in turns[1:]]
    with winnow.load_session(path, model_of(module, name)) as loaded:
        again = [loaded.generate(turn, max_new_tokens=40, logprobs=0) for turn in turns[1:]]
    for one, other in zip(went_on, again, strict=True):
        assert one.samples[0].logprobs == other.samples[0].logprobs
        assert one.stats.entries_after == other.stats.entries_after


def test_without_its_memory_a_session_would_go_on_otherwise(module, tmp_path, monkeypatch):
    path = tmp_path / "context.kv"
    with model_of(module, "h2o").session() as session:
        session.generate(prompt(150, 1), max_new_tokens=21)
        session.save(path)
        went_on = session.generate(prompt(20, 2), max_new_tokens=40, logprobs=0)
    monkeypatch.setattr(Compression, "recall", lambda self, memory: None)
    with winnow.load_session(path, model_of(module, "h2o")) as loaded:
        forgetful = loaded.generate(prompt(20, 2), max_new_tokens=40, logprobs=0)
    assert forgetful.samples[0].logprobs != went_on.samples[0].logprobs


def test_a_session_saved_without_its_memory_is_refused(module, tmp_path):
    path = tmp_path / "context.kv"
    with model_of(module, "h2o").session() as session:
        session.generate(prompt(60), max_new_tokens=1)
        session.save(path)
    store, header = files.load(path)
    for change in (
        lambda memory: memory.clear(),
        lambda memory: memory.update(states=[{"sums": 1}, None, None]),
    ):
        other = {**header, "compression": dict(header["compression"])}
        change(other["compression"])
        files.save(store, path, other)
        with pytest.raises(StoreFileError, match="saved by another version"):
            winnow.load_session(path, model_of(module, "h2o"))
    header.pop("compression")
    files.save(store, path, header)
    with pytest.raises(StoreFileError, match="saved by another version"):
        winnow.load_session(path, model_of(module, "h2o"))


def test_a_compression_without_memory_reads_files_that_have_none(module, tmp_path):
    path, llm = tmp_path / "context.kv", winnow.load(module, recipe=recipe_named("snapkv", keep=40))
    with llm.session() as session:
        session.generate(prompt(60), max_new_tokens=1)
        session.save(path)
        store, header = files.load(path)
        header.pop("compression")
        files.save(store, path, header)
        went_on = session.generate(prompt(20, 2), max_new_tokens=5, logprobs=0)
    with winnow.load_session(path, llm) as loaded:
        again = loaded.generate(prompt(20, 2), max_new_tokens=5, logprobs=0)
    assert again.samples[0].logprobs == went_on.samples[0].logprobs


@pytest.mark.parametrize("name", REMEMBERING)
def test_memory_survives_the_way_through_plain_data(module, name):
    with model_of(module, name).session() as session:
        session.generate(prompt(150, 1), max_new_tokens=21)
        compression = session._session._sequence.compression
        memory = compression.memory()
        other = Compression(compression.recipe, None)
        other.recall(memory)

        def told(value):
            return json.loads(json.dumps(value, default=lambda tensor: [str(tensor.dtype), tensor.tolist()]))

        assert told(other.memory()) == told(memory)
        assert other.bytes() == compression.bytes()


@pytest.mark.parametrize(
    "part", [one for slot in ("scorer", "budget", "action") for one in PARTS[slot].values()]
)
def test_every_part_says_what_its_state_is(part):
    """By the annotation of ``state``, without which nothing could be read back."""
    hint = get_type_hints(part.state)["return"]
    needed = {"keep": 8} if "keep" in {field.name for field in fields(part)} else {}
    state = part(**needed).state()
    assert restored(hint, plain(state)) == state
    assert (hint is Any) == (state is None), "a part without a state inherits none"


def test_values_of_another_type_are_refused():
    assert restored(dict[tuple[int, int], float], plain({(1, 2): 3.0})) == {(1, 2): 3.0}
    assert restored(float, 3) == 3.0
    for hint, value in ((int, "3"), (torch.Tensor, 3), (type(None), 3), (float, "3")):
        with pytest.raises(TypeError, match="is no"):
            restored(hint, value)
    with pytest.raises(AssertionError, match="cannot be saved"):
        plain({1: object()})
    assert [t.tolist() for t in tensors({1: [torch.ones(1), {2: torch.zeros(1)}]})] == [[1.0], [0.0]]


# ---------------------------------------------------------------------- bytes


def test_bytes_stored_count_what_a_compression_remembers(module):
    for name in ("h2o", "lazy-eviction"):
        with model_of(module, name).session() as session:
            stats = session.generate(prompt(150, 1), max_new_tokens=3).stats
            scorer = session._session._sequence.compression._score_state
            tables = [scorer] if isinstance(scorer, Tracks) else [scorer.active, scorer.pause]
            held = sum(t.numel() * t.element_size() for one in tables for t in one.tables.values())
            assert held >= len(tables) * 4 * 4 * 2 * 40, "four layers, two heads, forty entries of four bytes"
            assert stats.bytes_stored["host/state"] == session._session.bytes_stored()["host/state"] == held
    with winnow.load(module, recipe=recipe_named("snapkv", keep=40)).session() as session:
        assert "host/state" not in session.generate(prompt(150, 1), max_new_tokens=3).stats.bytes_stored


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", ["h2o", "d2o", "lazy-eviction", "snapkv", "full"])
def test_no_step_adds_more_bytes_than_it_was_said_to(module, name, samples, monkeypatch):
    monkeypatch.setattr("winnow.compression.tracks._ROOM", 32)
    recipe = recipe_named(name, **REMEMBERING.get(name, {"keep": 40})) if name != "full" else Recipe()
    engine = winnow.load(module, recipe=recipe, max_num_batched_tokens=48).engine
    first = engine.bytes_of(200) + samples * (engine.bytes_of(200) + engine.bytes_of(80))
    engine.submit(prompt(200), SamplingParams(max_new_tokens=80, n=samples, temperature=1.0, seed=0))
    promised, held = engine.bytes_promised(), []
    while engine.busy:
        before, said = engine.bytes_held(), engine.growth()
        engine.step()
        held.append(engine.bytes_held())
        assert held[-1] - before <= said
        if len(held) == 6:  # the prompt is computed, and one more token of each sample
            assert held[-1] <= promised + samples * engine.bytes_of(1)
    assert 0 < max(held) <= first


@pytest.mark.parametrize("space", [0, 1 << 24])
@pytest.mark.parametrize("name", ["h2o", "lazy-eviction", "streaming-llm"])
def test_a_suspended_request_takes_its_memory_along(module, tmp_path, name, space):
    """Nothing of it stays, what comes back is what was said to, and the tokens are the same."""
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, logprobs=0)

    def run(interrupted):
        engine = model_of(module, name).engine
        result = engine.submit(prompt(150, 1), params)
        for _ in range(20):
            engine.step()
        if interrupted:
            before, swap = engine.bytes_held(), Swap(tmp_path, space)
            state = engine.bytes_stored()["host/state"]
            engine.suspend(result, swap)
            assert (engine.bytes_held(), engine.bytes_suspended(result)) == (0, before)
            assert sum(swap.bytes().values()) > 0
            engine.resume(result)
            assert engine.bytes_stored()["host/state"] == state, "memory pages of entries may be fewer"
        while engine.busy:
            engine.step()
        return result.samples[0].logprobs

    assert run(True) == run(False)


def test_layers_that_share_entries_take_their_bytes_once(module):
    engine = winnow.load(module).engine
    whole = engine.bytes_of(100)
    engine.model = replace_slots(engine.model, (0, 1, 1, 1))
    assert engine.bytes_of(100) == whole // 2


class replace_slots:  # noqa: N801
    """A model of which some layers read the entries of others."""

    def __init__(self, model, slots):
        self._model, self.slots = model, slots

    def __getattr__(self, name):
        return getattr(self._model, name)


# ---------------------------------------------------------------------- rollback


def graded(session):
    """Per layer and head: positions in each codec, and what the action thinks of them."""
    sequence = session._session._sequence
    store, state = sequence.store, sequence.compression._act_state
    found = {}
    for layer, end in state.end.items():
        for head in range(store.shape.heads):
            held = {}
            for segment in store.segments(layer):
                held.setdefault(segment.codec, []).extend(segment.positions_of(head).tolist())
            counts = (state.low[layer][head], state.all[layer][head])
            found[layer, head] = (held, end[head], counts)
    return found


def test_grades_follow_a_turn_that_is_broken_off(module):
    """Entries that come in the place of graded ones are graded, and shares are those of what is left."""
    low = "separable:2"
    with model_of(module, "zipcache").session() as session:
        session.generate(prompt(200, 1), max_new_tokens=20)
        cut = session._session._sequence.store.length
        ends = {key: end for key, (_, end, _) in graded(session).items()}
        params = SamplingParams(max_new_tokens=60, ignore_eos=True)
        turn = session._session.stream(prompt(100, 2), params)
        for _ in range(40):
            next(turn)
        assert all(end > cut for _, end, _ in graded(session).values()), "the turn graded its own entries"
        turn.close()
        for (layer, head), (held, end, (lows, all_)) in graded(session).items():
            assert ends[layer, head] <= end <= cut
            assert lows == len(held.get(low, []))
            assert all_ == sum(position < end for positions in held.values() for position in positions)
        session.generate(prompt(120, 3), max_new_tokens=40)
        for held, end, (lows, all_) in graded(session).values():
            assert end > cut + 100
            assert not [position for position in held["raw"] if cut <= position < end]
            assert abs(lows - 0.4 * all_) <= 32, "to half a page"
