"""Recipes: what is refused, what is written, what is equal."""

from __future__ import annotations

import dataclasses
import math

import pytest

from winnow.compression.actions.demote import Demote
from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.everything import Everything
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.recency import Recency
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.generation.a_shape import AShape
from winnow.generation.anchor import Anchor
from winnow.loading.tidal import Tidal
from winnow.recipe import Recipe
from winnow.retrieval.radix import Radix
from winnow.types import Needs

SNAP = Compress(score=WindowAttention(), budget=Uniform(keep=100), act=Drop())
FOUR = Recipe(
    name="four",
    generation=Anchor(theta=3.0),
    compression=SNAP,
    retrieval=Radix(),
    loading=Tidal(select_layers=(2, 9)),
)


def test_the_empty_recipe_is_exact():
    assert Recipe().needs == Needs()
    assert Recipe().generation_fingerprint() == "exact"
    assert Recipe.from_yaml("") == Recipe()
    assert Recipe.from_yaml(Recipe().to_yaml()) == Recipe()


def test_yaml_both_ways():
    assert Recipe.from_yaml(FOUR.to_yaml()) == FOUR
    assert Recipe.from_dict(FOUR.to_dict()) == FOUR


@pytest.mark.parametrize("theta", [math.inf, -math.inf, 12])
def test_numbers_survive_yaml(theta):
    recipe = Recipe(generation=Anchor(theta=theta))
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_a_part_may_be_named_alone():
    assert Recipe.from_yaml("generation: anchor").generation == Anchor()
    assert Recipe.from_yaml("generation: {anchor: }").generation == Anchor()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loadin: tidal", "unknown key 'loadin'; did you mean 'loading'"),
        ("generation: ancor", "unknown generation part 'ancor'; did you mean 'anchor'"),
        ("generation: tidal", "unknown generation part 'tidal'; it is a loading part"),
        (
            "generation: {anchor: {tetha: 1}}",
            "generation.anchor: unknown field 'tetha'; did you mean 'theta'",
        ),
        ("generation: {a-shape: {}, anchor: {}}", "'a-shape' and 'anchor' are two parts for one place"),
        ("generation: 3", "give a part as"),
        ("generation: {anchor: 3}", "give its fields as a mapping"),
        ("generation: {anchor: {theta: high}}", "generation.anchor.theta: give a number"),
        ("generation: {anchor: {theta: .nan}}", "theta=nan"),
        ("generation: {a-shape: {local: 0}}", "local=0 will not do; give an integer of tokens, at least 1"),
        ("loading: {tidal: {keep: 0}}", "keep=0 will not do"),
        ("loading: {tidal: {keep: 0.25}}", "loading.tidal.keep: give an integer, not 0.25"),
        ("loading: {tidal: {keep: true}}", "give an integer, not True"),
        ("loading: {tidal: {select_layers: 3}}", "give a list"),
        ("loading: {tidal: {select_layers: [5, 3]}}", "ascending"),
        ("loading: {tidal: {select_layers: [1]}}", "dense_layers=1 or a later selecting layer"),
        ("compression: {compress: {score: recency, act: drop}}", "the field 'budget' is missing"),
        (
            "compression: {compress: {score: recency, budget: {uniform: {keep: 9}}, act: drop, turns: firs}}",
            "did you mean 'first'",
        ),
        (
            "compression: {compress: {score: recency, budget: everything, act: {demote: {codec: rwa}}}}",
            "unknown codec 'rwa'",
        ),
        ("a: [", "not valid YAML in line 1"),
        ("- x", "a list, not a mapping"),
        ("methods: {snapkv: }", "winnow.methods"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError) as caught:
        Recipe.from_yaml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [1, 31, 32])
def test_a_budget_without_room_beside_the_window_is_refused(keep):
    with pytest.raises(ValueError, match="keep at least 33"):
        Compress(score=WindowAttention(window=32), budget=Uniform(keep=keep), act=Drop())


@pytest.mark.parametrize("keep", [0, -1, 0.5, True, "10"])
def test_a_budget_is_a_count(keep):
    with pytest.raises(ValueError, match="at least 1"):
        Uniform(keep=keep)


def test_even_pooling_is_refused():
    with pytest.raises(ValueError, match="give 3 or 5"):
        WindowAttention(pool=4)


def test_demoting_nowhere_is_refused():
    with pytest.raises(ValueError, match="neither a codec nor a tier"):
        Demote(codec=None)


@pytest.mark.parametrize("part", [Tidal(), Tidal, AShape, 3, "anchor", SNAP])
def test_a_part_of_another_stage_is_refused(part):
    with pytest.raises(ValueError, match="is no generation part"):
        Recipe(generation=part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hungry(AShape):
    """A part from outside the package, which wants a profile."""

    @property
    def needs(self) -> Needs:
        return Needs(profile=True)


def test_a_missing_profile_is_refused_and_so_is_an_idle_one():
    with pytest.raises(ValueError, match="generation reads an offline profile but the recipe names none"):
        Recipe(generation=Hungry())
    assert Recipe(generation=Hungry(), profile="heads.json").needs.profile
    with pytest.raises(ValueError, match="none of its parts reads one"):
        Recipe(generation=AShape(), profile="heads.json")


def test_a_part_from_outside_works_but_cannot_be_written():
    recipe = Recipe(generation=Hungry(), profile="p")
    assert recipe.fingerprint() != Recipe(generation=Hungry(init=5), profile="p").fingerprint()
    with pytest.raises(ValueError, match="keep the recipe in Python"):
        recipe.to_yaml()


def test_recipes_of_different_stages_combine():
    combined = (
        Recipe(name="a", generation=Anchor(theta=3.0))
        | Recipe(name="b", compression=SNAP)
        | Recipe(retrieval=Radix())
        | Recipe(loading=Tidal(select_layers=(2, 9)))
    )
    assert combined.name == "a + b"
    assert dataclasses.replace(combined, name="four") == FOUR


def test_two_decisions_on_one_stage_are_refused():
    with pytest.raises(ValueError, match="'a' and 'b' both decide generation"):
        Recipe(name="a", generation=AShape()) | Recipe(name="b", generation=Anchor())
    # The same decision twice is no conflict.
    assert (FOUR | Recipe(loading=FOUR.loading)).fingerprint() == FOUR.fingerprint()


def test_fingerprints_name_what_is_done_not_what_it_is_called():
    assert dataclasses.replace(FOUR, name="other").fingerprint() == FOUR.fingerprint()
    assert dataclasses.replace(FOUR, loading=None).fingerprint() != FOUR.fingerprint()
    assert Recipe(generation=Anchor(theta=12)).fingerprint() == Recipe(generation=Anchor()).fingerprint()


def test_the_pools_name_space_depends_on_generation_alone():
    only = Recipe(generation=FOUR.generation).generation_fingerprint()
    assert FOUR.generation_fingerprint() == only != "exact"
    assert dataclasses.replace(FOUR, generation=None).generation_fingerprint() == "exact"
    assert Recipe(generation=Anchor(theta=4.0)).generation_fingerprint() != only


def test_fingerprints_do_not_change_between_versions():
    """Saved files and pools are keyed by them: a change of these is a change of format."""
    assert Recipe().fingerprint() == "317bc5f5cebcc998"
    assert FOUR.fingerprint() == "900ff483b6ada6d4"


def test_needs_are_those_of_all_parts():
    assert FOUR.needs == Needs(window_queries=32)


def test_a_model_without_the_layers_is_refused():
    FOUR.check(layers=10)
    with pytest.raises(ValueError, match="9 layers, numbered from 0"):
        FOUR.check(layers=9)


def test_a_codec_alone():
    recipe = Recipe(compression=Compress(score=Recency(), budget=Everything(), act=Demote(codec="raw")))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
