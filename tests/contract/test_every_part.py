"""What every part owes, whatever its slot."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from contract_harness import SAMPLES, everywhere, names, walk

from winnow.compression.actions.drop import Drop
from winnow.compression.budgets.uniform import Uniform
from winnow.compression.protocol import Compress
from winnow.compression.scorers.window_attention import WindowAttention
from winnow.recipe import Recipe

_AROUND = {"scorer": "score", "budget": "budget", "action": "act"}


def recipe_with(part: object, slot: str) -> Recipe:
    if slot not in _AROUND:
        return Recipe(**{slot: part})
    whole = Compress(score=WindowAttention(window=4), budget=Uniform(keep=11), act=Drop())
    profile = "some.safetensors" if part.needs.profile else None
    return Recipe(compression=dataclasses.replace(whole, **{_AROUND[slot]: part}), profile=profile)


def test_walk_finds_parts():
    assert len(walk()) >= 8


@everywhere("in the table")
def test_in_the_table(part):
    assert part in names(), f"{part.__name__} is missing from winnow.recipe.PARTS"


@everywhere("has samples")
def test_has_samples(part):
    assert part in SAMPLES, f"{part.__name__} needs a Sample in tests/contract/contract_harness.py"


@everywhere("frozen")
def test_frozen_and_keyword_only(part):
    assert part.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(part))
    assert hash(SAMPLES[part].tight) == hash(dataclasses.replace(SAMPLES[part].tight))


@everywhere("survives YAML")
@pytest.mark.parametrize("which", ["tight", "limit"])
def test_recipe_survives_yaml(part, which):
    recipe = recipe_with(getattr(SAMPLES[part], which), walk()[part])
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


@everywhere("documented")
def test_every_parameter_is_documented(part):
    for field in dataclasses.fields(part):
        assert field.name in (part.__doc__ or ""), f"{part.__name__}.{field.name} is not in the docstring"


@everywhere("fingerprint")
def test_every_parameter_changes_the_fingerprint(part):
    slot, tight = walk()[part], SAMPLES[part].tight
    base = recipe_with(tight, slot).fingerprint()
    hints = get_type_hints(part)
    for field in dataclasses.fields(part):
        value = getattr(tight, field.name)
        if get_origin(hints[field.name]) is Literal:
            changed = next(one for one in get_args(hints[field.name]) if one != value)
        elif isinstance(value, int) and not isinstance(value, bool):
            changed = value + 2
        elif isinstance(value, float):
            changed = value / 2 + 0.125  # a share stays a share
        else:
            continue
        other = dataclasses.replace(tight, **{field.name: changed})
        assert recipe_with(other, slot).fingerprint() != base, field.name
