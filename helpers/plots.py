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


def plot_compared(shares: dict[str, pd.DataFrame], *, label: str, baseline: float | None = None) -> plt.Figure:
    """The same shares for several models, side by side: where do they differ by more than chance?

    Args:
        shares: for each model a table as `plot_shares` takes it, with the same index; where low and high are missing
            (NaN), a point is drawn without an interval.
        baseline: where a coin would be, if there is one.
    """
    rows = next(iter(shares.values()))
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.22 * len(rows) * len(shares)), layout="constrained")
    colours = plt.cm.viridis([i / len(shares) for i in range(len(shares))])
    for i, (model, table) in enumerate(shares.items()):
        table = table.loc[rows.index]
        places = [row + 0.7 * ((i + 0.5) / len(shares) - 0.5) for row in range(len(rows))]
        errors = [(table.share - table.low).clip(lower=0).fillna(0), (table.high - table.share).clip(lower=0).fillna(0)]
        axis.errorbar(table.share, places, xerr=errors, fmt="o", color=colours[i], capsize=2, label=model)
    if baseline is not None:
        axis.axvline(baseline, color="grey", linestyle="--", linewidth=1, label="a coin")
    names = [f"{name} ({count})" for name, count in zip(rows.index, rows.pairs, strict=True)]
    axis.set(xlabel=label, xlim=(-0.02, 1.02), yticks=range(len(rows)), yticklabels=names)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.invert_yaxis()
    plt.close(figure)
    return figure


def plot_thought_lengths(tokens: dict[str, list[int]]) -> plt.Figure:
    """How long the thoughts of each model are: quartiles as a box, the mean as a diamond.

    Args:
        tokens: for each model the tokens of each thought, 0 where there is none.
    """
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.5 * len(tokens)), layout="constrained")
    means = {"marker": "D", "markerfacecolor": CHOSEN, "markeredgecolor": CHOSEN}
    axis.boxplot(tokens.values(), orientation="horizontal", tick_labels=list(tokens), showmeans=True, meanprops=means)
    axis.set(xlabel="tokens in the thought")
    axis.invert_yaxis()
    plt.close(figure)
    return figure
