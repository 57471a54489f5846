"""Held-out figures of a run, from the log-probs of its pairs under reference and policy."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from helpers.model.logps import PairLogps


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 percent interval for the share `successes` of `n` (Wilson 1927): (lower end, upper end), within 0 and 1.

    >>> [round(end, 3) for end in wilson_interval(90, 120)]
    [0.666, 0.819]
    """
    z = NormalDist().inv_cdf(0.975)
    share, spread = successes / n, z * z / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


def seed_interval(values: Sequence[float], comparisons: int = 1) -> float:
    """Half of the 95 percent interval for the mean of `values`, one a seed, by Student's t; NaN for one seed.

    The level holds for so many `comparisons` together (Bonferroni). The quantile comes from the density itself: with
    t = sqrt(degrees) * tan(angle) it is proportional to cos(angle) ** (degrees - 1).

    >>> round(seed_interval([1.0, 2.0, 3.0]), 3)  # 4.303 standard errors
    2.484
    """
    if len(values) < 2:
        return math.nan
    angles = np.linspace(0, math.pi / 2, 100_001)
    height = np.cos(angles) ** (len(values) - 2)
    area = np.cumsum(height[1:] + height[:-1])
    angle = np.interp(1 - 0.05 / comparisons, area / area[-1], angles[1:])
    return math.sqrt(len(values) - 1) * math.tan(angle) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def pairs_to_decide(share: float) -> float:
    """How many pairs a `wilson_interval` around this `share` needs to leave out one half; infinite for one half itself.

    >>> pairs_to_decide(0.55)
    385
    """
    z = NormalDist().inv_cdf(0.975)
    return math.ceil((z / (2 * share - 1)) ** 2) if share != 0.5 else math.inf


def held_out_table(test: Dataset, reference: PairLogps, policy: PairLogps) -> pd.DataFrame:
    """One row for each pair of `test`, as `Run.held_out` keeps it, from the log-probs under `reference` and `policy`.

    Columns: topic and flaw ("not given" if the pairs have none), origin if they have it, chosen_reference and
    chosen_policy (log-probs in nats), chosen_tokens, the same for rejected, and log_ratio_gap in nats.
    """
    columns = {name: test[name] for name in ("origin", "topic", "flaw") if name in test.column_names}
    table = pd.DataFrame({"topic": "not given", "flaw": "not given"} | columns, index=range(len(test)))
    for side in ("chosen", "rejected"):
        table[f"{side}_reference"] = getattr(reference, side).numpy()
        table[f"{side}_policy"] = getattr(policy, side).numpy()
        table[f"{side}_tokens"] = getattr(policy, f"{side}_tokens").long().numpy()
    changes = table.chosen_policy - table.chosen_reference, table.rejected_policy - table.rejected_reference
    return table.assign(log_ratio_gap=changes[0] - changes[1])


def preference_metrics(table: pd.DataFrame, beta: float) -> dict[str, Any]:
    """Held-out figures of a run, from its `table` (`Run.held_out`) and the `beta` of its training.

    reference_accuracy is the share of pairs whose chosen has the higher log-prob per token before training, accuracy
    that whose chosen has the higher log-ratio after it; each with its `wilson_interval`. loss is that of DPO in nats
    (Rafailov et al. 2023, eq. 7), margin the mean of beta * log-ratio gap (section 5.1 there); log_ratio_gap, without
    beta, can be compared across betas. The changes are the mean log-ratios of either side in nats.
    """
    gap = torch.tensor(table.log_ratio_gap.to_numpy())
    before = table.chosen_reference / table.chosen_tokens > table.rejected_reference / table.rejected_tokens
    found: dict[str, Any] = {"pairs": len(table)}
    for name, right in (("reference_accuracy", int(before.sum())), ("accuracy", int((gap > 0).sum()))):
        found |= {name: right / len(table), f"{name}_interval": wilson_interval(right, len(table))}
    return found | {
        "loss": float(-torch.nn.functional.logsigmoid(beta * gap).mean()),
        "margin": float(beta * gap.mean()),
        "log_ratio_gap": float(gap.mean()),
        "chosen_change": float((table.chosen_policy - table.chosen_reference).mean()),
        "rejected_change": float((table.rejected_policy - table.rejected_reference).mean()),
    }


def accuracy_by(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Share of pairs with a positive margin for each value of a `column` ("flaw", say) of `table` (`Run.held_out`).

    One row for each value, most pairs first; columns share, low, high (`wilson_interval`), pairs.
    """
    groups = (table.log_ratio_gap > 0).groupby(table[column]).agg(["sum", "size"]).sort_values("size", ascending=False)
    rows = [(right / n, *wilson_interval(right, n), n) for right, n in groups.itertuples(index=False)]
    return pd.DataFrame(rows, groups.index, ["share", "low", "high", "pairs"])
