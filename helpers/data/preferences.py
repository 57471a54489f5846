"""Which of two answers won. Only what is certain is read; else the reader is asked for `wins`."""

import functools
import itertools
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from helpers.common import UserError, visible
from helpers.data.layouts import Layout, lookup

MEANINGS = ("first", "second", "tie", None)
UNKNOWN, MISSING = "not certain", "nothing said"
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SHOWN_VALUES = 12
MOST_VALUES = 1000  # kept apart when values are counted
TAIL = re.compile(r"(?:.*[_ -])?(a|b|0|1|2)", re.I)
# Whole verdicts in words, once case, marks and brackets are gone; X and Y stand for the names of the two answers.
_HOW = r"(?: (?:much|slightly|clearly|significantly|somewhat|far|a bit|a little|a lot|strongly|marginally|way))*"
_OVER = r"(?: (?:than|over|to) Y)?"
X_WINS = (
    r"X(?: wins| won)?",
    rf"X(?: is| was)?{_HOW} (?:better|best|preferred|superior){_OVER}",
    rf"(?:i )?(?:strongly |slightly )?prefer(?:s|red)?(?: is)? X{_OVER}",
    r"(?:winner|better|best|choose|chosen)(?: is)? X",
    r"X ?>+ ?Y|Y ?<+ ?X",
    rf"Y(?: is| was)?{_HOW} worse(?: than X)?",
)
TIES = (
    r"ties?(?: both ?(?:bad|good))?|draw|equal|equally (?:good|bad)|same|about (?:the same|equal)|none|no preference",
    r"(?:both|neither)(?: (?:are )?(?:good|bad|equal))?|both(?:bad|good)|both X and Y|neither X nor Y|X ?=+ ?Y",
)
NOUNS = "model|response|answer|completion|output|reply|candidate|conversation|assistant|option|text|summary"
MODEL_COLUMNS = ("model_{}", "model{}", "generator_{}", "{}_model", "response_{}_model", "response_{}_source")
TERM = re.compile(r"(?:(<=?|>=?) *)?(-?\d*\.?\d+)(?: *(?:to|\.\.|-) *(-?\d*\.?\d+))? +(first|second|tie|none)", re.I)
# Columns whose numbers name an answer. Others ("label", "is_0_better") may hold 1 for yes, or a scale.
NUMBERED = re.compile(r"preference|preferred|winner|choice|.*_(?:id|index|idx)", re.I)


class LeftOut(Exception):
    """A row that is no pair; its text is the reason that the report names."""


def number_of(value: Any) -> float | None:
    """`value` as a number, if it is one or is written as one; a truth value is none."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, an empty text or NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _key(value: Any) -> str:
    number = number_of(value)
    if number is not None:
        return f"{number:.10g}"
    return value.strip().casefold() if isinstance(value, str) else json.dumps(value, default=str).casefold()


def _words(text: str) -> str:
    return " ".join(re.sub(r"(?<=\w)[_-](?=\w)|[()\[\]\"'.,]|!+$", " ", text.casefold().strip()).split())


class _Words:
    """Reads verdicts in words, and numbers that name an answer, about two answers with these column names."""

    def __init__(self, a: str, b: str, column: str):
        self.numbered = NUMBERED.fullmatch(column)
        tails = [found[1].lower() if (found := TAIL.fullmatch(name)) else "" for name in (a, b)]
        self.tails = tails if sorted(tails) in (["a", "b"], ["0", "1"], ["1", "2"]) else ["a", "b"]
        # "The first" is not certain if the reader has response_2 as the first answer.
        places = ("first|1st", "second|2nd") if self.tails == sorted(self.tails) else self.tails
        first, second = (
            f"(?:{re.escape(_words(name))}|(?:the )?(?:(?:{NOUNS}) ?)?(?:{tail}|{place})|(?:{place}) (?:{NOUNS}))"
            for name, tail, place in zip((a, b), self.tails, places, strict=True)
        )
        kinds = (("first", X_WINS, first, second), ("second", X_WINS, second, first))
        kinds += (("tie", TIES, first, second), ("tie", TIES[1:], second, first))
        self.patterns = [
            (meaning, re.compile("|".join(patterns).replace("X", x).replace("Y", y)))
            for meaning, patterns, x, y in kinds
        ]

    def __call__(self, value: Any) -> str | None:
        number = number_of(value)
        if number is not None:
            return self._place(number)
        return self._of_text(value) if isinstance(value, str) else UNKNOWN

    @functools.lru_cache(maxsize=MOST_VALUES)  # noqa: B019 - a Judge lives as long as one call of load_pairs
    def _of_text(self, text: str) -> str | None:
        text = _words(text)
        return next((meaning for meaning, pattern in self.patterns if pattern.fullmatch(text)), UNKNOWN)

    def _place(self, number: float) -> str | None:
        """A number counts if the names of the answers end in it; between 1 and 2 AlpacaEval has fractions."""
        if not self.numbered or "a" in self.tails:
            return UNKNOWN
        first, second = map(float, self.tails)
        if number not in (first, second) and not (first + second == 3 and 1 < number < 2):
            return UNKNOWN
        toward_second = abs(number - first) - abs(number - second)
        return "second" if toward_second > 0 else "first" if toward_second < 0 else "tie"


def _by_table(wins: dict[Any, str | None]) -> Callable[[Any], str | None]:
    wrong = [meaning for meaning in wins.values() if meaning not in MEANINGS]
    if wrong:
        raise UserError(f"wins= gives {wrong[0]!r} to a value; it is 'first', 'second', 'tie' or None (left out).")
    table: dict[str, str | None] = {}
    for value, meaning in wins.items():
        if table.setdefault(_key(value), meaning) != meaning:
            raise UserError(f"wins= says two things of {value!r}: capitals make no difference, nor do 1, 1.0 and '1'.")
    return lambda value: table.get(_key(value), UNKNOWN)


def _by_rule(rule: str) -> Callable[[Any], str | None]:
    terms = [TERM.fullmatch(term.strip()) for term in rule.split(",")]
    if None in terms:
        raise UserError(
            f"wins={rule!r} is no rule like '1 to 3 first, 4 to 6 second' or '< 0 first, 0 tie, > 0 second'."
        )

    def of(value: Any) -> str | None:
        number, found = number_of(value), set()
        if number is None:
            return UNKNOWN
        for sign, low, high, meaning in (term.groups() for term in terms if term):
            ends = sorted((float(low), float(high or low)))
            if SIGNS[sign](number, ends[0]) if sign else ends[0] <= number <= ends[1]:
                found.add(meaning.lower())
        return UNKNOWN if len(found) != 1 else None if found == {"none"} else found.pop()

    return of


class Judge:
    """Says of each row which answer won. It has to `see` all rows and to `settle` before it judges one.

    Args:
        layout: of the rows.
        wins, first_wins: as in `load_pairs`.
    """

    def __init__(self, layout: Layout, wins: Any, first_wins: Any):
        self.layout, self.first_wins = layout, first_wins
        wins: Any = layout.wins if wins is None else wins
        self.given = wins is not None
        if self.given:
            self.rule = _by_rule(wins) if isinstance(wins, str) else _by_table(dict(wins))
        else:
            self.rule = _Words(layout.a, layout.b, layout.preference)
        self.found: Counter[tuple[str, str | None]] = Counter()  # (value as it is shown, meaning)
        self.values: dict[str, Any] = {}
        self.models: list[tuple[str, str]] | None = None

    def _named(self, value: Any, row: dict[str, Any]) -> str | None:
        """The side that a text names by its content: the model that wrote the answer, or the answer itself."""
        if self.models is None:
            names = [
                (form.format(*first), form.format(*second))
                for form in MODEL_COLUMNS
                for first, second in ((("a",), ("b",)), (("1",), ("2",)), ((self.layout.a,), (self.layout.b,)))
            ]
            self.models = [pair for pair in names if set(pair) <= set(row)] + [(self.layout.a, self.layout.b)]
        for a, b in self.models:
            a, b = lookup(row, a), lookup(row, b)
            if value in (a, b) and a != b:
                return "first" if value == a else "second"
        return None

    def _of_preference(self, value: Any, row: dict[str, Any]) -> str | None:
        if is_missing(value):
            return MISSING
        meaning = self.rule(value)
        named = None if self.given or not isinstance(value, str) else self._named(value, row)
        if named is None or named == meaning:
            return meaning
        return named if meaning == UNKNOWN else UNKNOWN  # a word and a name that say different things

    def _verdict(self, row: dict[str, Any]) -> tuple[Any, str | None]:
        """(value as it is shown, meaning)."""
        layout = self.layout
        if layout.preference:
            value = lookup(row, layout.preference)
            return value, self._of_preference(value, row)
        if layout.scores:
            first, second = (number_of(lookup(row, name)) for name in layout.scores)
            if first is None or second is None:
                return "no score", MISSING
            names = [f"{name} higher" for name in layout.scores]
            return ("equal", "tie") if first == second else (names[first < second], MEANINGS[first < second])
        if layout.one_hot:
            flags = [str(lookup(row, name)).strip().lower() in ("1", "1.0", "true") for name in layout.one_hot]
            set_ones = list(itertools.compress(zip(layout.one_hot, MEANINGS, strict=False), flags))
            return set_ones[0] if len(set_ones) == 1 else ("not exactly one of them", MISSING)
        if any(state not in ("submitted", False, None) for state in lookup(row, layout.status) or ()):
            return "a vote that is a draft, discarded or cancelled", MISSING
        votes = Counter()
        for value in itertools.chain.from_iterable(lookup(row, path) or () for path in layout.votes):
            meaning = self._of_preference(value, row)
            if meaning == UNKNOWN:
                return value, UNKNOWN
            votes[meaning] += meaning != MISSING
        if not +votes:
            return "no vote", MISSING
        (most, count), *_ = votes.most_common()
        return ("majority", most) if 2 * count > votes.total() else ("no majority", "tie")

    def see(self, row: dict[str, Any]) -> None:
        """Take in one row, before any is judged."""
        value, meaning = self._verdict(row)
        key = _key(value) if len(self.values) < MOST_VALUES else "..."
        self.values.setdefault(key, value)
        self.found[key, meaning] += 1

    def _shown(self, keys: Iterable[str]) -> str:
        keys = list(keys)
        counts = {key: sum(count for (other, _), count in self.found.items() if other == key) for key in keys}
        more = f" and {len(keys) - SHOWN_VALUES} more" if len(keys) > SHOWN_VALUES else ""
        return ", ".join(f"{visible(repr(self.values[key]), 60)} ({counts[key]})" for key in keys[:SHOWN_VALUES]) + more

    def settle(self) -> None:
        """Raise UserError, without the source's name, if a value could mean more than one thing."""
        kept = {key: meaning for key, meaning in self.found if meaning != MISSING}
        if self.first_wins is not None and self.layout.preference:
            ties = {key for key, meaning in kept.items() if meaning == "tie" and number_of(self.values[key]) is None}
            first, sides = _key(self.first_wins), set(kept) - ties
            if first not in sides or len(sides) > 2:
                what = f"first_wins={self.first_wins!r} does not say what each value means"
                raise UserError(self._question(what, kept))
            meanings = {key: "tie" if key in ties else "first" if key == first else "second" for key in kept}
            found, self.found = self.found, Counter()
            for (key, meaning), count in found.items():
                self.found[key, meaning if meaning == MISSING else meanings[key]] += count
            self.given, self.rule = True, _by_table({self.values[key]: meaning for key, meaning in meanings.items()})
        elif UNKNOWN in kept.values() or (  # 1 alone may be of 0 and 1, or of 1 and 2
            self.layout.preference and not self.given and {number_of(self.values[key]) for key in kept} == {1}
        ):
            what = (
                "wins= does not say what each value means" if self.given else "it is not certain which answer is better"
            )
            raise UserError(self._question(what, kept))

    def _question(self, what: str, kept: dict[str, str | None]) -> str:
        layout = self.layout
        column = layout.preference or ", ".join(layout.votes)
        keys = sorted(kept, key=lambda key: kept[key] != UNKNOWN)[:SHOWN_VALUES]
        numeric = {key for key in kept if number_of(self.values[key]) is not None}
        wins = ", ".join(
            f"{visible(repr(self.values[key]), 60)}: "
            + ("..." if kept[key] == UNKNOWN or key in numeric else repr(kept[key]))
            for key in keys
        )
        rule = ""
        if len(kept) == 2:
            rule = f" Of two values, first_wins={self.values[keys[0]]!r} or ={self.values[keys[1]]!r} will do."
        elif numeric:
            rule = " For a scale of numbers, give a rule: wins='1 to 3 first, 4 to 6 second' or the like."
        return (
            f"{what}. Column {column!r} holds {self._shown(kept)}. Pass wins={{{wins}}} and say of each value: 'first' "
            f"({layout.a!r} is better), 'second' ({layout.b!r} is better), 'tie', or None to leave its rows out.{rule}"
        )

    def winner(self, row: dict[str, Any]) -> str:
        """first or second. Raises LeftOut for a tie, or if nothing is said."""
        value, meaning = self._verdict(row)
        if meaning in ("first", "second"):
            return meaning
        said = "" if is_missing(value) else f": {value}"
        raise LeftOut(
            "tie" if meaning == "tie" else f"no preference{said}" if meaning == MISSING else f"{value!r} is left out"
        )

    def reading(self) -> str:
        """What the values were taken for, in one line."""
        names = {"first": self.layout.a, "second": self.layout.b, "tie": "tie, left out", None: "left out"}
        groups = []
        for meaning in (*MEANINGS, MISSING):
            counts = {key: n for (key, other), n in self.found.items() if other == meaning}
            values = ["nothing" if is_missing(self.values[key]) else str(self.values[key]) for key in counts]
            if values:
                shown = ", ".join(visible(value, 60) for value in dict.fromkeys(values[:6])) + ", ..." * (
                    len(values) > 6
                )
                groups.append(f"{shown} -> {names.get(meaning, 'left out')} ({sum(counts.values())})")
        layout = self.layout
        column = layout.preference or ", ".join(layout.scores or layout.one_hot or layout.votes)
        return f"{column}: {(', ' if len(self.found) == len(groups) else '; ').join(groups)}"
