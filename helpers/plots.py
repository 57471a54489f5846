"""Figures from plain numbers: each answers one question, with its axes named."""

import math

import matplotlib.pyplot as plt
import pandas as pd

# Two colours that differ in lightness too, so that they read in grey and for the colour-blind.
CHOSEN, REJECTED = "#1b6ca8", "#d9822b"


def _series(history: list[dict], name: str) -> tuple[list, list]:
    rows = [(row["step"], float(row[name])) for row in history if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def plot_training(history: list[dict]) -> plt.Figure:
    """Loss, margin and preference accuracy by step: is it learning, and on pairs that it has not seen?

    Args:
        history: as in `Run.history`; held-out points are drawn where it has evaluations.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    parts = (
        ("loss", "loss", "loss (nats)", math.log(2), "ln 2: nothing learned"),
        ("rewards/margins", "margin", "margin (beta x log-ratio gap)", 0, "no preference"),
        ("rewards/accuracies", "accuracy", "share of pairs with margin > 0", 0.5, "a coin"),
    )
    for axis, (name, title, label, line, meaning) in zip(axes, parts, strict=True):
        axis.plot(*_series(history, name), color=CHOSEN, marker="o", markersize=3, label="training batches")
        steps, values = _series(history, f"eval_{name}")
        if steps:
            axis.plot(steps, values, color="black", linestyle="none", marker="D", label="held out")
        axis.axhline(line, color="grey", linestyle="--", linewidth=1, label=meaning)
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.legend(fontsize=8)
    plt.close(figure)  # shown once, as the cell's value
    return figure


def plot_log_ratios(table: pd.DataFrame) -> plt.Figure:
    """Log-ratio of chosen and rejected for each held-out pair: which side moved, and which way?

    Args:
        table: as in `Run.held_out`.
    """
    chosen = table.chosen_policy - table.chosen_reference
    rejected = table.rejected_policy - table.rejected_reference
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    bins = 30
    span = (min(chosen.min(), rejected.min()), max(chosen.max(), rejected.max()))
    axis.hist(chosen, bins, range=span, color=CHOSEN, alpha=0.6, label=f"chosen, mean {chosen.mean():+.2f}")
    axis.hist(rejected, bins, range=span, color=REJECTED, alpha=0.6, label=f"rejected, mean {rejected.mean():+.2f}")
    axis.axvline(0, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel="log policy - log reference (nats)", ylabel="held-out pairs")
    axis.legend()
    plt.close(figure)
    return figure


def plot_lengths(chosen: list[int], rejected: list[int]) -> plt.Figure:
    """Lengths of the two sides: could length alone tell them apart?

    Args:
        chosen, rejected: tokens in each completion, shape (pairs,).
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    span = (0, max(*chosen, *rejected))
    axes[0].hist(chosen, 30, range=span, color=CHOSEN, alpha=0.6, label="chosen")
    axes[0].hist(rejected, 30, range=span, color=REJECTED, alpha=0.6, label="rejected")
    axes[0].set(xlabel="tokens in the completion", ylabel="pairs")
    axes[0].legend()
    axes[1].scatter(rejected, chosen, s=8, color=CHOSEN)
    axes[1].plot(span, span, color="grey", linestyle="--", linewidth=1, label="equal length")
    axes[1].set(xlabel="tokens in rejected", ylabel="tokens in chosen")
    axes[1].legend()
    plt.close(figure)
    return figure


def plot_shares(shares: pd.DataFrame, *, label: str, baseline: float | None = None) -> plt.Figure:
    """A share for each row with its interval: which groups differ by more than chance?

    Args:
        shares: index of group names; columns share, low, high (0 to 1) and pairs (count).
    """
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.45 * len(shares)), layout="constrained")
    # At a share of 0 or 1 an end of the interval is the share itself, to rounding.
    errors = [(shares.share - shares.low).clip(lower=0), (shares.high - shares.share).clip(lower=0)]
    names = [f"{name} ({count})" for name, count in zip(shares.index, shares.pairs, strict=True)]
    axis.errorbar(shares.share, names, xerr=errors, fmt="o", color=CHOSEN, capsize=3)
    axis.axvline(0.5, color="grey", linestyle="--", linewidth=1, label="a coin")
    if baseline is not None:
        axis.axvline(baseline, color=REJECTED, linestyle=":", label="reference alone")
    axis.set(xlabel=label, xlim=(0, 1.02))
    axis.legend(fontsize=8, loc="lower left")
    axis.invert_yaxis()
    plt.close(figure)
    return figure


def _beta_colours(betas) -> dict[float, tuple]:
    betas = sorted(set(betas))
    return {beta: plt.cm.viridis(0.9 * place / max(len(betas) - 1, 1)) for place, beta in enumerate(betas)}


def plot_frontier(table: pd.DataFrame) -> plt.Figure:
    """Held-out accuracy against KL: what does each nat of drift buy?

    Args:
        table: as in `Sweep.finished`: a point for each run, with its 95 percent intervals.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for beta, colour in _beta_colours(table.beta).items():
        rows = table[table.beta == beta]
        axis.errorbar(
            rows.kl,
            rows.accuracy,
            xerr=1.96 * rows.kl_error,
            yerr=[rows.accuracy - rows.accuracy_low, rows.accuracy_high - rows.accuracy],
            fmt="o",
            color=colour,
            elinewidth=0.6,
            label=f"{beta:g}",
        )
    axis.set(
        xlabel="KL(policy || reference) of sampled replies (nats a reply)",
        ylabel="held-out preference accuracy",
    )
    figure.legend(title="beta", fontsize=8, loc="outside right upper")
    plt.close(figure)
    return figure


def plot_gaps_and_margins(history: pd.DataFrame) -> plt.Figure:
    """Log-ratio gap and margin by step, a line for each beta: the same runs, told comparably and misleadingly.

    Args:
        history: as in `Sweep.history`; seeds are averaged. A line's points are means over the batches since the last
            one; held-out pairs are drawn as diamonds where they were scored on the way.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    parts = (
        ("log_ratio_gap", "log-ratio gap: compare this", "log-ratio gap (nats)"),
        ("margin", "margin: do not compare, it contains beta", "margin (beta x log-ratio gap)"),
    )
    for axis, (name, title, label) in zip(axes, parts, strict=True):
        for beta, colour in _beta_colours(history.beta).items():
            rows = history[history.beta == beta]
            for split, style in (("train", "-"), ("held out", "D")):
                means = rows[rows.split == split].groupby("step")[name].mean()
                axis.plot(means, style, color=colour, markersize=4, label=f"{beta:g}" if split == "train" else None)
        axis.axhline(0, color="grey", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="step", ylabel=label)
        axis.legend(title="beta", fontsize=8)
    plt.close(figure)
    return figure


def plot_changes(table: pd.DataFrame) -> plt.Figure:
    """Change of the chosen's and the rejected's log-prob by beta: which side makes the gap?

    Args:
        table: as in `Sweep.finished`; a point for each run.
    """
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    betas = [f"{beta:g}" for beta in table.beta]  # as names: evenly spaced
    axis.plot(betas, table.chosen_change, "o", color=CHOSEN, alpha=0.8, label="chosen")
    axis.plot(betas, table.rejected_change, "s", color=REJECTED, alpha=0.8, label="rejected")
    axis.axhline(0, color="grey", linestyle="--", linewidth=1, label="reference")
    axis.set(xlabel="beta", ylabel="log policy - log reference (nats),\nmean of held-out pairs")
    axis.legend(fontsize=8)
    plt.close(figure)
    return figure
