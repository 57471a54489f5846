"""The sweep: equal to runs made alone, kept as it goes, true where runs fail, careful in what it recommends."""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

import helpers
from helpers import UserError
from helpers.after.recommend import compare_accuracy, recommend
from helpers.data.load import load_pairs
from helpers.teach import plots
from helpers.train.dpo import train_dpo
from helpers.train.sweep import Sweep, _add, sweep_beta  # private: rows without a run

pytest_slow = pytest.mark.slow

SHORT = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
SAMPLING = {"prompts": 3, "max_new_tokens": 12}


# ------------------------------------------------------------------------------------------------ recommendations


def made_up(right: dict, kl: dict | None = None, pairs: int = 100) -> Sweep:
    """A sweep in which the run (beta, seed) is right on so many pairs, the first ones."""
    gaps = {key: np.where(np.arange(pairs) < count, 1.0, -1.0) for key, count in right.items()}
    rows = [
        {"beta": beta, "seed": seed, "status": "finished", "accuracy": count / pairs, "log_ratio_gap": 1.0}
        | ({"kl": kl[beta], "kl_error": 0.1} if kl else {})
        for (beta, seed), count in right.items()
    ]
    return Sweep(None, {}, pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame(gaps))


def test_pairs_are_compared_with_themselves():
    sweep = made_up({(0.1, 0): 80, (0.5, 0): 90})
    difference, low, high = compare_accuracy(sweep, 0.5, 0.1)
    # Ten pairs in a hundred differ, all one way; two separate intervals of 0.8 and 0.9 would overlap.
    half = 1.959964 * np.std([1] * 10 + [0] * 90, ddof=1) / 10
    assert [difference, low, high] == pytest.approx([0.1, 0.1 - half, 0.1 + half])
    assert compare_accuracy(sweep, 0.5, 0.1, comparisons=5)[1] < low
    # Seeds are averaged for each pair; they are not more pairs.
    doubled = made_up({(0.1, 0): 80, (0.1, 1): 80, (0.5, 0): 90, (0.5, 1): 90})
    assert compare_accuracy(doubled, 0.5, 0.1) == pytest.approx((difference, low, high))


def test_seeds_that_disagree_widen_the_interval():
    right = {(0.1, 0): 80, (0.1, 1): 80, (0.1, 2): 80, (0.5, 0): 84, (0.5, 1): 90, (0.5, 2): 96}
    difference, low, high = compare_accuracy(made_up(right), 0.5, 0.1)
    half = 4.3027 * 0.06 / 3**0.5  # Student's t with two degrees of freedom
    assert [difference, low, high] == pytest.approx([0.1, 0.1 - half, 0.1 + half], abs=1e-4)
    assert recommend(made_up(right)).beta == 0.1
    del right[0.1, 2]
    assert compare_accuracy(made_up(right), 0.5, 0.1)[1] < low  # of the two seeds that both have


def test_drift_is_compared_over_seeds():
    sweep = made_up({(beta, seed): 80 for beta in (0.1, 1.0) for seed in range(3)}, kl={0.1: 2.0, 1.0: 1.0})
    nearer = "Nearer to the reference than 0.1 (KL 2.0 nats a reply): 1 (1.0)."
    seed, kl, of_one = sweep.table.seed - 1, sweep.table.kl, sweep.table.beta == 1.0
    # Each seed is 1.0 nearer, however much the seeds differ; then the seeds do not agree.
    for table, told in ((kl + seed, True), (kl + seed * of_one, False), (kl + 0.2 * seed * of_one, True)):
        found = dataclasses.replace(sweep, table=sweep.table.assign(kl=table))
        assert (nearer in recommend(found).reason) == told


def test_without_a_measured_difference_the_usual_beta_is_kept():
    advice = recommend(made_up({(0.01, 0): 83, (0.1, 0): 82, (1.0, 0): 81}))
    assert advice.beta == 0.1
    assert "No beta is measured to be more accurate" in advice.reason and "keep 0.1" in advice.reason
    assert "from 0.810 to 0.830 (100 held-out pairs, 1 seed)" in advice.reason and "One seed" in advice.reason
    # 0.1 was not tried: the nearest that was.
    assert recommend(made_up({(0.05, 0): 83, (1.0, 0): 83})).beta == 0.05


def test_a_measured_difference_decides_and_drift_is_named():
    sweep = made_up({(0.01, 0): 60, (0.1, 0): 80, (0.3, 0): 81, (1.0, 0): 95}, kl={0.01: 9, 0.1: 2.0, 0.3: 1.9, 1.0: 1})
    advice = recommend(sweep)
    assert advice.beta == 1.0
    assert "Take 1: accuracy 0.950 against 0.800" in advice.reason
    assert "Less accurate than 0.1: 0.01." in advice.reason and "Nearer" not in advice.reason
    kept = recommend(made_up({(0.1, 0): 80, (0.3, 0): 80, (1.0, 0): 80}, kl={0.1: 2.0, 0.3: 1.9, 1.0: 1.0}))
    assert kept.beta == 0.1
    assert "Nearer to the reference than 0.1 (KL 2.0 nats a reply): 1 (1.0)." in kept.reason


def test_recommendation_from_one_beta_or_none():
    assert "nothing to compare" in recommend(made_up({(0.3, 0): 80})).reason
    sweep = made_up({(0.1, 0): 80})
    sweep.table["status"] = "failed: the loss is not a number"
    with pytest.raises(UserError, match="No run"):
        recommend(sweep)


def test_a_run_that_failed_is_replaced_when_it_is_made_again():
    sweep = _add(made_up({(0.1, 0): 80}), {"beta": 0.5, "seed": 0, "status": "failed: x"}, [], None)
    row = {"beta": 0.5, "seed": 0, "status": "finished", "accuracy": 0.9, "log_ratio_gap": 2.0}
    sweep = _add(sweep, row, [{"beta": 0.5, "seed": 0, "step": 1}], np.ones(100))
    assert sweep.table.status.tolist() == ["finished"] * 2 and sweep.table.beta.tolist() == [0.1, 0.5]
    assert len(sweep.history) == 1 and list(sweep.gaps) == [(0.1, 0), (0.5, 0)]


def test_folders_that_hold_no_sweep(tmp_path):
    with pytest.raises(UserError, match="no sweep.*05_beta_sweep"):
        Sweep.load(tmp_path)
    (tmp_path / "sweep.json").write_text('{"table": []}')
    with pytest.raises(UserError, match="cannot|can be read"):
        Sweep.load(tmp_path)


# ------------------------------------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def pairs():
    loaded = load_pairs()
    return loaded.select(range(12)), loaded.select(range(16, 22))


@pytest.fixture(scope="module")
def made(base, pairs, tmp_path_factory):
    """Three betas, of which the last makes the loss infinite; its own cache of reference log-probs."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers.model.logps.cache_folder", lambda: folder / "cache")
        yield sweep_beta(*base, *pairs, folder / "sweep", betas=(0.05, 1.0, 1e38), **SAMPLING, **SHORT)


@pytest_slow
def test_each_run_equals_the_same_run_made_alone(made, base, pairs, tmp_path):
    model, tokenizer = base
    policy = helpers.add_lora(model, seed=0)
    settings = SHORT | {"eval_strategy": "no", "load_best_model_at_end": False, "logging_first_step": True}
    alone = train_dpo(policy, tokenizer, *pairs, tmp_path / "alone", beta=1.0, seed=0, **settings)
    policy.unload()
    losses = made.history[made.history.beta == 1.0].loss.tolist()
    assert losses == [float(row["loss"]) for row in alone.history if "loss" in row] and len(losses) == 3
    of_both = [load_file(run.adapter / "adapter_model.safetensors") for run in (alone, made.run(1.0))]
    assert all(torch.equal(value, of_both[1][name]) for name, value in of_both[0].items())


@pytest_slow
def test_a_failed_run_is_reported_and_the_rest_are_measured(made, base):
    assert made.table.status.tolist() == ["finished"] * 2 + ["failed: the gradient of step 1 is not finite"]
    assert list(made.gaps) == [(0.05, 0), (1.0, 0)] and len(made.gaps) == 6
    row = made.finished.iloc[1]
    assert row.margin == pytest.approx(row.log_ratio_gap) and row.log_ratio_gap == pytest.approx(
        made.gaps[1.0, 0].mean()
    )
    assert row.accuracy == (made.gaps[1.0, 0] > 0).mean()
    assert row.weight_end == pytest.approx((1 / (1 + np.exp(made.gaps[1.0, 0]))).mean())
    # At the first step both have the same gradient but for beta.
    assert made.finished.grad_norm_start[1] / made.finished.grad_norm_start[0] == pytest.approx(20, rel=0.01)
    assert 1 <= row.reply_tokens <= 12 and 0 <= row.ended <= 1
    assert not isinstance(base[0], PeftModel) and not any("lora" in name for name, _ in base[0].named_modules())


@pytest_slow
def test_it_loads_again_without_training(made):
    again = Sweep.load(made.folder)
    pd.testing.assert_frame_equal(again.table, made.table)
    pd.testing.assert_frame_equal(again.history, made.history)
    pd.testing.assert_frame_equal(again.gaps, made.gaps, atol=1e-4)
    assert again.info == json.loads(json.dumps(made.info))
    assert pd.read_csv(made.folder / "table.csv").status.tolist() == made.table.status.tolist()


class PressStop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.beta == 0.3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest_slow
def test_more_betas_and_seeds_add_to_it_and_an_interruption_loses_nothing(made, base, pairs, capsys, recwarn):
    call = {"folder": made.folder} | SAMPLING | SHORT
    reference = sorted(made.folder.parent.glob("cache/reference/*"))
    # Of the training and the held-out pairs, for all betas; of the latter in 32 bits too if training takes 16.
    assert len(reference) == 2 + (base[0].dtype == torch.bfloat16)
    first = [json.loads((made.folder / "beta-1-seed-0" / "run.json").read_text())]
    stored = json.loads((made.folder / "sweep.json").read_text())
    assert stored["info"]["step"] == {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
    }
    stored["info"]["step"] |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    (made.folder / "sweep.json").write_text(json.dumps(stored))
    with pytest.raises(KeyboardInterrupt):
        sweep_beta(*base, *pairs, betas=(1.0, 0.3), seeds=(0, 1), callbacks=[PressStop()], **call)
    assert "run 1 of 3: beta 0.3, seed 0" in capsys.readouterr().out
    assert len(Sweep.load(made.folder).table) == 3
    sweep = sweep_beta(*base, *pairs, betas=(1.0, 0.3), seeds=(0, 1), **call)
    out = capsys.readouterr().out
    assert "Resuming from step 2" in out and "run 3 of 3: beta 0.3, seed 1, about" in out
    assert sorted(sweep.finished[["beta", "seed"]].itertuples(index=False, name=None)) == [
        (0.05, 0),
        (0.3, 0),
        (0.3, 1),
        (1.0, 0),
        (1.0, 1),
    ]
    assert sorted(made.folder.parent.glob("cache/reference/*")) == reference
    assert first == [json.loads((made.folder / "beta-1-seed-0" / "run.json").read_text())]
    assert (sweep.gaps[1.0, 0] != sweep.gaps[1.0, 1]).any()
    later = [sweep.run(*which).info.config for which in ((0.3, 0), (0.3, 1), (1.0, 1))]
    assert [c["gradient_accumulation_steps"] for c in later] == [4] * 3  # steps are made as in the sweep so far
    assert "Nothing" not in sweep_beta(*base, *pairs, betas=(1.0,), **call).table and capsys.readouterr().out == ""
    assert [str(w.message) for w in recwarn if "PEFT" in str(w.message)] == []


@pytest_slow
def test_what_cannot_be_swept_is_refused(made, base, pairs):
    with pytest.raises(UserError, match="other settings.*folder of its own"):
        sweep_beta(*base, *pairs, made.folder, **SAMPLING, **SHORT | {"learning_rate": 1e-5})
    with pytest.raises(UserError, match="other sampling"):
        sweep_beta(*base, *pairs, made.folder, **SHORT)
    with pytest.raises(UserError, match="betas="):
        sweep_beta(*base, *pairs, made.folder, beta=0.1)
    with pytest.raises(UserError, match="above 0"):
        sweep_beta(*base, *pairs, made.folder, betas=(0.1, 0))
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        sweep_beta(*base, *pairs, made.folder, learnin_rate=1e-5)
    policy = helpers.add_lora(base[0], seed=0)
    with pytest.raises(UserError, match="without one"):
        sweep_beta(policy, base[1], *pairs, made.folder)
    policy.unload()


@pytest_slow
def test_full_disk_loses_no_run(small, pairs, disk, monkeypatch, capsys):
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: disk / "cache")
    model, call = helpers.load_model(str(small)), {"betas": (0.1,), "prompts": 0} | SHORT
    sweep = sweep_beta(*model, *pairs, disk / "sweep", **call)
    (disk / "sweep" / "sweep.json").unlink()
    (disk / "filler").write_bytes(b"0" * shutil.disk_usage(disk).free)
    with pytest.raises(UserError, match=r"to .*sweep \(No space left .*\)\. Its runs are kept"):
        sweep_beta(*model, *pairs, disk / "sweep", **call)
    (disk / "filler").unlink()
    capsys.readouterr()
    pd.testing.assert_frame_equal(sweep_beta(*model, *pairs, disk / "sweep", **call).gaps, sweep.gaps)
    assert "finished already" in capsys.readouterr().out


@pytest_slow
def test_template_that_writes_the_date_makes_no_other_sweep_tomorrow(small, pairs, day, tmp_path, monkeypatch, capsys):
    """Nor other tokens for what it trains tomorrow: the runs of a sweep differ in beta and seed alone."""
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    model, tokenizer = helpers.load_model(str(small))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    call = {"prompts": 0, "learning_rate": 0.1} | SHORT
    day(1)
    whole = sweep_beta(model, tokenizer, *pairs, tmp_path / "whole", betas=(0.1, 0.5), **call)
    sweep_beta(model, tokenizer, *pairs, tmp_path / "sweep", betas=(0.1,), **call)
    with pytest.raises(KeyboardInterrupt):
        sweep_beta(model, tokenizer, *pairs, tmp_path / "cut", betas=(0.3,), callbacks=[PressStop()], **call)
    capsys.readouterr()
    day(2)
    sweep = sweep_beta(model, tokenizer, *pairs, tmp_path / "sweep", betas=(0.1, 0.5), **call)
    assert "run 1 of 1: beta 0.5" in capsys.readouterr().out
    pd.testing.assert_frame_equal(sweep.gaps, whole.gaps, atol=1e-3)
    again = sweep_beta(model, tokenizer, *pairs, tmp_path / "cut", betas=(0.3, 0.5), **call)
    assert "Resuming from step 2" in capsys.readouterr().out
    assert np.allclose(again.gaps[0.5, 0], whole.gaps[0.5, 0], atol=1e-3)
    assert {run.info.data.train for run in map(again.run, (0.3, 0.5))} == {whole.run(0.1).info.data.train}
    with pytest.raises(UserError, match="other data"):
        sweep_beta(model, tokenizer, pairs[1], pairs[0], tmp_path / "sweep", betas=(0.1,), **call)


# ------------------------------------------------------------------------------------------------ figures


def test_figures_show_each_run_and_beta():
    rows = [
        {"beta": beta, "seed": seed, "kl": kl, "kl_error": 0.1, "accuracy": 0.8, "accuracy_low": 0.7}
        | {"accuracy_high": 0.9, "chosen_change": -1.0, "rejected_change": -3.0}
        for beta, seed, kl in ((0.1, 0, 2.0), (0.1, 1, 3.0), (1.0, 0, 1.0))
    ]
    axis = plots.plot_frontier(pd.DataFrame(rows)).axes[0]
    drawn = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in axis.containers}
    assert drawn == {"0.1": [2.5], "1": [1.0]}
    assert [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "."] == [[2.0, 3.0]]
    widths = [bars.lines[2][0].get_segments()[0][:, 0] for bars in axis.containers]
    # Two seeds: 12.706 standard errors; one seed: 1.96 of those over prompts.
    assert np.diff(widths, axis=1)[:, 0] == pytest.approx([2 * 12.706 * 0.5, 2 * 1.96 * 0.1], rel=1e-3)
    assert axis.get_title() == "95% intervals over 2 seeds"
    assert "one seed" in plots.plot_frontier(pd.DataFrame(rows[1:])).axes[0].get_title()
    assert "KL" in axis.get_xlabel() and "accuracy" in axis.get_ylabel()


def test_changes_are_means_with_intervals_over_the_seeds():
    rows = [
        {"beta": beta, "seed": seed, "chosen_change": chosen, "rejected_change": -3.0}
        for beta, seed, chosen in ((0.1, 0, -1.0), (0.1, 1, -2.0), (1.0, 0, 0.5))
    ]
    axis = plots.plot_changes(pd.DataFrame(rows)).axes[0]
    chosen, rejected = axis.containers
    assert chosen.lines[0].get_ydata().tolist() == [-1.5, 0.5] and rejected.lines[0].get_ydata().tolist() == [-3.0] * 2
    bar = chosen.lines[2][0].get_segments()[0]  # the second has no ends
    assert bar[:, 1] == pytest.approx([-1.5 - 6.353, -1.5 + 6.353], abs=1e-3)  # 12.706 standard errors
    assert "2 seeds" in axis.get_title()
    assert "one seed" in plots.plot_changes(pd.DataFrame(rows[1:])).axes[0].get_title()


def test_gaps_and_margins_are_means_over_seeds():
    rows = [
        {"beta": beta, "seed": seed, "step": 5, "split": split, "margin": beta * gap, "log_ratio_gap": gap}
        for beta, seed, split, gap in (
            (0.1, 0, "train", 2.0),
            (0.1, 1, "train", 4.0),
            (1.0, 0, "held out", 1.0),
            (1.0, 1, "held out", 2.0),
        )
    ]
    figure = plots.plot_gaps_and_margins(pd.DataFrame(rows))
    for axis in figure.axes:  # of beta 1, where gap and margin are the same
        (held_out,) = axis.containers
        (bar,) = held_out.lines[2][0].get_segments()
        assert held_out.lines[0].get_ydata().tolist() == [1.5]
        assert bar[:, 1] == pytest.approx([1.5 - 6.353, 1.5 + 6.353], abs=1e-3)  # 12.706 standard errors
    drawn = [
        next(line.get_ydata().tolist() for line in axis.lines if line.get_label() == "0.1") for axis in figure.axes
    ]
    assert drawn == [[3.0], pytest.approx([0.3])] and "beta" in figure.axes[1].get_title()


def test_a_beta_has_one_colour_in_every_figure():
    def colours(*betas):
        rows = [{"beta": b, "step": 1, "split": "train", "margin": 0.0, "log_ratio_gap": 0.0} for b in betas]
        lines = plots.plot_gaps_and_margins(pd.DataFrame(rows)).axes[0].get_legend().get_lines()
        return dict(zip(betas, (tuple(line.get_color()) for line in lines), strict=True))

    few, many = colours(0.1, 1.0), colours(0.01, 0.1, 0.5, 1.0)
    assert few == {beta: many[beta] for beta in few} and len(set(many.values())) == 4
