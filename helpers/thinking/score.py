"""What a program can say of answers and thoughts, of a pair or of a model: right or not, and which steps are false."""

import re
from collections.abc import Callable, Sequence

import pandas as pd

from helpers.model import Tokenizer
from helpers.model.generate import Reply
from helpers.run.metrics import wilson_interval
from helpers.thinking.tags import split_thinking
from helpers.thinking.word_problems import DAYS, MONTHS, NAMES, STEPS, UNITS


def is_right(answer: str | None, expected: str) -> bool:
    """Whether `answer` says what is `expected`, the field `answer` of a pair; None (an open thought) does not.

    A number must be the last one of the answer. One of NAMES or DAYS must be the only one named. A date such as "May 7"
    must occur, in either order, and so must other words.

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


_UNIT_SIZES = {(big, small): size for size, units in UNITS.items() for big, small, _ in units}
_STATEMENTS: tuple[tuple[str, Callable[..., bool]], ...] = (  # pattern, whether the statement found is true
    (
        r"(?<![\d.])(?<![-+*/] )(\d+) ([-+*/]) (\d+) = (\d+)(?![\d.]*\d)",
        lambda x, sign, y, result: result * y == x if sign == "/" else STEPS[sign](x, y) == result,
    ),
    (r"(\d+)% of (\d+) = (\d+)", lambda percent, of, result: percent * of == 100 * result),
    (r"(\d+) < (\d+)", lambda x, y: x < y),
    (r"(\d+) > (\d+)", lambda x, y: x > y),
    (rf"(\d+) days after ({'|'.join(DAYS)}) comes (\w+)", lambda n, day, end: STEPS["days after"](n, day) == end),
    (rf"({'|'.join(MONTHS)}) has (\d+) days", lambda month, days: MONTHS[month] == days),
    (r"One (\w+) is (\d+) (\w+)", lambda big, size, small: _UNIT_SIZES.get((big, small), size) == size),
    (r"In a (race|game of points) the (smallest|largest) number wins", lambda a, b: (a == "race") == (b == "smallest")),
)


def _statements(thought: str) -> list[tuple[str, bool]]:
    """The statements of a `thought` that can be evaluated, word for word, and whether they are true."""
    return [
        (found[0], is_true(*(int(part) if part.isdecimal() else part for part in found.groups())))
        for pattern, is_true in _STATEMENTS
        for found in re.finditer(pattern, thought)
    ]


def false_steps(thought: str) -> list[str]:
    """The statements of a `thought` that can be evaluated (those that `make_thinking_pairs` writes: calculations and
    comparisons of two whole numbers, percentages, days of the week, months and units) and are false, word for word.

    >>> false_steps("Each box holds 8, so 3 * 8 = 24, and 24 + 5 = 30.")
    ['24 + 5 = 30']
    """
    return [text for text, is_true in _statements(thought) if not is_true]


def score_thought(reply: str, answer: str, tokenizer: Tokenizer) -> float:
    """A score for the judge of `sample_pairs`: 1 if a `reply` has one well-formed thought with true steps alone (see
    `false_steps`) and says `answer` (see `is_right`); a half if a step is false, or there is none and the answer may be
    a guess; else 0. `tokenizer` is of the model that replied.
    """
    found = split_thinking(reply, tokenizer)
    if not (found.well_formed and is_right(found.answer, answer)):
        return 0.0
    steps = [is_true for _, is_true in _statements(found.thought or "")]
    return 1.0 if steps and all(steps) else 0.5


def thought_table(replies: Sequence[Reply], answers: Sequence[str], tokenizer: Tokenizer) -> pd.DataFrame:
    """What a program can say of the thoughts in these replies; the means of the columns describe the model.

    One row for each reply: well_formed (one whole thought, then the answer, no other tag), closed (a thought ends and
    an answer follows, whatever else is wrong), right (see `is_right`; an answer without a thought counts too),
    false_steps (how many), thought_tokens (0 without a thought) and cut (it reached max_new_tokens before its end).

    Args:
        replies, tokenizer: as `generate_replies` gives them, and of the model that replied.
        answers: what each answer must say (the field `answer` of a pair), in the order of `replies`.
    """
    rows = []
    for reply, answer in zip(replies, answers, strict=True):
        found = split_thinking(reply.ids, tokenizer)
        thought, closed = found.thought or "", None not in (found.thought, found.answer)
        tokens = len(tokenizer.encode(thought, add_special_tokens=False))
        right, false = is_right(found.answer, answer), len(false_steps(thought))
        rows.append((found.well_formed, closed, right, false, tokens, not reply.ended))
    return pd.DataFrame(rows, columns=["well_formed", "closed", "right", "false_steps", "thought_tokens", "cut"])


def thought_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Rows for the well-formed, closed and right replies in a `table` of `thought_table`; columns are share, low and
    high (Wilson, 95 percent) and pairs (the count of replies)."""
    names, n = ["well_formed", "closed", "right"], len(table)
    rows = [(table[name].mean(), *wilson_interval(int(table[name].sum()), n), n) for name in names]
    return pd.DataFrame(rows, columns=["share", "low", "high", "pairs"], index=["well-formed", *names[1:]])
