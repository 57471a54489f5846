"""What only a notebook shows: figures from plain numbers, and tables of what the benchmarks measured."""

# ruff: noqa: F401, I001  (notebooks import these names from here; a list of names stays a block)

from helpers.teach.lessons import advice, guide, lesson_pairs, recorded
from helpers.teach.losses import loss_runs, take_this_when
from helpers.teach.plots import (
    plot_changes, plot_compared, plot_frontier, plot_gaps_and_margins, plot_lengths, plot_log_ratios, plot_losses,
    plot_margins, plot_rewards_by_length, plot_shares, plot_symptoms, plot_thought_lengths, plot_token_rewards,
    plot_training, symptom_table, text_table,
)  # fmt: skip
