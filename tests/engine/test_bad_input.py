"""Bad input and interruption: a clear message, and no damaged state."""

from __future__ import annotations

import signal
import threading

import pytest

import winnow
from tests.engine.conftest import VOCABULARY, prompt
from winnow.engine.compress import uninterrupted
from winnow.methods import load as recipe_named
from winnow.recipe import Recipe


def test_empty_prompt(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.generate([])


def test_prompt_longer_than_the_model_takes(llm):
    with pytest.raises(ValueError, match=r"512.*shorten"):
        llm.generate(prompt(512))
    assert llm.generate(prompt(511), max_new_tokens=9).finish_reason == "length"


def test_one_bad_prompt_of_a_batch_refuses_all_and_leaves_nothing_queued(llm, oracle):
    with pytest.raises(ValueError, match="vocabulary"):
        llm.generate([prompt(5), [VOCABULARY]])
    assert llm.generate(prompt(5), max_new_tokens=3).token_ids == oracle(prompt(5), 3)


def test_text_without_a_tokenizer(llm):
    with pytest.raises(ValueError, match="token ids"):
        llm.generate("hello")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("n", 0),
        ("stop", ("",)),
        ("max_tokens", 3),
    ],
)
def test_bad_sampling_options(llm, option, value):
    with pytest.raises(ValueError, match=option.split("_")[0]):
        llm.generate(prompt(5), **{option: value})


def test_n_without_temperature_is_refused(llm):
    with pytest.raises(ValueError, match="temperature"):
        llm.generate(prompt(5), n=2)


class Interrupting:
    """A model that is interrupted in the middle of its layers."""

    def __init__(self, model, at_layer: int, at_call: int):
        self._model, self._layer, self._call = model, at_layer, at_call
        self._calls = 0
        self.armed = True

    def __getattr__(self, name):
        return getattr(self._model, name)

    def forward(self, token_ids, position_ids, rows, attend, read=None):
        self._calls += 1

        def interrupted(layer, *rest):
            if self.armed and self._calls >= self._call and layer == self._layer:
                raise KeyboardInterrupt
            return attend(layer, *rest)

        return self._model.forward(token_ids, position_ids, rows, interrupted, read)


@pytest.mark.parametrize("at_call", [1, 2, 3])
@pytest.mark.parametrize("layer", [0, 2])
def test_interrupted_turn_is_rolled_back_whole(module, oracle, layer, at_call):
    llm = winnow.load(module, recipe=Recipe(), max_num_batched_tokens=16)
    first, second = prompt(30, 1), prompt(40, 2)
    with llm.session() as session:
        one = session.generate(first, max_new_tokens=3)
        before, held = session.tokens, session.bytes_stored()
        llm.engine.model = broken = Interrupting(llm.engine.model, layer, at_call)
        with pytest.raises(KeyboardInterrupt):
            session.generate(second, max_new_tokens=3)
        broken.armed = False
        assert session.tokens == before
        assert session.bytes_stored() == held
        two = session.generate(second, max_new_tokens=3)
    assert two.token_ids == oracle([*first, *one.token_ids, *second], 3)


def test_interrupted_request_frees_everything(module):
    llm = winnow.load(module, recipe=recipe_named("prefix-reuse"))
    llm.engine.model = broken = Interrupting(llm.engine.model, 1, 1)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt(100, 1), prompt(100, 2)])
    assert llm.engine._running == []
    assert llm.engine.pool.bytes() == 0
    broken.armed = False
    assert len(llm.generate(prompt(100, 1), max_new_tokens=2).token_ids) == 2


def test_abandoned_stream_frees_its_sequence(llm):
    stream = llm.stream(prompt(20), max_new_tokens=50)
    next(stream)
    stream.close()
    assert llm.engine._running == []


def test_interrupt_waits_for_the_end_of_a_critical_section():
    order = []

    def critical():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            order.append("finished")

    # A shell that starts us in the background makes Python ignore SIGINT: ask for its usual handler.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            critical()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert order == ["finished"]


def test_critical_section_works_outside_the_main_thread():
    seen = []

    def body():
        with uninterrupted():
            seen.append(1)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [1]


def test_closed_session_says_so(llm):
    session = llm.session()
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.generate(prompt(3))
