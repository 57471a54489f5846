"""Figures show the numbers that they are given, with named axes."""

import math

import pandas as pd
from bs4 import BeautifulSoup

from helpers.run.metrics import accuracy_by
from helpers.teach import plots
from tools.picture import plot_measured


def test_training_curves_show_every_point_and_the_line_of_no_learning():
    history = [
        {"step": 1, "loss": 0.7, "rewards/margins": 0.0, "rewards/accuracies": 0.0},
        {"step": 2, "loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 1.0},
        {"step": 2, "eval_loss": 0.65, "eval_rewards/margins": 0.1, "eval_rewards/accuracies": 0.8},
    ]
    axes = plots.plot_training(history).axes
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in axes]
    assert drawn[0] == [[0.7, 0.6], [0.65], [math.log(2)] * 2]
    assert drawn[2] == [[0.0, 1.0], [0.8], [0.5] * 2]
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in axes)
    assert all(float(tick).is_integer() for axis in axes for tick in axis.get_xticks())


def test_shares_of_zero_and_one_are_drawn():
    table = pd.DataFrame({"log_ratio_gap": [1.0] * 15 + [-1.0] * 7, "flaw": ["good"] * 15 + ["bad"] * 7})
    figure = plots.plot_shares(accuracy_by(table, "flaw"), label="share")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["good (15)", "bad (7)"]


def test_shares_side_by_side_and_lengths_of_thoughts():
    nan = float("nan")
    rows = {"share": [0.5, 0.9], "low": [0.4, nan], "high": [0.6, nan], "pairs": [40, 6]}
    table = pd.DataFrame(rows, index=["slip", "looping"])
    other = table.assign(share=[0.7, 0.2]).iloc[::-1]  # in another order
    axis = plots.plot_compared({"naive": table, "both think": other}, label="share", baseline=0.5).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["slip (40)", "looping (6)"]
    drawn = [list(container[0].get_xdata()) for container in axis.containers]
    assert drawn == [[0.5, 0.9], [0.7, 0.2]] and axis.get_xlabel() == "share"
    assert axis.get_legend_handles_labels()[1] == ["a coin", "naive", "both think"]
    alone = plots.plot_compared({"both think": table}, label="share").axes[0].containers[0][0]
    assert alone.get_color() == axis.containers[1][0].get_color() != axis.containers[0][0].get_color()
    lengths = plots.plot_thought_lengths({"base": [0, 0], "policy": [40, 60]}).axes[0]
    assert [text.get_text() for text in lengths.get_yticklabels()] == ["base", "policy"]
    assert "tokens" in lengths.get_xlabel()


def test_log_ratios_and_lengths():
    table = pd.DataFrame(
        {"chosen_policy": [-9.0], "chosen_reference": [-10.0], "rejected_policy": [-5.0], "rejected_reference": [-2.0]}
    )
    axis = plots.plot_log_ratios(table).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["chosen", "rejected", "the reference"]
    assert axis.get_title() == "mean of chosen +1.00, of rejected -3.00"
    histogram, scatter = plots.plot_lengths([3, 5], [4, 4]).axes
    assert scatter.collections[0].get_offsets().tolist() == [[4, 3], [4, 5]]
    assert histogram.get_xlabel() == "tokens in the completion"


def test_a_table_of_texts_is_read_from_the_left_and_holds_no_html():
    texts = ["<script>alert(1)</script> & $5", "two\nlines"]
    table = pd.DataFrame({"<b>text": texts, "margin": [-0.5, 1.234], "count": [3, 40]}, index=["<i>first", 7])
    page = BeautifulSoup(plots.text_table(table).data, "html.parser")
    rows = [[(cell.text, "text-align:left" in cell["style"]) for cell in row.select("th, td")] for row in page("tr")]
    assert rows[0] == [("", True), ("<b>text", True), ("margin", False), ("count", False)]
    assert rows[1] == [("<i>first", True), (texts[0], True), ("-0.50", False), ("3", False)]
    assert rows[2] == [("7", True), (texts[1], True), ("1.23", False), ("40", False)]
    assert {tag.name for tag in page.find_all()} == {"table", "tr", "th", "td"}
    assert "mathjax_ignore" in page.table["class"]


def test_the_table_of_symptoms_has_its_words_and_no_row_labels():
    rows = [{"symptom": "loss < 0", "cured": 0.123, "figure": object()}]
    page = BeautifulSoup(plots.symptom_table(rows).data, "html.parser")
    assert [[cell.text for cell in row.select("th, td")] for row in page("tr")] == [
        ["symptom", "cured"],
        ["loss < 0", "0.123"],
    ]


def test_the_picture_of_the_readme_shows_every_run():
    seeds = [{"seed": s, "pairs": 9, "accuracy": 0.8, "accuracy_interval": [0.7, 0.9]} for s in range(2)]
    sweep = pd.DataFrame({"beta": [0.1, 0.1, 1.0], "kl": [5.0, 7.0, 1.0]})
    left, right = plot_measured(seeds, sweep).axes
    assert [line.get_ydata()[0] for line in left.lines if line.get_marker() == "o"] == [0.8, 0.8]
    mean, runs = right.lines
    assert (list(mean.get_ydata()), list(runs.get_ydata())) == ([6.0, 1.0], [5.0, 7.0, 1.0])
    assert all(axis.get_ylabel() for axis in (left, right))
