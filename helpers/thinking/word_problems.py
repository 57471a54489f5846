"""Word problems (word_problems.yaml) as thinking pairs: one side right in every step, the other wrong in one."""

import itertools
import operator
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from helpers.common import documents
from helpers.thinking.pairs import THINKING_FIELDS

# One planted error each: a wrong calculation, a number of the question copied wrong, plus for minus, a wrong fact
# (days of a month, size of a unit), or a right thought followed by another answer.
KINDS = ("slip", "misread", "operation", "fact", "wrong_answer")
_TEXTS: dict[str, Any] = documents(__file__, "word_problems.yaml")[0]
NAMES, DAYS, MONTHS, UNITS = (_TEXTS[name] for name in ("names", "days", "months", "units"))
_NEXT_MONTH = dict(pairwise([*MONTHS, "January"])) | {"January": "February"}
_FORMS = {"%": "{}% of {} = {}", "days after": "{} days after {} comes {}"}
# The result of a step by its operator: 5 "%" 80 is five percent of 80, 3 "days after" "Monday" is "Thursday".
STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "%": lambda percent, of: percent * of // 100,
    "days after": lambda days, day: DAYS[(DAYS.index(day) + days) % 7],
}


def _slip(rng: random.Random, values: dict, left: str, sign: str, right: str) -> int | str:
    """A wrong result that, over many problems, is as round, as long and as large as the right ones are."""
    x, y = values[left], values[right]
    if nudge := {"days after": 1, "%": 5, "*": 1}.get(sign):
        nudge = rng.choice((-nudge, nudge))
        of_right = sign == "*" and right != "f" and rng.random() >= 0.5
        return STEPS[sign](x, y + nudge) if of_right else STEPS[sign](x + nudge, y)
    step = values["a"] // 20 if "p" in values else rng.choice((1, 10))
    return STEPS[sign](x, y) + rng.choice((-step, step))


def _signed(story: dict, signs: list[str]) -> list[tuple[str, str, str]]:
    """The story's steps with the drawn signs in place of the question marks."""
    drawn = iter(signs)
    return [(left, next(drawn) if sign == "?" else sign, right) for left, sign, right in story["steps"]]


def _work(story: dict, values: dict, signs: list[str], wrong: dict[int, Any]) -> dict | None:
    """Values, calculations {s1} and results {r1} of a story, or None if a result is out of bounds.

    `wrong` has the wrong result of a step, by its index; the next step goes on from there.
    """
    for i, (left, sign, right) in enumerate(_signed(story, signs)):
        x, y = values[left], values[right]
        result = wrong.get(i, STEPS[sign](x, y))
        if isinstance(result, int) and not 0 < result <= story.get("at_most", result):
            return None
        text = _FORMS.get(sign, f"{{}} {sign} {{}} = {{}}").format(x, y, result)
        values = values | {f"s{i + 1}": text, f"r{i + 1}": result}
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


def _story_pair(story: dict, rng: random.Random, kind: str) -> tuple | None:
    """A problem of this story with an error of this kind (THINKING_FIELDS), or None if the numbers do not allow it."""
    values, facts = _draw(story, rng)
    signs = [rng.choice("+-") for _ in story.get("signs", ())]
    wrong_values, wrong_signs, wrong_result = dict(values), list(signs), {}
    if kind in ("misread", "fact"):
        key = rng.choice(list(story["numbers"])) if kind == "misread" else "f"
        choices = range(*story["numbers"][key]) if kind == "misread" else facts
        wrong_values[key] = rng.choice([n for n in choices if n != values[key]])
    elif kind == "operation":
        i = rng.randrange(len(signs))
        wrong_signs[i] = "-" if signs[i] == "+" else "+"
    right = _work(story, values, signs, {})
    if right is None:
        return None
    if kind in ("slip", "wrong_answer"):
        i = rng.randrange(2) if kind == "slip" else 1
        wrong_result = {i: _slip(rng, right, *_signed(story, signs)[i])}
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
    return fill("question", values), *sides, kind, story["topic"], fill("expected", right)


def _ranking_pair(rng: random.Random, kind: str) -> tuple | None:
    """Who came first, second or last, by the smallest number (a race) or the largest (points)."""
    names, numbers = rng.sample(NAMES, 3), rng.sample(range(31, 90), 3)
    race, place = rng.random() < 0.5, rng.randrange(3)
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
    texts = _TEXTS["ranking"]
    game, asked = texts["race" if race else "points"], texts["places"][place]

    def thought(smallest_wins: bool, of: dict, order: list[str]) -> str:
        rule = texts["race" if smallest_wins else "points"]
        steps = " ".join(texts["step"].format(of[x], rule["sign"], of[y], x=x, y=y) for x, y in pairwise(order))
        return texts["thought"].format(game=game["name"], wins=rule["wins"], steps=steps, order=", ".join(order))

    right = thought(race, of, order)
    wrong = right if kind == "wrong_answer" else thought(wrong_race, wrong_of, wrong_order)
    answer, wrong_answer = (texts["answer"].format(names[place], asked) for names in (order, wrong_order))
    question = game["question"].format(*itertools.chain(*of.items()), asked)
    return question, right, answer, wrong, wrong_answer, kind, "order", order[place]


def make_thinking_pairs(n: int, seed: int = 0) -> list[dict]:
    """`n` different word problems as thinking pairs; the same `n` and `seed` give the same pairs.

    The chosen thought is right in every step. The rejected one has one planted error, named in `flaw` (see KINDS), and
    goes on from it without a second one, in the same words. So it is as long, and only the error gives it away.
    """
    # kind of error -> topic -> what makes such a pair
    makers: dict[str, dict[str, list[Callable]]] = {kind: defaultdict(list) for kind in KINDS}
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
        fields = rng.choice(makers[kind][topic])(rng, kind)
        if fields is not None and fields[0] not in pairs:
            origin = f"make_thinking_pairs(seed={seed}) row {len(pairs) + 1}"
            pairs[fields[0]] = dict(zip(THINKING_FIELDS, fields, strict=True)) | {"origin": origin}
    return list(pairs.values())
