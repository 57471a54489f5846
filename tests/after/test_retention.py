"""The panel of `retention` and its checks; what counts as lost; a run asked for real, and by lm-evaluation-harness."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

import helpers
from helpers import UserError, load_pairs, retention, train_dpo, verdict
from helpers.after.checks import CHECKS, passes, words
from helpers.after.inspection import open_run
from helpers.after.retention import NEW_TOKENS, PANEL, Retention
from helpers.data.messages import prompt_text
from helpers.run.retained import LOST, lost_parts, retained_line, retained_parts

ROOT = Path(__file__).parent.parent.parent
TASKS = ROOT / "benchmarks" / "lm_eval"
ITEMS = [json.loads(line) for line in PANEL.read_text(encoding="utf-8").splitlines()]

# ------------------------------------------------------------------------------------------------ the panel


def test_the_panel_is_as_its_card_says():
    counts = Counter(item["part"] for item in ITEMS)
    assert counts == {"texts": 26, "instructions": 60, "arithmetic": 30, "facts": 30}
    card = PANEL.with_name("README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", card, re.M)) == {name: str(n) for name, n in counts.items()}
    assert len({item["id"] for item in ITEMS}) == len({item.get("prompt", item["id"]) for item in ITEMS}) == len(ITEMS)
    texts = [item["text"] for item in ITEMS if item["part"] == "texts"]
    assert all(40 <= len(words(text)) <= 80 for text in texts)
    asked = {prompt_text(prompt) for prompt in load_pairs()["prompt"]}
    assert not asked & {item.get("prompt") for item in ITEMS}
    assert set(LOST) == set(counts) | {"replies", "end"} and set(NEW_TOKENS) == set(counts) - {"texts"}


def test_checks_are_data_and_an_empty_reply_passes_none_alone():
    named = {check["check"] for item in ITEMS for check in item.get("checks", ())}
    assert named == set(CHECKS)
    assert not [item["id"] for item in ITEMS if "checks" in item and passes(item["checks"], "")]


# check: value, a reply that passes, one that does not
EXAMPLES = {
    "words_at_most": (3, "A well-known cat.", "One two three four."),
    "words_at_least": (3, "It's 2 cats", "Two cats"),
    "sentences_at_most": (1, "At 3.15 it began!", "It began. It ended."),
    "listed_at_least": (2, "Here:\n- one\n 2. two", "- one and two"),
    "upper_case": (True, "HELLO 2.", "HELLo"),
    "lower_case": (True, "green", "Green"),
    "has": (["river", "stone"], "A Stone in the river.", "A river"),
    "has_any": (["yes", "no"], "No, never", "Nothing"),
    "has_at_least": ({"count": 2, "words": ["mars", "venus"]}, "Venus, Mars", "Mars, mars"),
    "lacks": (["egg"], "Eggs", "An egg."),
    "has_text": ("1, 2", "So: 1, 2.", "1,2"),
    "starts_with": ("Dear", " Dear Tom", "Oh Dear"),
    "ends_with": ("?", "Rain? \n", "Rain?!"),
    "json_keys": (["a"], '```json\n{"a": 1, "b": 2}\n```', '["a"]'),
    "last_number": (1040, "52 times 20 is 1,040.\n3", "1040 or 3"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name):
    value, good, bad = EXAMPLES[name]
    assert CHECKS[name](good, value) and not CHECKS[name](bad, value)


@pytest.mark.parametrize("text", ["[" * 20_000, '{"a": ' * 20_000, "\x00\ud83d" * 100, "9" * 10_000])
def test_hostile_replies_pass_no_check_and_break_none(text):
    assert not any(passes(item["checks"], text) for item in ITEMS if item["part"] in ("arithmetic", "facts"))
    assert all(isinstance(passes(item["checks"], text), bool) for item in ITEMS if "checks" in item)


@pytest.mark.parametrize("part", NEW_TOKENS)
def test_the_tasks_of_the_harness_cut_replies_where_retention_does(part):
    task = (TASKS / f"dpo_panel_{part}.yaml").read_text(encoding="utf-8")
    assert f"{{part: {part}}}" in task and f"max_gen_toks: {NEW_TOKENS[part]}}}" in task


# ------------------------------------------------------------------------------------------------ what is lost


def figures(change: float, half: float = 0.01, before: float = -3.0) -> dict[str, float]:
    ends = {"low": change - half, "high": change + half}
    return {"items": 26, "before": before, "after": before + change, "change": change, **ends}


@pytest.mark.parametrize("name", LOST)
def test_what_counts_as_lost(name):
    limit = LOST[name]["limit"]
    assert LOST[name]["why"] and limit > 0
    kept = (figures(0.9 * -limit, 0.0), figures(3 * limit), figures(-2 * limit, 2.1 * limit), figures(0, 0))
    assert not any(lost_parts({name: one}) for one in kept)
    assert lost_parts({name: figures(-2 * limit, 1.9 * limit)}) == [name]
    assert lost_parts({name: figures(math.nan)}) == [name]


def test_the_limits_tell_the_damaged_runs_of_the_benchmark_from_the_healthy_ones():
    stored = json.loads((ROOT / "benchmarks" / "results" / "retention.json").read_text(encoding="utf-8"))
    alarms = Counter((run["fault"], bool(lost_parts(run["parts"]))) for run in stored["runs"])
    healthy = alarms["healthy", True], alarms["healthy", False]
    assert sum(healthy) == 20 and healthy[0] <= 1
    damaged = {key: n for key, n in alarms.items() if key[0] != "healthy"}
    assert sum(damaged.values()) == 40 and len({fault for fault, _ in damaged}) == 5
    found = sum(n for (_, alarm), n in damaged.items() if alarm)
    assert found >= 0.95 * 40
    assert stored["limits"] == {name: one["limit"] for name, one in LOST.items()}
    assert (stored["damaged_found"], stored["healthy_alarms"]) == (found, healthy[0])


def test_the_sentence_names_what_fell_and_by_how_much():
    assert retained_line({"texts": figures(0.1)}) == "nothing found to be lost"
    line = retained_line({"texts": figures(-0.5, 0.1), "facts": figures(0.0), "end": figures(math.nan)})
    assert "texts unlike the pairs (nats) fell by 0.50 (95%: 0.40 to 0.60); " in line
    assert line.endswith("ends those replies (nats) is no number") and "facts" not in line


@pytest.mark.parametrize("text", ["[]", "{}", '{"parts": {"texts": {"items": 1}}}', '{"parts": {"texts": 3}}', "{"])
def test_another_file_is_refused(tmp_path, text):
    assert retained_parts(tmp_path) == {}
    (tmp_path / "retention.json").write_text(text)
    with pytest.raises(UserError, match=r"retention\.json.*Call retention"):
        retained_parts(tmp_path)


def test_it_prints_as_text_and_as_html_without_the_replies():
    rows = pd.DataFrame({"part": ["facts"], "reference": ["<img>"]})
    found = Retention(rows, {"facts": figures(-0.5, 0.1, 0.9)})
    assert found.lost == ["facts"] and found.line in str(found) and "-0.5" in str(found)
    assert "<img>" not in found._repr_html_() and found.line in found._repr_html_()


# ------------------------------------------------------------------------------------------------ a run


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch):
    """Four steps at a high rate of a tiny model with random weights, whose replies are many random words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("DPO_MODEL", str(folder))
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    model, own = helpers.load_model()
    pairs = load_pairs()
    settings = {"max_steps": 4, "learning_rate": 0.03, "warmup_steps": 0, "save_strategy": "no", "eval_strategy": "no"}
    settings |= {"load_best_model_at_end": False, "lr_scheduler_type": "constant"}
    train, test = pairs.select(range(32)), pairs.select(range(32, 36))
    return train_dpo(helpers.add_lora(model), own, train, test, tmp_path / "run", **settings)


@pytest.mark.slow  # it trains
def test_a_run_is_asked_and_its_cards_say_it(run):
    found = retention(run.folder)
    assert set(found.parts) >= {"texts", "replies", "instructions", "arithmetic", "facts"}
    assert found.table.loc["texts", "items"] == 26
    stored = json.loads((run.folder / "retention.json").read_text())["parts"]
    assert stored == retained_parts(run.folder) == found.parts
    # The figures, by the plain definition: the sum of a text's log-probs under either model.
    opened = open_run(run)
    text = next(item for item in ITEMS if item["part"] == "texts")
    ids = torch.tensor([[opened.tokenizer.bos_token_id, *opened.tokenizer(text["text"])["input_ids"]]])
    with torch.no_grad():
        losses = opened.both(lambda model: float(model(input_ids=ids, labels=ids).loss))
    row = found.items.set_index("id").loc[text["id"]]
    assert [-row.before, -row.after] == pytest.approx([losses["reference"], losses["policy"]], rel=1e-3)
    assert row.before - row.after > 0.01  # so that it matters which is which
    said = verdict(run)
    assert said.table.loc["retention(run)", "after"] == found.line
    assert found.lost and said.decision != "keep"


@pytest.fixture
def harness() -> str:
    """The Python that has lm_eval."""
    python = os.environ.get("LM_EVAL_PYTHON") or sys.executable
    there = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    if subprocess.run([python, "-c", there]).returncode:
        pytest.skip("lm_eval is not installed; `make harness` installs it and runs this test")
    return python


@pytest.mark.slow  # it trains, and starts the harness
def test_the_harness_finds_the_same_items_right(harness, run, tokenizer, tmp_path):
    merged, out = helpers.export_run(run, "merged", tmp_path / "merged"), tmp_path / "out.json"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [harness, str(TASKS / "run.py"), str(merged), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(out.read_text(encoding="utf-8"))
    items = retention(run).items.set_index("id")
    checked, texts = items[items.part.isin(NEW_TOKENS)], items[items.part == "texts"]
    assert 3 <= checked.after.sum() <= 100  # else there is nothing to compare
    assert {name: theirs[name] for name in checked.index} == checked.after.to_dict()
    tokens = {item["id"]: len(tokenizer(item["text"])["input_ids"]) for item in ITEMS if item["part"] == "texts"}
    per_token = {name: theirs[name] / tokens[name] for name in texts.index}
    assert per_token == pytest.approx(texts.after.to_dict(), rel=0.01)  # merging rounds to 16 bits
    assert texts.before.to_dict() != pytest.approx(texts.after.to_dict(), rel=0.01)
