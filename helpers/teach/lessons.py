"""Diagnosis of a training run: the symptom by name, with its numbers, its likely causes in order, and the cure.

All is read from what a run folder holds (history, metrics, info); no model is loaded. `measure` turns it into a few
numbers, `LIMITS` says from where on a number is a symptom, `CATALOGUE` what is behind it.
"""

import collections
from pathlib import Path

import pandas as pd

from helpers.after.diagnosis import SYMPTOMS, measure
from helpers.run.folder import Run

# What shows a symptom best: a number of `measure`, its name for a table, and the curve of the history.
SHOWN = {
    "out_of_memory": ("needed", "GB needed beside the model", None),
    "nan": ("not_numbers", "values that are not finite", "loss"),
    "wrong_reference": ("start_off", "nats between policy and reference at step 1", "loss"),
    "diverged": ("loss_end", "training loss, last half", "loss"),
    "leak": ("accuracy_first", "held-out accuracy, first evaluation", "eval_rewards/accuracies"),
    "below_half": ("accuracy_end", "held-out accuracy", "eval_rewards/accuracies"),
    "overfitting": ("loss_rise", "nats of held-out loss above its best", "eval_loss"),
    "loss_zero": ("loss_half", "training loss half-way", "loss"),
    "chosen_falls": ("chosen_fall", "share of its log-prob that the chosen lost", "eval_rewards/chosen"),
    "not_moving": ("moved", "nats moved", "loss"),
    "no_preference": ("accuracy_end", "held-out accuracy", "eval_rewards/accuracies"),
    "never_ends": ("ended", "share of replies that end", "loss"),
}
# Advice of usual guides: the number of `measure` that should change, its name, and which way (1 up, -1 down).
ADVICE = {
    "raise beta for a stronger signal": ("gap", "log-ratio gap, nats", 1),
    "lower beta against overfitting": ("accuracy_end", "held-out accuracy", 1),
    "raise beta against overfitting": ("accuracy_end", "held-out accuracy", 1),
    "a separate reference for a stronger constraint": ("moved", "nats moved", -1),
}


def recorded(part: dict, name: str) -> Run:
    """The run called `name` from `part`, what one call of benchmarks/diagnosis.py printed."""
    return Run(Path(name), held_out=None, **part["runs"][name])


def before_and_after(results: list[dict], case: str, number: str) -> pd.DataFrame:
    """A number of `measure`, or of the metrics, in the runs of one case: a row for each seed, columns sick and cured.

    Args:
        results: what calls of benchmarks/diagnosis.py printed, on one machine or on several.
    """
    rows = collections.defaultdict(dict)
    for place, part in enumerate(results):
        for one in part["cases"]:
            if one["case"] == case:
                run = recorded(part, one["run"])
                numbers = run.metrics | run.info["memory_gb"] | measure(run.history, run.info)
                rows[place, one["seed"]][one["state"]] = numbers[number]
    return pd.DataFrame.from_dict(rows, orient="index")


def _spread(values: pd.Series) -> str:
    numbers = values.mean(), values.min(), values.max()
    mean, low, high = (f"{number:,.0f}" if abs(number) >= 100 else f"{number:.2f}" for number in numbers)
    return mean if low == high else f"{mean} ({low} to {high})"


def guide(results: list[dict]) -> list[dict]:
    """The rows of `plots.symptom_table`: each symptom as benchmarks/diagnosis.py made and cured it.

    Args:
        results: what calls of it printed, on one machine or on several.

    Returns:
        Cells by the name of their column. Beside them "curve", the name of a series, or None, and "histories" of the
        "sick" and the "cured" run, as in `Run.history`.
    """
    rows = []
    for code, (number, label, curve) in SHOWN.items():
        values = before_and_after(results, code, number)
        part = next(part for part in results if any(one["case"] == code for one in part["cases"]))
        runs = {one["state"]: one for one in reversed(part["cases"]) if one["case"] == code}  # the first seed's
        rows.append(
            {
                "symptom": f"{code}: {SYMPTOMS[code][0]}",
                "made by": runs["sick"]["fault"],
                "try first": SYMPTOMS[code][1][0][1],
                "measured": label,
                "sick": _spread(values["sick"]),
                "cured": _spread(values["cured"]),
                "seeds": len(values),
                "curve": curve,
                "histories": {state: recorded(part, one["run"]).history for state, one in runs.items()},
            }
        )
    return rows


def advice(results: list[dict]) -> pd.DataFrame:
    """Common advice as benchmarks/diagnosis.py tried it: does the number that it should change change that way?

    Args:
        results: what calls of it printed, on one machine or on several.

    Returns:
        One row for each piece of advice, with its number without and with it, and the verdict: "held", "did not hold"
        or "differs between seeds".
    """
    rows = []
    for name, (number, label, direction) in ADVICE.items():
        values = before_and_after(results, name, number)
        change = (values["sick"] - values["cured"]) * direction
        verdict = "held" if (change > 0).all() else "did not hold" if (change <= 0).all() else "differs between seeds"
        fault = next(one["fault"] for part in results for one in part["cases"] if one["case"] == name)
        should = f"{label}: {'up' if direction > 0 else 'down'}"
        fall = before_and_after(results, name, "chosen_fall").mean()
        beside = f"{fall['cured']:.0%}, {fall['sick']:.0%}"
        rows.append(
            [name, fault, should, _spread(values["cured"]), _spread(values["sick"]), verdict, beside, len(values)]
        )
    columns = "advice", "tried", "should go", "without", "with", "verdict", "chosen lost: without, with", "seeds"
    return pd.DataFrame(rows, columns=columns)
