"""Word problems as thinking pairs, as many as asked: one side right in every step, the other wrong in exactly one.

Their words and texts are in word_problems.yaml.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from helpers.thinking.pairs import THINKING_FIELDS

# One planted error each: a wrong calculation, a number of the question copied wrong, plus for minus, a wrong fact
# (days of a month, size of a unit), or a right thought followed by another answer.
KINDS = ("slip", "misread", "operation", "fact", "wrong_answer")
_TEXTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
NAMES, DAYS, MONTHS, UNITS = (_TEXTS[name] for name in ("names", "days", "months", "units"))
_NEXT_MONTH = dict(pairwise([*MONTHS, "January"])) | {"January": "February"}
_FORMS = {"%": "{}% of {} = {}", "days after": "{} days after {} comes {}"}


def step_result(left: int, operator: str, right: Any) -> Any:
    """The result of one step: left + right, left - right, left * right, left % (of) right, left "days after" right."""
    if operator == "days after":
        return DAYS[(DAYS.index(right) + left) % 7]
    if operator == "%":
        return left * right // 100
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _slip(rng: random.Random, values: dict, left: str, operator: str, right: str) -> int | str:
    """A wrong result that, over many problems, is as round, as long and as large as the right ones are."""
    x, y = values[left], values[right]
    if operator in ("days after", "%"):
        nudge = 1 if operator == "days after" else 5
        return step_result(x + rng.choice((-nudge, nudge)), operator, y)
    if operator == "*":
        nudge = rng.choice((-1, 1))
        return (x + nudge) * y if right == "f" or rng.random() < 0.5 else x * (y + nudge)
    step = values["a"] // 20 if "p" in values else rng.choice((1, 10))
    return step_result(x, operator, y) + rng.choice((-step, step))


def _signed(story: dict, signs: list[str]) -> list[tuple[str, str, str]]:
    """The story's steps with the drawn signs in place of the question marks."""
    drawn = iter(signs)
    return [(left, next(drawn) if operator == "?" else operator, right) for left, operator, right in story["steps"]]


def _work(story: dict, values: dict, signs: list[str], wrong: dict[int, Any]) -> dict | None:
    """Values, calculations {s1} and results {r1} of a story, or None if a result is out of bounds.

    `wrong` maps the index of a step to the wrong result that it gives; the next step goes on from there.
    """
    values = dict(values)
    for i, (left, operator, right) in enumerate(_signed(story, signs)):
        x, y = values[left], values[right]
        result = wrong.get(i, step_result(x, operator, y))
        if isinstance(result, int) and not 0 < result <= story.get("at_most", result):
            return None
        form = _FORMS.get(operator, f"{{}} {operator} {{}} = {{}}")
        values |= {f"s{i + 1}": form.format(x, y, result), f"r{i + 1}": result}
    return values


def _draw(story: dict, rng: random.Random) -> tuple[dict[str, Any], list]:
    """The words and numbers of a problem, and the facts of its kind (sizes of units, or days of months)."""
    name, other = rng.sample(NAMES, 2)
    values: dict[str, Any] = {"name": name, "other": other, "week": 7, "day": rng.choice(DAYS)}
    values |= {key: rng.choice(choices) for key, choices in _TEXTS["words"].items()}
    facts = list(UNITS) if story["topic"] == "unit" else [30, 31]
    values["f"] = rng.choice(facts)
    if story["topic"] == "unit":
        values["big"], values["small"], things = rng.choice(UNITS[values["f"]])
        values["thing"] = rng.choice(things)
    values["month"] = rng.choice([month for month, days in MONTHS.items() if days == values["f"]] or [None])
    values["next"] = _NEXT_MONTH.get(values["month"])
    return values | {key: rng.choice(range(*span)) for key, span in story["numbers"].items()}, facts


def _story_pair(story: dict, rng: random.Random, kind: str) -> dict | None:
    """A problem of this story with an error of this kind, or None if the numbers drawn do not allow it."""
    values, facts = _draw(story, rng)
    signs = [rng.choice("+-") for _ in story.get("signs", ())]
    wrong_values, wrong_signs, wrong_result = dict(values), list(signs), {}
    if kind == "misread":
        key = rng.choice(list(story["numbers"]))
        wrong_values[key] = rng.choice([n for n in range(*story["numbers"][key]) if n != values[key]])
    elif kind == "fact":
        wrong_values["f"] = rng.choice([n for n in facts if n != values["f"]])
    elif kind == "operation":
        i = rng.randrange(len(signs))
        wrong_signs[i] = "-" if signs[i] == "+" else "+"
    right = _work(story, values, signs, {})
    if right is None:
        return None
    if kind in ("slip", "wrong_answer"):
        steps = _signed(story, signs)
        i = rng.randrange(len(steps)) if kind == "slip" else len(steps) - 1
        wrong_result = {i: _slip(rng, right, *steps[i])}
        if kind == "wrong_answer" and isinstance(right["r2"], int) and rng.random() < 0.5:
            wrong_result = {i: right["r1"]}  # a number that the thought does name
    wrong = _work(story, wrong_values, wrong_signs, wrong_result)
    if wrong is None or wrong["r2"] == right["r2"]:
        return None

    def fill(name: str, values: dict) -> str:
        text = story.get(name, "{r2}")
        for i, sign in enumerate(signs):
            text = text.replace(f"{{sign{i + 1}}}", story["signs"][i][sign])
        return text.format(**values)

    said = right if kind == "wrong_answer" else wrong
    sides = fill("thought", right), fill("answer", right), fill("thought", said), fill("answer", wrong)
    fields = fill("question", values), *sides, kind, story["topic"], fill("expected", right)
    return dict(zip(THINKING_FIELDS, fields, strict=True))


def _ranking_pair(rng: random.Random, kind: str) -> dict | None:
    """Who came first, second or last, by the smallest number (a race) or the largest (points)."""
    names, numbers = rng.sample(NAMES, 3), rng.sample(range(31, 90), 3)
    race = rng.random() < 0.5
    place = rng.randrange(3)
    of = dict(zip(names, numbers, strict=True))
    order = sorted(names, key=of.__getitem__, reverse=not race)
    wrong_race, wrong_of, wrong_order = race, dict(of), list(order)
    if kind == "misread":
        wrong_of[rng.choice(names)] = rng.choice([number for number in range(31, 90) if number not in numbers])
        wrong_order.sort(key=wrong_of.__getitem__, reverse=not race)
    elif kind == "fact":
        wrong_race, wrong_order = not race, order[::-1]
    elif kind == "slip":
        i = rng.randrange(2)
        wrong_order[i], wrong_order[i + 1] = order[i + 1], order[i]
    else:
        wrong_order[place] = rng.choice([name for name in names if name != order[place]])
    if wrong_order[place] == order[place]:
        return None
    game, place_name = "race" if race else "game of points", ("first", "second", "last")[place]

    def thought(smallest_wins: bool, of: dict, order: list[str]) -> str:
        winner, sign = ("smallest", "<") if smallest_wins else ("largest", ">")
        steps = " ".join(f"{of[x]} {sign} {of[y]}, so {x} is before {y}." for x, y in pairwise(order))
        return f"In a {game} the {winner} number wins. {steps} From first to last the order is {', '.join(order)}."

    how = "needed {} seconds for the race" if race else "made {} points in the game"
    (a, x), (b, y), (c, z) = of.items()
    question = f"{a} {how.format(x)}, {b} {y} and {c} {z}. Who came {place_name}?"
    right = thought(race, of, order)
    wrong = right if kind == "wrong_answer" else thought(wrong_race, wrong_of, wrong_order)
    answer, wrong_answer = (f"{names[place]} came {place_name}." for names in (order, wrong_order))
    fields = question, right, answer, wrong, wrong_answer, kind, "order", order[place]
    return dict(zip(THINKING_FIELDS, fields, strict=True))


def make_thinking_pairs(n: int, seed: int = 0) -> list[dict]:
    """`n` different word problems as thinking pairs; the same `n` and `seed` give the same pairs.

    The chosen thought is right in every step. The rejected one has one planted error, named in `flaw` (see KINDS), and
    goes on from it without a second one, in the same words. So it is as long, and only the error gives it away.
    """
    # kind of error -> topic -> what makes such a pair
    makers: dict[str, dict[str, list[Callable]]] = defaultdict(lambda: defaultdict(list))
    for kind in KINDS:
        for story in _TEXTS["stories"]:
            if (kind != "operation" or "signs" in story) and (kind != "fact" or "{f}" in story["thought"]):
                makers[kind][story["topic"]].append(partial(_story_pair, story))
        if kind != "operation":
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
