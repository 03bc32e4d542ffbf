"""From ratings to questions and answers: each by its definition, on inputs small enough to read."""

import json
import random
import re
from collections import Counter

import pytest

from classifier import prompt_suffix
from pretraining import rated
from pretraining.corpus import Document
from pretraining.rated import (
    FIVE,
    TWO,
    Questions,
    ask,
    draw_passages,
    encode_examples,
    is_binary,
    label_of,
    passage,
    treebank_spelling,
)
from training.templates import TEMPLATES


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ('It doesn\'t "work".', "It does n't `` work '' ."),
        ('He said (and I agree) it\'s "fun."', "He said -LRB- and I agree -RRB- it 's `` fun . ''"),
        ("Don\u2019t miss Mr. Lee\u2019s 1,000 films!", "Do n't miss Mr. Lee 's 1,000 films !"),
        ("The boys' club--a dud... OK?", "The boys ' club -- a dud ... OK ?"),
        ("Good. Bad, no: so-so; 3.5 stars", "Good . Bad , no : so-so ; 3.5 stars"),
        ("At 5:50 he left (\u201cno.\u201d)", "At 5:50 he left -LRB- `` no . '' -RRB-"),
        ("Too  long.\n\nReally.", "Too long . Really ."),
    ],
)
def test_the_treebank_sets_punctuation_and_contractions_apart(text, spelled):
    assert treebank_spelling(text) == spelled


def test_the_ends_of_the_scale_are_a_tenth_each_and_the_middle_is_a_fifth():
    ratings = [0.0, 0.09, 0.1, 0.39, 0.4, 0.59, 0.6, 0.89, 0.9, 1.0]
    assert [label_of(rating) for rating in ratings] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_passage_is_the_first_or_the_last_sentences():
    review = "One. Two! Three?\nFour. Five."
    drawn = Counter(passage(review, random.Random(seed)) for seed in range(600))
    first = {"One.", "One. Two!", "One. Two! Three?"}
    assert set(drawn) == first | {"Five.", "Four. Five.", "Three? Four. Five."}
    assert min(drawn.values()) > 60  # of 100
    assert passage("Alone.", random.Random(1)) == "Alone."


def asked(rating: float, subject: str) -> set[tuple[str, str]]:
    questions = Questions(subject)
    return {questions.ask(rating, False, random.Random(seed)) for seed in range(2000)}


@pytest.mark.parametrize("rating", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_every_question_has_the_answers_that_its_rating_means(rating):
    label = label_of(rating)
    expected = {(prompt_suffix(FIVE).rstrip(), FIVE[label]), ("Rating:", f"{label + 1}/5")}
    if rating != 0.5:
        expected.add((prompt_suffix(TWO).rstrip(), "good" if rating > 0.5 else "bad"))
    for entry in json.loads(TEMPLATES.read_text(encoding="utf-8"))["sst"]:
        words = entry["template"].removeprefix("{sentence} ")
        expected |= {(words, answer) for answer in entry["labels"][label]}
    assert asked(rating, "movie") == expected
    of_a_book = {(re.sub("movie|film", "book", words), answer) for words, answer in expected}
    assert asked(rating, "book") == of_a_book


@pytest.mark.parametrize(("n_average", "odds"), [(200, 1.0), (50, 4 * 50 / 500)])
def test_labels_are_drawn_equally_often_but_no_review_weighs_more_than_four(n_average, odds):
    reviews = [Document(f"bad {i}.", 0.3) for i in range(1000 - n_average)]
    reviews += [Document(f"average {i}.", 0.5) for i in range(n_average)]
    passages = draw_passages(reviews, 40_000, random.Random(0))
    assert set(passages) <= set(reviews) and len(passages) == 40_000
    n_drawn = sum(passage.rating == 0.5 for passage in passages)
    assert n_drawn / (40_000 - n_drawn) == pytest.approx(odds, rel=0.05)
    few = [draw_passages(reviews, 99, random.Random(seed)) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_every_review_is_asked_about_half_of_them_in_the_treebanks_spelling():
    reviews = [Document(f"Film {i}.", i / 999) for i in range(1000)]
    examples = ask(reviews, "movie", False, random.Random(0))
    for review, example in zip(reviews, examples, strict=True):
        assert example.text.startswith((f"{review.text} ", f"{review.text[:-1]} . "))
    assert sum(" . " in example.text for example in examples) == pytest.approx(500, abs=50)
    assert examples == ask(reviews, "movie", False, random.Random(0))
    assert examples != ask(reviews, "movie", False, random.Random(1))


def test_reviews_of_two_ratings_are_binary_and_asked_about_as_one_of_two_alone():
    reviews = [Document("a", 0.0), Document("b", 1.0)]
    assert is_binary(reviews) and not is_binary([*reviews, Document("c", 0.5)])
    question = "Is this place bad or good? This place is"
    examples = ask(reviews * 200, "place", True, random.Random(0))
    assert examples == [(f"a {question}", "bad"), (f"b {question}", "good")] * 200


def test_held_out_reviews_become_lines_of_the_assignments_form():
    graded = [Document("A\n B.", 0.0), Document("C ||| D", 0.5), Document("E", 0.95)]
    assert rated.labeled_lines(graded, False) == "0 ||| A B.\n2 ||| C ||| D\n4 ||| E\n"
    extremes = [Document("A", 1.0), Document("B", 0.0)]
    assert rated.labeled_lines(extremes, True) == "1 ||| A\n0 ||| B\n"
    assert rated.labeled_lines(extremes, False) == "4 ||| A\n0 ||| B\n"  # of a graded file


def test_the_answer_begins_where_a_prompt_ends(tokenizer):
    example = rated.Example("the story was good. Rating:", "3/5")
    ((ids, n_answer),) = encode_examples(tokenizer, [example])
    prompt = tokenizer.encode(example.text, bos=True, eos=False)
    answer = tokenizer.encode("3/5", bos=False, eos=False)
    assert ids.tolist() == prompt + answer and n_answer == len(answer)
