"""Readers of published data: SCBench, RULER and LongBench as `Example`.

Nothing is downloaded unless the user names a hub's data set (``hub:owner/name/config``, which needs
the package ``datasets``); otherwise a source is a local ``.json`` or ``.jsonl`` file in the published
schema.  Prompts are put together as the benchmarks do it for models without a chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from winnow.bench import repoqa_scorer
from winnow.bench.tasks.example import Category, Example, Join, Turn

__all__ = ["READERS", "longbench", "ruler", "scbench"]

Row = Mapping[str, Any]
Count = Callable[[str], int]
LETTERS = "ABCD"


def rows(source: str | Path) -> Iterator[Row]:
    """The rows of a JSON (a list, or ``{"data": list}``) or JSON Lines file, or of a hub's data set.

    Raises
    ------
    ValueError
        If there is no such file, it holds something else, or ``datasets`` is missing.
    """
    if str(source).startswith("hub:"):
        yield from _hub(str(source).removeprefix("hub:"))
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; give a local .json or .jsonl file, or hub:owner/name/config"
        )
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); JSON Lines files end in .jsonl") from None
    yield from held["data"] if isinstance(held, dict) else held


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}); is the download complete?") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object; rows are objects in the published schemas")
    return row


def _hub(name: str) -> Iterator[Row]:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError("reading from a hub needs the package datasets; pip install datasets") from None
    owner, _, rest = name.partition("/")
    data, _, config = rest.partition("/")
    yield from datasets.load_dataset(f"{owner}/{data}", config or None, split="test")


def _need(row: Row, number: int, *fields: str, what: str = "row") -> None:
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(f"{what} {number} has no {missing[0]!r}; its fields are {', '.join(map(str, row))}")


def _depth(context: str, answer: str) -> float | None:
    """Where the answer stands in the context, if it does so once."""
    return context.index(answer) / len(context) if answer and context.count(answer) == 1 else None


# ------------------------------------------------------------------------------------- SCBench


@dataclass(frozen=True, kw_only=True)
class _Published:
    """What SCBench fixes about one of its tasks; ``mixed`` are the tokens of its turns in a mixture."""

    category: Category
    scorer: str
    corrected: str
    tokens: int
    mixed: int = 0
    opening: str = "{context}"
    question: str = "\n\n{question}"
    answer: str = "{answer}"


_KV = _Published(
    category="string",
    scorer="scbench:kv",
    corrected="string",
    tokens=150,
    mixed=80,
    opening="Extract the value corresponding to the specified key in the JSON object below.\n\n{context}",
)
_REPOQA = _Published(
    category="semantic",
    scorer="scbench:repoqa",
    corrected="code",
    tokens=1024,
    mixed=1024,
    opening=(
        "Based on the function description and code context, please retrieve and repeat the exact "
        "described function from the code context in a code block wrapped by ```:\n\n{context}"
    ),
)
_SUMMARY = _Published(
    category="global", scorer="scbench:summary", corrected="scbench:summary", tokens=200, mixed=800
)
_BOOK = "Read the book and answer the question.{concise}\n\n{{context}}"
#: by the data's name without ``scbench_``; token limits as in the published harness
SCBENCH: Mapping[str, _Published] = {
    "kv": _KV,
    "prefix_suffix": _Published(
        category="string", scorer="scbench:prefix_suffix", corrected="string", tokens=150
    ),
    "vt": _Published(category="string", scorer="scbench:vt", corrected="facts", tokens=30),
    "repoqa": _REPOQA,
    "qa_eng": _Published(
        category="semantic",
        scorer="scbench:qa_eng",
        corrected="phrase",
        tokens=40,
        opening=_BOOK.format(concise=" Be very concise in your answer."),
        question="\n\nQuestion: {question}\nAnswer:",
    ),
    "qa_chn": _Published(
        category="semantic",
        scorer="scbench:qa_chn",
        corrected="longbench:qa_zh",
        tokens=40,
        opening="阅读以下书籍然后回答问题。\n\n{context}",
        question="\n\n问题：{question}\n答案：",  # noqa: RUF001
    ),
    "choice_eng": _Published(
        category="semantic",
        scorer="scbench:choice_eng",
        corrected="choice",
        tokens=40,
        opening=_BOOK.format(concise=""),
        question="\n\nQuestion: {question}",
    ),
    "mf": _Published(category="global", scorer="scbench:mf", corrected="number", tokens=5),
    "many_shot": _Published(category="global", scorer="scbench:many_shot", corrected="phrase", tokens=10),
    "summary": _SUMMARY,
    "summary_with_needles": _Published(
        category="multi-task", scorer="scbench:summary", corrected="scbench:summary", tokens=800
    ),
    "passkey": _Published(
        category="string",
        scorer="scbench:passkey",
        corrected="number",
        tokens=15,
        mixed=15,
        opening=(
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information.\n\n{context}"
        ),
        answer="{answer}.",
    ),
    "repoqa_and_kv": _Published(
        category="multi-task", scorer="scbench:repoqa", corrected="code", tokens=1024
    ),
}


def scbench(
    source: str | Path, *, count: Count, task: str | None = None, published: bool = False
) -> Iterator[Example]:
    """Read SCBench (arXiv 2412.10319): rows of ``context`` and ``multi_turns`` (``input``, ``answer``).

    Parameters
    ----------
    source : str or Path
        Local file, or ``hub:microsoft/SCBench/scbench_kv``.
    count : callable
        Tokens of a text, for the examples' length.
    task : str, optional
        ``kv`` or ``scbench_kv``; by default from the source's name.
    published : bool
        Score as published (``scbench:...``) instead of with the corrected scorers.

    Notes
    -----
    Prompts are those of the published multi-turn mode.  ``context`` may be a list of numbers (math find).
    Turns of mixtures name their own ``task``.  Functions asked for about the same ``repo`` anywhere in
    the source become each other's ``choices``, which the published scorer compares with.  The golden
    answer of a multiple choice is shown to later turns as its letter, with ``published`` as its text.

    Raises
    ------
    ValueError
        If the source holds something else, or ``published`` needs a parser that is not installed.
    """
    name = (task or Path(str(source)).stem).removeprefix("scbench_")
    if name not in SCBENCH:
        raise ValueError(f"SCBench has no task {name!r}; name one of {', '.join(SCBENCH)}")
    held = list(rows(source))
    for number, row in enumerate(held):
        _need(row, number, "context", "multi_turns")
    functions = _functions(held)
    spec = SCBENCH[name]
    for number, row in enumerate(held):
        context = row["context"] if isinstance(row["context"], str) else str(list(row["context"]))
        opening = spec.opening
        if name == "mf":
            opening = _target(row["multi_turns"][0]["input"]) + "\n\n{context}"
        join = Join(opening=opening, question=spec.question, answer=spec.answer)
        yield Example(
            task=f"{'scbench-published' if published else 'scbench'}:{name}",
            category=spec.category,
            form="text",
            length=count(join.open(context)),
            seed=0,
            number=number,
            context=context,
            turns=tuple(
                _scbench_turn(name, at, turn, row, context, published, functions)
                for at, turn in enumerate(row["multi_turns"])
            ),
            join=join,
        )


def _functions(held: Sequence[Row]) -> Mapping[str, Sequence[tuple[str, str]]]:
    """Name and source of every function that is asked for, by repository."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in held:
        if "repo" in row:
            found.setdefault(row["repo"], []).extend(
                (str(turn.get("name")), str(turn["answer"]))
                for turn in row["multi_turns"]
                if turn.get("task", "repoqa").endswith("repoqa")
            )
    return found


def _target(question: str) -> str:
    """Math find states its question a second time: "What is the largest number?"."""
    found = re.search(r"The .+ is", question)
    if found is None:
        raise ValueError(f"{question!r} is no question of math find (The ... is); is the task right?")
    return f"What is {found[0].lower().removesuffix(' is')}?"


def _scbench_turn(
    name: str,
    at: int,
    turn: Row,
    row: Row,
    context: str,
    published: bool,
    functions: Mapping[str, Sequence[tuple[str, str]]],
) -> Turn:
    own = str(turn.get("task", name)).removeprefix("scbench_")
    spec = SCBENCH[own]
    question, answer = str(turn["input"]), turn["answer"]
    if own in ("mf", "passkey") and isinstance(answer, list):
        (answer,) = answer
    scorer = spec.scorer if published else spec.corrected
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = (str(answer), *(map(str, answer) if isinstance(answer, list) else ()))
    if own == "choice_eng":
        choices = tuple(turn["options"])
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))
        # The first question is worded in another way, slip included.
        question += f"{listed}\n\nThe {'letter of the' if at else 'the'} correct answer is"
        answers = (LETTERS[choices.index(answer)], str(answer))
        answers = answers[::-1] if published else answers
    elif own == "mf" and at:
        question = f"{_target(question)}\n\n{question}"
    elif own == "repoqa":
        known = functions.get(row.get("repo", ""), ())
        choices = tuple(code for _, code in known)
        if published:
            _need(row, row.get("id", 0), "lang")
            _need(turn, at, "name", what="turn")
            scorer = _repoqa(scorer, str(row["lang"]))
            answers += tuple(code for name, code in known if name == turn["name"] and code != answers[0])
    elif own == "vt" and len(answers) == 1 and not published:
        answers *= 2
    return Turn(
        question=question,
        answers=answers,
        scorer=scorer,
        max_new_tokens=spec.tokens if own == name else spec.mixed,
        depth=_depth(context, str(answer)),
        choices=choices,
    )


def _repoqa(scorer: str, language: str) -> str:
    """The published scorer of a language; refused before a model answers rather than after."""
    repoqa_scorer.check(language)
    return scorer if language == "python" else f"{scorer}:{language}"


# --------------------------------------------------------------------------------------- RULER

#: by the opening of a task's name: category, scorer, tokens of an answer
RULER: Mapping[str, tuple[Category, str, int]] = {
    "niah": ("string", "facts", 128),
    "vt": ("string", "facts", 30),
    "cwe": ("global", "facts", 120),
    "fwe": ("global", "facts", 50),
    "qa": ("semantic", "phrase", 32),
}


def ruler(source: str | Path, *, count: Count, task: str | None = None) -> Iterator[Example]:
    """Read RULER (arXiv 2404.06654): rows of ``input``, ``outputs`` and, in newer data, ``answer_prefix``.

    The last line of ``input`` is the question, what stands before it the context.  Scored by the
    share of the outputs found (published: substrings; here whole words), questions by any of them.

    Parameters
    ----------
    source, count
        As in `scbench`.
    task : str, optional
        ``niah_single_1``, ``vt``, ...; by default the name of the file or, for files named
        ``validation`` or ``test``, of its folder.
    """
    path = Path(str(source))
    name = task or (path.parent.name if path.stem in ("validation", "test") else path.stem)
    opening = name.split("_")[0]
    if opening not in RULER:
        raise ValueError(f"RULER has no task {name!r}; its tasks begin with {', '.join(RULER)}")
    category, scorer, tokens = RULER[opening]
    join = Join(opening="{context}", question="{question}", answer=" {answer}")
    for number, row in enumerate(rows(source)):
        _need(row, number, "input", "outputs")
        context, newline, question = row["input"].rstrip("\n").rpartition("\n")
        outputs = tuple(map(str, row["outputs"]))
        answers = (", ".join(outputs), *outputs) if scorer == "facts" else outputs
        position = row.get("token_position_answer")
        depth = position / row["length"] if position is not None else _depth(context, outputs[0])
        yield Example(
            task=f"ruler:{name}",
            category=category,
            form="text",
            length=count(context),
            seed=0,
            number=number,
            context=context,
            turns=(
                Turn(
                    question=newline + question + row.get("answer_prefix", ""),
                    answers=answers,
                    scorer=scorer,
                    max_new_tokens=tokens,
                    depth=depth,
                ),
            ),
            join=join,
        )


# ------------------------------------------------------------------------------------ LongBench

#: category, scorer, tokens of an answer
LONGBENCH: Mapping[str, tuple[Category, str, int]] = {
    "narrativeqa": ("semantic", "longbench:qa", 128),
    "qasper": ("semantic", "longbench:qa", 128),
    "multifieldqa_en": ("semantic", "longbench:qa", 64),
    "multifieldqa_zh": ("semantic", "longbench:qa_zh", 64),
    "hotpotqa": ("semantic", "longbench:qa", 32),
    "2wikimqa": ("semantic", "longbench:qa", 32),
    "musique": ("semantic", "longbench:qa", 32),
    "dureader": ("semantic", "longbench:rouge_zh", 128),
    "gov_report": ("global", "longbench:rouge", 512),
    "qmsum": ("global", "longbench:rouge", 512),
    "multi_news": ("global", "longbench:rouge", 512),
    "vcsum": ("global", "longbench:rouge_zh", 512),
    "trec": ("global", "longbench:classes", 64),
    "triviaqa": ("global", "longbench:qa_line", 32),
    "samsum": ("global", "longbench:rouge_line", 128),
    "lsht": ("global", "longbench:classes", 64),
    "passage_count": ("global", "longbench:number", 32),
    "passage_retrieval_en": ("semantic", "longbench:number", 32),
    "passage_retrieval_zh": ("semantic", "longbench:number", 32),
    "lcc": ("semantic", "longbench:code", 64),
    "repobench-p": ("semantic", "longbench:code", 64),
}
PLAIN_PROMPT = "{context}\n\n{input}"


def longbench(
    source: str | Path, *, count: Count, task: str | None = None, prompts: str | Path | None = None
) -> Iterator[Example]:
    """Read LongBench (arXiv 2308.14508) and LongBench v2 (arXiv 2412.15204).

    Parameters
    ----------
    source, count
        As in `scbench`.
    task : str, optional
        By default each row's ``dataset`` (v1); rows of v2 need none.
    prompts : str or Path, optional
        The benchmark's ``dataset2prompt.json``; without it context and input are joined by an empty
        line, and scores cannot be compared with published ones.
    """
    templates = {} if prompts is None else json.loads(Path(prompts).read_text(encoding="utf-8"))
    for number, row in enumerate(rows(source)):
        yield (
            _choice_row(row, number, count)
            if "choice_A" in row
            else _row(row, number, count, task, templates)
        )


def _row(row: Row, number: int, count: Count, task: str | None, templates: Mapping[str, str]) -> Example:
    _need(row, number, "input", "context", "answers")
    name = str(task or row.get("dataset", "")).removesuffix("_e")
    if name not in LONGBENCH:
        raise ValueError(f"LongBench has no task {name!r}; name one of {', '.join(LONGBENCH)}")
    category, scorer, tokens = LONGBENCH[name]
    before, _, after = templates.get(name, PLAIN_PROMPT).partition("{context}")
    join = Join(
        opening=before + "{context}", question=after.replace("{input}", "{question}"), answer=" {answer}"
    )
    answers = tuple(map(str, row["answers"]))
    return Example(
        task=f"longbench:{name}",
        category=category,
        form="text",
        length=count(join.open(row["context"])),
        seed=0,
        number=number,
        context=row["context"],
        turns=(
            Turn(
                question=row["input"],
                answers=answers,
                scorer=scorer,
                max_new_tokens=tokens,
                depth=_depth(row["context"], answers[0]),
                choices=tuple(row.get("all_classes") or ()),
            ),
        ),
        join=join,
    )


def _choice_row(row: Row, number: int, count: Count) -> Example:
    _need(row, number, "question", "context", "answer", *(f"choice_{letter}" for letter in LETTERS))
    choices = tuple(str(row[f"choice_{letter}"]) for letter in LETTERS)
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))
    join = Join(question="\n\nQuestion: {question}\n\nThe letter of the correct answer is")
    return Example(
        task="longbench:v2",
        category="semantic",
        form="text",
        length=count(row["context"]),
        seed=0,
        number=number,
        context=row["context"],
        turns=(
            Turn(
                question=row["question"] + listed,
                answers=(row["answer"], choices[LETTERS.index(row["answer"])]),
                scorer="choice",
                max_new_tokens=16,
                depth=None,
                choices=choices,
            ),
        ),
        join=join,
    )


#: by benchmark; all take the source and ``count``
READERS: Mapping[str, Callable[..., Iterable[Example]]] = {
    "scbench": scbench,
    "scbench-published": partial(scbench, published=True),
    "ruler": ruler,
    "longbench": longbench,
}
