"""Which loss to take when, by the runs that benchmarks/losses.py stored. No model is needed."""

import math
from statistics import NormalDist
from typing import Any

import pandas as pd

from helpers.common import UserError
from helpers.run.metrics import seed_interval

# What one may want, in which column it is, and whether less of it is better.
_WANTED = (
    ("most held-out pairs right", "accuracy", False),
    ("least KL, with at least {accuracy:.0%} of held-out pairs right", "kl", True),
    ("the chosen loses least log-prob", "chosen_per_token", False),
    ("most replies end", "ended", False),
    ("least accuracy lost with {share:.0%} of labels exchanged", "lost", True),
)
CHANCE = "no difference beyond chance"


def loss_runs(stored: dict[str, Any]) -> pd.DataFrame:
    """The finished runs in `stored`, the JSON of benchmarks/losses.py, a row each; `run` names loss and strength.

    kl is in nats a reply, the changes in nats (a token, where the name says so). `exchanged` is the share of training
    labels that were exchanged, `right` has "1" for each held-out pair that was right. Raises UserError if no run
    finished.
    """
    rows = [row for row in stored["runs"] if row["status"] == "finished"]
    if not rows:
        raise UserError("No run of these finished; benchmarks/losses.py says why.")
    return pd.DataFrame(rows).assign(run=[f"{row['loss']} ({row['strength']:g})" for row in rows])


def _right(runs: pd.DataFrame) -> pd.DataFrame:
    """Whether a pair was right (1.0 or 0.0): a row for each pair, a column for each (run, seed)."""
    rows = runs.set_index(["run", "seed"]).right
    return pd.DataFrame({key: [float(one) for one in text] for key, text in rows.items()})


def _compared(by_seed: pd.DataFrame, by_pair: pd.DataFrame | None, less: bool) -> dict[str, Any]:
    """The best run of those in the columns, and which others are as good as far as seeds and pairs can tell."""
    means = by_seed.mean() * (-1 if less else 1)
    of_loss = means.groupby(means.index.str.partition(" (").get_level_values(0)).idxmax()  # each at its best strength
    best = max(of_loss, key=lambda one: means[one])
    others, alike = [one for one in of_loss if one != best], []
    for other in others:
        apart = (by_seed[best] - by_seed[other]).dropna()
        halves = [seed_interval(apart, len(others))]
        if by_pair is not None:
            of_pairs = by_pair[best] - by_pair[other]
            z = NormalDist().inv_cdf(1 - 0.025 / len(others))
            halves.append(z * of_pairs.std() / math.sqrt(len(of_pairs)))
        if not all(abs(apart.mean()) > half for half in halves):  # NaN with one seed
            alike.append(other)
    mean, half = by_seed[best].mean(), seed_interval(by_seed[best].dropna())
    take = CHANCE if others and len(alike) == len(others) else best
    interval = f"{mean - half:.3f} to {mean + half:.3f}" if math.isfinite(half) else "one seed"
    return {"take": take, "best": best, "mean": mean, "interval": interval, "as good": ", ".join(alike)}


def take_this_when(runs: pd.DataFrame, *, accuracy: float) -> pd.DataFrame:
    """Which loss, at which strength, is the best of `loss_runs` at what one may want: a row for each of five wants.

    A loss counts with the strength that is best at this. `mean` and `interval` are those of the best over its seeds (95
    percent, Student's t). "as good" are the losses that differ from it by no more than chance: seeds are compared with
    themselves, for accuracies pairs too, and the wider interval has to leave out 0, at a level divided by the number of
    comparisons (Bonferroni). If that are all of them, `take` says so. Intervals do not know that the best of several
    strengths was picked.

    Args:
        runs: of which those with exchanged labels count for the last row alone.
        accuracy: share of held-out pairs that has to be right, in the mean of the seeds, where the KL decides.
    """
    clean, share = runs[runs.exchanged == 0], runs.exchanged.max()
    before = clean.pivot(index="seed", columns="run", values="accuracy")
    after = runs[runs.exchanged == share].pivot(index="seed", columns="run", values="accuracy")
    lost_pairs = (_right(clean) - _right(runs[runs.exchanged == share])).dropna(axis="columns", how="all")
    rows = {}
    for want, column, less in _WANTED:
        by_pair = None
        if column == "lost":
            by_seed = (before - after).dropna(axis="columns", how="all")
            by_pair = lost_pairs.T.groupby(level=0).mean().T
        else:
            by_seed = clean.pivot(index="seed", columns="run", values=column)
        if column == "accuracy":
            by_pair = _right(clean).T.groupby(level=0).mean().T
        if column == "kl":
            by_seed = by_seed[before.columns[before.mean() >= accuracy]]
        none = {"take": "none reaches it", "best": "", "mean": math.nan, "interval": "", "as good": ""}
        found = none if by_seed.empty else _compared(by_seed, by_pair, less)
        rows[want.format(accuracy=accuracy, share=share)] = found
    return pd.DataFrame.from_dict(rows, orient="index")
