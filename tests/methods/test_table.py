"""The method table, packaged recipes, and finding a recipe by name or file."""

from __future__ import annotations

import inspect
import pkgutil
from pathlib import Path

import pytest

import winnow.methods
from winnow.generation.anchor import Anchor
from winnow.loading.tidal import Tidal
from winnow.methods import METHODS, from_text, load, packaged, rows
from winnow.recipe import STAGES, Recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_decides_the_stage_it_says(name):
    recipe = load(name)
    decides = [stage for stage in STAGES if getattr(recipe, stage) is not None]
    # ShadowKV's form of the entries and its way of reading them make sense together only.
    assert decides == (["compression", "loading"] if name == "shadowkv" else [METHODS[name].stage])
    assert recipe.name == name
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_cites_its_paper_and_lists_its_deviations(name):
    text = METHODS[name].make.__doc__
    for needed in ("Paper:", "Code:", "Deviations"):
        assert needed in text
    for paper in METHODS[name].paper.replace("arXiv ", "").split(", "):
        assert paper in text
    for parameter in inspect.signature(METHODS[name].make).parameters.values():
        assert f"{parameter.name} :" in text
        assert parameter.kind is parameter.KEYWORD_ONLY


def test_one_file_per_method():
    files = {info.name for info in pkgutil.iter_modules(winnow.methods.__path__)} - {"pages"}
    assert files == {name.replace("-", "_") for name in METHODS}


def test_rows_are_plain_data():
    assert [row["name"] for row in rows()] == list(METHODS)
    assert all(set(row) == {"name", "stage", "paper", "needs", "saves"} for row in rows())


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_can_be_made_and_written(name):
    recipe = load(name)
    assert recipe.name == name
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_four_stages_has_four():
    assert all(getattr(load("four-stages"), stage) is not None for stage in STAGES)


def test_parameters():
    assert load("anchor-attention", theta=3).generation == Anchor(theta=3.0)
    assert load("tidal-decode", select_layers=[2, 5]).loading == Tidal(select_layers=(2, 5))


def test_a_file_may_mix_methods_and_parts(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmethods:\n  anchor-attention: {theta: 3}\nloading:\n  tidal: {keep: 64}\n")
    expected = Recipe(name="mine", generation=Anchor(theta=3.0), loading=Tidal(keep=64))
    assert load(path) == load(str(path)) == expected
    assert from_text("methods: [anchor-attention]").generation == Anchor()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("snapvk", "did you mean 'snapkv'"),
        ("four-stage", "did you mean 'four-stages'"),
        ("nowhere.yaml", "there is no recipe file nowhere.yaml"),
        (Path("nowhere"), "there is no recipe file nowhere"),
    ],
)
def test_what_is_not_there_is_named(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kep": 5}, "unknown parameter 'kep'; did you mean 'keep'"),
        ({"keep": 0.25}, "snapkv.keep: give an integer, not 0.25"),
        ({"keep": 0}, "keep=0 will not do"),
        ({"keep": 20}, "keep at least 33"),
        ({"pooling": "mx"}, "did you mean 'max'"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        load("snapkv", **params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {snapkv: {keep: 100}, snapvk: }", "unknown method 'snapvk'; did you mean 'snapkv'"),
        ("methods: {a-shape: , anchor-attention: }", "a-shape and anchor-attention both decide generation"),
        ("methods: {a-shape: }\ngeneration: anchor", "the recipe itself and a-shape both decide generation"),
        ("methods: snapkv", "give a mapping of names"),
        ("methods: [{snapkv: {keep: 3}}]", "give a mapping of names"),
        ("methods: {snapkv: 3}", "give its parameters as a mapping"),
        ("methods: {snapkv: {keep: many}}", "methods.snapkv.keep: give an integer"),
    ],
)
def test_bad_method_yaml_is_refused(text, message):
    with pytest.raises(ValueError) as caught:
        from_text(text)
    assert message in str(caught.value)


def test_errors_in_a_file_name_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("generation: ancor")
    with pytest.raises(ValueError, match=r"broken.yaml: generation: unknown"):
        load(path)


def test_recipes_take_no_parameters():
    with pytest.raises(ValueError, match="takes no parameters, keep given"):
        load("keep-128", keep=5)
    assert load(load("snapkv")) == load("snapkv")
