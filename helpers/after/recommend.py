"""Which beta to take after a sweep: held-out accuracies compared pair by pair, drift, and how sure that is."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.common import UserError
from helpers.run.metrics import seed_interval
from helpers.train.sweep import Sweep

USUAL_BETA = 0.1  # TRL's default, and what to keep if no other is measured to be better


class Recommendation(NamedTuple):
    """A beta, and why."""

    beta: float
    reason: str


def compare_accuracy(sweep: Sweep, beta: float, other: float, comparisons: int = 1) -> tuple[float, float, float]:
    """Held-out accuracy of `beta` minus that of `other`, and the ends of its interval (95 percent for all comparisons).

    They are compared pair by pair of the `sweep`, each averaged over its seeds: what makes a pair hard for both cancels
    out. Other pairs and other seeds would give another difference, so the interval is the wider of the one over pairs
    and the one over the seeds that both betas have (Student's t; with one seed that over pairs alone). The level is
    divided among the comparisons (Bonferroni).
    """
    right = (sweep.gaps > 0).astype(float)  # columns are (beta, seed)
    difference = right[beta].mean(axis=1) - right[other].mean(axis=1)
    half = NormalDist().inv_cdf(1 - 0.025 / comparisons) * difference.std() / math.sqrt(len(difference))
    of_seeds = (right[beta].mean() - right[other].mean()).dropna()
    half = np.nanmax([half, seed_interval(of_seeds, comparisons)])
    return difference.mean(), difference.mean() - half, difference.mean() + half


def _is_nearer(runs: pd.DataFrame, beta: float, other: float) -> bool:
    """Whether the runs of `beta` drifted less than those of `other` (rows by beta and seed), by more than chance.

    The same seed is compared with itself, by Student's t; a single one by its standard errors over prompts.
    """
    less = (runs.kl[other] - runs.kl[beta]).dropna()
    errors = [runs.kl_error[one].iloc[0] for one in (beta, other)]
    return less.mean() > (seed_interval(less) if len(less) > 1 else 1.96 * math.hypot(*errors))


def recommend(sweep: Sweep) -> Recommendation:
    """The beta of `sweep` with the best held-out accuracy if it beats the usual one by more than chance, else that one.

    Drift is named too, and decides nothing. Raises UserError if no run finished.
    """
    table = sweep.finished
    if table.empty:
        raise UserError("No run of this sweep finished; its table says why.")
    by_beta = table.groupby("beta")
    accuracy, seeds = by_beta.accuracy.mean(), by_beta.size().min()
    home = min(accuracy.index, key=lambda beta: abs(math.log(beta / USUAL_BETA)))
    basis = f"{len(sweep.gaps)} held-out pairs, {seeds} seed{'s' if seeds > 1 else ''}"
    others = [beta for beta in accuracy.index if beta != home]
    if not others:
        return Recommendation(home, f"Only beta {home:g} finished; there is nothing to compare it with ({basis}).")
    compared = {beta: compare_accuracy(sweep, beta, home, len(others)) for beta in others}
    better = [beta for beta, (_, low, _) in compared.items() if low > 0]
    beta = max(better, key=lambda beta: accuracy[beta], default=home)
    unseen = max((high - low) / 2 for _, low, high in compared.values())
    lines = [
        f"No beta is measured to be more accurate than {home:g}; keep {home:g}. Accuracies run from "
        f"{accuracy.min():.3f} to {accuracy.max():.3f} ({basis}); a difference below about "
        f"{unseen:.2f} could not be seen."
    ]
    if better:
        size, low, high = compared[beta]
        against = f"accuracy {accuracy[beta]:.3f} against {accuracy[home]:.3f} of {home:g}"
        lines = [f"Take {beta:g}: {against}, a difference of {size:.3f} (interval {low:.3f} to {high:.3f}; {basis})."]
    if worse := [f"{beta:g}" for beta, (_, _, high) in compared.items() if high < 0]:
        lines.append(f"Less accurate than {home:g}: {', '.join(worse)}.")
    if "kl" in table:
        drift, runs = by_beta.kl.mean(), table.set_index(["beta", "seed"])
        closer = drift[[other for other in drift.index if other != beta and _is_nearer(runs, other, beta)]]
        if len(closer):
            listed = ", ".join(f"{other:g} ({kl:.1f})" for other, kl in closer.items())
            lines.append(f"Nearer to the reference than {beta:g} (KL {drift[beta]:.1f} nats a reply): {listed}.")
    if seeds == 1:
        lines.append("One seed: the intervals are over pairs, and another seed may order the betas differently.")
    return Recommendation(beta, "\n".join(lines))
