"""Figures that need no model, and log-probs that do."""

import pandas as pd
import pytest
import torch
from datasets import Dataset

from helpers.model.logps import PairLogps, with_reference
from helpers.run.metrics import accuracy_by, held_out_table, preference_metrics, wilson_interval


def test_wilson_interval_keeps_within_zero_and_one():
    # Newcombe 1998, table I: 81 of 263, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(20, 20)[1] == pytest.approx(1, abs=1e-12)


def table():
    reference = PairLogps(*(torch.tensor(v) for v in ([-10.0, -20.0], [-12.0, -10.0], [5.0, 10.0], [5.0, 10.0])))
    policy = PairLogps(*(torch.tensor(v) for v in ([-9.0, -21.0], [-13.0, -10.5], [5.0, 10.0], [5.0, 10.0])))
    test = Dataset.from_list([{"origin": "a:1", "flaw": "wrong"}, {"origin": "a:2", "flaw": "vague"}])
    return held_out_table(test, reference, policy)


def test_preference_metrics_by_hand():
    metrics = preference_metrics(table(), beta=0.1)
    # gaps: (1) - (-1) = 2 and (-1) - (-0.5) = -0.5
    assert metrics["log_ratio_gap"] == pytest.approx(0.75)
    assert metrics["margin"] == pytest.approx(0.075)
    assert metrics["accuracy"] == 0.5
    assert metrics["reference_accuracy"] == 0.5  # -2 > -2.4 per token, but -2 < -1
    expected = (torch.nn.functional.softplus(torch.tensor([-0.2, 0.05]))).mean().item()
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)
    assert (metrics["chosen_change"], metrics["rejected_change"]) == pytest.approx((0.0, -0.75))


def test_accuracy_by_counts_and_bounds():
    shares = accuracy_by(table(), "flaw")
    assert shares.loc["wrong"].tolist() == pytest.approx([1.0, *wilson_interval(1, 1), 1])
    assert shares.loc["vague", "share"] == 0.0
    assert isinstance(shares, pd.DataFrame) and shares.pairs.sum() == 2


def test_reference_columns_are_those_of_the_trainer():
    logps = PairLogps(*(torch.tensor([1.5, 2.5]) for _ in range(4)))
    pairs = with_reference(Dataset.from_list([{"a": 1}, {"a": 2}]), logps)
    assert pairs["ref_chosen_logps"][:] == [1.5, 2.5] and pairs["ref_rejected_logps"][:] == [1.5, 2.5]
