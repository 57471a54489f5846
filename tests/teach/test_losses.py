"""Which loss to take when: by made-up runs of benchmarks/losses.py, in which the answer is known."""

import math

import pytest

from helpers import UserError
from helpers.teach import plots
from helpers.teach.losses import CHANCE, loss_runs, take_this_when

SAME = {"chosen_per_token": -0.1, "ended": 0.5}  # of every run, give or take the seed
WANTS = ["most held-out", "least KL", "the chosen", "most replies", "least accuracy lost"]


def stored(settings: list[tuple], pairs: int = 100, seeds: int = 3) -> dict:
    """Runs of (loss, strength, exchanged, pairs that are right, KL); seeds differ in the second decimal."""
    rows = [
        {"loss": loss, "strength": strength, "exchanged": exchanged, "seed": seed, "status": "finished"}
        | {
            "accuracy": right / pairs,
            "right": "1" * right + "0" * (pairs - right),
            "kl": kl + 0.01 * (seed * len(loss) % 3),
        }
        | {name: value + 0.01 * ((7 * seed + len(loss)) % 3) for name, value in SAME.items()}
        for loss, strength, exchanged, right, kl in settings
        for seed in range(seeds)
    ]
    return {"runs": rows}


def table(*settings: tuple, accuracy: float = 0.8, **shape: int):
    found = take_this_when(loss_runs(stored(list(settings), **shape)), accuracy=accuracy)
    assert all(want.startswith(start) for want, start in zip(found.index, WANTS, strict=True))
    return found.set_axis(WANTS)


ROBUST = [("a", 0.1, 0.0, 90, 5.0), ("bb", 1.0, 0.0, 88, 5.0), ("a", 0.1, 0.3, 60, 5.0), ("bb", 1.0, 0.3, 86, 5.0)]


def test_what_differs_by_more_than_chance_is_named_and_the_rest_is_not():
    found = table(*ROBUST)
    assert found.loc["least accuracy lost", ["take", "as good"]].tolist() == ["bb (1)", ""]
    assert found.loc["least accuracy lost", "mean"] == pytest.approx(0.02)
    # Two pairs in a hundred, the same KL, and what only the seeds make.
    for want in WANTS[:4]:
        assert found.loc[want, "take"] == CHANCE and found.loc[want, "as good"] in ("a (0.1)", "bb (1)")


def test_many_pairs_make_a_small_difference_a_measured_one():
    more = [(loss, strength, exchanged, 10 * right, kl) for loss, strength, exchanged, right, kl in ROBUST]
    row = table(*more, pairs=1000).loc["most held-out"]
    assert (row["take"], row["best"], row["mean"], row["interval"]) == ("a (0.1)", "a (0.1)", 0.9, "0.900 to 0.900")


def test_the_least_kl_is_looked_for_among_those_that_are_right_often_enough():
    runs = [("a", 0.1, 0.0, 90, 5.0), ("a", 1.0, 0.0, 82, 2.0), ("bb", 1.0, 0.0, 79, 0.5), ("ccc", 1.0, 0.0, 90, 4.0)]
    assert table(*runs).loc["least KL", ["take", "as good"]].tolist() == ["a (1)", ""]  # a at its best strength
    assert table(*runs, accuracy=0.85).loc["least KL", "take"] == "ccc (1)"
    assert table(*runs, accuracy=0.95).loc["least KL", "take"] == "none reaches it"
    # With another that is as near it is one of the two, and still not the third.
    near = [*runs, ("dd", 1.0, 0.0, 90, 2.001)]
    assert table(*near).loc["least KL", ["take", "as good"]].tolist() == ["a (1)", "dd (1)"]


def test_one_seed_decides_nothing():
    found = table(*ROBUST, seeds=1)
    assert set(found["take"]) == {CHANCE}
    assert all(interval == "one seed" for interval in found["interval"])


def test_runs_that_failed_are_left_out_and_nothing_at_all_is_an_error():
    made = stored(ROBUST)
    made["runs"].append({"loss": "a", "strength": 0.1, "exchanged": 0.0, "seed": 3, "status": "failed: x"})
    runs = loss_runs(made)
    assert len(runs) == 12 and runs.run.unique().tolist() == ["a (0.1)", "bb (1)"]
    with pytest.raises(UserError, match="No run of these finished"):
        loss_runs({"runs": made["runs"][-1:]})


def test_without_exchanged_labels_nothing_is_lost():
    row = table(*ROBUST[:2]).loc["least accuracy lost"]
    assert row["mean"] == 0 and row["take"] == CHANCE


def test_the_frontier_has_a_point_for_each_run_with_right_labels():
    settings = [*ROBUST, ("a", 0.5, 0.0, 80, 2.0), ("a", 1.0, 0.0, 70, 1.0)]
    figure = plots.plot_losses(loss_runs(stored(settings)))
    shown = [[line for line in axis.lines if line.get_marker() in "os^"] for axis in figure.axes]
    every, near = ([(line.get_marker(), line.get_color(), *line.get_ydata()) for line in lines] for lines in shown)
    means = {("o", "C0", 0.9), ("s", "C0", 0.8), ("^", "C0", 0.7), ("o", "C1", 0.88)}
    assert {(*look, round(mean, 6)) for *look, mean in every} == means
    assert [line[:2] for line in near] == [("o", "C0"), ("o", "C1")]  # those above 0.85
    runs = [list(line.get_ydata()) for line in figure.axes[0].lines if line.get_marker() == "."]
    assert [sorted(values) for values in runs] == [[0.7] * 3 + [0.8] * 3 + [0.9] * 3, [0.88] * 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "bb"]
    assert all("KL" in axis.get_xlabel() and "accuracy" in axis.get_ylabel() for axis in figure.axes)
    assert not any(math.isnan(value) for line in figure.axes[0].lines for value in line.get_xdata())
