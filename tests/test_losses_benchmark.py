"""The benchmark of losses: what it would run, whose labels it exchanges, and each trainer on a tiny model."""

import argparse
import json
from collections import Counter

import pytest
from peft import PeftModel

import helpers
from benchmarks import losses
from helpers.model.fingerprint import base_hash

OF_TRAINERS = {"dpo": "sigmoid", "cpo": "simpo", "orpo": "orpo", "kto": "kto"}


def test_the_plan_has_every_strength_and_seed_and_exchanges_labels_at_the_middle_one(tmp_path):
    runs = losses.plan(False, list(losses.LOSSES))
    assert Counter(run["exchanged"] for run in runs) == {0.0: 90, 0.1: 30, 0.3: 30}
    assert len({losses.place(tmp_path, run) for run in runs}) == 150
    assert all(run["strength"] == losses.LOSSES[run["loss"]].values[1] for run in runs if run["exchanged"])
    assert all(list(loss.values) == sorted(set(loss.values)) for loss in losses.LOSSES.values())
    quick = losses.plan(True, list(losses.LOSSES))
    assert [run["loss"] for run in quick] == list(losses.LOSSES) and all(run in runs for run in quick)


def test_a_share_of_the_labels_is_exchanged_and_what_10_percent_exchange_30_do_too():
    pairs = helpers.load_pairs().select(range(50))

    def exchanged(share: float, seed: int = 0) -> set[int]:
        made = losses.exchange(pairs, share, seed)
        assert made.features == pairs.features
        changed = {i for i, (now, row) in enumerate(zip(made, pairs, strict=True)) if now != row}
        assert all(
            (made[i]["chosen"], made[i]["rejected"]) == (pairs[i]["rejected"], pairs[i]["chosen"]) for i in changed
        )
        return changed

    assert exchanged(0) == set() and len(exchanged(0.1)) == 5 and len(exchanged(0.3)) == 15
    assert exchanged(0.1) < exchanged(0.3) != exchanged(0.3, seed=1)


def test_the_text_that_simpo_and_orpo_read_becomes_the_ids_that_were_checked(tokenizer):
    pairs = helpers.load_pairs().select(range(20))
    for row, ids in zip(losses.texts(pairs, tokenizer), helpers.tokenize_pairs(pairs, tokenizer), strict=True):
        for side in ("chosen", "rejected"):
            *expected, line_break = ids["prompt_ids"] + ids[f"{side}_ids"]
            assert tokenizer(row["prompt"] + row[side], add_special_tokens=False)["input_ids"] == expected
            assert expected[-1] == tokenizer.eos_token_id and tokenizer.decode([line_break]) == "\n"


@pytest.fixture(scope="module")
def bench(small):
    return losses.Bench(str(small), pairs=16, held_out=4, prompts=2, new_tokens=4)


def planned(name: str, **change) -> dict:
    return {"loss": name, "strength": losses.LOSSES[name].values[1], "exchanged": 0.0, "seed": 1} | change


@pytest.mark.slow
@pytest.mark.parametrize("trainer", OF_TRAINERS)
def test_every_trainer_trains_and_is_measured_alike_and_leaves_the_model_as_it_was(bench, trainer):
    before, forward = base_hash(bench.model), vars(bench.model).get("forward")
    run = planned(OF_TRAINERS[trainer], exchanged=0.3)
    assert losses.LOSSES[run["loss"]].trainer == trainer
    row = bench.run(run, steps=2)
    assert row["status"] == "finished", row["status"]
    assert row | run == row and row["steps"] == 2 and set(losses.FIGURES) <= set(row)
    assert len(row["right"]) == 4 and row["accuracy"] == row["right"].count("1") / 4
    assert row["chosen_change"] != 0 and row["rejected_change"] != 0  # it was the trained adapter that was measured
    assert not isinstance(bench.model, PeftModel) and base_hash(bench.model) == before
    assert vars(bench.model).get("forward") == forward


@pytest.mark.slow
def test_what_is_finished_is_kept_what_failed_is_tried_again_and_the_next_runs_go_on(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "Bench", lambda *shape: bench)
    runs = [planned("sigmoid"), planned("hinge")]
    args = argparse.Namespace(share=0, processes=1, folder=tmp_path, minutes=10, steps=1, model="")
    args.pairs = args.held_out = args.prompts = args.new_tokens = 0  # the bench is made
    broken = losses.LOSSES["sigmoid"]._replace(settings=lambda beta: {"beta": -beta})

    def outcomes() -> list[tuple]:
        rows = [json.loads(losses.place(tmp_path, run).read_text()) for run in runs]
        return [(row["status"].split(":")[0], row.get("kl")) for row in rows]

    with monkeypatch.context() as patch:
        patch.setitem(losses.LOSSES, "sigmoid", broken)
        losses.work(args, runs)
    failed, done = outcomes()
    assert failed == ("failed", None) and done[0] == "finished"
    losses.work(args, runs)
    again, kept = outcomes()
    assert again[0] == "finished" and kept == done
    assert json.loads((tmp_path / "reference.json").read_text())["reply_tokens"] > 0
    late = argparse.Namespace(**vars(args) | {"minutes": 0})
    losses.work(late, [planned("ipo")])
    assert not losses.place(tmp_path, planned("ipo")).exists()


def test_means_are_over_the_seeds_that_finished():
    rows = [
        planned("sigmoid", seed=seed, status="finished") | dict.fromkeys(losses.FIGURES, seed) for seed in (1, 2, 3)
    ]
    rows.append(planned("ipo", status="failed: x"))
    first, second = losses.summary(rows)
    assert first["seeds"] == 3 and first["kl"] == [2.0, 2.4841] and first["exchanged"] == 0
    assert second == {"loss": "ipo", "strength": 0.5, "exchanged": 0.0, "seeds": 0}
