"""What only a lesson needs: its share of the pairs, and what benchmarks/diagnosis.py made, cured and tried."""

from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from helpers.common import documents
from helpers.data.report import load_report
from helpers.run.diagnosis import SYMPTOMS, measure, of_run, to_try
from helpers.run.folder import Run, RunInfo

_TABLES: dict[str, Any] = documents(__file__, "lessons.yaml")[0]
SHOWN, DRAWN, ADVICE = (_TABLES[name] for name in ("shown", "drawn", "advice"))


def recorded(part: dict, name: str) -> Run:
    """The run of this name in what one call of benchmarks/diagnosis.py printed, without its folder."""
    run = part["runs"][name]
    not_recorded = dict.fromkeys(("model", "profile", "base", "start", "end", "reference"), "")
    info = not_recorded | {"versions": part["versions"], "machine": part["machine"]} | run["info"]
    info["data"] = {"train": "", "test": ""} | info["data"]
    return Run(Path(name), RunInfo.from_json(info, name), run["history"], run["metrics"], None)


def _runs(results: list[dict], case: str) -> list[tuple[dict, Run]]:
    """What was tried in a case (a symptom's code, or a piece of advice), with its run; the first seed first."""
    return [(one, recorded(part, one["run"])) for part in results for one in part["cases"] if one["case"] == case]


def _before_and_after(runs: list[tuple[dict, Run]], number: str) -> pd.DataFrame:
    """One number of `measure`, the metrics or `RunInfo.memory_gb`: columns sick and cured, a row for each seed."""
    values = [(one["state"], (run.metrics | run.info.memory_gb | measure(of_run(run)))[number]) for one, run in runs]
    return pd.DataFrame({name: [one for state, one in values if state == name] for name in ("sick", "cured")})


def _spread(values: pd.Series) -> str:
    if values.isna().all():
        return "none"
    numbers = values.mean(), values.min(), values.max()
    mean, low, high = (f"{number:,.0f}" if abs(number) >= 100 else f"{number:.2f}" for number in numbers)
    return mean if low == high else f"{mean} ({low} to {high})"


def _by_step(run: Run, name: str) -> pd.Series:
    """A number of the history by step; rewards as log-ratios in nats, which can be compared across betas."""
    table = pd.DataFrame(run.history).set_index("step").reindex(columns=[name])[name].dropna()
    return table / run.info.config["beta"] if "rewards/" in name else table


def guide(results: list[dict]) -> list[dict[str, Any]]:
    """The rows of `symptom_table`: each symptom as benchmarks/diagnosis.py made and cured it.

    `results` are what calls of it printed, on one machine or on several. A row has cells by the name of their column;
    one that `plot_symptoms` draws also has a "figure": title, label, and by state the curves of training and held out.
    """
    rows = []
    for code, (number, label) in SHOWN.items():
        runs = _runs(results, code)
        values = _before_and_after(runs, number)
        row = {"symptom": f"{code}: {SYMPTOMS[code]['what']}", "made by": runs[0][0]["fault"]}
        row |= {"try first": SYMPTOMS[code]["causes"][0][1].format_map(to_try({})), "measured": label}
        row |= {state: _spread(values[state]) for state in ("sick", "cured")}
        if code in DRAWN:
            name, *texts = DRAWN[code]
            first = {one["state"]: run for one, run in reversed(runs)}
            curves = {state: (_by_step(run, name), _by_step(run, f"eval_{name}")) for state, run in first.items()}
            row["figure"] = *texts, curves
        rows.append(row | {"seeds": len(values)})
    return rows


def advice(results: list[dict]) -> pd.DataFrame:
    """Common advice as benchmarks/diagnosis.py tried it: does its number change in the direction that it promises?

    One row for each piece of advice in `results`, with its number without and with it, and the verdict: "held", "did
    not hold" or "differs between seeds".
    """
    rows = []
    for name, (number, label, direction) in ADVICE.items():
        runs = _runs(results, name)
        values, start, end = (_before_and_after(runs, one) for one in (number, "logp_start", "logp_end"))
        change = (values["sick"] - values["cured"]) * direction
        verdict = "held" if (change > 0).all() else "did not hold" if (change <= 0).all() else "differs between seeds"
        row = {"advice": name, "tried": runs[0][0]["fault"]}
        row |= {"should go": f"{label}: {'up' if direction > 0 else 'down'}", "verdict": verdict}
        row |= {"without": _spread(values["cured"]), "with": _spread(values["sick"])}
        fell = f"from {start['cured'].mean():.0f} to {end['cured'].mean():.0f}, with it to {end['sick'].mean():.0f}"
        rows.append(row | {"log-prob of a chosen answer, nats": fell, "seeds": len(values)})
    return pd.DataFrame(rows)


def lesson_pairs(pairs: Dataset) -> Dataset:
    """The first 192 of the bundled `pairs`, so that training takes minutes; a reader's own are all taken.

    Prints what was taken.
    """
    report = load_report(pairs)
    if report is None or not report.bundled:
        print(f"Training on all {len(pairs)} pairs.")
        return pairs
    taken = pairs.select(range(min(192, len(pairs))))
    print(f"Training on {len(taken)} of {len(pairs)} bundled pairs, so that it takes minutes.")
    return taken
