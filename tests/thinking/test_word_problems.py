"""The word problems: right where chosen, wrong as named, and told apart by nothing else."""

import re
from collections import Counter
from datetime import datetime, timedelta

import pytest

from helpers.data.check import check_pairs
from helpers.thinking.check import check_thinking
from helpers.thinking.pairs import render_thinking
from helpers.thinking.score import false_steps, is_right
from helpers.thinking.word_problems import DAYS, KINDS, make_thinking_pairs


@pytest.fixture(scope="module")
def generated():
    return make_thinking_pairs(5000, seed=0)


def test_word_problems_are_as_many_as_asked_and_repeatable(generated):
    assert len(generated) == len({pair["prompt"] for pair in generated}) == 5000
    assert make_thinking_pairs(5000, seed=0) == generated
    assert make_thinking_pairs(20, seed=1) != generated[:20]
    assert set(Counter(pair["flaw"] for pair in generated)) == set(KINDS)
    topics = Counter(pair["topic"] for pair in generated)
    assert set(topics) == {"arithmetic", "unit", "percentage", "order", "date"} and min(topics.values()) > 700


def test_chosen_reasoning_is_right_in_every_step(generated):
    for pair in generated:
        assert false_steps(pair["chosen_thought"]) == []
        assert is_right(pair["chosen_answer"], pair["answer"])
        result = pair["chosen_answer"].split()[0] if pair["answer"].isalpha() else pair["answer"]
        assert result in pair["chosen_thought"] or pair["answer"] in DAYS


def solve(question):
    """The answer to a word problem, from the question alone and by other means than the maker's."""
    n = [int(number) for number in re.findall(r"\d+", question)]
    plus = {"+": 1, "-": -1}["-" if re.search(r"away|pays|shorter|falls|shrinks|older|places ahead", question) else "+"]
    if "boxes" in question or "dollars a day" in question:
        return n[0] * n[1] + plus * n[2]
    if "bus" in question:
        signs = [1 if word == "on" else -1 for word in re.findall(r"\d+ get (\w+)", question)]
        return n[0] + signs[0] * n[1] + signs[1] * n[2]
    if "percent" in question:
        return round(n[0] * (100 + plus * n[1]) / 100)
    if "long is it" in question:
        small = re.search(r"How many (\w+) long", question)[1]
        big = re.search(r"of \d+ (\w+)s is", question)[1]
        ratio = {"days": 7, "months": 12, "hours": 24, "minutes": 60, "seconds": 60, "centimetres": 100, "metres": 1000}
        assert (big, small) in zip(("week", "year", "day", "hour", "minute", "metre", "kilometre"), ratio, strict=True)
        return n[0] * ratio[small] + plus * n[1]
    if "was born" in question:
        return n[0] + plus * n[1] + n[2]
    if "starts on" in question:
        start = datetime.strptime(re.search(r"on (\w+ \d+)", question)[1] + " 2023", "%B %d %Y")
        end = start + timedelta(days=n[1])
        return f"{end:%B} {end.day}"
    if "day of the week" in question:
        day = re.search(r"on a (\w+)", question)[1]
        return f"{datetime.strptime(f'2024 1 {DAYS.index(day) + 1}', '%Y %m %d') + timedelta(days=n[0]):%A}"
    if "In a line" in question:
        return n[0] - n[1] - plus * n[2]
    names = re.findall(r"(\w+) (?:needed |made )?\d", question)
    order = sorted(names, key=lambda name: n[names.index(name)], reverse="points" in question)
    return order[("first", "second", "last").index(question[:-1].split()[-1])]


def test_chosen_answer_is_right(generated):
    for pair in generated:
        assert str(solve(pair["prompt"])) == pair["answer"], pair


def test_rejected_holds_exactly_one_planted_error(generated):
    def numbers(text):
        return set(re.findall(r"\d+", text))

    for pair in generated:
        right, wrong, false = pair["chosen_thought"], pair["rejected_thought"], false_steps(pair["rejected_thought"])
        assert not is_right(pair["rejected_answer"], pair["answer"])
        if pair["flaw"] == "wrong_answer":
            assert wrong == right
            continue
        assert wrong != right
        if "<" not in wrong and ">" not in wrong:  # the wrong answer follows from the wrong thought
            last = re.findall(r"(?:= (\d+)|comes (\w+))", wrong)[-1]
            assert (last[0] or last[1]) in pair["rejected_answer"]
        if pair["flaw"] in ("slip", "fact"):
            assert len(false) == 1, pair
        else:
            assert false == [], pair
        if pair["flaw"] == "misread":
            assert len((numbers(pair["prompt"]) & numbers(right)) - numbers(wrong)) <= 1
            assert (
                sum(a != b for a, b in zip(re.findall(r"[-+*]", right), re.findall(r"[-+*]", wrong), strict=True)) == 0
            )
        if pair["flaw"] == "operation":
            signs = [re.findall(r" ([-+*]) ", text) for text in (right, wrong)]
            assert sum(a != b for a, b in zip(*signs, strict=True)) == 1


def test_no_one_feature_tells_the_word_problems(generated, texts, accuracy):
    features = {
        "characters": len,
        "words": lambda text: len(text.split()),
        "digits": lambda text: len(re.findall(r"\d", text)),
        "largest number": lambda text: max(map(int, re.findall(r"\d+", text))),
        "last number": lambda text: int(re.findall(r"\d+", text)[-1]),
        "even digits": lambda text: len(re.findall(r"[02468]", text)),
        "round numbers": lambda text: len(re.findall(r"[05]\b", text)),
        "plus signs": lambda text: text.count("+"),
        "first letter": lambda text: ord(text[0]),
        "different numbers": lambda text: len(set(re.findall(r"\d+", text))),
    }
    for name, feature in features.items():
        assert 0.45 <= accuracy(generated, feature) <= 0.55, name
    for topic in {pair["topic"] for pair in generated}:  # a slip must leave a number as even as it was
        pairs = [pair for pair in generated if pair["topic"] == topic]
        assert 0.465 <= accuracy(pairs, lambda text: len(re.findall(r"[02468]\b", text))) <= 0.535, topic
    assert all(pair["chosen_thought"].split()[0] == pair["rejected_thought"].split()[0] for pair in generated)
    words = Counter()  # how many more pairs have the word in chosen only than in rejected only
    for pair in texts(generated):
        sides = [set(re.findall(r"\w+|\S", text)) for text in pair]
        words.update(sides[0] - sides[1])
        words.subtract(sides[1] - sides[0])
    assert max(map(abs, words.values())) < 0.02 * len(generated)


@pytest.mark.slow
def test_check_pairs_runs_clean_on_5000_word_problems(tokenizer, generated):
    pairs = render_thinking(generated, tokenizer)
    report = check_pairs(pairs, tokenizer, max_length=512)
    assert report.findings == [], str(report)
    assert {finding.code for finding in check_thinking(pairs, tokenizer, 512)} == {"tags_are_text"}


def test_word_problems_stay_short(generated):
    assert all(25 <= len(pair["chosen_thought"].split()) <= 60 for pair in generated)
    assert all(len(pair["prompt"].split()) < 40 and len(pair["chosen_answer"].split()) <= 15 for pair in generated)
