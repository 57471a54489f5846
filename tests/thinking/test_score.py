"""Reading answers and thoughts: what is right, what is false, and a table of a model's replies."""

import pytest

from helpers.model.generate import Reply
from helpers.thinking.score import false_steps, is_right, score_thought, thought_shares, thought_table


@pytest.mark.parametrize(
    "answer, expected, right",
    [
        ("There are 33 pencils left.", "33", True),
        ("Of 48 pencils, 33 are left.", "33", True),
        ("That is 1,200 metres.", "1200", True),
        ("33.0", "33", True),
        ("33.5", "33", False),
        ("There are 34 pencils.", "33", False),
        ("There are some.", "33", False),
        (None, "33", False),
        ("Ben came second.", "Ben", True),
        ("Ben or Ada came second.", "Ben", False),
        ("It is a Friday.", "Friday", True),
        ("It ends on May 7.", "May 7", True),
        ("It ends on the 7th of May.", "May 7", True),
        ("It ends on May 17.", "May 7", False),
        ("No, a whale is a mammal.", "Mammal", True),
        ("Mammalogy.", "mammal", False),
    ],
)
def test_is_right(answer, expected, right):
    assert is_right(answer, expected) is right


def test_false_steps_reads_what_it_can():
    assert false_steps("300 / 4 = 75, 75 * 6 = 450, and 25% of 80 = 20, so 80 - 20 = 60.") == []
    assert false_steps("300 / 4 = 74 and 25% of 80 = 25") == ["300 / 4 = 74", "25% of 80 = 25"]
    assert false_steps("31 > 40 and 5 > 5, but 3 < 4") == ["31 > 40", "5 > 5"]
    assert false_steps("50 * 9 / 5 = 90 and 0.5 * 4 = 2 are left alone") == []
    assert false_steps("3 days after Monday comes Friday") == ["3 days after Monday comes Friday"]
    assert false_steps("June has 31 days. One day is 60 hours.") == ["June has 31 days", "One day is 60 hours"]


@pytest.mark.parametrize(
    "reply, score",
    [
        ("<think>\n6 + 1 = 7\n</think>\n\nIt is 7.", 1),
        ("<think>\n6 + 1 = 8\n</think>\n\nIt is 7.", 0.5),
        ("<think>\n5 + 1 = 6, and 6 + 1 = 8\n</think>\n\nIt is 7.", 0.5),
        ("<think>\nSeven is a good number.\n</think>\n\nIt is 7.", 0.5),
        ("<think>\n6 + 1 = 7\n</think>\n\nIt is 8.", 0),
        ("It is 7.", 0),
        ("<think>\n6 + 1 = 7. It is 7.", 0),
        ("<think>\n<think>\n6 + 1 = 7\n</think>\n\nIt is 7.", 0),
    ],
)
def test_score_of_a_reply(reply, score, tokenizer):
    assert score_thought(reply, "7", tokenizer) == score


def replied(tokenizer, text, ended=True):
    return Reply(text, tokenizer.encode(text, add_special_tokens=False), ended)


def test_table_of_thoughts(tokenizer):
    texts = [
        "<think>\n6 + 1 = 8\n</think>\n\nIt is 7.",
        "<think>\nSix and one: 7",
        "It is 7.",
        "<think></think>It is 8.",
    ]
    replies = [replied(tokenizer, text, ended=i != 1) for i, text in enumerate(texts)]
    table = thought_table(replies, ["7"] * 4, tokenizer)
    assert table.well_formed.tolist() == [True, False, False, False]
    assert table.closed.tolist() == [True, False, False, True]
    assert table.right.tolist() == [True, False, True, False]
    assert table.false_steps.tolist() == [1, 0, 0, 0]
    assert table.cut.tolist() == [False, True, False, False]
    assert (table.thought_tokens > 0).tolist() == [True, True, False, False]
    shares = thought_shares(table)
    assert shares.share.to_dict() == {"well-formed": 0.25, "closed": 0.5, "right": 0.5}
    assert shares.loc["closed", "low"] < 0.5 < shares.loc["closed", "high"] and set(shares.pairs) == {4}


def test_table_of_thoughts_that_the_prompt_opened(thinking_2507):
    table = thought_table([replied(thinking_2507, "Six and one.\n</think>\n\nIt is 7.")], ["7"], thinking_2507)
    assert table.loc[0, ["well_formed", "closed", "right"]].all()
