"""Word problems as thinking pairs, as many as asked: one side right in every step, the other wrong in exactly one."""

import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

# One planted error each: a wrong calculation, a number of the question copied wrong, plus for minus, a wrong fact
# (days of a month, size of a unit), or a right thought followed by another answer.
KINDS = ("slip", "misread", "operation", "fact", "wrong_answer")
NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mina", "Nils", "Olga",
    "Paul", "Rosa", "Sam", "Tara", "Udo", "Vera", "Will",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {
    "January": 31, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31, "September": 30,
    "October": 31, "November": 30, "December": 31,
}  # fmt: skip
_NEXT_MONTH = dict(zip(MONTHS, [*list(MONTHS)[1:], "January"], strict=True)) | {"January": "February"}
UNITS = {  # how many small units make a big one: big, small, things of such a length
    7: (("week", "days", ("holiday", "strike", "camp")),),
    12: (("year", "months", ("course", "project", "lease")),),
    24: (("day", "hours", ("journey", "storm", "voyage")),),
    60: (("hour", "minutes", ("film", "meeting", "concert")), ("minute", "seconds", ("song", "speech", "video"))),
    100: (("metre", "centimetres", ("rope", "ribbon", "shelf")),),
    1000: (("kilometre", "metres", ("path", "race", "tunnel")),),
}
_WORDS = {
    "goods": ("pencils", "marbles", "stickers", "cards", "shells", "buttons", "coins", "beads"),
    "ware": ("coat", "lamp", "chair", "watch", "tent", "phone", "bike", "table"),
    "group": ("club", "choir", "school", "village", "team", "chess league"),
    "event": ("fair", "show", "market", "camp", "trip", "exam", "sale", "course"),
}


class _Story(NamedTuple):
    """A kind of word problem. In the texts, {a} {b} {c} are numbers, {s1} {s2} calculations, {r1} {r2} results.

    `steps` are (left, operator, right) over names of numbers and results. For "?" plus or minus is drawn; `signs` has
    the words for both. `fact` names the number that the reader must know, since the question does not give it. A
    problem with a result above `at_most` is not made.
    """

    topic: str
    question: str
    thought: str
    answer: str
    numbers: dict[str, range]
    steps: tuple[tuple[str, str, str], ...]
    signs: tuple[dict[str, str], ...] = ()
    expected: str = "{r2}"
    fact: str = ""
    at_most: int = 1_000_000


_STORIES = (
    _Story(
        "arithmetic",
        "{name} has {a} boxes with {b} {goods} in each and {sign1}. How many {goods} does {name} have then?",
        "Each of the {a} boxes holds {b} {goods}, which makes {s1} {goods} in the boxes. Then {name} {sign1}, so the "
        "next step is {s2}. That leaves {name} with {r2} {goods}.",
        "{name} has {r2} {goods}.",
        {"a": range(4, 13), "b": range(6, 16), "c": range(3, 24)},
        (("a", "*", "b"), ("r1", "?", "c")),
        ({"+": "buys {c} more", "-": "gives {c} away"},),
    ),
    _Story(
        "arithmetic",
        "A bus leaves with {a} people. At the first stop {sign1}, at the second stop {sign2}. How many are on it then?",
        "The bus leaves with {a} people. At the first stop {sign1}, and {s1} people are on it. At the second stop "
        "{sign2}, and {s2} people are on it after that stop.",
        "There are {r2} people on the bus.",
        {"a": range(30, 70), "b": range(3, 15), "c": range(3, 15)},
        (("a", "?", "b"), ("r1", "?", "c")),
        ({"+": "{b} get on", "-": "{b} get off"}, {"+": "{c} get on", "-": "{c} get off"}),
    ),
    _Story(
        "arithmetic",
        "{name} earns {a} dollars a day, works {b} days and {sign1}. How many dollars does {name} have after that?",
        "Working {b} days at {a} dollars a day brings {s1} dollars. After that {name} {sign1}, so the sum becomes "
        "{s2} dollars, and nothing else is earned or paid.",
        "{name} has {r2} dollars.",
        {"a": range(20, 61), "b": range(3, 10), "c": range(5, 46)},
        (("a", "*", "b"), ("r1", "?", "c")),
        ({"+": "gets a bonus of {c}", "-": "pays {c} for travel"},),
    ),
    _Story(
        "unit",
        "A {thing} of {a} {big}s is made {b} {small} {sign1}. How many {small} long is it then?",
        "One {big} is {f} {small}, so for {a} {big}s the length is {s1} {small}. The {thing} is made {b} {small} "
        "{sign1}, which gives {s2} {small} in all.",
        "The {thing} is {r2} {small} long.",
        {"a": range(2, 13), "b": range(2, 14)},
        (("a", "*", "f"), ("r1", "?", "b")),
        ({"+": "longer", "-": "shorter"},),
        fact="f",
    ),
    _Story(
        "percentage",
        "A {ware} costs {a} dollars. Then its price {sign1} by {p} percent. What is the new price in dollars?",
        "First find the change in price. {s1} dollars. The price of the {ware} {sign1} by this change, so the next "
        "step is {s2}. The new price is {r2} dollars.",
        "The {ware} costs {r2} dollars.",
        {"a": range(40, 420, 20), "p": range(10, 65, 5)},
        (("p", "%", "a"), ("a", "?", "r1")),
        ({"+": "rises", "-": "falls"},),
    ),
    _Story(
        "percentage",
        "A {group} has {a} members, and within a year it {sign1} by {p} percent. How many members does it have then?",
        "The {group} has {a} members, and the change is a part of these. {s1} members. Within the year the {group} "
        "{sign1} by that number, so {s2} members are in it.",
        "The {group} has {r2} members.",
        {"a": range(40, 420, 20), "p": range(10, 65, 5)},
        (("p", "%", "a"), ("a", "?", "r1")),
        ({"+": "grows", "-": "shrinks"},),
    ),
    _Story(
        "date",
        "The {event} starts on {month} {a} and ends {b} days later. On which date does it end?",
        "{month} has {f} days, so {s1} days of {month} are left after the start. The other days fall into {next}, and "
        "{s2} of them are needed. So the {event} ends on {next} {r2}.",
        "The {event} ends on {next} {r2}.",
        {"a": range(15, 26), "b": range(18, 33)},
        (("f", "-", "a"), ("b", "-", "r1")),
        expected="{next} {r2}",
        fact="f",
        at_most=28,
    ),
    _Story(
        "date",
        "{name} was born in {a}. {other} is {b} years {sign1} and married at the age of {c}. In which year was that?",
        "{name} was born in {a}. {other} is {b} years {sign1}, so {other} was born in {s1}. The wedding was {c} years "
        "after that, so the year is {s2}.",
        "{other} married in {r2}.",
        {"a": range(1900, 1970), "b": range(2, 13), "c": range(21, 40)},
        (("a", "?", "b"), ("r1", "+", "c")),
        ({"+": "younger", "-": "older"},),
    ),
    _Story(
        "date",
        "The {event} of {name} was on a {day}. Which day of the week is it {a} days after the {event}?",
        "The {event} was on a {day}. After 7 days it is {day} again, and {s1} days are left to count. Going on from "
        "there, {s2}, so that is the day of the week.",
        "It is a {r2}.",
        {"a": range(9, 14)},
        (("a", "-", "week"), ("r1", "days after", "day")),
    ),
    _Story(
        "order",
        "In a line of {a} people {name} is number {b} from the front. {other} is {c} places {sign1} {name}. How many "
        "people stand behind {other}?",
        "{name} is number {b} from the front, and {other} is {c} places {sign1} {name}, which is number {s1}. The "
        "line has {a} people, so behind {other} there are {s2} people.",
        "There are {r2} people behind {other}.",
        {"a": range(40, 71), "b": range(12, 26), "c": range(2, 10)},
        (("b", "?", "c"), ("a", "-", "r1")),
        ({"+": "behind", "-": "ahead of"},),
    ),
)
_FORMS = {"%": "{}% of {} = {}", "days after": "{} days after {} comes {}"}


def step_result(left: int, operator: str, right: Any) -> Any:
    """The result of one step: left + right, left - right, left * right, left % (of) right, left "days after" right.

    Whole numbers, except that what comes "days after" is one of DAYS, to a day.
    """
    if operator == "days after":
        return DAYS[(DAYS.index(right) + left) % 7]
    if operator == "%":
        return left * right // 100
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _slip(rng: random.Random, values: dict, left: str, operator: str, right: str) -> int | str:
    """A wrong result that, over many problems, is as round, as long and as large as the right ones are."""
    x, y = values[left], values[right]
    if operator == "days after":
        return step_result(x + rng.choice((-1, 1)), operator, y)
    if operator == "%":
        return step_result(x + rng.choice((-5, 5)), operator, y)
    if operator == "*":
        nudge = rng.choice((-1, 1))
        return (x + nudge) * y if right == "f" or rng.random() < 0.5 else x * (y + nudge)
    step = values["a"] // 20 if "p" in values else rng.choice((1, 10))
    return step_result(x, operator, y) + rng.choice((-step, step))


def _signed(steps: tuple, signs: str) -> list[tuple[str, str, str]]:
    """The steps with the drawn signs in place of the question marks."""
    drawn = iter(signs)
    return [(left, next(drawn) if operator == "?" else operator, right) for left, operator, right in steps]


def _work(story: _Story, values: dict, signs: str, wrong: dict[int, int | str]) -> dict | None:
    """Values, calculations {s1} and results {r1} of a story, or None if a result is out of bounds.

    `wrong` maps the index of a step to the wrong result that it gives; the next step goes on from there.
    """
    values = dict(values)
    for i, (left, operator, right) in enumerate(_signed(story.steps, signs)):
        x, y = values[left], values[right]
        result = wrong.get(i, step_result(x, operator, y))
        if isinstance(result, int) and not 0 < result <= story.at_most:
            return None
        form = _FORMS.get(operator, f"{{}} {operator} {{}} = {{}}")
        values[f"s{i + 1}"], values[f"r{i + 1}"] = form.format(x, y, result), result
    return values


def _story_pair(story: _Story, rng: random.Random, kind: str) -> dict | None:
    """A problem of this story with an error of this kind, or None if the numbers drawn do not allow it."""
    name, other = rng.sample(NAMES, 2)
    words: dict[str, Any] = {"name": name, "other": other, "week": 7, "day": rng.choice(DAYS)}
    words |= {key: rng.choice(choices) for key, choices in _WORDS.items()}
    facts = list(UNITS) if story.topic == "unit" else [30, 31]
    words["f"] = rng.choice(facts)
    if story.topic == "unit":
        words["big"], words["small"], things = rng.choice(UNITS[words["f"]])
        words["thing"] = rng.choice(things)
    words["month"] = rng.choice([month for month, days in MONTHS.items() if days == words["f"]] or [None])
    words["next"] = _NEXT_MONTH.get(words["month"])
    values = words | {key: rng.choice(span) for key, span in story.numbers.items()}
    signs = "".join(rng.choice("+-") for _ in story.signs)

    def fill(text: str, values: dict) -> str:
        said = {f"sign{i + 1}": story.signs[i][sign].format(**values) for i, sign in enumerate(signs)}
        return text.format(**values, **said)

    wrong_values, wrong_signs = dict(values), signs
    wrong_result: dict[int, int | str] = {}
    if kind == "misread":
        key = rng.choice(list(story.numbers))
        wrong_values[key] = rng.choice([number for number in story.numbers[key] if number != values[key]])
    elif kind == "fact":
        wrong_values[story.fact] = rng.choice([number for number in facts if number != values[story.fact]])
    elif kind == "operation":
        i = rng.randrange(len(signs))
        wrong_signs = signs[:i] + {"+": "-", "-": "+"}[signs[i]] + signs[i + 1 :]
    right = _work(story, values, signs, {})
    if right is None:
        return None
    if kind in ("slip", "wrong_answer"):
        i = rng.randrange(len(story.steps)) if kind == "slip" else len(story.steps) - 1
        wrong_result = {i: _slip(rng, right, *_signed(story.steps, signs)[i])}
        if kind == "wrong_answer" and isinstance(right["r2"], int) and rng.random() < 0.5:
            wrong_result = {i: right["r1"]}  # a number that the thought does name
    wrong = _work(story, wrong_values, wrong_signs, wrong_result)
    if wrong is None or wrong["r2"] == right["r2"]:
        return None
    return {
        "prompt": fill(story.question, values),
        "chosen_thought": fill(story.thought, right),
        "chosen_answer": fill(story.answer, right),
        "rejected_thought": fill(story.thought, right if kind == "wrong_answer" else wrong),
        "rejected_answer": fill(story.answer, wrong),
        "flaw": kind,
        "topic": story.topic,
        "answer": fill(story.expected, right),
    }


def _ranking_pair(rng: random.Random, kind: str) -> dict | None:
    """Who came first, second or last, by the smallest number (a race) or the largest (points)."""
    names, numbers = rng.sample(NAMES, 3), rng.sample(range(31, 90), 3)
    race = rng.random() < 0.5
    place = rng.randrange(3)
    of = dict(zip(names, numbers, strict=True))
    order = sorted(names, key=lambda name: of[name], reverse=not race)
    wrong_race, wrong_of, wrong_order = race, dict(of), list(order)
    if kind == "misread":
        wrong_of[rng.choice(names)] = rng.choice([number for number in range(31, 90) if number not in numbers])
        wrong_order = sorted(names, key=lambda name: wrong_of[name], reverse=not race)
    elif kind == "fact":
        wrong_race, wrong_order = not race, order[::-1]
    elif kind == "slip":
        i = rng.randrange(2)
        wrong_order[i], wrong_order[i + 1] = order[i + 1], order[i]
    else:
        wrong_order[place] = rng.choice([name for name in names if name != order[place]])
    if wrong_order[place] == order[place]:
        return None

    def thought(smallest_wins: bool, of: dict, order: list[str]) -> str:
        winner, sign = ("smallest", "<") if smallest_wins else ("largest", ">")
        steps = " ".join(f"{of[x]} {sign} {of[y]}, so {x} is before {y}." for x, y in pairwise(order))
        return f"In a {game} the {winner} number wins. {steps} From first to last the order is {', '.join(order)}."

    game, place_name = "race" if race else "game of points", ("first", "second", "last")[place]
    how = "needed {} seconds for the race, {} {} and {} {}" if race else "made {} points in the game, {} {} and {} {}"
    (a, x), (b, y), (c, z) = of.items()
    said = (race, of, order) if kind == "wrong_answer" else (wrong_race, wrong_of, wrong_order)
    return {
        "prompt": f"{a} {how.format(x, b, y, c, z)}. Who came {place_name}?",
        "chosen_thought": thought(race, of, order),
        "chosen_answer": f"{order[place]} came {place_name}.",
        "rejected_thought": thought(*said),
        "rejected_answer": f"{wrong_order[place]} came {place_name}.",
        "flaw": kind,
        "topic": "order",
        "answer": order[place],
    }


def make_thinking_pairs(n: int, seed: int = 0) -> list[dict]:
    """`n` different word problems as thinking pairs; the same `n` and `seed` give the same pairs.

    The chosen thought is right in every step. The rejected one has one planted error, named in `flaw` (see KINDS), and
    goes on from it without a second one, in the same words. So it is as long, and only the error gives it away.
    """
    # kind of error -> topic -> what makes such a pair
    makers: dict[str, dict[str, list[Callable]]] = defaultdict(lambda: defaultdict(list))
    for story in _STORIES:
        for kind in KINDS:
            if (kind != "operation" or story.signs) and (kind != "fact" or story.fact):
                makers[kind][story.topic].append(partial(_story_pair, story))
    for kind in ("slip", "misread", "fact", "wrong_answer"):
        makers[kind]["order"].append(_ranking_pair)

    rng = random.Random(seed)
    pairs: dict[str, dict] = {}  # by prompt; there are millions, so a repeated one is drawn again
    while len(pairs) < n:
        kind = rng.choice(KINDS)
        topic = rng.choice(list(makers[kind]))
        pair = rng.choice(makers[kind][topic])(rng, kind)
        if pair is not None and pair["prompt"] not in pairs:
            pairs[pair["prompt"]] = pair | {"origin": f"make_thinking_pairs(seed={seed}) row {len(pairs) + 1}"}
    return list(pairs.values())
