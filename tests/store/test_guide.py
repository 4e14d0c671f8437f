"""The Python of the guide pages about store and retrieval runs, and their recipes are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from winnow.recipe import Recipe

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
PAGES = ["store.md", "retrieval.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (GUIDE / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str) -> None:
    whole = [block for block in blocks(page, "python") if block.startswith("import")]
    assert whole
    for block in whole:
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_recipes_are_valid(page: str) -> None:
    found = blocks(page, "yaml")
    assert found
    for block in found:
        recipe = Recipe.from_yaml(block)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_sizes_in_the_table_are_those_of_the_codecs() -> None:
    import torch

    from winnow.store.codecs import CODECS, bytes_per_entry

    text = (GUIDE / "store.md").read_text()
    for name, codec in CODECS.items():
        size = bytes_per_entry(codec, 64, torch.bfloat16)
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {size} |" in row
        assert f"{256 / size:.1f} times smaller" in row or name == "raw"
