"""Thinking pairs: the written ones, files that are none, and rendering for each kind of model."""

import json
import re
from collections import Counter
from statistics import median

import pytest
from trl.data_utils import common_prefix_length

from helpers.common import UserError
from helpers.data.check import check_pairs
from helpers.thinking.pairs import BUNDLED_THINKING, load_thinking_pairs, render_thinking
from helpers.thinking.score import false_steps, is_right
from helpers.thinking.tags import think_boundary
from helpers.thinking.word_problems import make_thinking_pairs

# The pairs written for this project


def test_written_pairs_have_their_flaws_and_both_sides_think():
    pairs = load_thinking_pairs()
    flaws = Counter(pair["flaw"] for pair in pairs)
    assert len(pairs) == 72 and len({pair["prompt"] for pair in pairs}) == 72
    assert set(flaws) == {"no_thinking", "shallow", "wrong_step", "wrong_answer", "looping", "off_topic"}
    assert all((pair["rejected_thought"] is None) == (pair["flaw"] == "no_thinking") for pair in pairs)
    assert flaws["no_thinking"] == 6 and min(count for flaw, count in flaws.items() if flaw != "no_thinking") == 12
    assert set(Counter(pair["topic"] for pair in pairs).values()) == {12}


def test_written_pairs_are_short():
    for pair in load_thinking_pairs():
        thoughts = [pair["chosen_thought"], *filter(None, [pair["rejected_thought"]])]
        assert all(25 <= len(thought.split()) <= 60 for thought in thoughts), pair["origin"]
        assert len(pair["chosen_answer"].split()) <= 15 and len(pair["prompt"].split()) < 40


def test_written_pairs_are_right_where_chosen_and_only_there():
    for pair in load_thinking_pairs():
        assert is_right(pair["chosen_answer"], pair["answer"]), pair["origin"]
        assert not is_right(pair["rejected_answer"], pair["answer"]), pair["origin"]
        assert false_steps(pair["chosen_thought"]) == []


def test_no_surface_feature_tells_the_written_pairs(tokenizer, texts, accuracy):
    everything = load_thinking_pairs()
    both_think = [pair for pair in everything if pair["rejected_thought"]]
    for pairs in (everything, both_think):
        for feature in (
            len,
            lambda text: len(text.split()),
            lambda text: len(tokenizer.encode(text)),
            lambda text: len(re.findall(r"\d", text)),
        ):
            assert 0.45 <= accuracy(pairs, feature) <= 0.55
    ratios = [len(chosen) / len(rejected) for chosen, rejected in texts(everything)]
    assert 0.95 <= median(ratios) <= 1.05
    first = Counter()
    for pair in both_think:
        first[pair["chosen_thought"].split()[0]] += 1
        first[pair["rejected_thought"].split()[0]] -= 1
    assert max(map(abs, first.values())) <= 1  # no first word is on one side twice more often


def test_bundled_file_is_plain_json():
    with BUNDLED_THINKING.open(encoding="utf-8") as file:
        assert all(set(json.loads(line)) >= {"prompt", "chosen_thought", "flaw"} for line in file)


def test_written_pairs_pass_check_pairs(tokenizer, qwen3, thinking_2507):
    for model in (tokenizer, qwen3, thinking_2507):
        report = check_pairs(render_thinking(load_thinking_pairs(), model), model)
        assert report.findings == []


# Bad files


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "f.jsonl is empty"),
        ("\n", "f.jsonl holds no pairs"),
        ('{"prompt": "a"}\n', r"f.jsonl:1: the field 'chosen_thought'"),
        ("[1]\n", "f.jsonl row 1: a line must hold one JSON object"),
        ('{"prompt": \n', "f.jsonl, line 2, column 1: not valid JSON"),
    ],
)
def test_thinking_pairs_from_a_bad_file(tmp_path, text, message):
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_thinking_pairs(path)


def test_thinking_pairs_from_no_file(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        load_thinking_pairs(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        load_thinking_pairs(tmp_path / "bad.jsonl")


# Rendering


def test_one_thought_and_a_prompt_that_stays_a_prefix(case, codes, as_trained):
    tokenizer, switch = case
    pairs = load_thinking_pairs() + make_thinking_pairs(50, seed=1)
    for pair, rendered in zip(pairs, render_thinking(pairs, tokenizer, switch), strict=True):
        prompt, *sides = as_trained(rendered, tokenizer)
        for ids, thought in zip(sides, (pair["chosen_thought"], pair["rejected_thought"]), strict=True):
            assert common_prefix_length(prompt, ids) == len(prompt)
            text = tokenizer.decode(ids)
            blocks = 0 if thought is None and think_boundary(tokenizer).kind == "ordinary" else 1
            assert (text.count("<think>"), text.count("</think>")) == (blocks, blocks)
            inside = text.partition("<think>")[2].partition("</think>")[0].strip()
            if switch is False or (thought is None and blocks == 0):
                assert inside == ""
            elif thought is not None:
                assert inside == thought
    assert codes(render_thinking(pairs, tokenizer, switch), tokenizer, max_length=512) == set()


def test_tags_are_single_tokens_where_the_model_has_them(thinking_2507, as_trained):
    pair = render_thinking(load_thinking_pairs()[:1], thinking_2507)[0]
    prompt, chosen, _ = as_trained(pair, thinking_2507)
    assert prompt[-2] == 151667 and chosen.count(151667) == chosen.count(151668) == 1


def test_earlier_thoughts_follow_the_template(qwen3, tokenizer, codes, as_trained):
    turns = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    pair = load_thinking_pairs()[0] | {"prompt": turns}
    for model, kept in ((qwen3, False), (tokenizer, True)):
        rendered = render_thinking([pair], model)[0]
        at_inference = model.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt, chosen, _ = as_trained(rendered, model)
        assert model.decode(prompt) == at_inference and chosen[: len(prompt)] == prompt
        assert ("Two and two." in at_inference) == kept
        assert codes([rendered], model) == set()


def test_no_switch_no_enable_thinking(tokenizer, thinking_2507):
    for model in (tokenizer, thinking_2507):
        with pytest.raises(UserError, match="enable_thinking"):
            render_thinking(load_thinking_pairs(), model, enable_thinking=False)
