"""Real text: a fact hidden in source code that nobody wrote for this model."""

from __future__ import annotations

import inspect
import textwrap

import pytest

import winnow


@pytest.fixture(scope="module")
def source() -> str:
    text = inspect.getsource(textwrap)
    middle = text.rfind("\n", 0, 1500) + 1
    return f"{text[:middle]}key bako -> 48-21\n{text[middle:3000]}\n"


@pytest.mark.parametrize("recipe", [None, "sparse-read", "four-stages"])
def test_a_fact_is_found_in_source_code(source, recipe):
    llm = winnow.load("embedded", recipe=recipe)
    result = llm.generate(f"{source}Q: key bako A:", max_new_tokens=12, stop=("\n",))
    assert result.text.strip() == "48-21"
    assert result.stats.tokens_computed > 2000
