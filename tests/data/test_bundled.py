"""The bundled pairs: what their card says of them is so."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from helpers import check_pairs, load_pairs, split_pairs
from helpers.data.load import BUNDLED_PAIRS
from helpers.data.messages import prompt_text
from helpers.data.split import HELD_OUT_TOPICS

FLAWS = {"wrong", "vague", "off-topic", "overlong", "unsafe"}


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in BUNDLED_PAIRS.read_text(encoding="utf-8").splitlines()]


def test_every_row_is_whole(rows):
    assert len(rows) >= 400
    assert {tuple(row) for row in rows} == {("prompt", "chosen", "rejected", "topic", "flaw")}
    assert all(row[name].strip() == row[name] != "" for row in rows for name in row)
    assert {row["flaw"] for row in rows} == FLAWS
    assert len({row["topic"] for row in rows}) >= 8
    assert max(Counter(row["prompt"].lower() for row in rows).values()) == 1


def test_card_counts_the_flaws_as_they_are(rows):
    card = Path(BUNDLED_PAIRS).with_name("README.md").read_text(encoding="utf-8")
    said = {name: int(count) for name, count in re.findall(r"`([\w-]+)` \((\d+)\)", card)}
    assert said == Counter(row["flaw"] for row in rows)
    assert f"{len(rows)} preference pairs" in card


def test_no_single_feature_tells_the_sides_apart(tokenizer):
    report = check_pairs(load_pairs(), tokenizer)
    assert report.findings == []
    assert 0.9 <= report.figures["length_ratio"] <= 1.1
    assert 0.45 <= report.figures["longer_is_chosen"] <= 0.55
    assert all(0.45 <= accuracy <= 0.55 for accuracy in report.figures["features"].values())


def test_mean_length_ratio_in_characters(rows):
    ratios = [len(row["chosen"]) / len(row["rejected"]) for row in rows]
    assert 0.8 <= sum(ratios) / len(ratios) <= 1.25


def test_held_out_topics_are_apart(tokenizer):
    parts = split_pairs(load_pairs())
    assert set(parts["test"]["topic"]) == set(HELD_OUT_TOPICS)
    assert not set(parts["train"]["topic"]) & set(HELD_OUT_TOPICS)
    assert len(parts["test"]) >= 80
    both = {prompt_text(p) for p in parts["train"]["prompt"]} & {prompt_text(p) for p in parts["test"]["prompt"]}
    assert both == set()
    assert check_pairs(parts["train"], tokenizer, test=parts["test"]).findings == []


def test_own_pairs_by_setting(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n')
    monkeypatch.setenv("DPO_DATA", str(tmp_path / "mine.jsonl"))
    assert load_pairs()["origin"][:] == ["mine.jsonl:1"]
    monkeypatch.setenv("DPO_DATA", "helpers/data/bundled/pairs.jsonl")  # relative to the project, not to the notebook
    monkeypatch.chdir(tmp_path)
    assert len(load_pairs()) == 480
