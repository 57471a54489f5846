"""Keep an adapter or discard it: each rule by a run that is made for it, and never against diagnosis. No model here."""

import dataclasses
import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import Run, UserError, diagnose, verdict
from helpers.common import write_json
from helpers.run.card import model_card
from helpers.run.diagnosis import RULES as SYMPTOM_RULES
from helpers.run.folder import RunInfo
from helpers.run.metrics import pairs_to_decide, wilson_interval
from helpers.run.verdict import DECIDES, WORDING, Verdict
from helpers.teach.lessons import recorded

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
FIELD = json.loads((Path(__file__).parent / "field" / "runs.json").read_text(encoding="utf-8"))
LAB = json.loads((RESULTS / "diagnosis.json").read_text(encoding="utf-8"))
CONFIG = {"beta": 0.1, "max_length": 512, "loss_type": ["sigmoid"], "num_train_epochs": 1, "learning_rate": 2e-4}


def pairs(right: int, wrong: int, chosen: float = -0.4) -> pd.DataFrame:
    """So many pairs whose chosen answer gained more, and less; it moved by `chosen` nats from -100."""
    gap = np.array([2.5] * right + [-2.5] * wrong)
    sides = {"chosen_reference": -100.0, "chosen_policy": -100.0 + chosen, "chosen_tokens": 30}
    sides |= {"rejected_reference": -120.0, "rejected_policy": -120.0 + chosen - gap, "rejected_tokens": 30}
    return pd.DataFrame(sides | {"log_ratio_gap": gap})


def log(chosen: float = -0.04, rejected: float = -0.29, accuracy: float = 0.9, **more: float) -> list[dict]:
    """A history of three rows whose end is as given, rewards with beta."""
    rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    start = {"step": 1, "loss": 0.693, **dict.fromkeys(rewards, 0.0), "logps/chosen": -100.0, "learning_rate": 2e-4}
    end = {"loss": 0.57, "logps/chosen": -100 + 10 * chosen, "rewards/accuracies": accuracy, **rewards} | more
    middle = {"step": 20, "grad_norm": 1.0, "learning_rate": 1e-4} | end
    return [start, middle, {"step": 24} | {f"eval_{name}": value for name, value in end.items()}]


@pytest.fixture
def run(first, tmp_path) -> Run:
    first["data"] |= {"findings": {}, "prompts": {"shortened": 0, "left_out": 0}}
    return Run(tmp_path, RunInfo.from_json(first | {"config": CONFIG}), log(), {}, pairs(108, 12))


def replies(before: int, after: int, of: int = 12, tokens: tuple[int, int] = (50, 52)) -> pd.DataFrame:
    columns = {f"{m}_ended": [n < e for n in range(of)] for m, e in (("reference", before), ("policy", after))}
    return pd.DataFrame(columns | {"reference_tokens": tokens[0], "policy_tokens": tokens[1]})


def test_a_healthy_run_is_kept_and_each_measure_stands_beside_itself(run):
    assert "not asked" in str(verdict(run)) and verdict(run).decision == "keep"
    found = verdict(run, replies(10, 9))
    assert found.decision == "keep" and "90% of 120 held-out pairs" in found.line
    rows = {name.partition(" (of ")[0]: (row.before, row.after) for name, row in found.table.iterrows()}
    assert rows == {
        "implicit reward: chosen gained more": ("a tie, by definition", "0.90 (95%: 0.83 to 0.94)"),
        "likelihood per token: chosen likelier": ("1.00 (95%: 0.97 to 1.00)", "1.00 (95%: 0.97 to 1.00)"),
        "log-prob of a chosen answer, nats": ("-100.0", "-100.4 (fell by 0.4, 0.4%)"),
        "log-prob of a rejected answer, nats": ("-120.0", "-122.4 (fell by 2.4, 2.0%)"),
        "replies that end": ("0.83 (95%: 0.55 to 0.95)", "0.75 (95%: 0.47 to 0.91)"),
        "tokens of a reply": ("50", "52"),
        "diagnose(run)": ("", "no symptom"),
        "left out of the training data": ("nothing", ""),
    }


def test_replies_that_were_judged_once_are_on_the_cards_that_follow(run):
    run.info.config |= {"seed": 0}
    assert "not asked" in model_card(run, "adapter")
    line = verdict(run, replies(12, 2)).line
    card = model_card(run, "adapter")
    assert html.escape(line) in card and "replies no longer end: 17% of 12 do" in card
    assert "| tokens of a reply | 50 | 52 |" in card and "not asked" not in card
    assert verdict(run, replies(10, 9)).decision == "keep" == verdict(run).decision  # the last ones


def test_replies_that_cannot_be_kept_are_judged_all_the_same(run, capsys):
    (run.folder / "replies.json").mkdir()
    assert verdict(run, replies(12, 2)).decision == "discard"
    assert "could not be kept" in capsys.readouterr().out


# rule -> what makes a run for it: fields of the run, replies, and a part of the line
CASES = {
    "symptom": ({"history": log(0.0, -0.001)}, None, "Discard: The loss stays at ln 2.*ten times as much"),
    "not_numbers": ({"held_out": pairs(108, 12).replace(-120.0, np.nan)}, None, "NaN"),
    "stopped": ({}, replies(12, 2), "Discard: replies no longer end: 17% of 12 do, 100% did before"),
    "below": ({"held_out": pairs(40, 80)}, None, r"0\.26 to 0\.42, is below one half.*exchange"),
    "lost": (
        {"parts": {"facts": {"items": 30, "before": 0.5, "after": 0.2, "change": -0.3, "low": -0.4, "high": -0.2}}},
        None,
        r"Undecided: .* unlike the pairs, share of facts that are right fell by 0\.30 \(95%: 0\.20 to 0\.40\)\. What",
    ),
    "unknown": ({"held_out": None}, None, r"its held_out\.jsonl"),
    "few": ({"held_out": pairs(12, 2)}, None, "14 held-out pairs are too few.*30 or more"),
    "half": ({"held_out": pairs(66, 54)}, None, r"0\.46 to 0\.64, contains one half.*some 385 pairs.*0\.55"),
    "unsure": ({"history": log(accuracy=1.0)[:2] + [log(accuracy=1.0)[2] | {"step": 10}]}, None, "too easy"),
    "fell": (
        {"held_out": pairs(108, 12, -20.0)},
        None,
        r"Undecided: the log-prob of a chosen answer fell from -100 to -120 nats, and no reply was looked at",
    ),
    "none_ends": ({}, replies(3, 0), r"no reply ended before its limit \(25% did"),
    "longer": ({}, replies(8, 8, tokens=(20, 50)), r"2\.5 times as long"),
    "keep": ({"held_out": pairs(108, 12, -20.0)}, replies(8, 8), "Keep"),
}


def test_each_rule_has_its_run_and_its_text():
    assert list(DECIDES) == list(WORDING) == list(CASES)


def test_what_retention_found_is_on_the_cards(run):
    run.info.config |= {"seed": 0}
    assert "retention(run)" not in model_card(run, "adapter")
    write_json(run.folder / "retention.json", {"parts": CASES["lost"][0]["parts"] | {"<b>": {}}})
    card = model_card(run, "adapter")
    assert "| retention(run) |  | share of facts that are right fell by 0.30" in card and "<b>" not in card
    kept = {"facts": CASES["lost"][0]["parts"]["facts"] | {"change": -0.01, "high": 0.1}}
    write_json(run.folder / "retention.json", {"parts": kept})
    assert verdict(run).decision == "keep"
    assert "| retention(run) |  | nothing found to be lost |" in model_card(run, "adapter")


@pytest.mark.parametrize("rule", CASES)
def test_rule(run, rule):
    changes, asked, line = CASES[rule]
    if rule == "lost":
        write_json(run.folder / "retention.json", changes)
        changes = {}
    found = verdict(dataclasses.replace(run, **changes), asked)
    assert found.decision == WORDING[rule]["decision"] and pd.Series([found.line]).str.contains(line).all(), found.line
    assert "{" not in found.line and "nan" not in found.line.lower().replace("(nan or", "")


def test_a_note_is_named_where_it_does_not_decide(run):
    easy = dataclasses.replace(run, history=log(accuracy=1.0), held_out=pairs(119, 1))
    found = verdict(easy)
    assert diagnose(easy).codes == [] and found.table.after["diagnose(run)"] == "no symptom; note: leak"
    assert found.decision == "keep" and "(a note: Nearly every held-out pair is right" in found.why


def test_a_coin_is_not_decided_by_any_number_of_pairs(run):
    assert "a longer run" in verdict(dataclasses.replace(run, held_out=pairs(60, 60))).change


@pytest.mark.parametrize("share", [0.51, 0.55, 0.4, 0.75])
def test_so_many_pairs_decide_and_one_fewer_does_not(share):
    needed = pairs_to_decide(share)
    assert wilson_interval(share * needed, needed)[0] > 0.5 or wilson_interval(share * needed, needed)[1] < 0.5
    low, high = wilson_interval(share * (needed - 1), needed - 1)
    assert low <= 0.5 <= high


# ------------------------------------------------------------------------------------------------ never against it


def of_others(run: Run) -> dict[str, Run]:
    """Runs with histories of the lab and of other people, with held-out pairs that alone would speak for keeping."""
    every = {f"lab {number} {name}": recorded(part, name) for number, part in enumerate(LAB) for name in part["runs"]}
    every = {name: dataclasses.replace(one, held_out=run.held_out) for name, one in every.items()}
    for one in FIELD:
        settings = {name: one[name] for name in ("beta", "loss_type") if one.get(name)} | one.get("config", {})
        sizes = {name: one.get(name) or 100 for name in ("train_pairs", "test_pairs")}
        info = dataclasses.replace(run.info, config={"max_length": 512} | settings, **sizes)
        every[one["name"]] = dataclasses.replace(run, info=info, history=one["history"])
    return every


@pytest.mark.slow
def test_no_run_with_a_symptom_is_kept(run):
    every, seen = of_others(run), set()
    assert len(every) >= 60
    for name, one in every.items():
        found, codes = verdict(one, replies(9, 9)), diagnose(one).codes
        assert (found.decision != "keep") if codes else (found.decision == "keep"), (name, codes, found.line)
        assert all(code in found.table.loc["diagnose(run)", "after"] for code in codes)
        seen |= set(codes)
    assert seen >= set(SYMPTOM_RULES) - {"out_of_memory"}


# ------------------------------------------------------------------------------------------------ folders, text


def test_a_folder_of_version_1(first, run, tmp_path):
    del first["data"]["prompts"]
    (tmp_path / "run.json").write_text(json.dumps(first))
    (tmp_path / "history.json").write_text(json.dumps(run.history))
    (tmp_path / "metrics.json").write_text("{}")
    assert verdict(tmp_path).decision == "undecided"
    run.held_out.to_json(tmp_path / "held_out.jsonl", orient="records", lines=True)
    found = verdict(str(tmp_path))
    assert (
        found.decision == "keep" and found.table.before["left out of the training data"] == "long prompts not recorded"
    )
    (tmp_path / "held_out.jsonl").write_text('{"origin": "pairs.jsonl:1"}\n')
    assert verdict(tmp_path).decision == "undecided"


def test_what_was_left_out_is_counted(run):
    run.info.data.findings |= {"left_out": 3, "over_max_length": 4, "length_leak": 9}
    run.info.data.prompts |= {"shortened": 5, "left_out": 2}
    left = verdict(run).table.before["left out of the training data"]
    assert left == "3 rows when they were read, 2 long prompts, 5 prompts shortened, 4 answers cut"


def test_another_table_is_no_replies(run):
    with pytest.raises(UserError, match="lacks policy_ended"):
        verdict(run, replies(9, 9).drop(columns="policy_ended"))


def test_texts_are_escaped():
    table = pd.DataFrame({"before": ["<b>x</b>"], "after": ["<img>"]}, index=["<script>"])
    found = Verdict("keep", "<i>why</i>", "<script>", table)
    for text in (found._repr_html_(), found.to_markdown()):
        assert not any(tag in text for tag in ("<b>", "<img", "<script", "<i>"))
