"""Chronicles: people, what they did, and questions about it, in any language of templates.

A language is data: how a fact is told (in several ways), how it is asked for, and how a person is
described by a deed ("the person who built the mill of Ostvale in 1432"), which makes a question of
two hops out of one of one hop.  The oracle reads the same templates backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from winnow.bench.tasks.text.fit import shuffled
from winnow.bench.tasks.text.templates import compiled, read_slots
from winnow.models.embedded.dice import Dice

__all__ = ["Fact", "Language", "Query", "Relation", "answer", "query", "tell"]

Fact = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact about a person.

    Attributes
    ----------
    told : tuple of str
        Templates of the sentence, with the same slots in all.
    asked : str
        Template of the question; its slots name one fact.
    wanted : str
        The slot that answers it.
    """

    told: tuple[str, ...]
    asked: str
    wanted: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Language:
    """Templates and vocabulary of a chronicle.

    Attributes
    ----------
    relations : mapping of str to Relation
    described : str
        Noun phrase for a person by the slots of the relation ``built``.
    people : tuple of str
        Names; none is used for two people.
    values : mapping of str to callable
        From dice to the text of a slot.
    patterns : mapping of str to str
        Regular expressions of slots whose text could end too early or too late.
    sentence, paragraph : str
        What separates sentences and paragraphs; sentences end with their own full stop.
    stop : str
        The full stop, which occurs nowhere else.
    """

    relations: Mapping[str, Relation]
    described: str
    people: tuple[str, ...]
    values: Mapping[str, Callable[[Dice], str]]
    patterns: Mapping[str, str]
    sentence: str
    paragraph: str
    stop: str


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question, its answer, the fact that holds it, that fact's relation and the slot it fills there."""

    question: str
    answer: str
    source: int
    relation: str
    slot: str


def _fact(dice: Dice, language: Language, relation: str, person: str) -> dict[str, str]:
    told = language.relations[relation].told[0]
    slots = [slot for slot in language.values if slot != "person" and f"{{{slot}}}" in told]
    return {"relation": relation, "person": person} | {slot: language.values[slot](dice) for slot in slots}


def tell(dice: Dice, language: Language, n: int) -> tuple[list[Fact], list[str]]:
    """``n`` facts in random order, and the sentence for each.

    Every person has one fact of every relation, but for the last one who has what is left.  What was
    built (thing, place, year) is never built twice.
    """
    facts: list[Fact] = []
    built: set[tuple[str, ...]] = set()
    persons = -(-n // len(language.relations))
    if persons > len(language.people):
        raise ValueError(f"a chronicle of {n} facts needs {persons} names, of {len(language.people)}")
    for person in dice.sample(language.people, persons):
        for relation in language.relations:
            fact = _fact(dice, language, relation, person)
            while relation == "built" and _work(fact) in built:
                fact = _fact(dice, language, relation, person)
            if relation == "built":
                built.add(_work(fact))
            facts.append(fact)
    facts = [facts[index] for index in shuffled(dice, n)]
    sentences = [dice.pick(language.relations[fact["relation"]].told).format(**fact) for fact in facts]
    return facts, sentences


def _work(fact: Fact) -> tuple[str, ...]:
    return fact["thing"], fact["place"], fact["year"]


def query(
    dice: Dice, language: Language, facts: Sequence[Fact], near: int, hops: int, used: set[int]
) -> Query:
    """A question about the first fact from ``near`` on that can be asked and was not yet.

    Parameters
    ----------
    facts : sequence of mapping
        From `tell`.
    near : int
        Where in the chronicle the answer should lie.
    hops : int
        1 names the person, 2 describes the person by what they built.
    used : set of int
        Facts already asked for; the chosen one is added.
    """
    works = {fact["person"]: fact for fact in facts if fact["relation"] == "built"}
    for step in range(len(facts)):
        source = (near + step) % len(facts)
        fact = facts[source]
        relation = language.relations[fact["relation"]]
        if source in used or (hops == 2 and (relation.wanted == "person" or fact["person"] not in works)):
            continue
        used.add(source)
        person = fact["person"]
        if hops == 2:
            person = language.described.format(**works[person])
        asked = relation.asked.format(**{**fact, "person": person})
        return Query(
            question=asked,
            answer=fact[relation.wanted],
            source=source,
            relation=fact["relation"],
            slot=relation.wanted,
        )
    raise ValueError("the chronicle has no further fact to ask for; ask for fewer turns or more tokens")


def answer(language: Language, context: str, question: str) -> str:
    """Read the chronicle and answer a question about it."""
    facts = _read(language, context)
    for name, relation in language.relations.items():
        known = read_slots(relation.asked, question, {**language.patterns, "person": ".+?"})
        if known is None:
            continue
        if "person" in known:
            work = read_slots(language.described, known["person"], language.patterns)
            if work is not None:
                known = {**known, "person": _only(facts, "built", work)["person"]}
        return _only(facts, name, known)[relation.wanted]
    raise AssertionError(f"no relation asks {question!r}")


def _only(facts: Sequence[Fact], relation: str, known: Fact) -> Fact:
    """The one fact of a relation that has these slots."""
    (fact,) = (f for f in facts if f["relation"] == relation and all(f[k] == v for k, v in known.items()))
    return fact


@lru_cache(maxsize=1)
def _read(language: Language, context: str) -> tuple[Fact, ...]:
    """All facts that the sentences of a context tell; other sentences are passed over.

    The last context is remembered, since all turns ask about the same one.
    """
    readers = [
        (name, compiled(told, language.patterns))
        for name, relation in language.relations.items()
        for told in relation.told
    ]
    facts: list[Fact] = []
    text = context.replace(language.paragraph, language.sentence)
    for sentence in text.split(language.stop + language.sentence):
        whole = sentence.removesuffix(language.stop) + language.stop
        for name, reader in readers:
            if found := reader.fullmatch(whole):
                facts.append({"relation": name, **found.groupdict()})
    return tuple(facts)
