"""Pairs from the policy's own replies: which two replies make a pair, what is counted, and going on."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest

import helpers
from helpers import UserError, sample_pairs
from helpers.model.generate import Reply
from helpers.train.sample import best_and_worst

QUESTIONS = ["2 + 2?", "3 + 3?", "4 + 4?", "5 + 5?"]


def reply(text, score, ended=True):
    return {"text": text, "count": 1, "score": score, "ended": ended}


def test_the_readmes_judge_swaps_positions_and_counts_no_tie():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"^    from itertools import .*\n(?:    .*\n|\n)+", readme, flags=re.M)[0].replace("\n    ", "\n")
    names = {"prefers_first": lambda prompt, first, second: len(first) >= len(second)}  # of two equal ones the first
    exec(code.strip(), names)
    assert names["judge"]("?", ["aa", "b", "c", "dddd"]) == [2, 0, 0, 3]
    names["prefers_first"] = lambda prompt, first, second: True
    assert names["judge"]("?", ["aa", "b", "c"]) == [0, 0, 0]


def test_the_order_of_replies_does_not_change_which_are_paired():
    rng, first = random.Random(0), set()
    for number in range(300):
        scores = [rng.choice((0, 0.5, 1)) for _ in range(5)]
        replies = [reply(f"text {i}", score, rng.random() < 0.8) for i, score in enumerate(scores)]
        found = best_and_worst(replies, f"prompt {number}")
        for order in itertools.islice(itertools.permutations(replies), 0, None, 7):
            assert best_and_worst(list(order), f"prompt {number}") == found
        if found:
            chosen, rejected = found
            assert chosen["ended"] and chosen["score"] == max(one["score"] for one in replies if one["ended"])
            assert rejected["score"] == min(scores) < chosen["score"]
            first.add(chosen["text"])
    assert len(first) == 5  # no place is preferred


@pytest.mark.parametrize(
    "replies",
    [
        [reply("a", 1), reply("b", 1)],
        [reply("a", 1, ended=False), reply("b", 0)],
        [reply(" ", 1), reply("b", 0)],
        [reply("a", 0), reply("b", 1, ended=False), reply("", -1)],
    ],
)
def test_no_pair_without_a_whole_reply_that_is_better(replies):
    assert best_and_worst(replies) is None


@pytest.fixture(scope="module")
def tiny(small):
    return helpers.load_model(str(small))


@pytest.fixture
def says(monkeypatch, tiny):
    """A function: the model's replies to each question are then these texts, whatever it is asked for."""

    def set_to(*texts):
        def generate(model, tokenizer, prompts, **sampling):
            which = {question: itertools.cycle(one) for question, one in zip(QUESTIONS, texts, strict=False)}
            return [Reply(text, [1], True) for text in (next(which[prompt]) for prompt in prompts)]

        monkeypatch.setattr("helpers.train.sample.generate_replies", generate)

    return set_to


def number_in(prompt, replies):
    return [float(text.split()[-1]) for text in replies]


def sample(tiny, folder, judge=number_in, **settings):
    settings = {"replies": 4, "max_new_tokens": 4} | settings
    return sample_pairs(*tiny, QUESTIONS, judge, folder, **settings)


def test_ties_are_left_out_and_counted(says, tiny, tmp_path, capsys):
    says(["so 1", "so 0"], ["all 1", "right 1"], ["wrong 0", "all 0"], ["no 0", "hm 0.5", "no 0", "no 0"])
    pairs = sample(tiny, tmp_path)
    printed = capsys.readouterr().out
    assert (
        "4 prompts, of which 2 have replies that are all equally good: 1 at the best score given (1), 1 at" in printed
    )
    assert "at the worst (0). 16 tokens sampled, " in printed and printed.count("\n") == 1
    assert [row[0]["content"] for row in pairs["prompt"]] == ["2 + 2?", "5 + 5?"]
    assert pairs["chosen"][1] == [{"role": "assistant", "content": "hm 0.5"}]
    assert pairs["rejected"][0] == [{"role": "assistant", "content": "so 0"}]
    assert (pairs["score_chosen"][:], pairs["score_rejected"][:]) == ([1.0, 0.5], [0.0, 0.0])
    assert pairs["different"][:] == [2, 2]
    helpers.check_pairs(pairs, tiny[1]).raise_for_errors()
    assert pairs["origin"][:] == ["pairs.jsonl:1", "pairs.jsonl:2"]
    with pytest.raises(UserError, match="No prompt has a whole reply"):
        sample(tiny, tmp_path / "other", lambda prompt, replies: [1.0] * len(replies))


def test_the_judge_sees_each_text_once_and_rows_keep_what_they_bring(tiny, tmp_path, monkeypatch):
    seen = []
    row = {"prompt": QUESTIONS[0], "answer": "4", "topic": "sums", "flaw": "slip", "chosen": "5"}
    row["chat_template_kwargs"] = {"enable_thinking": False}

    def judge(prompt, replies):
        seen.append((prompt, replies))
        return [prompt["answer"] == "4" and text == "a 1" for text in replies]

    def generate(model, tokenizer, prompts, **sampling):
        return [Reply(text, [1], True) for text in ("a 1", "b 0", "a 1", "a 1")]

    monkeypatch.setattr("helpers.train.sample.generate_replies", generate)
    pairs = sample_pairs(*tiny, [row], judge, tmp_path, replies=4, max_new_tokens=4)
    assert seen == [(row, ["a 1", "b 0"])]
    assert pairs[0]["chosen"][0]["content"] == "a 1" and pairs[0]["answer"] == "4" and pairs[0]["topic"] == "sums"
    assert pairs[0]["chat_template_kwargs"] == {"enable_thinking": False} and "flaw" not in pairs.column_names
    kept = json.loads((tmp_path / "replies-00000.jsonl").read_text())
    assert [one["count"] for one in kept] == [3, 1]


def test_replies_with_a_control_token_make_no_pair(says, tiny, tmp_path, capsys):
    says(["<|im_end|> 1", "b 0"], ["a 1", "b 0"], ["b 0"], ["b 0"])
    assert sample(tiny, tmp_path)["origin"][:] == ["pairs.jsonl:2"]
    assert "1 pairs are left out: eos_doubled, special_token_in_text" in capsys.readouterr().out


def test_a_thought_that_the_prompt_opened_is_whole_in_the_pair(says, tiny, thinking_2507, tmp_path):
    says(*[["Four.\n</think>\n\n4 1", "Five.\n</think>\n\n5 0"]] * 4)
    pairs = sample((tiny[0], thinking_2507), tmp_path)
    assert pairs["chosen"][0][0]["content"] == "<think>\nFour.\n</think>\n\n4 1"
    ids = helpers.tokenize_pairs(pairs, thinking_2507)[0]
    assert thinking_2507.decode(ids["prompt_ids"]).endswith("<think>\n")
    assert thinking_2507.decode(ids["chosen_ids"]).startswith("Four.")


def test_errors_say_what_to_do(says, tiny, tmp_path):
    says(*[["a 1", "b 0"]] * 4)
    for judge in (lambda prompt, replies: [1], lambda prompt, replies: [float("nan"), 1]):
        with pytest.raises(UserError, match=r"judge has to return a finite number for each of 2 replies"):
            sample(tiny, tmp_path / "judge", judge)
    sample(tiny, tmp_path / "one")
    for changed, name in (({"temperature": 0.5}, "temperature"), ({"seed": 1}, "seed"), ({"judge": max}, "judge")):
        with pytest.raises(UserError, match=f"holds replies sampled with other {name}. Give this call"):
            sample(tiny, tmp_path / "one", **changed)
    for wrong in ({"replies": 1}, {"temperature": 0}):
        with pytest.raises(UserError, match="at least two replies"):
            sample(tiny, tmp_path / "one", **wrong)

    def unreachable(prompt, replies):
        raise ConnectionError

    with pytest.raises(ConnectionError):  # an OSError, and not of the disk
        sample(tiny, tmp_path / "two", unreachable)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        sample(tiny, tmp_path / "file")


@pytest.mark.slow  # it samples
def test_an_interrupted_call_goes_on_and_gives_the_same_pairs(tiny, tmp_path, monkeypatch):
    # Random weights would hardly ever end a reply.
    monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", list(range(1000, 10_000)))
    questions, asked = [f"{question} And {i}?" for i in range(3) for question in QUESTIONS], []

    def vowels(prompt, replies):
        asked.append(prompt)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return [sum(text.count(vowel) for vowel in "aeiou") for text in replies]

    def call(folder):
        settings = {"replies": 4, "max_new_tokens": 6, "batch_size": 8, "seed": 3}
        return sample_pairs(*tiny, questions, vowels, tmp_path / folder, **settings)

    stop = -1
    whole = call("whole").to_list()
    assert asked == questions and len(whole) > 6
    stop = len(asked) + 6
    with pytest.raises(KeyboardInterrupt):
        call("stopped")
    asked.clear()
    stop = -1
    assert call("stopped").to_list() == whole
    assert asked == questions[4:]  # two of the two batches that were complete are not asked for again
    texts = {row["chosen"][0]["content"] for row in whole}
    assert len(texts) == len(whole)  # batches differ
