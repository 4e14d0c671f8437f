"""What a task is: a name, its difficulty, a maker and an oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from winnow.bench.tasks.example import Category, Example, Form, Join, Turn

__all__ = ["Count", "Draft", "Request", "Task"]

#: tokens of an example; the vocabularies of names are large enough for these
LENGTHS = range(256, 2**20 + 1)
#: tokens of a text in the user's tokenizer
Count = Callable[[str], int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a maker is asked for; ``seed_text`` seeds every choice, ``knobs`` are complete."""

    length: int
    seed: int
    number: int
    turns: int
    count: Count
    knobs: Mapping[str, int]
    seed_text: str


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a maker returns."""

    context: str
    turns: tuple[Turn, ...]
    join: Join


Maker = Callable[[Request], Draft]
Oracle = Callable[[Example, Turn], str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of the lifecycle benchmark, in one or two forms.

    Attributes
    ----------
    name : str
        As in SCBench (arXiv 2412.10319) where it has the task, without ``scbench_``.
    category : str
        ``string``, ``semantic``, ``global`` or ``multi-task``.
    about : str
        One line for lists.
    text, embedded : callable or None
        Makers of the two forms.
    text_knobs, embedded_knobs : mapping of str to int
        Difficulty: names and defaults of each form.
    oracles : mapping of str to callable
        For each form a function that reads the context and answers a turn.
    turns : int
        Questions asked by default.
    """

    name: str
    category: Category
    about: str
    oracles: Mapping[Form, Oracle]
    text: Maker | None = None
    embedded: Maker | None = None
    text_knobs: Mapping[str, int] = field(default_factory=dict)
    embedded_knobs: Mapping[str, int] = field(default_factory=dict)
    turns: int = 5

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that the task has."""
        makers: tuple[tuple[Form, Maker | None], ...] = (("text", self.text), ("embedded", self.embedded))
        return tuple(form for form, maker in makers if maker is not None)

    def knobs(self, form: Form) -> Mapping[str, int]:
        """Names and defaults of a form's difficulty knobs."""
        return self.text_knobs if form == "text" else self.embedded_knobs

    def make(
        self,
        *,
        form: Form = "text",
        length: int,
        seed: int,
        number: int = 0,
        turns: int | None = None,
        count: Count,
        knobs: Mapping[str, int] | None = None,
    ) -> Example:
        """Make one example; the same arguments give the same bytes on every machine.

        Parameters
        ----------
        form : str
            ``text`` or, where the task has it, ``embedded``.
        length : int
            Tokens of the example's opening, met within 5 %.
        seed, number : int
            The run's seed and the example's number, both in ``range(1000)``.
        turns : int, optional
            Questions; by default the task's.
        count : callable
            Tokens of a text in the model's tokenizer.  It is called a few times per example.
        knobs : mapping, optional
            Difficulty that differs from the defaults of `knobs`.

        Raises
        ------
        ValueError
            If the task has no such form or knob, or the length cannot hold what the knobs ask for.
        """
        maker = self.text if form == "text" else self.embedded
        if maker is None:
            raise ValueError(f"task {self.name} has no {form} form; it has {', '.join(self.forms)}")
        unknown = sorted(set(knobs or ()) - set(self.knobs(form)))
        if unknown:
            known = ", ".join(self.knobs(form)) or "none"
            raise ValueError(f"task {self.name} has no knob {unknown[0]!r}; its {form} knobs: {known}")
        if not (0 <= seed < 1000 and 0 <= number < 1000):
            raise ValueError(f"seed and number must lie in 0..999, not {seed} and {number}")
        if length not in LENGTHS:
            raise ValueError(f"examples have {LENGTHS[0]} to {LENGTHS[-1]} tokens, not {length}")
        wanted = self.turns if turns is None else turns
        if wanted < 1:
            raise ValueError(f"an example needs at least one turn, not {wanted}")
        full = {**self.knobs(form), **(knobs or {})}
        listed = ",".join(f"{name}={full[name]}" for name in sorted(full))
        draft = maker(
            Request(
                length=length,
                seed=seed,
                number=number,
                turns=wanted,
                count=count,
                knobs=full,
                seed_text=f"winnow/{self.name}/{form}/{length}/{wanted}/{listed}/{seed}/{number}",
            )
        )
        return Example(
            task=self.name,
            category=self.category,
            form=form,
            length=length,
            seed=seed,
            number=number,
            context=draft.context,
            turns=draft.turns,
            join=draft.join,
        )

    def solve(self, example: Example, turn: Turn) -> str:
        """Answer a turn from the context alone, by rule; never looks at the stored answers."""
        return self.oracles[example.form](example, turn)
