"""Which of two answers won. Only what is certain is read; else the reader is asked for `wins`."""

import functools
import itertools
import json
import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from helpers.common import UserError, visible
from helpers.data import layouts
from helpers.data.layouts import QUESTIONS, VERDICTS, Layout, asked, lookup, opened

MEANINGS = ("first", "second", "tie", None)
UNKNOWN = "not certain"
SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
MOST_VALUES = 1000  # kept apart when values are counted
TAIL = re.compile(r"[a-z]|\d+|first|second")
TAILS = (["a", "b"], ["0", "1"], ["1", "2"], ["first", "second"])
TERM = re.compile(r"(?:(<=?|>=?) *)?(-?\d*\.?\d+)(?: *(?:to|\.\.|-) *(-?\d*\.?\d+))? +(first|second|tie|none)", re.I)
Rule = Callable[[Any], str | None]  # value -> one of MEANINGS, or UNKNOWN


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
    if (number := number_of(value)) is not None:
        return f"{number:.10g}"
    return value.strip().casefold() if isinstance(value, str) else json.dumps(value, default=str).casefold()


def _top(value: Any) -> Any:
    """The name on top of a ranking as Argilla writes it, {"rank": [2, 1], "value": [...]} or a list; else the value."""
    if isinstance(value, dict) and value.keys() == {"rank", "value"}:
        lists = [item if isinstance(item, list) else [item] for item in value.values()]
        value = [dict(zip(value, item, strict=True)) for item in zip(*lists, strict=False)]
    if not isinstance(value, list) or not all(isinstance(item, dict) and "rank" in item for item in value):
        return value
    known = [(rank, item.get("value")) for item in value if (rank := number_of(item["rank"])) is not None]
    if len(known) < len(value):
        return value if known else None
    top = [name for rank, name in known if rank == min(best for best, _ in known)]
    return top[0] if len(top) == 1 else "tie" if top else None


def _words(text: str) -> str:
    return " ".join(re.sub(r"(?<=\w)[_-](?=\w)|[()\[\]\"'.,]|!+$", " ", text.casefold().strip()).split())


def _side_named(value: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    return next(("first" if value == a else "second" for a, b in pairs if value in (a, b) and a != b), None)


def _by_words(a: str, b: str, column: str, models: Iterable[str] = ("", "")) -> Rule:
    """Reads verdicts in words, and numbers that name an answer, about two answers with these column names, by those of
    their `models` too."""
    tails = [part if TAIL.fullmatch(part) else "" for part in layouts.apart(a, b)]
    # "The first" is not certain if the reader has response_2 as the first answer, nor is "b" of response_b, response_c.
    places = ("first|1st", "second|2nd") if tails == sorted(tails) else tails
    if sorted(tails) not in TAILS:
        tails = ["a", "b"] if tails == ["", ""] else [re.escape(_words(name)) for name in (a, b)]
        places = places if tails == ["a", "b"] else tails
    nouns = VERDICTS["nouns"]
    first, second = (
        f"(?:{re.escape(_words(name))}{f'|{re.escape(_words(model))}' * bool(model)}"
        f"|(?:the )?(?:(?:{nouns}) ?)?(?:{tail}|{place})|(?:{place}) (?:{nouns}))"
        for name, tail, place, model in zip((a, b), tails, places, models, strict=True)
    )
    patterns = [
        (side, re.compile("|".join(VERDICTS[forms]).format(x=x, y=y, how=VERDICTS["how"])))
        for x, y, winner in ((first, second, "first"), (second, first, "second"))
        for side, forms in ((winner, "x wins"), ("tie", "ties"))
    ]

    @functools.lru_cache(MOST_VALUES)
    def of_text(text: str) -> str | None:
        return next((side for side, pattern in patterns if pattern.fullmatch(_words(text))), UNKNOWN)

    rule = VERDICTS["numbers"].get(" ".join(tails)) if layouts.says("numbers", column) else None
    of_number = _by_rule(rule) if rule else lambda _: UNKNOWN
    return lambda value: (of_text if isinstance(value, str) and number_of(value) is None else of_number)(value)


def _by_first(first: str, words: Rule, value: Any) -> str | None:
    """One value means the first answer, ties in words are ties, and all else is the second; `settle` counts them."""
    tie = isinstance(value, str) and words(value) == "tie" and number_of(value) is None
    return "tie" if tie else "first" if _key(value) == first else "second"


def _by_table(wins: Iterable[tuple[Any, str | None]]) -> Rule:
    table: dict[str, str | None] = {}
    for value, meaning in wins:
        if meaning not in MEANINGS:
            raise asked("no meaning", meaning=meaning)
        if table.setdefault(_key(value), meaning) != meaning:
            raise asked("two meanings", value=value)
    return lambda value: table.get(_key(value), UNKNOWN)


def _by_rule(rule: str) -> Rule:
    terms = [TERM.fullmatch(term.strip()) for term in rule.split(",")]
    if None in terms:
        raise asked("no rule", rule=rule)

    def of(value: Any) -> str | None:
        number, found = number_of(value), set()
        number = math.nan if number is None else number  # which is in no range
        for sign, low, high, meaning in (term.groups() for term in terms if term):
            ends = sorted((float(low), float(high or low)))
            if SIGNS[sign](number, ends[0]) if sign else ends[0] <= number <= ends[1]:
                found.add(None if meaning.lower() == "none" else meaning.lower())
        return found.pop() if len(found) == 1 else UNKNOWN

    return of


class Judge:
    """Which answer won, in rows of a `layout` (`sample` is one). It has to `see` all, and `settle`, to judge one."""

    def __init__(self, layout: Layout, sample: dict[str, Any], given: dict[str, Any]):
        wins, first_wins = given["wins"], given["first_wins"]
        self.layout, self.sample, self.first_wins, self.count = layout, sample, first_wins, 0
        said = wins.items() if isinstance(wins, dict) else ()
        of_nothing = {meaning for value, meaning in said if is_missing(layouts.plain_value(value))}
        if len(of_nothing) > 1:
            raise asked("two meanings", value="")
        self.of_nothing = next(iter(of_nothing), None)
        self.judges = bool(layout.kind) and layout.kind not in layouts.RANKED
        self.found: dict[str, Counter[str | None]] = defaultdict(Counter)  # how often a value had which meaning
        self.values: dict[str, Any] = {}  # the same values as they are shown
        self.places: dict[str, None] = {}  # other columns that hold a value which is no verdict in words
        self.asked = "preference" if wins is None else "wins"  # what does not say which answer is better
        wins = layout.wins if wins is None else wins
        self.given = (wins, first_wins) != (None, None)
        if not self.judges:
            return
        self.models = [*layouts.twins(sample, layout.answers, "models"), layout.answers]
        a, b = layout.answers
        self.words = _by_words(a, b, layout.by[0], *self.models[:-1][:1])
        # Other columns that may say it too; of a longer name, like preferred_response, also by a number.
        others = sorted(
            name for name in sample.keys() - layout.columns(sample) if layouts.says("another verdict", name)
        )
        if given["scores"] or "preference" in given["columns"]:  # the reader has said which one counts
            others = []
        columns = {name: "choice" if len(layouts.parts(name)) > 1 else name for name in others}
        self.others = {name: _by_words(a, b, column, *self.models[:-1][:1]) for name, column in columns.items()}
        if isinstance(wins, str):
            self.rule = _by_rule(wins)
        elif wins is not None:
            self.rule = _by_table(wins.items() if isinstance(wins, dict) else wins)
        elif layouts.says("worse", layout.by[0]) or layouts.says("yes or no", layout.by[0]):
            self.rule, self.models = lambda _: UNKNOWN, []
        else:
            self.rule = self.words
        if first_wins is not None and layout.kind == "preference":
            self.rule = functools.partial(_by_first, _key(first_wins), self.words)

    def _of_preference(self, value: Any, row: dict[str, Any]) -> str | None:
        if is_missing(value.strip() if isinstance(value, str) else value):
            return self.of_nothing
        meaning = self.rule(value)
        if self.given or not isinstance(value, str) or number_of(value) is not None:
            return meaning
        # By its content, it may be the model that wrote an answer, or the answer itself.
        pairs = [(lookup(row, a), lookup(row, b)) for a, b in self.models]
        pairs = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
        named = _side_named(value, pairs)
        if named is None and self.models[1:]:  # whatever the capitals
            named = _side_named(_key(value), [(_key(a), _key(b)) for a, b in pairs])
        if named is None and meaning == UNKNOWN and any(value == a == b for a, b in pairs):
            return None  # one model wrote both
        named = named or meaning
        if len(self.places) < 2 and (meaning == UNKNOWN or named != meaning):
            self.places |= dict.fromkeys(name for name in row if row[name] == value and name != self.layout.by[0])
        return named if meaning in (named, UNKNOWN) else UNKNOWN  # a word and a name that say different things

    def _verdict(self, row: dict[str, Any]) -> tuple[Any, str | None]:
        """(value as it is shown, meaning)."""
        kind, by = self.layout.kind, self.layout.by
        if kind == "votes":
            values = [value for path in by for value in lookup(row, path) or ()]
            return self._majority(values, lookup(row, self.layout.status) or (), row)
        if kind == "one_hot":
            names = [name for name in by if str(lookup(row, name)).strip().lower() in ("1", "1.0", "true")]
            return (names[0], MEANINGS[by.index(names[0])]) if len(names) == 1 else ("not exactly one of them", None)
        if kind == "scores":
            both = (lookup(row, name) for name in by)
            first, second = (number_of(int(one) if isinstance(one, bool) else one) for one in both)
            if first is None or second is None:
                name = by[first is not None]
                held = lookup(row, name)
                return f"no score in {name}" + ("" if is_missing(held) else f": {visible(repr(held), 30)}"), None
            return ("equal", "tie") if first == second else (f"{by[first < second]} higher", MEANINGS[first < second])
        value = lookup(row, by[0])
        votes = opened(value)
        if isinstance(votes, list) and all(isinstance(vote, dict) and "value" in vote for vote in votes):  # Argilla 1.x
            return self._majority([_top(vote["value"]) for vote in votes], [vote.get("status") for vote in votes], row)
        return value, self._of_preference(value, row)

    def _majority(self, values: list[Any], states: Iterable[Any], row: dict[str, Any]) -> tuple[Any, str | None]:
        counts = [state in ("submitted", False, None) for state in states]
        own = self.layout.status.count("*") == self.layout.by[0].count("*") or not self.layout.status  # of each vote
        if own and len(counts) == len(values) and any(counts):
            values = list(itertools.compress(values, counts))
        elif not all(counts):  # none that counts, or nothing tells which
            return "a vote that is a draft, discarded or cancelled", None
        said = [UNKNOWN if self.first_wins is not None else self._of_preference(value, row) for value in values]
        if UNKNOWN in said:
            return values[said.index(UNKNOWN)], UNKNOWN
        if not (votes := [side for side in said if side]):
            return "no vote", None
        most = max(votes, key=votes.count)
        return ("majority", most) if 2 * votes.count(most) > len(votes) else ("no majority", "tie")

    def see(self, row: dict[str, Any]) -> None:
        """Take in one row, before any is judged."""
        self.count += 1
        if self.judges:
            value, meaning = self._verdict(row)
            for name, words in self.others.items():
                if {words(row[name]) if row.get(name) is not None else None, meaning} == {"first", "second"}:
                    raise asked("several preferences", names=layouts.listed([*self.layout.by, name]))
            key = _key(value) if len(self.values) < MOST_VALUES else "..."
            self.values.setdefault(key, value)
            self.found[key][meaning] += 1

    def settle(self) -> None:
        """Raise UserError, without the source's name, if a value could mean more than one thing."""
        said = {key: set(meanings) - {None} for key, meanings in self.found.items()}
        kept = {key: UNKNOWN if UNKNOWN in sides else sides.pop() for key, sides in said.items() if sides}
        counts, preference = Counter(kept.values()), self.layout.kind == "preference"
        if preference and self.first_wins is not None:
            others = [key for key, meaning in kept.items() if meaning != "first"]
            what, sure = "first_wins", counts["first"] == 1 and self._opposite(list(kept), others)
            kept |= {key: UNKNOWN for key, meaning in kept.items() if meaning != "tie"}
        else:  # 1 alone may be of 0 and 1, or of 1 and 2; 2 alone of a scale
            numbers = {number_of(self.values[key]) for key in kept}
            one = preference and not self.given and numbers in ({1}, {2})
            what, sure = self.asked, not counts[UNKNOWN] and not one
        if not sure:
            raise self._question(QUESTIONS[what].format(value=self.first_wins), kept)

    def _opposite(self, keys: list[str], others: list[str]) -> bool:
        """Whether of two values, besides ties, one can only be the opposite of the other: both are words for an answer,
        both are whole numbers, or neither is anything known, and none of `others` says that there is no verdict."""
        values = [self.values[key] for key in keys if self.words(self.values[key]) != "tie"]
        if len(values) < 2 or all(isinstance(value, bool) for value in values):
            return len(values) <= 2
        numbers, known = list(map(number_of, values)), {self.words(value) for value in values}
        if None not in numbers:
            return set(numbers) in ({0, 1}, {1, 2}, {-1, 1})
        plain = not any(re.search(VERDICTS["no verdict"], _words(str(value))) for value in map(self.values.get, others))
        return len(values) == 2 and plain and known in ({"first", "second"}, {UNKNOWN})

    def _question(self, what: str, kept: dict[str, str | None]) -> UserError:
        a, b = self.layout.answers
        values = ((key, self.values[key]) for key in kept)
        plain = {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in values}
        shown = {key: visible(repr(value), 120) for key, value in plain.items()}
        held = layouts.shortened([f"{text} ({self.found[key].total()})" for key, text in shown.items()])
        scale = {key for key, value in plain.items() if number_of(value) is not None}
        unsure = scale.union(key for key, meaning in kept.items() if meaning == UNKNOWN)
        keys = sorted(kept, key=lambda key: kept[key] != UNKNOWN)[: layouts.MOST_NAMES]
        wins = ", ".join(f"{shown[key]}: {'...' if key in unsure else repr(kept[key])}" for key in keys)
        elsewhere = len(self.places) > 1 or any(layouts.says("models", name) for name in self.places)
        two = len(kept) == 2 and self._opposite(list(kept), list(kept))
        more = QUESTIONS["two values" if two else "scale" if scale else "one"].format(*shown.values())
        more += QUESTIONS["cut"] * any(shown[key] != repr(plain[key]) for key in plain)
        said = {"column": ", ".join(self.layout.by), "held": held, "wins": wins, "a": a, "b": b, "more": more}
        return asked("elsewhere" if elsewhere else "values", what=what, names=layouts.listed(self.places), **said)

    def order(self, row: dict[str, Any]) -> tuple[str, ...]:
        """Where the better answer is, and the other. Raises LeftOut for a tie, or if nothing is said."""
        votes = (lookup(row, self.layout.question) or ()) if self.layout.question else ()
        votes = [vote for vote in votes if isinstance(vote, dict) and "selected" in (vote.get("value") or ())]
        if len(questions := {str(vote.get("from_name")) for vote in votes}) > 1:
            raise LeftOut(
                f"votes on several questions ({visible(', '.join(sorted(questions)), 60)}): keep those on one"
            )
        value, meaning = self._verdict(row) if self.judges else (None, "first")
        if meaning in ("first", "second"):
            return self.layout.answers[:: 1 if meaning == "first" else -1]
        said = "" if is_missing(value) else f": {visible(str(value), 60)}"
        raise LeftOut("tie" if meaning == "tie" else f"no preference{said}")

    def reading(self) -> str:
        """What the values were taken for, in one line."""
        groups = []
        for meaning, name in zip(MEANINGS, (*self.layout.answers, "tie, left out", "left out"), strict=True):
            keys = [key for key, meanings in self.found.items() if meaning in meanings]
            values = ["nothing" if is_missing(self.values[key]) else visible(str(self.values[key]), 60) for key in keys]
            if keys:
                shown = ", ".join(dict.fromkeys(values[:6])) + ", ..." * (len(values) > 6)
                count = sum(self.found[key][meaning] for key in keys)
                groups.append(f"{shown} -> {name} ({count})")
        single = sum(map(len, self.found.values())) == len(groups)
        return f"{', '.join(self.layout.by)}: {(', ' if single else '; ').join(groups)}"
