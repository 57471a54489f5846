"""The README's picture, drawn from the committed results: python tools/picture.py

Reads `seeds.json` and `beta.json` in benchmarks/results and writes `measured.png` next to them. Trains nothing.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from helpers.teach.plots import CHOSEN, DASHED
from helpers.train.sweep import Sweep

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def plot_measured(seeds: list[dict], sweep: pd.DataFrame) -> plt.Figure:
    """Does training teach the preference, and what does beta do?

    The left side has one measure only, the implicit reward. Before training it is a tie for every pair.

    Args:
        seeds: as in `seeds.json`: accuracies with 95 percent intervals.
        sweep: as in `Sweep.finished`: a row for each run.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for run in seeds:
        share, (low, high) = run["accuracy"], run["accuracy_interval"]
        errors = [[share - low], [high - share]]
        left.errorbar([f"seed {run['seed']}"], [share], yerr=errors, fmt="o", color=CHOSEN, capsize=4)
    left.axhline(0.5, **DASHED, label="a coin (before training, every pair is a tie)")
    left.set(title="Did the chosen gain more than the rejected?", xlabel="95% intervals")
    left.set(ylabel=f"share of {seeds[0]['pairs']} held-out pairs whose\nchosen has the higher implicit reward")
    left.set(ylim=(0.4, 1), xlim=(-0.5, len(seeds) - 0.5))
    left.legend(fontsize=8, loc="lower right")
    right.plot(sweep.groupby("beta").kl.mean(), color=CHOSEN, linewidth=1, label="mean of the seeds")
    right.plot(sweep.beta, sweep.kl, "o", color=CHOSEN, alpha=0.6, label="a run")
    right.set(title="What does beta do?", xlabel="beta", xscale="log", ylabel="KL from the reference\n(nats a reply)")
    betas = sorted(set(sweep.beta))
    right.set(ylim=(0, None), xticks=betas, xticklabels=[f"{beta:g}" for beta in betas])
    right.minorticks_off()
    right.legend(fontsize=8)
    plt.close(figure)
    return figure


def main() -> None:
    seeds = json.loads((RESULTS / "seeds.json").read_text(encoding="utf-8"))["seeds"]
    figure = plot_measured(seeds, Sweep.load(RESULTS / "beta.json").finished)
    figure.savefig(RESULTS / "measured.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
