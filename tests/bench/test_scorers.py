"""Scorers on hand-made cases, the published faults among them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.bench.repoqa_scorer import bleu
from winnow.bench.scbench_scorers import rouge_lsum
from winnow.bench.scorers import SCORERS, similarity
from winnow.bench.tasks import Turn


def turn(scorer, *answers, choices=()):
    return Turn(question="?", answers=answers, scorer=scorer, max_new_tokens=8, depth=None, choices=choices)


def score(scorer, answers, given, choices=()):
    answers = (answers,) if isinstance(answers, str) else answers
    return SCORERS[scorer](turn(scorer, *answers, choices=choices), given)


TOWNS = ("Darby", "Ashford", "Burley", "Calstead")
CODE = "def add(left, right):\n    # sum\n    return left + right"
OTHER = "class Reader:\n    def close(self):\n        self.file.close()\n        self.file = None"

CASES = [
    # the embedded model: first line, after the last "="
    ("value", "48-21", " 48-21\nQ: key", 1),
    ("value", ("bako = 48-21", "48-21"), "48-21", 1),
    ("value", ("bako = 48-21", "48-21"), "zimu = 48-21", 1),
    ("value", "48-21", "48-22", 0),
    ("value", "48-21", "\n\n48-21", 1),
    ("value", "48-21", "48-210", 0),
    # whole strings, letter by letter
    ("string", "a1b2", 'The value is "a1b2".', 1),
    ("string", "a1b2", "a1b2", 1),
    ("string", "a1b2", "A1B2", 0),
    ("string", "a1b2", "a1b23", 0),
    ("string", "a1b2", "0a1b2", 0),
    ("string", "a1b2-c3", "a1b2-c3-d4", 0),
    ("string", "a1b2", "x-a1b2", 0),
    ("string", "19", "1975", 0),
    ("string", ("a", "b"), "it is b", 1),
    ("string", "a.c", "abc", 0),
    ("phrase", "Gara Larkford", "it was gara\n larkford!", 1),
    ("phrase", "Gara Larkford", "Gara Larkfords", 0),
    ("phrase", "铁匠", "他的职业是铁匠。", 1),
    ("phrase", "铁匠", "木匠", 0),
    ("phrase", "581", "他买了581支蜡烛", 1),
    ("phrase", "58", "他买了581支蜡烛", 0),
    ("phrase", "(A)", "(A)", 1),
    ("phrase", "(A)", "A", 0),
    # labels are strings, not sets of characters
    ("label", "dax", "dax", 1),
    ("label", "dax", " Dax.\nThing: dog", 1),
    ("label", "dax", "'dax'", 1),
    ("label", "dax", "d", 0),
    ("label", "dax", "xad", 0),
    ("label", "dax", "wug or dax", 0),
    # sets
    ("set", ("ABCDE, FGHIJ", "ABCDE", "FGHIJ"), "ABCDE, FGHIJ", 1),
    ("set", ("ABCDE, FGHIJ", "ABCDE", "FGHIJ"), "They are FGHIJ and ABCDE.", 1),
    ("set", ("ABCDE, FGHIJ", "ABCDE", "FGHIJ"), "ABCDE", 2 / 3),
    ("set", ("ABCDE, FGHIJ", "ABCDE", "FGHIJ"), "ABCDE, FGHIJ, KLMNO, PQRST", 2 / 3),
    ("set", ("ABCDE, FGHIJ", "ABCDE", "FGHIJ"), "abcde", 0),
    # numbers
    ("number", "98", "98", 1),
    ("number", "98", "The 2nd largest number is 98.", 1),
    ("number", "98", "98.0", 1),
    ("number", "-7", "-7", 1),
    ("number", "7", "-7", 0),
    ("number", "1234", "It is 1,234.", 1),
    ("number", "1234", "1,2345", 0),
    ("number", "98", "981", 0),
    ("number", "98", "97 or 98", 0),
    ("number", "98", "none", 0),
    ("number", "98", "\n98\n99", 1),
    # facts
    ("facts", ("s", "Maric Dove", "2187", "45"), "Maric Dove has 2,187 and 45", 1),
    ("facts", ("s", "Maric Dove", "2187", "45"), "maric dove has 21870 and 450", 1 / 3),
    # code
    ("code", f"```python\n{CODE}\n```", CODE, 1),
    ("code", f"```python\n{CODE}\n```", f"Here it is:\n```\n{CODE}\n```\nIt adds.", 1),
    ("code", f"```python\n{CODE}\n```", "def add( left,right ):\n  return left+right", 1),
    ("code", f"```python\n{CODE}\n```", OTHER, 0),
    ("code", f"```python\n{CODE}\n```", f"```python\n{CODE}", 1),
]


@pytest.mark.parametrize(("scorer", "answers", "given", "right"), CASES)
def test_cases(scorer, answers, given, right):
    assert score(scorer, answers, given) == pytest.approx(right)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B. Ashford", 1),
        ("B) Ashford", 1),
        ("The answer is B", 1),
        ("The correct choice is (B).", 1),
        ("Ashford", 1),
        ("It was Ashford.", 1),
        ("A", 0),
        ("A. Ashford", 0),
        ("A town called Ashford", 1),
        ("Because of Ashford", 1),
        ("Burley", 0),
        ("Darby or Ashford", 0),
        ("The answer is D", 0),
        ("", 0),
    ],
)
def test_choice(given, right):
    assert score("choice", ("B", "Ashford"), given, choices=TOWNS) == right


def test_similarity_of_a_damaged_function_lies_between():
    damaged = CODE.replace("left + right", "left")
    assert 0.5 < similarity(CODE, damaged) < 1
    assert score("code", CODE, damaged) == similarity(CODE, damaged)
    assert score("code", CODE, "") == 0


@pytest.mark.parametrize(
    ("scorer", "answers", "given", "published", "corrected", "right"),
    [
        # exact matches that the published scorers miss
        ("scbench:choice_eng", ("B", "Ashford"), "Ashford", 0, "choice", 1),
        ("scbench:choice_eng", ("D", "Darby"), "Because of Darby", 0, "choice", 1),
        ("scbench:mf", "98", "The 2nd largest number is 98", 0, "number", 1),
        ("scbench:repoqa", "x = 1", "x = 1", 0, "code", 1),
        # wrong answers that they count as right
        ("scbench:many_shot", "dax", "wug and blick, gorp and zav", 1, "label", 0),
        ("scbench:kv", "48", "1489", 1, "string", 0),
        ("scbench:vt", ("AB, CD", "AB", "CD"), "zABz CDX", 1, "facts", 0),
        ("scbench:mf", "7", "-7", 1, "number", 0),
        # a plain string is compared by character
        ("scbench:vt", "ABC", "C, B and A", 1, "string", 0),
        ("scbench:qa_chn", "北京", "北京", 2 / 3, "longbench:qa_zh", 1),
    ],
)
def test_published_faults_are_kept_and_corrected(scorer, answers, given, published, corrected, right):
    assert score(scorer, answers, given, choices=TOWNS) == pytest.approx(published)
    assert score(corrected, answers, given, choices=TOWNS) == right


@pytest.mark.parametrize(
    ("scorer", "answers", "given", "right"),
    [
        ("scbench:kv", "a1", "it is a1", 1),
        ("scbench:prefix_suffix", "a1", "a2", 0),
        ("scbench:vt", ("A, B, C", "A", "B", "C"), "A", 0.33),
        ("scbench:qa_eng", ("Gara Larkford",), "gara larkford, he said", 1),
        ("scbench:qa_eng", ("Gara",), "Mara", 0),
        ("scbench:qa_chn", ("['北京', '燕京']", "北京", "燕京"), "北京。", 1),
        ("scbench:qa_chn", ("['北京']", "北京"), "东京", 0.5),
        ("scbench:many_shot", ("['dax', 'wug']", "dax", "wug"), "a wug", 1),
        ("scbench:many_shot", ("['dax', 'wug']", "dax", "wug"), "a blick", 0),
        ("scbench:choice_eng", ("B", "Ashford"), "B. Ashford", 1),
        ("scbench:choice_eng", ("B", "Ashford"), "the answer is B", 1),
        ("scbench:choice_eng", ("B", "Ashford"), "the answer is", 0),
        ("scbench:choice_eng", ("B", "Ashford"), "I think B it is", 1),
        ("scbench:choice_eng", ("B", "Ashford"), "  ", 0),
        ("scbench:mf", "98", "98.6", 1),
        ("scbench:mf", "98", "no", 0),
        ("scbench:mf", "98.5", "It is 98.5", 1),
        ("scbench:mf", "98.5", "98", 0),
        ("scbench:mf", "98.0", "98", 1),
        ("scbench:passkey", "71432", "The key is 71432.", 1),
        ("scbench:passkey", "71432", "714", 0),
        ("longbench:qa", ("The Red House",), "red house!", 1),
        ("longbench:qa", ("red house", "blue"), "a blue car", 2 / 3),
        ("longbench:number", ("Paragraph 7",), "Paragraph 7", 1),
        ("longbench:number", ("Paragraph 7",), "Paragraph 7 or 8", 0.5),
        ("longbench:qa", ("red house",), "red house\nblue car", 2 / 3),
        ("longbench:qa_line", ("red house",), "\nred house\nblue car", 1),
        ("longbench:number", ("7", "8"), "7 or 8", 0.5),
        ("longbench:code", ("x = 1",), "# set\nx = 1\ny", 1),
        ("longbench:code", ("x = 12",), "x = 1", 0.91),  # 10 / 11
        ("longbench:code", ("x",), "# no code", 0),
        ("longbench:rouge", ("a b c d",), "a b\nc d", 1),
        # distinct words count: of b a the first common one is a, of a b a b c three are distinct
        ("longbench:rouge", ("a b a b c",), "b a", 2 * (2 / 2 * 2 / 3) / (2 / 2 + 2 / 3)),
        # sentences end at full stops: order is compared within them
        ("longbench:rouge", ("a b. c d",), "c d. a b", 1),
        ("longbench:rouge", ("a b, c d",), "c d, a b", 1 / 4),
        ("longbench:rouge", ("A b",), "a b", 1 / 2),
        ("longbench:rouge", ("a b",), " . ", 0),
        ("longbench:rouge", ("a b",), "", 0),
        ("longbench:rouge_line", ("a b",), "\na b\nc d", 1),
        ("longbench:rouge_zh", ("北京市",), "北京", 4 / 5),
    ],
)
def test_published_scorers(scorer, answers, given, right):
    assert score(scorer, answers, given) == pytest.approx(right)


def test_classes_within_classes():
    classes = ("Animal", "Animal and plant", "Number")
    assert score("longbench:classes", "Animal and plant", "Animal and plant", classes) == 1
    assert score("longbench:classes", "Number", "Number or Animal", classes) == 0.5
    assert score("longbench:classes", "Number", "Animal\nNumber", classes) == 0
    # As published, the list shrinks while it is gone through: of two names inside the right one, one stays.
    classes = ("Animal", "plant", "Animal and plant")
    assert score("longbench:classes", "Animal and plant", "Animal and plant", classes) == 0.5


def test_repoqa_needs_the_most_similar_function_to_be_the_right_one():
    near = CODE.replace("add", "plus")
    long = "\n".join([CODE, *(f"    step_{i} = {i}" for i in range(20))])
    assert score("scbench:repoqa", long, long) == 1
    assert score("scbench:repoqa", long, long, choices=(long, near)) == 1
    assert score("scbench:repoqa", long, long.replace("add", "plus"), choices=(long,)) == 1
    twin = long.replace("add", "plus")
    assert score("scbench:repoqa", long, twin, choices=(long, twin)) == 0
    # Nothing is kept: the same answer without the other function scores as before.
    assert score("scbench:repoqa", long, twin, choices=(long,)) == 1


def test_bleu_by_hand():
    words = ["the", "cat", "sat", "on", "the", "mat"]
    assert bleu(words, words) == pytest.approx(1)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples
    given = ["the", "cat", "sat", "on", "a", "mat"]
    assert bleu(given, words) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # a brief answer: exp(1 - 6 / 4)
    assert bleu(words[:4], words) == pytest.approx(math.exp(1 - 6 / 4))
    # no quadruple of three words: log(3) / 10 matches of at least one
    assert bleu(["a", "b", "c"], ["a", "b", "c"]) == pytest.approx((math.log(3) / 10) ** 0.25)
    assert bleu([], words) == 0
    assert bleu(["dog"], words) == 0
    # of a single word only the first order counts
    assert bleu(["cat"], words) == pytest.approx(math.exp(1 - 6))


def test_rouge_by_hand():
    assert rouge_lsum("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)
    assert rouge_lsum("the gunman police killed", "police killed the gunman") == pytest.approx(2 / 4)
    # the union of common subsequences over lines: w1 w2 and w1 w3 w5 hit four of five
    assert rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(2 * 4 / 15)
    assert rouge_lsum("", "a") == 0
    assert rouge_lsum("A, b!", "a b") == 1


@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.lists(st.sampled_from("abcd"), max_size=8)
)
def test_rouge_and_bleu_stay_within_bounds(left, right):
    for value in (rouge_lsum(" ".join(right), " ".join(left)), bleu(right, left)):
        assert 0 <= value <= 1 + 1e-9


@given(st.text(max_size=60))
def test_no_answer_breaks_a_scorer(given):
    turns = {
        "choice": turn("choice", "B", "Ashford", choices=TOWNS),
        "scbench:choice_eng": turn("x", "B", "Ashford", choices=TOWNS),
        "set": turn("set", "AB, CD", "AB", "CD"),
        "facts": turn("facts", "s", "one", "2"),
        "longbench:classes": turn("x", "one", choices=("one", "two")),
        "longbench:number": turn("x", "Paragraph 3"),
    }
    for name, scorer in SCORERS.items():
        asked = turns.get(name, turn(name, "98"))
        before = scorer(asked, "98")
        assert 0 <= scorer(asked, given) <= 1
        # No state: what came between does not matter.
        assert scorer(asked, "98") == before
