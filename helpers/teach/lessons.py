"""What notebooks show of benchmarks/diagnosis.py: each symptom sick and cured, and common advice, tried."""

import collections
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from helpers.after.diagnosis import SYMPTOMS, measure, of_run, to_try
from helpers.run.folder import Run, RunInfo

_TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
SHOWN, ADVICE = _TABLES["shown"], _TABLES["advice"]


def recorded(part: dict, name: str) -> Run:
    """The run of this name in what one call of benchmarks/diagnosis.py printed, without its folder."""
    run = part["runs"][name]
    not_recorded = dict.fromkeys(("model", "profile", "base", "start", "end", "reference"), "")
    info = not_recorded | {"versions": part["versions"], "machine": part["machine"]} | run["info"]
    info["data"] = {"train": "", "test": ""} | info["data"]
    return Run(Path(name), RunInfo.from_json(info, name), run["history"], run["metrics"], None)


def before_and_after(results: list[dict], case: str, number: str) -> pd.DataFrame:
    """One number in all runs of a case (a symptom's code, or a piece of advice): columns sick and cured, a row a seed.

    `number` is one of `measure`, of the metrics, or of `RunInfo.memory_gb`.
    """
    rows: dict[tuple, dict[str, float]] = collections.defaultdict(dict)
    for place, part in enumerate(results):
        for one in part["cases"]:
            if one["case"] == case:
                run = recorded(part, one["run"])
                numbers = run.metrics | run.info.memory_gb | measure(of_run(run))
                rows[place, one["seed"]][one["state"]] = numbers[number]
    return pd.DataFrame.from_dict(rows, orient="index")


def _spread(values: pd.Series) -> str:
    numbers = values.mean(), values.min(), values.max()
    mean, low, high = (f"{number:,.0f}" if abs(number) >= 100 else f"{number:.2f}" for number in numbers)
    return mean if low == high else f"{mean} ({low} to {high})"


def guide(results: list[dict]) -> list[dict[str, Any]]:
    """The rows of `symptom_table`: each symptom as benchmarks/diagnosis.py made and cured it.

    `results` are what calls of it printed, on one machine or on several. A row has cells by the name of their column;
    also "curve", the name of a series or None, and "histories" of the "sick" and the "cured" run.
    """
    rows = []
    for code, (number, label, curve) in SHOWN.items():
        values = before_and_after(results, code, number)
        runs = [(part, one) for part in results for one in part["cases"] if one["case"] == code]
        first = {one["state"]: part["runs"][one["run"]]["history"] for part, one in reversed(runs)}
        row = {"symptom": f"{code}: {SYMPTOMS[code]['what']}", "made by": runs[0][1]["fault"]}
        row |= {"try first": SYMPTOMS[code]["causes"][0][1].format_map(to_try({})), "measured": label}
        row |= {state: _spread(values[state]) for state in ("sick", "cured")}
        rows.append(row | {"seeds": len(values), "curve": curve, "histories": first})
    return rows


def advice(results: list[dict]) -> pd.DataFrame:
    """Common advice as benchmarks/diagnosis.py tried it: does its number change in the direction that it promises?

    One row for each piece of advice, with its number without and with it, and the verdict: "held", "did not hold" or
    "differs between seeds".
    """
    rows = []
    for name, (number, label, direction) in ADVICE.items():
        values = before_and_after(results, name, number)
        change = (values["sick"] - values["cured"]) * direction
        verdict = "held" if (change > 0).all() else "did not hold" if (change <= 0).all() else "differs between seeds"
        fall = before_and_after(results, name, "chosen_fall").mean()
        tried = next(one["fault"] for part in results for one in part["cases"] if one["case"] == name)
        row = {"advice": name, "tried": tried, "should go": f"{label}: {'up' if direction > 0 else 'down'}"}
        row |= {"without": _spread(values["cured"]), "with": _spread(values["sick"]), "verdict": verdict}
        row["chosen lost: without, with"] = f"{fall['cured']:.0%}, {fall['sick']:.0%}"
        rows.append(row | {"seeds": len(values)})
    return pd.DataFrame(rows)
