"""Ordinary pairs for models that can think: what is trained is what a reply is asked with."""

import copy
import json

import pytest

from helpers import UserError
from helpers.data.check import check_pairs
from helpers.data.load import load_pairs
from helpers.data.render import prompt_ids, tokenize_pairs
from helpers.data.report import load_report
from helpers.train.job import check_both

SAY = {"role": "user", "content": "Is it warm?"}
ORDINARY = {"prompt": "Is it warm?", "chosen": "Yes, it is.", "rejected": "No, it is."}
THOUGHT = "<think>\nThe sun shines.\n</think>\n\n"
THINKING = ORDINARY | {"chosen": THOUGHT + "Yes.", "rejected": THOUGHT + "No."}
OFF, ON = ({"chat_template_kwargs": {"enable_thinking": value}} for value in (False, True))
EMPTY = "<think>\n\n</think>\n\n"


def found(report):
    return {finding.code: finding.rows for finding in report.findings}


def texts(report, tokenizer, row=0):
    """Prompt and chosen answer of a pair, as trained."""
    return [tokenizer.decode(report.ids[row][name]) for name in ("prompt_ids", "chosen_ids")]


def test_an_ordinary_pair_is_trained_as_a_hybrid_is_asked(qwen3):
    pairs = load_pairs([ORDINARY, ORDINARY | {"prompt": [{"role": "system", "content": "Be brief."}, SAY]}])
    report = check_pairs(pairs, qwen3)
    assert found(report) == {}
    assert texts(report, qwen3) == [
        f"<|im_start|>user\nIs it warm?<|im_end|>\n<|im_start|>assistant\n{EMPTY}",
        "Yes, it is.<|im_end|>\n",
    ]
    assert report.template == {"enable_thinking": False}
    assert "The chat template gets enable_thinking=False." in str(report)
    # All who render take the same: of rows, of what was read from the file, and of a question by the run's options.
    asked = [prompt_ids(qwen3, rows) for rows in (list(pairs), list(report.pairs))]
    asked.append(prompt_ids(qwen3, pairs["prompt"], **report.template))
    assert asked == [report.ids["prompt_ids"][:]] * 3
    assert tokenize_pairs(pairs, qwen3).to_list() == tokenize_pairs(report.pairs, qwen3).to_list()
    assert tokenize_pairs(pairs, qwen3).to_list() == report.ids.to_list()
    assert load_report(report.pairs) == load_report(pairs)
    assert check_pairs(report.clean, qwen3).hash == report.hash


def test_thoughts_are_rendered_as_ever_and_rows_are_told_apart(qwen3):
    pairs = load_pairs([THINKING, ORDINARY])
    report = check_pairs(pairs, qwen3)
    prompt, answer = texts(report, qwen3)
    assert prompt.endswith("<|im_start|>assistant\n") and answer == THOUGHT + "Yes.<|im_end|>\n"
    assert texts(report, qwen3, 1)[0].endswith(EMPTY)
    assert report.template == {} and "chat template gets" not in str(report)
    assert prompt_ids(qwen3, list(pairs)) == report.ids["prompt_ids"][:]
    reasoning = [{"role": "assistant", "content": "Yes.", "reasoning_content": "The sun shines."}]
    alone = check_pairs(load_pairs([{"prompt": [SAY], "chosen": reasoning, "rejected": reasoning[::-1]}]), qwen3)
    assert texts(alone, qwen3) == [prompt, answer] and alone.template == {}


def test_what_a_row_says_goes_before_the_default(qwen3):
    report = check_pairs(load_pairs([ORDINARY | ON, ORDINARY | OFF, ORDINARY]), qwen3)
    assert [qwen3.decode(ids).endswith(EMPTY) for ids in report.ids["prompt_ids"]] == [False, True, True]
    assert found(report)["prompt_differs"] == (0,)  # the empty thought is in the answer, and in no reply
    own = [row["chat_template_kwargs"] for row in report.pairs]
    assert own == [{"enable_thinking": True}, {"enable_thinking": False}, {"enable_thinking": False}]
    other = {"chat_template_kwargs": {"tone": "dry"}}
    assert check_pairs(load_pairs([ORDINARY | other]), qwen3).template == {"enable_thinking": False, "tone": "dry"}
    assert prompt_ids(qwen3, [load_pairs([ORDINARY])[0]], enable_thinking=True) == [report.ids[0]["prompt_ids"]]


def test_completions_of_several_turns_stay_a_continuation_of_their_prompt(qwen3):
    turns = [{"role": "assistant", "content": "Why?"}, SAY, {"role": "assistant", "content": "Yes."}]
    report = check_pairs(load_pairs([{"prompt": [SAY], "chosen": turns, "rejected": [*turns[:2], turns[0]]}]), qwen3)
    assert set(found(report)) == {"user_turn_in_completion"} and report.template == {}


def test_a_long_prompt_is_shortened_as_it_is_rendered(qwen3):
    talk = [{"role": role, "content": "word " * 60} for role in ("user", "assistant")]
    report = check_pairs(load_pairs([ORDINARY | {"prompt": [*talk, SAY]}, ORDINARY]), qwen3, max_prompt_length=40)
    assert report.prompts == {"shortened": 1, "left_out": 0}
    assert report.pairs[0]["prompt"] == [SAY] and report.ids[0] == report.ids[1]
    assert report.pairs[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_model_that_always_thinks_says_what_to_do_with_ordinary_pairs(thinking_2507):
    report = check_pairs(load_pairs([ORDINARY, THINKING]), thinking_2507)
    assert {code: rows for code, rows in found(report).items() if code != "duplicate_pair"} == {"thought_missing": (0,)}
    with pytest.raises(UserError, match="(?s)always thinks: 1 .*hybrid one.* or write a thought into both answers"):
        report.raise_for_errors()
    one_sided = check_pairs(load_pairs([ORDINARY | {"chosen": THOUGHT + "Yes."}]), thinking_2507)
    assert [finding.code for finding in one_sided.errors] == ["prompt_not_prefix"]


SLOW = pytest.mark.slow  # a tokenizer that takes seconds to load


@pytest.mark.parametrize(
    "family", [pytest.param("llama3_1", marks=SLOW), pytest.param("gemma3", marks=SLOW), "embedded"]
)
def test_other_families_get_nothing(family, request):
    tokenizer = (
        request.getfixturevalue("tokenizer") if family == "embedded" else request.getfixturevalue("from_npm")(family)
    )
    pairs = load_pairs([ORDINARY, ORDINARY | {"prompt": "And now?", "chosen": "No, it is.", "rejected": "Yes, it is."}])
    report = check_pairs(pairs, tokenizer)
    assert found(report) == {} and report.template == {}
    assert report.pairs.column_names == pairs.column_names
    whole = tokenizer.apply_chat_template(pairs[0]["prompt"] + pairs[0]["chosen"], tokenize=False)
    assert "".join(texts(report, tokenizer)) == whole and "think" not in whole
    assert prompt_ids(tokenizer, list(pairs)) == prompt_ids(tokenizer, pairs["prompt"]) == report.ids["prompt_ids"][:]


def test_text_that_a_template_puts_before_answers_alone_is_found(tokenizer):
    other = copy.copy(tokenizer)
    part = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ 'Well: ' if m.role == 'assistant' }}{{ m.content }}"
    other.chat_template = (
        part + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    report = check_pairs(load_pairs([ORDINARY]), other)
    assert found(report) == {"prompt_differs": (0,)} and not report.errors
    both = {
        "chosen": "Well: yes.",
        "rejected": " Yes \n",
    }  # white space that a template adds or strips is no difference
    assert "prompt_differs" not in found(check_pairs(load_pairs([ORDINARY | both]), tokenizer))


def test_the_line_of_a_run_says_what_its_pairs_are_rendered_with(qwen3):
    checked = check_both(
        load_pairs([ORDINARY]),
        load_pairs([ORDINARY | {"prompt": "And now?"}]),
        qwen3,
        512,
        max_prompt_length=256,
        on_long_prompt="shorten",
    )
    assert checked.train.template == checked.test.template == {"enable_thinking": False}
    json.dumps(checked.train.template)
