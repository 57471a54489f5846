"""Which of two answers won, read from a preference column."""

import re
from typing import Any

import numpy as np

from helpers.common import UserError
from helpers.data.layouts import ANSWER, Layout

TIES = {"tie", "ties", "equal", "same", "both", "neither", "draw", "none"}


class LeftOut(Exception):
    """A row that is no pair; its text is the reason that the report names."""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


class Preference:
    """Reads a preference column; which numbers mean what follows from the numbers that the whole column holds."""

    def __init__(self, layout: Layout, first_wins: Any):
        self.layout, self.first_wins = layout, first_wins
        self.low, self.high, self.fractions = np.inf, -np.inf, False
        tails = [ANSWER.fullmatch(name) for name in (layout.a, layout.b)]
        self.tails = tuple(tail[2].lower() if tail else letter for tail, letter in zip(tails, "ab", strict=True))

    def see(self, value: Any) -> None:
        """Take in one value of the column, before any is judged."""
        number = _number(value)
        if number is not None:
            self.low, self.high = min(self.low, number), max(self.high, number)
            self.fractions |= number != int(number)

    def decide_scale(self, source: str) -> None:
        """Choose how numbers are read. Raises UserError if they could be read in two ways."""
        low, high, column = self.low, self.high, self.layout.preference
        if self.first_wins is not None or low > high:
            self.scale = "given"
        elif self.tails == ("0", "1") and low >= 0 and high <= 1 and not self.fractions:
            self.scale = "index"
        elif low >= 1 and high <= 2:
            self.scale = "one or two"
        elif low < 0:
            self.scale = "sign"
        elif high <= 1 and self.fractions:
            self.scale = "probability"
        else:
            raise UserError(
                f"{source}: the numbers in column {column!r} run from {low:g} to {high:g}, and do not say which "
                f"answer is better. Pass first_wins=..., the value that means that {self.layout.a!r} is the better "
                "one; every other value then means the other answer."
            )

    def second_wins(self, value: Any) -> bool:
        """Whether the second answer is the better one. Raises LeftOut for a tie or a value without a meaning."""
        if value is None or value == "":
            raise LeftOut("no preference")
        text = str(value).strip().lower()
        if text in TIES or text.startswith("tie"):
            raise LeftOut("tie")
        number = _number(value)
        if self.first_wins is not None:
            same = number == _number(self.first_wins) if number is not None else text == str(self.first_wins).lower()
            return not same
        if number is not None:
            # Distance above zero: the second answer is better.
            toward_second = {
                "index": number - 0.5,
                "one or two": number - 1.5,
                "sign": number,
                "probability": 0.5 - number,
            }[self.scale]
            if toward_second == 0:
                raise LeftOut("tie")
            return toward_second > 0
        last = re.split(r"[_ ]", text)[-1]
        if text == self.layout.a.lower() or last in ("a", "first", self.tails[0]):
            return False
        if text == self.layout.b.lower() or last in ("b", "second", self.tails[1]):
            return True
        raise LeftOut("the preference is not understood")
