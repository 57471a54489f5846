"""Cells that hold turns in odd spellings: read whole, kept as they are, or left out by name."""

import json

import datasets
import pytest

from helpers.data.load import load_pairs, load_report


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def rows_of(pairs):
    return [[row[side] for side in ("prompt", "chosen", "rejected")] for row in pairs]


def texts_of(pairs):
    return [[[turn["content"] for turn in side] for side in row] for row in rows_of(pairs)]


def plain(prompt="q", chosen="a", rejected="b"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def reason_of(row):
    """Why a row is left out, next to one that is a pair."""
    (reason,) = load_report(load_pairs([plain(), row])).left_out
    return reason


def test_quotation_marks_around_brackets_and_names_are_text():
    answer = '"thinking" and "reasoning"'
    for one in (answer, f'"{"[" * 9999}"'):
        pairs = load_pairs([plain(one, one)])
        assert texts_of(pairs) == [[[one], [one], ["b"]]]
        assert pairs.features == load_pairs([plain()]).features


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "map"}}}
MORE = {
    "reasoning": say("assistant", "one", reasoning_content="hm"),
    "calls": say("assistant", "", tool_calls=[CALL]),
    "calls without content": {"role": "assistant", "tool_calls": [CALL]},
}


@pytest.mark.parametrize("what", MORE)
def test_messages_that_became_json_are_messages(what, tmp_path):
    # A column of the type Json is a list of texts for pandas (datasets#8343).
    talk = [say("user", "q"), say("assistant", "x"), say("user", "q2")]
    rows = [plain(talk, [MORE[what]], [say("assistant", "two")]), plain("r", [MORE[what]], "b")]
    pairs = load_pairs(rows)
    pairs.to_pandas().to_parquet(tmp_path / "pairs.parquet")
    texts = [[json.dumps(turn) for turn in side] for side in rows_of(pairs)[1]]
    for source in (pairs.to_pandas(), tmp_path / "pairs.parquet"):
        assert rows_of(load_pairs(source)) == rows_of(pairs)
    assert rows_of(load_pairs([plain(*texts)])) == rows_of(pairs)[1:]


def test_tools_of_one_answer_are_kept():
    whole, other = ({"messages": [say("user", "q"), say("assistant", text)]} for text in "ab")
    for side in (whole | {"tools": [CALL]}, json.dumps(whole | {"tools": [CALL]})):
        (pair,) = load_pairs([{"chosen": side, "rejected": other}])
        assert pair["tools"] == [CALL]
    bare = {"messages": [say("user", "q"), MORE["calls"]], "tools": None}
    for side in (bare, json.dumps(bare)):
        (pair,) = load_pairs([{"chosen": side, "rejected": {"messages": [say("user", "q"), say("assistant", "b")]}}])
        assert pair["chosen"][0]["tool_calls"] == [CALL]


PARTS = [{"type": "text", "text": "q"}]
ODD = {
    "a Python list": (plain("['q']", "['a']", "['b']"), r"both answers are a list in a text"),
    "answers in a Python list": (plain("q", "['a, b']", "['c']"), "both answers are a list in a text"),
    "a JSON list as the question": (plain('["q"]'), "the prompt is a list in a text"),
    "a list of two as the question": (plain("['q', \"it's\"]"), "the prompt is a list in a text"),
    "parts": (plain(json.dumps(PARTS), "a", "b"), "prompt holds the parts of a message as JSON"),
    "parts in a message": (plain("q", [say("assistant", json.dumps(PARTS))], "b"), "chosen holds the parts"),
    "a part that is an object": (
        plain([say("user", [{"type": "text", "text": {"value": "q"}}])]),
        "part that is no text (an object)",
    ),
    "a call that is a name": (
        plain("q", [say("assistant", "", tool_calls=[{"function": "find", "arguments": {}}])]),
        "tool_calls of a message in chosen hold a text",
    ),
    "a call of nothing": (
        plain("q", [say("assistant", "", tool_calls=[{"type": "function", "function": None}])]),
        "tool_calls of a message in chosen hold nothing",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_text_is_left_out_by_name(what):
    row, wanted = ODD[what]
    assert wanted in reason_of(row)


def test_honest_lists_in_an_answer_stay_as_they_are():
    for chosen, rejected in (('["red"]', '["blue"]'), ("['a', 'b']", "['b']"), ("['a']", "It is a list.")):
        assert texts_of(load_pairs([plain("Name a colour as JSON.", chosen, rejected)])) == [
            [["Name a colour as JSON."], [chosen], [rejected]]
        ]
    shapes = json.dumps([{"type": "circle", "text": "r"}])
    assert load_pairs([plain("q", shapes)])[0]["chosen"][0]["content"] == shapes


# Prompt, answers, and the answers as they should be read.
MARKS = {
    "the letter of an option": ("Question: Red?\nA) Mars\nB) Tin\nAnswer:", ("A: Mars", "B: Tin"), None),
    "the same letter twice": ("Q: Red?\nA. Mars\nB. Tin\nA:", ("A: Mars", "A: Mars is red"), None),
    "one letter without options": ("Q: Which?\nA:", ("B: shelf", "A: fridge"), None),
    "a word in one answer": ("Question: What is written?\nAnswer:", ("Output: 42", "It is 67."), None),
    "a name in one answer": ("User: Spell out AI.\nAssistant:", ("AI: a science", "Nothing."), None),
    "Anthropic's word in one answer": ("\n\nHuman: Who?\n\nAssistant:", ("Assistant: me", "You."), None),
    "a word in both answers": ("Q: Which?\nA:", ("A: shelf", "A: fridge"), ("shelf", "fridge")),
    "a word in both, with options": ("Question: Red?\nA) x\nB) y\nAnswer:", ("Answer: A", "Answer: B"), ("A", "B")),
    "a token in one answer": ("<|user|>\nq\n<|assistant|>\n", ("<|assistant|>\none", "two"), ("one", "two")),
}


@pytest.mark.parametrize("what", MARKS)
def test_a_mark_of_prose_is_taken_off_both_answers_or_off_neither(what):
    prompt, answers, wanted = MARKS[what]
    (pair,) = texts_of(load_pairs([plain(prompt, *answers)]))
    assert tuple(side[0] for side in pair[1:]) == (wanted or answers)


TOKENS = {  # text before the question, before the answer, after it
    "gpt-oss": ("<|start|>user<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", "<|return|>"),
    "Seed-OSS": ("<seed:bos>user\n", "<seed:eos><seed:bos>assistant\n", "<seed:eos>"),
    "ChatML": ("<|im_start|>user\r\n", "<|im_end|>\r\n<|im_start|>assistant\r\n", "<|im_end|>"),
    "MiniCPM": ("<用户>", "<AI>", ""),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_more_models_are_marks(name, capsys):
    before, between, after = TOKENS[name]
    begun = before + "q" + between
    whole = {side: begun + text + after for side, text in (("chosen", "a"), ("rejected", "b"))}
    for row in (plain(begun, "a" + after, "b" + after), whole):
        assert texts_of(load_pairs([row])) == [[["q"], ["a"], ["b"]]]
        assert f"marks in the texts: {name} (1)" in capsys.readouterr().out


def test_channels_of_gpt_oss_are_read_whole_or_left_out():
    begun = "<|start|>user<|message|>q<|end|><|start|>assistant"
    sides = ["<|channel|>final<|message|>a<|return|>", "<|channel|>final<|message|>b<|return|>"]
    assert texts_of(load_pairs([plain(begun, *sides)])) == [[["q"], ["a"], ["b"]]]
    thought = begun + "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    row = {"chosen": thought + sides[0], "rejected": thought.replace("hm", "ha") + sides[1]}
    assert "unbalanced roles" in reason_of(row)
