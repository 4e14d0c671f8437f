"""RepoQA's published scorer (arXiv 2406.06025), as SCBench uses it: ``scbench/repo_qa_utils.py``.

The function is cut out of an answer with tree-sitter and compared, by sentence BLEU, with every
function that is asked for about the same repository.  Only this scorer needs the grammars (the extra
``repoqa``); they are imported when it is first used.  They are newer than the published ones, which
current versions of Python cannot install: code that does not parse may be read further, or less far.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import exp, log
from types import MappingProxyType

from winnow.bench.tasks.example import Turn

__all__ = ["REPOQA", "bleu", "check", "excerpt"]

#: similarity from which a function counts as found, the threshold that SCBench reports
FOUND = 0.8
#: by language, what tree-sitter calls a function: a method of C++ and a function in a variable are none
FUNCTION: Mapping[str, str] = MappingProxyType(
    {
        "python": "(function_definition name: (_)) @function",
        "java": "(method_declaration name: (_)) @function",
        "typescript": "(function_declaration name: (_)) @function",
        "rust": "(function_item name: (_)) @function",
        "cpp": "(function_definition declarator: (function_declarator declarator: (identifier))) @function",
        "go": "(function_declaration name: (_)) @function",
    }
)
_BLOCK = re.compile(r"^```(?:\w+)?\s*\n(.*?)(?=^```)```", re.DOTALL | re.MULTILINE)


def function(turn: Turn, answer: str, language: str) -> float:
    """The right function is the most similar one, and similar enough.

    ``turn.choices`` are the functions asked for about the repository, in the order of the data: of equal
    ones the first is the most similar.  ``turn.answers`` are those that go by the right one's name.
    """
    given = excerpt(answer, language).split()
    functions = dict.fromkeys((*turn.choices, *turn.answers))
    similar = {one: bleu(given, one.split()) for one in functions}
    best = max(similar, key=similar.__getitem__)
    return float(best in turn.answers and similar[best] >= FOUND)


def excerpt(answer: str, language: str) -> str:
    """What is compared: the first function in the code blocks, else the first block, else the answer.

    Raises
    ------
    ValueError
        If tree-sitter or the language's grammar is missing.
    """
    find = _finder(language)
    blocks: list[str] = _BLOCK.findall(answer.strip())
    found = (function for block in blocks if (function := find(block)) is not None)
    return next(found, blocks[0] if blocks else answer.strip())


def check(language: str) -> None:
    """Raise ``ValueError``, with a remedy, if answers in a language cannot be scored here."""
    _finder(language)


@cache
def _finder(language: str) -> Callable[[str], str | None]:
    """Gives the function of a source that begins first; of nested ones that is the outer one."""
    if language not in FUNCTION:
        raise ValueError(f"RepoQA has no language {language!r}; it has {', '.join(FUNCTION)}")
    try:
        from tree_sitter import Language, Parser, Query, QueryCursor

        grammar = importlib.import_module(f"tree_sitter_{language}")
    except ImportError as error:
        raise ValueError(
            f"scbench:repoqa parses answers and needs {error.name}; pip install 'winnow-llm[repoqa]'"
        ) from None
    # The grammar of TypeScript comes in two dialects.
    name = "language_typescript" if language == "typescript" else "language"
    spoken = Language(getattr(grammar, name)())
    query = Query(spoken, FUNCTION[language])

    def find(source: str) -> str | None:
        try:
            text = source.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which nobody can parse
            return None
        nodes = QueryCursor(query).captures(Parser(spoken).parse(text).root_node).get("function", [])
        first = min(nodes, key=lambda node: node.start_byte, default=None)
        return None if first is None else text[first.start_byte : first.end_byte].decode()

    return find


def bleu(given: Sequence[str], wanted: Sequence[str]) -> float:
    """Sentence BLEU of up to four words with smoothing method 4 (Chen and Cherry, 2014).

    The i-th order without a match counts as ``log(n) / (5 * 2**i)`` matches, ``n`` the answer's
    length and ``i`` the number of such orders so far; of a single word such orders do not count.
    """
    if not given:
        return 0.0
    logs, empty = 0.0, 0
    for order in range(1, 5):
        have, want = _ngrams(given, order), _ngrams(wanted, order)
        matches: float = (have & want).total()
        if order == 1 and not matches:
            return 0.0
        if not matches and len(given) > 1:
            empty += 1
            matches = log(len(given)) / (5 * 2**empty)
        if not matches:
            continue
        logs += log(matches / max(1, have.total())) / 4
    brevity = 0.0 if len(given) > len(wanted) else 1 - len(wanted) / len(given)
    return exp(brevity + logs)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


#: ``scbench:repoqa`` for Python, ``scbench:repoqa:rust`` and so on for the others
REPOQA: Mapping[str, Callable[[Turn, str], float]] = MappingProxyType(
    {
        "scbench:repoqa" + ("" if language == "python" else f":{language}"): partial(
            function, language=language
        )
        for language in FUNCTION
    }
)
