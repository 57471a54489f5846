"""The one place that renders a row: its ids are TRL's, whatever the row brings for the chat template."""

import copy
import json
from types import SimpleNamespace

import pytest
import trl

from helpers import UserError
from helpers.data.check import check_pairs
from helpers.data.load import load_pairs
from helpers.data.render import (
    IDS,
    data_hash,
    pair_lengths,
    prompt_ids,
    shared_options,
    template_options,
    token_counts,
    tokenize_pairs,
)
from helpers.model.load import CHATML

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}


def say(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def sides(better: str = "Blue.", worse: str = "Green, I think.") -> dict:
    return {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", better), ("rejected", worse))}


# Every kind of row that a chat template sees; tools as a list and as its JSON.
ROWS = [
    {"prompt": say("What colour is the sky?"), **sides()},
    {"prompt": say("Is it warm in Rome?"), **sides("Warm.", "No."), "tools": json.dumps([WEATHER])},
    {"prompt": say("Say hello."), **sides("Hello.", "Bye."), "chat_template_kwargs": {"style": "short"}},
    {"prompt": [{"role": "system", "content": "Be brief."}, *say("And the sea?")], **sides()},
    {"prompt": say("Hi", "Hello.", "What colour is the sky?"), **sides(), "tools": json.dumps([WEATHER])},
]


@pytest.fixture(scope="module")
def with_options(tokenizer):
    """The embedded model's tokenizer with a chat template that writes tools and a variable of its own."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% if style %}<|im_start|>system\nStyle: {{ style }}<|im_end|>\n{% endif %}" + CHATML
    )
    return changed


def by_trl(tokenizer, pairs):
    """Ids as DPOTrainer makes them, by its own code."""
    stub = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=512, truncation_mode="keep_start")
    # TRL reads chat_template_kwargs with a default only if the column is missing.
    rows = pairs.map(lambda row: {"chat_template_kwargs": row.get("chat_template_kwargs") or {}})
    prepare = trl.DPOTrainer._prepare_dataset  # noqa: SLF001  (TRL has no public function for it)
    return prepare(stub, rows, tokenizer, args, "train").select_columns(list(IDS)).to_list()


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_ids_are_those_of_the_trainer(with_options, row):
    pairs = load_pairs([ROWS[row]])
    expected = by_trl(with_options, pairs)
    assert tokenize_pairs(pairs, with_options).to_list() == expected
    assert check_pairs(pairs, with_options).ids.to_list() == expected


def test_rows_of_all_kinds_together_and_their_hash(with_options):
    pairs = load_pairs(ROWS)
    report = check_pairs(pairs, with_options)
    alone = [tokenize_pairs(pairs.select([row]), with_options)[0] for row in range(len(ROWS))]
    assert report.ids.to_list() == alone
    assert report.hash == data_hash(tokenize_pairs(pairs, with_options))
    text = with_options.decode(report.ids[1]["prompt_ids"])
    assert "weather" in text and "weather" not in with_options.decode(report.ids[0]["prompt_ids"])
    assert "Style: short" in with_options.decode(report.ids[2]["prompt_ids"])


def test_a_prompt_for_a_reply_is_the_prompt_that_was_trained(with_options):
    pairs = load_pairs(ROWS)
    assert prompt_ids(with_options, list(pairs)) == tokenize_pairs(pairs, with_options)["prompt_ids"][:]
    question = "What colour is the sky?"
    assert (
        prompt_ids(with_options, [question, say(question)])
        == [tokenize_pairs(pairs, with_options)[0]["prompt_ids"]] * 2
    )
    assert "Style: long" in with_options.decode(prompt_ids(with_options, [question], style="long")[0])


def test_what_a_row_brings_goes_before_what_all_get(with_options):
    rows = list(load_pairs(ROWS))
    ids = prompt_ids(with_options, [rows[0], rows[2]], style="long")
    assert ["Style: long" in with_options.decode(ids[0]), "Style: short" in with_options.decode(ids[1])] == [True, True]


def test_options_that_all_rows_share():
    short, other = ROWS[2], {**ROWS[2], "chat_template_kwargs": {"style": "long"}}
    assert shared_options(load_pairs([short, short])) == {"style": "short"}
    assert shared_options(load_pairs([short, other])) == shared_options(load_pairs(ROWS)) == {}


def test_counts_and_lengths(with_options):
    ids = tokenize_pairs(load_pairs(ROWS), with_options)
    counts = token_counts(ids)
    for name in counts:
        assert counts[name].tolist() == [len(row) for row in ids[f"{name}_ids"]]
    assert pair_lengths(ids).tolist() == [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in ids
    ]
    some = ids.select([3, 1])  # a selection counts its own rows
    assert token_counts(some)["prompt"].tolist() == [len(ids[3]["prompt_ids"]), len(ids[1]["prompt_ids"])]


def test_what_is_none_is_not_set():
    assert template_options({"tools": None, "chat_template_kwargs": {"style": None, "deep": 0}}) == {"deep": 0}
    assert template_options({"tools": ""}) == {}


def test_tools_that_are_no_json_are_named(with_options):
    pairs = load_pairs([{**ROWS[0], "tools": "weather, please"}, ROWS[1]])
    assert "tools" not in pairs.column_names and "source_tools" in pairs.column_names
    pairs = load_pairs([ROWS[0], ROWS[0]]).add_column("tools", ["weather, please", None])
    report = check_pairs(pairs, with_options)
    assert [finding.code for finding in report.errors] == ["template_refuses"]
    assert report.errors[0].rows == (0,)
    with pytest.raises(UserError, match="row 1: the chat template refuses"):
        tokenize_pairs(pairs, with_options)


def test_an_answer_that_is_a_tool_call_alone_is_not_empty(qwen3):
    """Which of many say so, is a hint that the sides can be told apart."""
    rows = []
    for number in range(12):
        calls = [{"type": "function", "function": {"name": "find", "arguments": {"what": f"map {number}"}}}]
        call = [{"role": "assistant", "content": "", "tool_calls": calls}]
        rows.append(
            {"prompt": f"Where is town {number}?", "chosen": call, "rejected": f"In the north, I think, {number}."}
        )
    report = check_pairs(load_pairs(rows), qwen3)
    assert report.errors == [] and "<tool_call>" in qwen3.decode(report.ids["chosen_ids"][0])
    assert 'starts with "(tool call)"' in str(report)
    empty = [{**rows[0], "chosen": [{"role": "assistant", "content": " "}]}, *rows[1:]]
    assert [one.code for one in check_pairs(load_pairs(empty), qwen3).errors] == ["completion_empty"]


def test_what_the_template_leaves_out_of_messages_is_an_error(with_options):
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "map"}}}
    talk = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "none"},
        {"role": "assistant", "content": "Nothing found."},
    ]
    thought = {"role": "assistant", "content": "Ten.", "reasoning_content": "10 > 2"}
    rows = [{**ROWS[0], "chosen": talk}, {**ROWS[0], "rejected": [thought]}, ROWS[0]]
    pairs = load_pairs(rows)
    found = {finding.what: finding.rows for finding in check_pairs(pairs, with_options).errors}
    assert found == {
        "tool_calls that the chat template leaves out": (0,),
        "reasoning_content that the chat template leaves out": (1,),
    }
    with_options.chat_template = with_options.chat_template.replace(
        "message['content']",
        "(message.tool_calls | default('') | string) + (message.reasoning_content | default('')) + message['content']",
    )
    assert not check_pairs(pairs, with_options).errors
