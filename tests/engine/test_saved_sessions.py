"""Sessions on disk: what is loaded goes on as if it had never left memory."""

from __future__ import annotations

import pytest
import torch

import winnow
from tests.engine.conftest import prompt
from winnow.compression.actions.demote import Demote
from winnow.compression.budgets.everything import Everything
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.methods import load as recipe_named
from winnow.recipe import Recipe
from winnow.store.files import StoreFileError

RECIPES = {
    "full": Recipe(),
    "snapkv": recipe_named("snapkv", keep=48),
    "int8": Recipe(
        compression=Compress(score=Recency(), budget=Everything(), act=Demote(codec="int8", recent=16))
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_loaded_session_goes_on_as_the_saved_one(module, tmp_path, name):
    llm = winnow.load(module, recipe=RECIPES[name])
    path, first, second = tmp_path / "context.kv", prompt(200, 1), prompt(20, 2)
    with llm.session() as session:
        session.generate(first, max_new_tokens=3)
        session.save(path)
        went_on = session.generate(second, max_new_tokens=4, logprobs=0)
    again = winnow.load(module, recipe=RECIPES[name])
    with winnow.load_session(path, again) as loaded:
        assert len(loaded.tokens) == 203
        result = loaded.generate(second, max_new_tokens=4, logprobs=0)
    assert result.token_ids == went_on.token_ids
    assert result.samples[0].logprobs == went_on.samples[0].logprobs
    assert result.stats.tokens_reused == 202


def test_compressed_session_is_a_smaller_file(module, tmp_path):
    sizes = {}
    for name in ("full", "snapkv"):
        with winnow.load(module, recipe=RECIPES[name]).session() as session:
            session.generate(prompt(400, 1), max_new_tokens=1)
            session.save(tmp_path / name)
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["snapkv"] < 0.25 * sizes["full"]


def test_a_session_of_another_recipe_or_model_is_refused(module, tmp_path):
    path = tmp_path / "context.kv"
    with winnow.load(module).session() as session:
        session.generate(prompt(50), max_new_tokens=1)
        session.save(path)
    with pytest.raises(StoreFileError, match="recipe"):
        winnow.load(module, recipe=RECIPES["snapkv"]).load_session(path)
    torch.manual_seed(1)
    other = type(module)(module.config).eval()
    with pytest.raises(StoreFileError, match="model"):
        winnow.load(other).load_session(path)


def test_torn_file_is_named_as_such(module, tmp_path):
    path = tmp_path / "context.kv"
    llm = winnow.load(module)
    with llm.session() as session:
        session.generate(prompt(50), max_new_tokens=1)
        session.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreFileError):
        llm.load_session(path)


def test_saving_where_nothing_can_be_written_keeps_the_session(module, tmp_path, oracle):
    (tmp_path / "file").write_text("in the way")
    llm = winnow.load(module)
    with llm.session() as session:
        one = session.generate(prompt(30, 1), max_new_tokens=2)
        with pytest.raises(StoreFileError, match="cannot save"):
            session.save(tmp_path / "file" / "context.kv")
        two = session.generate(prompt(10, 2), max_new_tokens=2)
    assert two.token_ids == oracle([*prompt(30, 1), *one.token_ids, *prompt(10, 2)], 2)
