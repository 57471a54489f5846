"""Figures from plain numbers: each answers one question, with its axes named, and is returned as a cell's value."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from helpers.common import html_table
from helpers.run.metrics import seed_interval

# The two colours differ in lightness too, so that they can be told apart in grey print and by the colour-blind.
CHOSEN, REJECTED = "#1b6ca8", "#d9822b"
REFERENCE, POLICY = "#a0a0a0", "#2f7d4f"  # the two models, where no side of a pair is meant
# Colour and marker of the models of 04, the same in each of its figures; any other name is a policy.
OF_MODEL = {
    "base": ("black", "s"),
    "reference": (REFERENCE, "D"),
    "naive": ("#c44e9a", "^"),
    "both think": (POLICY, "o"),
}
WORD_COLOURS = LinearSegmentedColormap.from_list("words", ["#8c1515", "white", "#4b2a8c"])  # less likely, likelier
OF_CHOSEN, OF_REJECTED = ({"color": color, "alpha": 0.6} for color in (CHOSEN, REJECTED))  # in a histogram
DASHED = {"color": "grey", "linestyle": "--", "linewidth": 1}  # a line to compare with


def _subplots(*shape: int, **options: Any) -> tuple[plt.Figure, Any]:
    """As `plt.subplots`, but closed at once: a cell shows the figure only as its value."""
    figure, axes = plt.subplots(*shape, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def _label(axis: plt.Axes, xlabel: str, ylabel: str = "", title: str = "", legend: str | None = None) -> None:
    """Name both axes, and show the legend under the heading `legend`."""
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.title.set_fontsize(10)
    axis.legend(title=legend, fontsize=8)
    if xlabel == "step":  # there is no half of one
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _series(history: list[dict], name: str) -> pd.Series:
    """Values of `name` by step in the rows of the history that have it."""
    return pd.Series({row["step"]: float(row[name]) for row in history if name in row}, dtype=float)


def _by_beta(table: pd.DataFrame) -> Iterator[tuple[str, tuple, pd.DataFrame]]:
    """The name, the colour and the rows of each beta, lowest first; a beta has one colour whatever the others are."""
    for beta in sorted(set(table.beta)):
        colour = plt.get_cmap("viridis")(0.37 * (math.log10(beta) + 2))  # 0.01 is dark, 5 is light
        yield f"{beta:g}", colour, table[table.beta == beta]


def _histograms(axis: plt.Axes, *parts: tuple[Sequence[float], str, dict], start: float = math.inf) -> None:
    """Histograms of (values, label, style) over one another, with the same bins from the least value or `start`."""
    every = [start, *itertools.chain(*(values for values, *_ in parts))]
    for values, label, style in parts:
        axis.hist(values, 30, range=(min(every), max(every[1:])), label=label, **style)


def plot_training(history: list[dict]) -> plt.Figure:
    """Loss, margin and preference accuracy by step: is it learning, and on pairs that it has not seen?

    `history` is that of a Run; its evaluations, if any, are drawn as held-out points.
    """
    figure, axes = _subplots(1, 3, figsize=(12, 3.4))
    parts = (
        ("loss", "loss", "loss (nats)", math.log(2), "ln 2: nothing learned"),
        ("rewards/margins", "margin", "margin (beta x log-ratio gap)", 0, "no preference"),
        ("rewards/accuracies", "accuracy", "share of pairs with margin > 0", 0.5, "a coin"),
    )
    for axis, (name, title, label, line, meaning) in zip(axes, parts, strict=True):
        axis.plot(_series(history, name), color=POLICY, marker="o", markersize=3, label="training batches")
        if len(held_out := _series(history, f"eval_{name}")):
            axis.plot(held_out, "D", color="black", label="held out")
        axis.axhline(line, **DASHED, label=meaning)
        _label(axis, "step", label, title)
    return figure


def plot_log_ratios(table: pd.DataFrame) -> plt.Figure:
    """Log-ratio of both sides for each pair of `Run.held_out`: which side moved, and which way?"""
    figure, axis = _subplots(figsize=(7, 3.4))
    chosen, rejected = (table[f"{side}_policy"] - table[f"{side}_reference"] for side in ("chosen", "rejected"))
    _histograms(axis, (chosen, "chosen", OF_CHOSEN), (rejected, "rejected", OF_REJECTED))
    axis.axvline(0, **DASHED, label="the reference")
    means = f"mean of chosen {chosen.mean():+.2f}, of rejected {rejected.mean():+.2f}"
    _label(axis, "log policy - log reference (nats)", "held-out pairs", means)
    return figure


def plot_lengths(chosen: list[int], rejected: list[int]) -> plt.Figure:
    """Tokens in each completion of the two sides: could length alone tell them apart?"""
    figure, axes = _subplots(1, 2, figsize=(10, 3.4))
    _histograms(axes[0], (chosen, "chosen", OF_CHOSEN), (rejected, "rejected", OF_REJECTED), start=0)
    _label(axes[0], "tokens in the completion", "pairs")
    axes[1].scatter(rejected, chosen, s=8, color=CHOSEN)
    axes[1].axline((0, 0), slope=1, **DASHED, label="equal length")
    _label(axes[1], "tokens in rejected", "tokens in chosen")
    return figure


def plot_shares(shares: pd.DataFrame, *, label: str) -> plt.Figure:
    """A share for each row with its interval: which groups differ by more than chance?

    `shares` has group names as its index, and columns share, low, high (0 to 1) and pairs (count); `label` says of
    what they are shares.
    """
    return plot_compared({"95% interval": shares}, label=label, baseline=0.5)


def plot_margins(rewards: pd.DataFrame) -> plt.Figure:
    """Margins of pairs before and after training, as from `implicit_rewards`: did all pairs move, or a few of them?"""
    before, after = (
        rewards[f"chosen_{name}"] / rewards.chosen_tokens - rewards[f"rejected_{name}"] / rewards.rejected_tokens
        for name in ("reference", "policy")
    )
    figure, axes = _subplots(1, 2, figsize=(11, 3.4), sharey=True)
    _histograms(axes[0], (rewards.margin, "after", {"color": POLICY, "alpha": 0.6}))
    axes[0].axvline(0, **DASHED, label="before: 0 for every pair")
    mean = f"relative to the reference: mean after training {rewards.margin.mean():+.2f}"
    _label(axes[0], "implicit reward of chosen - of rejected", "pairs", mean)
    _histograms(
        axes[1],
        (before, "before (reference)", {"color": REFERENCE, "alpha": 0.8}),
        (after, "after (policy)", {"color": POLICY, "alpha": 0.5, "hatch": "//"}),
    )
    axes[1].axvline(0, **DASHED)
    above = f"each model by itself: above 0 before {(before > 0).mean():.0%}, after {(after > 0).mean():.0%}"
    _label(axes[1], "log-prob per token, chosen - rejected (nats)", title=above)
    return figure


def plot_rewards_by_length(rewards: pd.DataFrame) -> plt.Figure:
    """Implicit reward against length, as from `implicit_rewards`: is it the length that is rewarded?"""
    figure, axis = _subplots(figsize=(7, 3.6))
    found = []
    for side, color, marker in (("chosen", CHOSEN, "o"), ("rejected", REJECTED, "x")):
        tokens, reward = rewards[f"{side}_tokens"], rewards[f"{side}_reward"]
        axis.scatter(tokens, reward, s=18, color=color, marker=marker, label=side)
        found.append(f"{side} r = {tokens.corr(reward):+.2f}")
    axis.axhline(0, **DASHED)
    title = f"correlation of reward and length: {', '.join(found)}"
    _label(axis, "tokens in the completion", "implicit reward (beta x log-ratio)", title)
    return figure


# Characters in a line of the heat map, and the least room for a word, so that its number fits below it.
_LINE, _LEAST = 88, 5


def plot_token_rewards(tokens: pd.DataFrame) -> plt.Figure:
    """Heat map over the words of `token_rewards`: which of them does the policy like more than its reference?

    Purple words have become likelier, red ones less likely; the number below a word says the same without colour.
    """
    words = tokens.groupby(["side", "word"], sort=False).agg(text=("token", "".join), ratio=("log_ratio", "sum"))
    limit = max(words.ratio.abs().max(), 1e-9)
    places: dict[Any, list] = {}  # side: (line, column, width, text, ratio) of each word
    for side, group in words.groupby(level="side", sort=False):
        line, column, places[side] = 0, 0, []
        for text, ratio in group.itertuples(index=False):
            text = text.strip() if len(text.strip()) <= _LINE else f"{text.strip()[: _LINE - 3]}..."
            width = max(len(text), _LEAST)
            if column + width > _LINE and column:
                line, column = line + 1, 0
            places[side].append((line, column, width, text, ratio))
            column += width + 1
    lines = [group[-1][0] + 1 for group in places.values()]
    size = {"figsize": (11, 0.5 * sum(lines) + 0.6 * len(lines)), "height_ratios": lines}
    figure, axes = _subplots(len(places), squeeze=False, **size)
    for axis, (side, group) in zip(axes[:, 0], places.items(), strict=True):
        for line, column, width, text, ratio in group:
            colour = WORD_COLOURS(0.5 + 0.5 * ratio / limit)
            axis.add_patch(plt.Rectangle((column - 0.3, line + 0.08), width + 0.6, 0.86, color=colour, linewidth=0))
            ink = "white" if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 0.5 else "black"
            style = {"family": "monospace", "ha": "center", "va": "center", "color": ink, "parse_math": False}
            axis.text(column + width / 2, line + 0.36, text, size=9.5, **style)
            axis.text(column + width / 2, line + 0.74, f"{ratio:+.2f}", size=8, **style)
        total = sum(ratio for *_, ratio in group)
        axis.set(xlim=(-0.5, _LINE + 0.5), ylim=(group[-1][0] + 1, 0))
        axis.set_title(f"{side}: log-ratio of each word in nats, sum {total:+.2f}", loc="left", fontsize=10)
        axis.axis("off")
    return figure


def plot_frontier(table: pd.DataFrame) -> plt.Figure:
    """Held-out accuracy against KL of each beta in `Sweep.finished`: what does each nat of drift buy?

    With several seeds a large point is their mean, with Student's t intervals over the seeds, and the small ones are
    the runs. With one seed the intervals are over held-out pairs (accuracy) and prompts (KL). The title says which.
    """
    figure, axis = _subplots(figsize=(7, 4))
    most = 1
    for beta, colour, rows in _by_beta(table):
        means, most = rows[["kl", "accuracy"]].mean(), max(most, len(rows))
        if len(rows) > 1:
            axis.plot(rows.kl, rows.accuracy, ".", color=colour, alpha=0.6)
            bars = {"xerr": seed_interval(rows.kl), "yerr": seed_interval(rows.accuracy)}
        else:
            ends = [rows.accuracy - rows.accuracy_low, rows.accuracy_high - rows.accuracy]
            bars = {"xerr": 1.96 * rows.kl_error, "yerr": ends}
        axis.errorbar([means.kl], [means.accuracy], **bars, fmt="o", color=colour, elinewidth=0.6, label=beta)
    over = f"{most} seeds" if most > 1 else "pairs and prompts (one seed)"
    axis.set_title(f"95% intervals over {over}", fontsize=10)
    axis.set(xlabel="KL(policy || reference) of sampled replies (nats a reply)", ylabel="held-out preference accuracy")
    figure.legend(title="beta", fontsize=8, loc="outside right upper")
    return figure


def plot_losses(runs: pd.DataFrame) -> plt.Figure:
    """Held-out accuracy against KL with right labels, a line for each loss: what does a nat of drift buy?

    `runs` are those of `loss_runs`. A faint point is a run; a line goes from the lowest strength (circle) to the
    highest (triangle) through the means of the seeds. Right: the runs with an accuracy above 0.85, larger.
    """
    figure, axes = _subplots(1, 2, figsize=(12, 4.5))
    for place, (loss, rows) in enumerate(runs[runs.exchanged == 0].groupby("loss", sort=False)):
        means, look = rows.groupby("strength")[["kl", "accuracy"]].mean(), {"color": f"C{place}"}
        for axis, least in zip(axes, (0, 0.85), strict=True):
            near, some = rows[rows.accuracy > least], means[means.accuracy > least]
            axis.plot(near.kl, near.accuracy, ".", alpha=0.3, **look)
            axis.plot(some.kl, some.accuracy, "-", label=loss, **look)
            for marker, (_, mean) in zip("os^", some.iterrows(), strict=False):
                axis.plot(mean.kl, mean.accuracy, marker, **look)
    for axis, title in zip(axes, ("all runs", "those with an accuracy above 0.85"), strict=True):
        axis.set(xlabel="KL(policy || reference) of sampled replies (nats a reply)", ylabel="held-out accuracy")
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), title="loss", fontsize=8, loc="outside right upper")
    return figure


def plot_gaps_and_margins(history: pd.DataFrame) -> plt.Figure:
    """Log-ratio gap and margin by step, a line for each beta: only one of the two can be compared.

    `history` is that of a Sweep; seeds are averaged, as are batches between two points. Diamonds are held-out pairs,
    at five steps or so. With several seeds they have Student's t intervals over the seeds, and are drawn next to each
    other.
    """
    figure, axes = _subplots(1, 2, figsize=(11, 3.8))
    parts = (
        ("log_ratio_gap", "log-ratio gap: compare this", "log-ratio gap (nats)"),
        ("margin", "margin: do not compare, it contains beta", "margin (beta x log-ratio gap)"),
    )
    for axis, (name, title, label) in zip(axes, parts, strict=True):
        for place, (beta, colour, rows) in enumerate(_by_beta(history)):
            train, held_out = (rows[rows.split == split].groupby("step")[name] for split in ("train", "held out"))
            axis.plot(train.mean(), "-", color=colour, label=beta)
            if len(held_out):
                bars = held_out.agg(["mean", seed_interval])[:: -max(1, len(held_out) // 5)]  # of all they would blur
                steps = bars.index + 0.3 * place  # or the bars would cover each other
                look = {"color": colour, "fmt": "D", "markersize": 4, "capsize": 2}
                axis.errorbar(steps, bars["mean"], yerr=bars["seed_interval"], **look)
        axis.axhline(0, **DASHED)
        _label(axis, "step", label, title, legend="beta")
    return figure


def plot_changes(table: pd.DataFrame) -> plt.Figure:
    """Change of the chosen's and the rejected's log-prob by beta in `Sweep.finished`: which side makes the gap?

    With several seeds a point is their mean, with Student's t interval over the seeds.
    """
    figure, axis = _subplots(figsize=(7, 3.4))
    groups = table.groupby("beta")
    betas = [f"{beta:g}" for beta in groups.groups]  # as text, so that they are evenly spaced
    for side, marker, color in (("chosen", "o", CHOSEN), ("rejected", "s", REJECTED)):
        changes = groups[f"{side}_change"]
        bars = changes.apply(seed_interval)
        axis.errorbar(betas, changes.mean(), yerr=bars, fmt=marker, color=color, capsize=3, label=side)
    axis.axhline(0, **DASHED, label="reference")
    seeds = groups.size().max()
    of_several = f"means of {seeds} seeds, 95% intervals over the seeds"
    title = of_several if seeds > 1 else "one seed, so no interval over seeds"
    _label(axis, "beta", "log policy - log reference (nats),\nmean of held-out pairs", title)
    return figure


def plot_compared(shares: dict[str, pd.DataFrame], *, label: str, baseline: float | None = None) -> plt.Figure:
    """The same shares for several models, side by side: where do they differ by more than chance?

    `shares` has for each model a table with group names as its index and columns share, low, high (0 to 1; NaN for no
    interval) and pairs (count). `label` says of what they are shares, `baseline` where a coin would be.
    """
    rows = next(iter(shares.values()))
    figure, axis = _subplots(figsize=(8, 0.8 + 0.22 * len(rows) * max(len(shares), 2)))
    for i, (model, table) in enumerate(shares.items()):
        table = table.loc[rows.index]
        places = [row + 0.7 * ((i + 0.5) / len(shares) - 0.5) for row in range(len(rows))]
        # At a share of 0 or 1 an end of the interval is the share itself, to rounding.
        bars = [bar.clip(lower=0).fillna(0) for bar in (table.share - table.low, table.high - table.share)]
        colour, marker = OF_MODEL.get(model, (POLICY, "o"))
        axis.errorbar(table.share, places, xerr=bars, fmt=marker, color=colour, capsize=2, label=model)
    if baseline is not None:
        axis.axvline(baseline, **DASHED, label="a coin")
    names = [f"{name} ({count})" for name, count in zip(rows.index, rows.pairs, strict=True)]
    axis.set(xlabel=label, xlim=(-0.02, 1.02), yticks=range(len(rows)), yticklabels=names)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.invert_yaxis()
    return figure


def plot_thought_lengths(tokens: dict[str, list[int]]) -> plt.Figure:
    """How many `tokens` the thoughts of each model have: quartiles as a box, the mean as a diamond."""
    figure, axis = _subplots(figsize=(8, 0.8 + 0.5 * len(tokens)))
    black = {"markerfacecolor": "black", "markeredgecolor": "black"}
    style: dict[str, Any] = {"medianprops": {"color": "black"}, "meanprops": {"marker": "D"} | black}
    style |= {"showmeans": True, "patch_artist": True, "orientation": "horizontal"}
    boxes = axis.boxplot(tokens.values(), tick_labels=list(tokens), **style)["boxes"]
    for model, box in zip(tokens, boxes, strict=True):
        box.set(facecolor=OF_MODEL.get(model, (POLICY, "o"))[0], alpha=0.5)
    axis.set(xlabel="tokens in the thought")
    axis.invert_yaxis()
    return figure


def plot_symptoms(rows: list[dict]) -> plt.Figure:
    """How do four symptoms of `guide` look, each next to the cured run? Held-out points are few: no line joins them."""
    figure, axes = _subplots(2, 2, figsize=(9, 6))
    for axis, (title, label, curves) in zip(axes.flat, (row["figure"] for row in rows if "figure" in row), strict=True):
        for state, colour in (("sick", REJECTED), ("cured", CHOSEN)):
            training, held_out = curves[state]
            axis.plot(training, "o-", color=colour, markersize=3, label=f"{state}, training batches")
            axis.plot(held_out, "D", color=colour, markeredgecolor="black", label=f"{state}, held out")
        axis.axhline(math.log(2) if "loss" in label else 0, **DASHED)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label, fontsize=8)  # as long as the axis
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def text_table(table: pd.DataFrame, *, index: bool = True) -> HTML:
    """`html_table` as the value of a cell."""
    return HTML(html_table(table, index=index))


def symptom_table(rows: list[dict]) -> HTML:
    """The words and numbers of each symptom of `guide`, in full width."""
    names = [name for name in rows[0] if name != "figure"]
    return text_table(pd.DataFrame(rows, columns=names, dtype=object), index=False)
