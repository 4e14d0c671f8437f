"""RepoQA's published scorer: which function it cuts out of an answer, and what it says of it."""

from __future__ import annotations

import sys

import pytest

from winnow.bench import repoqa_scorer
from winnow.bench.repoqa_scorer import FUNCTION, excerpt
from winnow.bench.scorers import SCORERS
from winnow.bench.tasks import Turn

ADD = '''def add(left, right):
    """The sum."""
    total = left + right  # both of them
    return total'''
SUB = ADD.replace("add", "sub").replace("left + right", "left - right").replace("sum", "difference")


def block(*lines, tag="python"):
    return "\n".join([f"```{tag}", *lines, "```"])


@pytest.mark.parametrize(
    ("answer", "cut"),
    [
        # prose around a block
        (f"It is this one:\n\n{block(ADD)}\n\nIt adds.", ADD),
        (block(ADD, tag=""), ADD),
        # what surrounds a function in its block goes: imports, decorators, calls
        (block("import math", "", "@cache", ADD, "", "print(add(1, 2))"), ADD),
        (block("async " + ADD), "async " + ADD),
        # several functions: the first; several blocks: the first that has a function
        (block(SUB, "", ADD), SUB),
        (f"{block('pip install it', tag='sh')}\nand then\n{block(ADD)}\n{block(SUB)}", ADD),
        # nested functions come with what surrounds them; a method without its class
        (block("def outer():", "    def inner():", "        pass", "    return inner"), ...),
        (
            block("class A:", "    x = 1", "", "    def f(self):", "        return 1"),
            "def f(self):\n        return 1",
        ),
        # no function: the first block; no block: everything
        (block("x = 1", "y = 2"), "x = 1\ny = 2\n"),
        (f"{block('x = 1')}\n{block('y = 2')}", "x = 1\n"),
        (f"  {ADD}\n", ADD),
        (f"The function is {ADD}", f"The function is {ADD}"),
        # a fence that is not closed is no block; nor is one behind other text
        (f"```python\n{ADD}", f"```python\n{ADD}"),
        (f"here: ```\n{ADD}\n```", f"here: ```\n{ADD}\n```"),
        # code that is wrong is read as far as it makes sense
        (block("def (:", "    ]["), "def (:\n    ][\n"),
        (block("x = = 1", "", ADD), ADD),
        ("", ""),
        # half a surrogate pair cannot be parsed
        (block("x = '\ud800'"), "x = '\ud800'\n"),
        (block("# π", ADD), ADD),
    ],
)
def test_what_is_cut_out_of_an_answer(answer, cut):
    if cut is ...:
        cut = answer.removeprefix("```python\n").removesuffix("\n```")
    assert excerpt(answer, "python") == cut


OTHERS = {
    "java": ("class A {\n  int x;\n", "int twice(int n) {\n    return 2 * n;\n  }", "\n}"),
    "typescript": (
        "export ",
        "function twice(n: number): number {\n  return 2 * n;\n}",
        "\nconst f = (n) => n;",
    ),
    "rust": ("/// Twice.\n", "pub fn twice(n: i32) -> i32 {\n    2 * n\n}", "\nstruct A;"),
    "cpp": ("void A::f() { g(); }\n", "int twice(int n) {\n  return 2 * n;\n}", "\nint x;"),
    "go": ("package a\n\n", "func twice(n int) int {\n\treturn 2 * n\n}", "\n\nvar x = 1"),
}


@pytest.mark.parametrize("language", OTHERS)
def test_other_languages(language):
    before, function, after = OTHERS[language]
    answer = f"Here:\n{block(before + function + after, tag=language)}"
    assert excerpt(answer, language) == function
    turn = Turn(
        question="?",
        answers=(function,),
        scorer=f"scbench:repoqa:{language}",
        max_new_tokens=8,
        depth=None,
        choices=(function.replace("twice", "thrice"), function),
    )
    assert SCORERS[turn.scorer](turn, answer) == 1
    assert SCORERS[turn.scorer](turn, answer.replace("twice", "thrice")) == 0


def test_every_language_has_a_scorer():
    assert set(OTHERS) | {"python"} == set(FUNCTION)
    assert {f"scbench:repoqa:{language}" for language in OTHERS} | {"scbench:repoqa"} == set(
        repoqa_scorer.REPOQA
    )


def score(answers, given, choices):
    turn = Turn(
        question="?", answers=answers, scorer="scbench:repoqa", max_new_tokens=8, depth=None, choices=choices
    )
    return SCORERS[turn.scorer](turn, given)


def test_the_most_similar_function_must_be_the_right_one():
    assert score((ADD,), block(ADD), (ADD, SUB)) == 1
    assert score((ADD,), block(SUB), (ADD, SUB)) == 0
    assert score((ADD,), block("import math", ADD), (ADD, SUB)) == 1
    assert score((ADD,), block("def helper():", "    return 1", "", ADD), (ADD, SUB)) == 0, (
        "a fault that is kept"
    )
    assert score((ADD,), "I do not know", (ADD, SUB)) == 0
    # far from all of them, and nearest to the right one
    assert score((ADD,), block(ADD.split("\n")[0], "    return left + right"), (ADD, SUB)) == 0


def test_of_equal_functions_the_first_is_the_most_similar_and_names_decide():
    one, two = "def f(a):\n    return a + a + a", "def f(a):\n    return a  + a + a"
    assert score((one,), block(one), (one, two)) == 1
    assert score((two,), block(two), (one, two)) == 0
    # functions of one name stand for each other
    assert score((two, one), block(two), (one, two)) == 1


@pytest.mark.parametrize("missing", ["tree_sitter", "tree_sitter_rust"])
def test_a_missing_parser_is_named_with_a_remedy(monkeypatch, missing):
    repoqa_scorer._finder.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"needs {missing}; pip install 'winnow-llm\[repoqa\]'"):
        repoqa_scorer.check("rust")
    monkeypatch.undo()
    repoqa_scorer.check("rust")


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="no language 'cobol'; it has python"):
        repoqa_scorer.check("cobol")
