"""Which beta to take after a sweep: held-out accuracies compared pair by pair, drift, and how sure that is."""

import math
from statistics import NormalDist
from typing import NamedTuple

from helpers.common import UserError
from helpers.train.sweep import Sweep

USUAL = 0.1  # TRL's default, and what to keep if no other is measured to be better


class Recommendation(NamedTuple):
    """A beta, and why: accuracies compared pair by pair, drift, and how sure it is."""

    beta: float
    reason: str


def compare_accuracy(sweep: Sweep, beta: float, other: float, comparisons: int = 1) -> tuple[float, float, float]:
    """Held-out accuracy of `beta` minus that of `other`, with its interval (95 percent for all comparisons together).

    Both saw the same pairs, so they are compared pair by pair, each averaged over its seeds: what makes a pair hard
    for both cancels out. The level is divided among the comparisons (Bonferroni).

    Args:
        sweep: with finished runs of both.
        beta, other: two of its betas.
        comparisons: how many are made together.

    Returns:
        (difference, lower end, upper end), as shares of pairs.
    """
    right = (sweep.gaps > 0).T.groupby(level=0).mean().T  # share of seeds, a row for each pair, a column for each beta
    difference = right[beta] - right[other]
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    half = z * difference.std() / math.sqrt(len(difference))
    return difference.mean(), difference.mean() - half, difference.mean() + half


def recommend(sweep: Sweep) -> Recommendation:
    """The beta with the best held-out accuracy, if it beats the usual one by more than chance; else the usual one.

    Drift is named too, and decides nothing.

    Args:
        sweep: one with a finished run, or more.

    Raises:
        UserError: no run finished.
    """
    table = sweep.finished
    if table.empty:
        raise UserError("No run of this sweep finished; its table says why.")
    means = table.groupby("beta")[["accuracy", "log_ratio_gap"]].mean()
    home = min(means.index, key=lambda beta: abs(math.log(beta / USUAL)))
    others = [beta for beta in means.index if beta != home]
    seeds, pairs = table.groupby("beta").size().min(), len(sweep.gaps)
    basis = f"{pairs} held-out pairs, {seeds} seed{'s' if seeds > 1 else ''}"
    if not others:
        return Recommendation(home, f"Only beta {home:g} finished; there is nothing to compare it with ({basis}).")
    compared = {beta: compare_accuracy(sweep, beta, home, len(others)) for beta in others}
    better = [beta for beta in others if compared[beta][1] > 0]
    worse = [beta for beta in others if compared[beta][2] < 0]
    if better:
        beta = max(better, key=lambda beta: means.accuracy[beta])
        size, low, high = compared[beta]
        lines = [
            f"Take {beta:g}: accuracy {means.accuracy[beta]:.3f} against {means.accuracy[home]:.3f} of {home:g}, a "
            f"difference of {size:.3f} (interval {low:.3f} to {high:.3f}; {basis})."
        ]
    else:
        beta = home
        unseen = max((high - low) / 2 for _, low, high in compared.values())
        lines = [
            f"No beta is measured to be more accurate than {home:g}; keep {home:g}. Accuracies run from "
            f"{means.accuracy.min():.3f} to {means.accuracy.max():.3f} ({basis}); a difference below about "
            f"{unseen:.2f} could not be seen."
        ]
    if worse:
        lines.append(f"Less accurate than {home:g}: {', '.join(f'{beta:g}' for beta in worse)}.")
    if "kl" in table:
        drift = table.groupby("beta").kl.mean()
        error = table.groupby("beta").kl_error.agg(lambda errors: math.hypot(*errors) / len(errors))
        closer = drift.index[drift + 1.96 * error < drift[beta] - 1.96 * error[beta]]
        if len(closer):
            listed = ", ".join(f"{other:g} ({drift[other]:.1f})" for other in closer)
            lines.append(f"Nearer to the reference than {beta:g} (KL {drift[beta]:.1f} nats a reply): {listed}.")
    if seeds == 1:
        lines.append("One seed: another one may order them differently.")
    return Recommendation(beta, "\n".join(lines))
