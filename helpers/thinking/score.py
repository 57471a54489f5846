"""Word problems as thinking pairs: as many as asked, right in every step, or wrong in exactly one.

The pairs have the fields that `helpers.thinking` describes. `is_right` and `false_steps` read answers and thoughts
again, so that a program can say whether a reply is right, of a pair or of a model.
"""

import re
from collections.abc import Sequence

import pandas as pd
from transformers import PreTrainedTokenizerBase

from helpers.model.generate import Reply
from helpers.run.metrics import wilson_interval
from helpers.thinking.tags import split_thinking
from helpers.thinking.word_problems import DAYS, MONTHS, NAMES, UNITS, calculate


def is_right(answer: str | None, expected: str) -> bool:
    """Whether an answer says what it must: what is `expected`, the field `answer` of a pair.

    A number: the last number of the answer is that one. One of NAMES or DAYS: it is the only one named. A date such
    as "May 7": it occurs, in either order. Other words: they occur. None (a thought that never closed) is not right.

    >>> is_right("That leaves 1,200 of them.", "1200"), is_right("Ben, or else Ada.", "Ben")
    (True, False)
    """
    if answer is None:
        return False
    if re.fullmatch(r"\d+", expected):
        numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
        return bool(numbers) and float(numbers[-1]) == float(expected)
    for group in (NAMES, DAYS):
        if expected in group:
            return {word for word in re.findall(r"\w+", answer) if word in group} == {expected}
    words = re.escape(expected)
    if date := re.fullmatch(rf"({'|'.join([*MONTHS, 'February'])}) (\d+)", expected):
        words = rf"{date[1]} {date[2]}(?:st|nd|rd|th)?|{date[2]}(?:st|nd|rd|th)? (?:of )?{date[1]}"
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", answer, re.IGNORECASE) is not None


def false_steps(thought: str) -> list[str]:
    """The statements of a thought that can be evaluated and are false, as they stand there.

    Reads what `make_thinking_pairs` writes: calculations of two whole numbers, comparisons of them, "25% of 80 = 20",
    "3 days after Monday comes Thursday", lengths of months ("June has 30 days") and of units ("One week is 7 days").

    >>> false_steps("Each box holds 8, so 3 * 8 = 24, and 24 + 5 = 30.")
    ['24 + 5 = 30']
    """
    false = []
    for found in re.finditer(r"(?<![\d.])(?<![-+*/] )(\d+) ([-+*/]) (\d+) = (\d+)(?![\d.]*\d)", thought):
        x, y, z = int(found[1]), int(found[3]), int(found[4])
        if not (z * y == x if found[2] == "/" else calculate(x, found[2], y) == z):
            false.append(found[0])
    for found in re.finditer(r"(\d+)% of (\d+) = (\d+)", thought):
        if int(found[1]) * int(found[2]) != 100 * int(found[3]):
            false.append(found[0])
    for found in re.finditer(r"(\d+) ([<>]) (\d+)", thought):
        if (int(found[1]) < int(found[3])) != (found[2] == "<"):
            false.append(found[0])
    for found in re.finditer(rf"(\d+) days after ({'|'.join(DAYS)}) comes (\w+)", thought):
        if calculate(int(found[1]), "days after", found[2]) != found[3]:
            false.append(found[0])
    for found in re.finditer(rf"({'|'.join(MONTHS)}) has (\d+) days", thought):
        if MONTHS[found[1]] != int(found[2]):
            false.append(found[0])
    for found in re.finditer(r"One (\w+) is (\d+) (\w+)", thought):
        known = {(big, small): f for f, units in UNITS.items() for big, small, _ in units}
        if known.get((found[1], found[3]), int(found[2])) != int(found[2]):
            false.append(found[0])
    for found in re.finditer(r"In a (race|game of points) the (smallest|largest) number wins", thought):
        if (found[1] == "race") != (found[2] == "smallest"):
            false.append(found[0])
    return false


def thought_table(replies: Sequence[Reply], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """What a program can say of the thoughts in these replies; the means of its columns are a model's figures.

    Args:
        replies: as `generate_replies` gives them.
        answers: what each answer must say (the field `answer` of a pair), in the order of `replies`.
        tokenizer: of the model that replied.

    Returns:
        One row for each reply: well_formed (one whole thought, then the answer, no other tag), closed (whatever else
        is wrong, a thought ends and an answer follows), right (see `is_right`; an answer without a thought counts
        too), false_steps (statements that can be evaluated and are false), thought_tokens (0 without a thought) and
        cut (the reply met max_new_tokens before its end).
    """
    rows = []
    for reply, answer in zip(replies, answers, strict=True):
        found = split_thinking(reply.ids, tokenizer)
        thought = found.thought or ""
        rows.append(
            {
                "well_formed": found.well_formed,
                "closed": found.thought is not None and found.answer is not None,
                "right": is_right(found.answer, answer),
                "false_steps": len(false_steps(thought)),
                "thought_tokens": len(tokenizer.encode(thought, add_special_tokens=False)),
                "cut": not reply.ended,
            }
        )
    return pd.DataFrame(rows)


def thought_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Shares of well-formed, closed and right replies in a table of `thought_table`.

    Returns:
        Three rows; columns share, low, high (Wilson, 95 percent) and pairs (the count of replies).
    """
    rows = {}
    for column in ("well_formed", "closed", "right"):
        low, high = wilson_interval(int(table[column].sum()), len(table))
        rows[column.replace("_", "-")] = {"share": table[column].mean(), "low": low, "high": high, "pairs": len(table)}
    return pd.DataFrame.from_dict(rows, orient="index").astype({"pairs": int})
