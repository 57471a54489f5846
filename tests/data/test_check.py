"""The check: every finding on a file made for it, the same tokens as TRL's trainer, and what is done about it."""

import copy
import random
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest

import helpers
from helpers.common import UserError
from helpers.data import measure
from helpers.data.check import check_pairs
from helpers.data.findings import FINDINGS, WORST, Finding
from helpers.data.load import load_pairs
from helpers.data.render import cuts_cleanly
from helpers.data.split import split_pairs

BROKEN = Path(helpers.__file__).parent / "data" / "bundled" / "broken_pairs.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def turn(role, content):
    return {"role": role, "content": content}


def pair(prompt="Why?", chosen="Because of this.", rejected="Because of that.", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def found(report, code):
    """The positions that a finding of this code names, sorted; None where there is no such finding."""
    rows = [set(finding.rows) for finding in report.findings if finding.code == code]
    return sorted(set.union(*rows)) if rows else None


def test_every_finding_that_a_file_can_hold_is_found_in_the_broken_file(tokenizer):
    pairs = load_pairs(BROKEN)
    report = check_pairs(pairs, tokenizer, test=pairs.select([1, 3]))
    lines = {
        finding.code: sorted(int(pairs[row]["origin"].split(":")[1]) for row in finding.rows)
        for finding in report.findings
        if finding.code not in ("length_ratio", "length_leak", "feature_leak")
    }
    assert lines == {
        "prompt_not_prefix": [13],
        "completion_empty": [14],
        "eos_doubled": [15],
        "special_token_in_text": [15, 16],
        "bos_doubled": [16],
        "same_text": [17],
        "swapped_labels": [18, 19],
        "test_overlap": [2, 4],
        "duplicate_pair": [21],
        "long_prompt": [22, 23],
        "over_max_length": [24],
        "user_turn_in_completion": [25],
        "template_leftover": [26],
        "not_utf8": [27],
        "left_out": [],
    }
    codes = {finding.code for finding in report.findings}
    of_others = {"eos_missing", "template_refuses", "no_room", "not_rendered"}  # no file makes these alone
    of_others |= {"thought_missing", "prompt_differs"}  # nor for this model
    of_others |= {"white_space_only", "prompt_in_answers", "prompt_is_answer", "one_prompt", "score_below"}
    assert set(FINDINGS) - codes == of_others
    leaks = " ".join(finding.what for finding in report.findings if finding.code == "feature_leak")
    for feature in ("think block", "list", 'starts with "sure, here"'):
        assert feature in leaks
    for finding in report.findings:
        assert finding.why and finding.cure and finding.count and len(finding.origins) <= WORST
        assert finding.severity == FINDINGS[finding.code][0]
    # Line 23 has one turn and can't be shortened; what remains has none of the errors.
    assert len(report.pairs) == len(pairs) - 1
    again = check_pairs(report.clean, tokenizer, test=pairs.select([1, 3]))
    assert not again.errors


def test_bundled_pairs_are_clean_and_nothing_tells_the_sides_apart(tokenizer):
    pairs = load_pairs()
    assert len(pairs) >= 400
    report = check_pairs(pairs, tokenizer)
    assert report.findings == []
    assert 0.9 <= report.figures["length_ratio"] <= 1.1
    for name in ("longer_is_chosen", "longer_is_chosen_characters"):
        assert 0.45 <= report.figures[name] <= 0.55
    for feature, accuracy in report.figures["features"].items():
        assert 0.45 <= accuracy <= 0.55, feature
    assert set(pairs["flaw"]) == {"wrong", "vague", "off-topic", "overlong", "unsafe"}
    split = split_pairs(pairs, test_size=0.2, by="topic")
    assert len(split["test"]) >= 80 and len(set(pairs["topic"])) >= 5
    assert check_pairs(split["train"], tokenizer, test=split["test"]).errors == []


# What the texts and the other columns show


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("Same answer.", "Same answer. "),
        ("Same  answer.", "Same answer."),
        ("def f():\n    return 1", "def f():\n  return 1"),
        ([turn("assistant", "a"), turn("user", "b"), turn("assistant", "c\n")],) * 2,
    ],
)
def test_sides_that_differ_in_white_space_only(tokenizer, chosen, rejected):
    if isinstance(chosen, list):
        rejected = [*chosen[:2], turn("assistant", "c")]
    rows = [pair("Question 1?", chosen, rejected), pair("Question 2?", "Yes.", "No."), pair("Question 3?", "y", "y")]
    report = check_pairs(load_pairs(rows), tokenizer)
    assert found(report, "white_space_only") == [0]
    assert found(report, "same_text") == [2]
    assert [finding.severity for finding in report.findings if finding.code == "white_space_only"] == ["warning"]


def test_answers_that_repeat_the_prompt(tokenizer):
    before = [turn("user", "Hello"), turn("assistant", "Hello."), turn("user", "How are you?")]
    rows = [
        pair("Q: 2 + 2? A:", "Q: 2 + 2? A: 4", "Q: 2 + 2? A: 5"),
        pair(before, "How are you? Well.", " How are you? So so."),
        pair("Is it late?\n", "Is it late? No.", "Is it late? Yes."),
        pair("What is salt?", "What is salt? It is a crystal.", "Who knows."),  # one of them only
        pair("Hello", "Hello, how are you?", "Hello yourself."),  # a greeting
        pair("Say yes.", "Yes.", "Say yes."),
    ]
    report = check_pairs(load_pairs(rows), tokenizer)
    assert found(report, "prompt_in_answers") == [0, 1, 2]
    assert found(report, "prompt_is_answer") == [5]


def test_one_prompt_in_most_rows(tokenizer):
    rows = [pair("Translate to French. ", f"Le chat {n}.", f"Le chien {n}.") for n in range(4)]
    rows += [pair("translate to  French.", "Oui.", "Non."), pair("Why?"), pair("How?"), pair("When?")]
    report = check_pairs(load_pairs(rows), tokenizer)
    assert found(report, "one_prompt") == [0, 1, 2, 3, 4]
    assert "the same prompt in 5 of 8 pairs" in str(report)
    assert found(check_pairs(load_pairs([*rows, pair("Where?"), pair("Who?")]), tokenizer), "one_prompt") is None
    assert found(check_pairs(load_pairs(rows[:2]), tokenizer), "one_prompt") is None  # two answers to one question
    assert found(check_pairs(load_pairs(rows[:1] * 9), tokenizer), "one_prompt") is None  # nine times the same pair


@pytest.mark.parametrize(
    "better, worse",
    [
        ("score_chosen", "score_rejected"),  # UltraFeedback binarized
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),  # Argilla
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("reward_chosen", "reward_rejected"),
        ("better_score", "worse_score"),
        ("score_j", "score_k"),
        ("chosen_grade", "rejected_grade"),
    ],
)
def test_scores_that_say_the_opposite(tokenizer, better, worse, tmp_path):
    scores = [(8.5, 4.0), (6.0, 6.5), (5.0, 5.0), (2.0, 9.0), (10.0, 9.0), (None, 3.0)]
    rows = [pair(f"Question {n}?") | {better: one, worse: other} for n, (one, other) in enumerate(scores)]
    report = check_pairs(load_pairs(rows), tokenizer)
    assert found(report, "score_below") == [1, 3]
    finding = next(finding for finding in report.findings if finding.code == "score_below")
    assert (finding.rows, finding.severity) == ((3, 1), "warning")  # the widest gap first
    assert finding.what == f"{better} below {worse}"
    path = tmp_path / "scores.csv"  # where every value is text
    path.write_text(f"prompt,chosen,rejected,{better},{worse}\nq1,a,b,9,10\nq2,a,b,10,9\nq3,a,b,,9\nq4,a,b,n/a,9\n")
    assert found(check_pairs(load_pairs(path), tokenizer), "score_below") == [0]


def test_tools_that_the_template_does_not_write(tokenizer):
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    pairs = load_pairs([pair("Why?", tools=[tool]), pair("How?", tools=None)])
    assert found(check_pairs(pairs, tokenizer), "not_rendered") == [0]
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + tokenizer.chat_template
    assert found(check_pairs(pairs, other), "not_rendered") is None


@pytest.mark.parametrize(
    "text",
    [
        "It\u00e2\u0080\u0099s",
        "\u00d0\u00bf\u00d1\u20ac",
        "\u00e4\u00bd\u00a0\u00e5\u00a5\u00bd",
        "\u00ef\u00bb\u00bfone",
    ],
)
def test_utf8_that_was_read_as_latin_1(tokenizer, text):
    honest = [
        "\u00ab\u00a0B\u00e9b\u00e9\u00a0\u00bb",
        "\u00c7a va \u2013 \u00e0 5\u00a0\u20ac",
        "\u00d1and\u00fa, \u00bfqu\u00e9?",
        "\u2018\u00e9t\u00e9\u2019",
    ]
    rows = [{"prompt": "Why?", "chosen": one, "rejected": "no"} for one in [text, *honest]]
    assert found(check_pairs(load_pairs(rows), tokenizer), "not_utf8") == [0]


def test_a_margin_below_zero_and_columns_that_are_no_scores(tokenizer):
    rows = [pair(f"Question {n}?", margin=margin) for n, margin in enumerate([0.5, -0.25, 0, "x"])]
    assert found(check_pairs(load_pairs(rows), tokenizer), "score_below") == [1]
    no_scores = {"chosen_tokens": 1, "rejected_tokens": 9, "chosen_score": [1], "rejected_score": {"a": 9}}
    no_scores |= {"score": 3, "score_ratio": -1, "rejected_rating": 7}
    report = check_pairs(load_pairs([pair(f"Question {n}?", **no_scores) for n in range(3)]), tokenizer)
    assert found(report, "score_below") is None


@pytest.mark.parametrize(
    "columns, what",
    [
        ({"is_chosen_better": [0, 1, True, False]}, "is_chosen_better says that the answers are exchanged"),
        ({"was_swapped": [1, 0, False, True]}, "was_swapped says that the answers are exchanged"),
        ({"chosen_rank": [3, 1, 1, 4], "rejected_rank": [2, 2, 2, 3]}, "chosen_rank above rejected_rank"),
    ],
)
def test_flags_and_ranks_that_say_the_opposite(tokenizer, columns, what):
    rows = [pair(f"Question {n}?") | {name: values[n] for name, values in columns.items()} for n in range(4)]
    report = check_pairs(load_pairs(rows), tokenizer)
    assert found(report, "score_below") == [0, 3]
    assert what in [finding.what for finding in report.findings]


def test_scores_are_those_of_the_rows_that_remain(tokenizer):
    rows = [pair("word " * 300, score_chosen=1, score_rejected=2), pair("Why?", score_chosen=1, score_rejected=2)]
    report = check_pairs(load_pairs(rows), tokenizer)
    assert (found(report, "long_prompt"), found(report, "score_below")) == ([0], [1])


def test_what_split_keeps_apart_the_check_counts(tokenizer):
    def talk(*texts, system=None):
        turns = [turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
        return [turn("system", system), *turns] if system else turns

    train = [talk("Why?"), talk("Tell me.", "What?", "All."), talk("How?", system="Be brief."), talk("Where?")]
    train += [talk("When?", "Now.", "Sure?"), talk("When?", "Never.", "Sure?")]
    test = [
        talk("why?", "So.", "And?", system="Be kind."),
        talk("Tell me."),
        talk("How?"),
        talk("When?", "Now.", "Oh?"),
    ]
    made = [load_pairs([pair(prompt) for prompt in prompts]) for prompts in (train, test)]
    report = check_pairs(made[0], tokenizer, test=made[1])
    assert found(report, "test_overlap") == [0, 1, 2]
    assert found(check_pairs(report.clean, tokenizer, test=made[1]), "test_overlap") is None
    whole = load_pairs([pair(prompt) for prompt in train + test])
    for seed in range(5):
        parts = split_pairs(whole, test_size=0.4, seed=seed)
        assert found(check_pairs(parts["train"], tokenizer, test=parts["test"]), "test_overlap") is None


def test_a_long_talk_that_is_shortened_is_still_in_the_test_set(tokenizer):
    prompt = [turn("user", "word " * 300), turn("assistant", "Yes."), turn("user", "Why?")]
    pairs = load_pairs([pair("word " * 300), pair(prompt), pair("How?")])
    report = check_pairs(pairs, tokenizer, test=pairs.select([1]))
    assert "1 shortened, 1 left out" in str(report)
    assert found(report, "test_overlap") == [1]


# Tokens


def odd_rows(count, seed=0):
    """Rows of the pieces that tokenizers stumble over, special tokens among them."""
    pieces = [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "start|>",
        "<|",
        "|>",
        " ",
        "\n",
        "\n\n",
        "\t",
        "user\n",
        "é",
        "日本",
    ]
    pieces += ["assistant\n", "<think>", "</think>\n", "word", " word", "12", "👍", "e\u0301", "\u200d", "."]
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(pieces, k=rng.randint(1, 8)))

    for _ in range(count):
        prompt = [turn("user", "q" + text())]
        if rng.random() < 0.4:
            prompt = [turn("user", "q" + text()), turn("assistant", text()), *prompt]
        if rng.random() < 0.3:
            prompt = [turn("system", text()), *prompt]
        yield pair(prompt, text(), text(), chat_template_kwargs=rng.choice([{}, {"tone": "dry"}]))


def as_trl_does(tokenizer, row):
    """(prompt, shared, chosen, rejected) in tokens, with the functions that DPOTrainer tokenizes with."""
    from trl.data_utils import _tokenize, common_prefix_length

    options = {"tools": None, **row["chat_template_kwargs"]}
    prompt = _tokenize(tokenizer, row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    sides = [_tokenize(tokenizer, row["prompt"] + row[side], **options)["input_ids"] for side in ("chosen", "rejected")]
    shared = min(common_prefix_length(prompt, side) for side in sides)
    return len(prompt), shared, *(len(side) - shared for side in sides)


@pytest.mark.parametrize("cut", [True, False])
def test_lengths_are_those_of_the_trainer(tokenizer, cut):
    pairs = load_pairs(list(odd_rows(200)))
    measuring = measure.Measure(tokenizer)
    assert measuring.renderer.cuts[0] == "<|im_start|>"  # the prompt is tokenized once, up to here
    if not cut:
        measuring.renderer.cuts = []
    out = measuring(pairs[:])
    got = list(zip(out["prompt"], out["shared"], out["chosen"], out["rejected"], strict=True))
    assert got == [as_trl_does(tokenizer, row) for row in pairs]
    split = np.array(out["marks"]) & measure.BIT["prompt_not_prefix"] > 0
    assert 0 < split.sum() < len(pairs)


def test_the_longest_pair_is_known_before_it_is_cut(tokenizer):
    report = check_pairs(load_pairs().select(range(20)), tokenizer, max_length=80)
    assert "over_max_length" in [one.code for one in report.findings]
    rows = ({name: len(ids) for name, ids in row.items()} for row in report.ids)
    expected = max(row["prompt_ids"] + max(row["chosen_ids"], row["rejected_ids"]) for row in rows)
    assert report.longest == expected > 80


def test_a_cut_is_made_only_where_no_other_token_can_reach_over_it():
    from tokenizers import AddedToken

    def clean(token, *others):
        return cuts_cleanly(token, [token.content, *others])

    assert clean(AddedToken("<|go|>", normalized=False), "<|end|>", "<tool>")
    assert not clean(AddedToken("<|go|>", normalized=False, lstrip=True))
    assert not clean(AddedToken("<|go|>", normalized=True))
    assert not clean(AddedToken("<|go|>", normalized=False), "\n<|go|>")  # a longer token holds it
    assert not clean(AddedToken("<|go|>", normalized=False), "end<|")  # a token that ends as this one begins
    assert not clean(AddedToken("aa", normalized=False))  # overlaps itself


def test_a_cut_that_does_not_hold_is_given_up(tokenizer):
    pairs = load_pairs([pair("What is a squirrel?", chat_template_kwargs={})])
    measuring = measure.Measure(tokenizer)
    measuring.renderer.cuts = ["quirrel"]  # inside a word: no boundary of tokens
    out = measuring(pairs[:])
    assert measuring.renderer.cuts == []
    assert out["prompt"][0] == as_trl_does(tokenizer, pairs[0])[0]


def with_template(tokenizer, template):
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_template_without_eos_and_a_wrong_eos_are_found(tokenizer):
    pairs = load_pairs([pair(), pair("How?")])
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert found(check_pairs(pairs, with_template(tokenizer, bare)), "eos_missing") == [0, 1]
    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<|im_start|>"  # what the embedded model's file says
    assert found(check_pairs(pairs, wrong), "eos_missing") == [0, 1]
    assert found(check_pairs(pairs, tokenizer), "eos_missing") is None


def test_a_template_that_refuses_a_row_is_a_finding_and_no_traceback(tokenizer):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    pairs = load_pairs([pair(), pair([turn("system", "Be brief."), turn("user", "Why?")])])
    report = check_pairs(pairs, with_template(tokenizer, strict + tokenizer.chat_template))
    assert found(report, "template_refuses") == [1]
    assert found(report, "eos_missing") is None


def test_eos_of_a_dialogue_counts_one_for_each_turn(tokenizer):
    sides = [[turn("assistant", "a"), turn("user", "b"), turn("assistant", text)] for text in ("c", "d")]
    report = check_pairs(load_pairs([pair("Why?", *sides)]), tokenizer)
    assert found(report, "eos_doubled") is None
    assert found(report, "user_turn_in_completion") == [0]


def test_only_tokens_of_the_chat_are_control_tokens(tokenizer):
    pairs = load_pairs([pair("What is <filename>?"), pair("What is <|im_end|>?"), pair("What is <|eot_id|>?")])
    report = check_pairs(pairs, tokenizer)
    assert found(report, "special_token_in_text") == [1]
    assert found(report, "template_leftover") == [2]


# Lengths


def test_long_prompts_lose_whole_turns_from_the_left_or_go(tokenizer):
    talk = [turn(role, "word " * 60) for role in ("user", "assistant") * 3]
    system = turn("system", "Be brief.")
    rows = [
        pair("Short?"),
        pair([system, *talk, turn("user", "Why?")]),
        pair("word " * 300),
        pair([*talk, turn("user", "word " * 300)]),
        pair("Short too?"),
    ]
    pairs = load_pairs(rows)
    report = check_pairs(pairs, tokenizer, max_prompt_length=200)
    assert found(report, "long_prompt") == [1, 2, 3]
    assert "1 shortened, 2 left out, 0 kept" in str(report)
    assert report.pairs["origin"][:] == ["row 1", "row 2", "row 5"]
    shortened = report.pairs[1]["prompt"]
    assert shortened == [system, *talk[4:], turn("user", "Why?")]  # as many turns as fit, beginning with the user's
    tokens = check_pairs(report.pairs, tokenizer, max_prompt_length=200).lengths["prompt"]
    assert tokens.max() <= 200 < tokens[1] + 60
    assert report.lengths["prompt"].tolist() == tokens.tolist()

    dropped = check_pairs(pairs, tokenizer, max_prompt_length=200, on_long_prompt="drop")
    assert dropped.pairs["origin"][:] == ["row 1", "row 5"]
    kept = check_pairs(pairs, tokenizer, max_length=250, max_prompt_length=200, on_long_prompt="keep")
    assert kept.pairs["prompt"][:] == pairs["prompt"][:]
    assert found(kept, "no_room") == [1, 2, 3]
    with pytest.raises(UserError, match="Every prompt"):
        check_pairs(pairs.select([2, 3]), tokenizer)


def test_completion_tokens_that_would_be_cut_are_counted(tokenizer):
    pairs = load_pairs([pair("Why?", "word " * 50, "word " * 70), pair("How?", "short", "word " * 20), pair("When?")])
    report = check_pairs(pairs, tokenizer, max_length=80)
    trainer = [as_trl_does(tokenizer, row | {"chat_template_kwargs": {}}) for row in pairs]
    cut = sum(max(0, shared + side - 80) for _, shared, *sides in trainer for side in sides)
    total = sum(chosen + rejected for *_, chosen, rejected in trainer)
    assert cut > 0 and found(report, "over_max_length") == [0]
    assert f"{cut} of {total} completion tokens" in str(report)


# What tells the sides apart


def test_chance_is_no_leak_and_a_habit_is(tokenizer):
    rng = random.Random(3)
    words = ["tree", "river", "stone", "cloud"]

    def text(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high))) + "."

    even = [pair(f"Question {n}?", text(5, 15), text(5, 15)) for n in range(200)]
    assert check_pairs(load_pairs(even), tokenizer).findings == []
    few = [pair(f"Question {n}?", *(["A tree.", "Tree."] if n < 8 else ["Tree.", "A tree."])) for n in range(12)]
    report = check_pairs(load_pairs(few), tokenizer)  # 8 of 12: a coin does that often
    assert report.findings == [] and report.figures["longer_is_chosen"] == pytest.approx(8 / 12)
    longer = [pair(f"Question {n}?", text(8, 15), text(5, 12)) for n in range(200)]
    report = check_pairs(load_pairs(longer), tokenizer)
    assert {finding.code for finding in report.findings} == {"length_leak"}
    assert report.figures["longer_is_chosen"] > 0.7
    for habit in ("1. {}", "Well then, {}", "<think>x</think>{}", "`{}`", "{} 7.", "**{}**", "{}!", "{}?", "x\n{}"):
        rows = [row | {"chosen": habit.format(row["chosen"])} for row in even]
        codes = {finding.code for finding in check_pairs(load_pairs(rows), tokenizer).findings}
        assert "feature_leak" in codes, habit


# The report


def test_errors_stop_and_warnings_do_not(tokenizer):
    warned = check_pairs(load_pairs([pair(), pair()]), tokenizer)
    assert found(warned, "duplicate_pair") == [1]
    warned.raise_for_errors()
    assert warned.clean["origin"][:] == ["row 1", "row 2"]
    wrong = check_pairs(load_pairs([pair(), pair(rejected=" ")]), tokenizer)
    with pytest.raises(UserError, match=r"(?s)empty completion: 1 \(row 2\).*\.clean .*1 of 2 pairs remain"):
        wrong.raise_for_errors()
    assert wrong.clean["origin"][:] == ["row 1"]


def test_findings_from_elsewhere_are_taken_in(tokenizer):
    report = check_pairs(load_pairs([pair(), pair()]), tokenizer)
    finding = Finding("thought_open", "error", 1, "a thought that never closes", "why", "cure", (0,), ("row 1",))
    assert report.add([finding]) is report
    assert [one.code for one in report.findings] == ["thought_open", "duplicate_pair"]  # errors first
    assert report.clean["origin"][:] == ["row 2"]
    frame = report.to_frame()
    assert frame.columns.tolist() == ["severity", "code", "count", "what", "rows", "why", "cure"]
    assert frame["rows"].tolist() == ["row 1", "row 2"]


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)


def test_what_the_report_shows_is_harmless(tokenizer, tmp_path):
    path = tmp_path / "<script>.csv"
    start = "</td><img\u202e src=x\x1b[31m onerror=y>"
    path.write_text("prompt,chosen,rejected\n" + "".join(f"q{n},{start} a,b{n}\n" for n in range(20)), encoding="utf-8")
    report = check_pairs(load_pairs(path), tokenizer)
    assert "onerror" in str(report) or "img" in str(report)
    tags = _Tags()
    tags.feed(report._repr_html_())
    assert tags.seen == {"p", "table", "tr", "th", "td"}
    shown = str(report) + report.to_frame().to_string()
    assert "\x1b" not in shown and "\u202e" not in shown


def test_the_table_names_the_worst_rows_of_a_file_once(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n' * 9)
    line = next(line for line in str(check_pairs(load_pairs(path), tokenizer)).splitlines() if "same_text" in line)
    assert line.startswith("error") and line.endswith("(a.jsonl:1, 2, 3, 4, 5, ...)")


def test_checking_a_file_twice_is_a_cache_hit(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": ""}\n')
    first = check_pairs(load_pairs(path), tokenizer)
    monkeypatch.setattr(measure.Measure, "__call__", lambda *args: pytest.fail("measured again"))
    again = check_pairs(load_pairs(path), tokenizer, max_length=100)  # lengths are judged afterwards: still a hit
    assert str(again) == str(first)
    other_eos = copy.deepcopy(tokenizer)
    other_eos.eos_token = "<|endoftext|>"
    for other in (with_template(tokenizer, tokenizer.chat_template + " "), other_eos):
        with pytest.raises(pytest.fail.Exception):
            check_pairs(load_pairs(path), other)
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(pytest.fail.Exception):
        check_pairs(load_pairs(path), tokenizer)


def test_what_can_not_be_checked(tokenizer):
    raw = datasets.Dataset.from_list([pair()])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    pairs = load_pairs([pair()])
    for call, words in (
        (lambda: check_pairs(raw, tokenizer), "load_pairs"),
        (lambda: check_pairs(pairs.select([]), tokenizer), "empty"),
        (lambda: check_pairs(pairs, tokenizer, test=raw), "test"),
        (lambda: check_pairs(pairs, bare), "no chat template"),
        (lambda: check_pairs(pairs, tokenizer, on_long_prompt="cut"), "'shorten', 'drop' or 'keep'"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_one_long_text_does_not_stop_the_check(tokenizer):
    report = check_pairs(load_pairs([pair(), pair("How?", "x" * 1_000_000, "y")]), tokenizer)
    assert found(report, "over_max_length") == [1]


@pytest.mark.parametrize("limit", ["max_length", "max_prompt_length"])
def test_a_limit_that_is_no_number_is_said(limit, tokenizer):
    pairs = load_pairs([{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}])
    for value in (None, "12", 0, -1, 2.5):
        with pytest.raises(UserError, match=f"^{limit}={value!r}: it has to be a whole number above 0"):
            check_pairs(pairs, tokenizer, **{limit: value})
    check_pairs(pairs, tokenizer, **{limit: np.int64(64)})
