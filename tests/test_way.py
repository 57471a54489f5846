"""The way of the notebooks on a model of two small layers with random weights.

What real weights learn is tested room by room; those tests are slow.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import helpers
from helpers import UserError
from helpers.after.inspection import open_run
from helpers.run.folder import Run
from helpers.train.sft import train_sft

SIDES = ("chosen", "rejected")
QUICK = {
    "max_steps": 2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(autouse=True)
def own_folders(small, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("DPO_MODEL", str(small))  # where an adapter finds its base again


@pytest.fixture(scope="module")
def pairs():
    loaded = helpers.load_pairs()
    return loaded.select(range(16)), loaded.select(range(16, 20))


@pytest.mark.slow  # it trains twice
def test_from_pairs_to_a_merged_model(pairs, tmp_path):
    train, test = pairs
    model, tokenizer = helpers.load_model()
    policy = helpers.add_lora(model)
    assert all(math.isfinite(loss) for loss in train_sft(policy, tokenizer, train, learning_rate=1e-2))
    run = helpers.train_dpo(policy, tokenizer, train, test, tmp_path / "run", learning_rate=1e-2, **QUICK)
    assert run.info.model == "small" and run.reference is not None  # the SFT adapter
    assert float(run.history[0]["loss"]) == pytest.approx(math.log(2), abs=1e-3)
    assert helpers.diagnose(run).codes == helpers.diagnose(tmp_path / "run").codes

    opened = open_run(Run.load(tmp_path / "run"))
    rewards = helpers.implicit_rewards(opened, test)
    assert rewards.log_ratio_gap.abs().max() > 0
    words = helpers.token_rewards(opened, test[0])
    for side in ("chosen", "rejected"):
        assert words[words.side == side].reward.sum() == pytest.approx(rewards[f"{side}_reward"][0], abs=1e-3)
    prompts = ["Why is the sky blue?", test[0], test[0]["prompt"]]
    replies = helpers.compare_generations(opened, prompts, max_new_tokens=4)
    assert replies.policy_tokens[0] <= 4
    assert replies.loc[1].equals(replies.loc[2])  # a row of pairs, and its conversation

    adapter = helpers.export_run(run, "adapter", tmp_path / "adapter")
    assert "figures" in (run.folder / "README.md").read_text() and "# small" in (adapter / "README.md").read_text()
    merged = helpers.export_run(run, "merged", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(merged).config.num_hidden_layers == 2
    with pytest.raises(UserError, match="started from a trained adapter"):
        helpers.export_run(run, "trl", tmp_path / "trl", train=train, test=test)


@pytest.mark.slow  # a process that imports everything and trains
def test_the_script_of_the_readme(small, tmp_path):
    """Line by line as a reader pastes it, on a file of own pairs in the simplest form, in a folder of its own."""
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    script = (
        re.search(r"^    from helpers import .*\n(?:    .*\n|\n)+", readme, flags=re.M)[0]
        .replace("\n    ", "\n")
        .strip()
    )
    assert sum(line != "" for line in script.splitlines()) <= 6
    rows = helpers.load_pairs().select(range(0, 480, 20))
    plain = [{"prompt": row["prompt"][0]["content"]} | {s: row[s][0]["content"] for s in SIDES} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in plain)
    (tmp_path / "my_pairs.jsonl").write_text(lines, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(root), "DPO_MODEL": str(small), "DPO_CACHE_DIR": str(tmp_path / "c")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    # Apart from its numbers, what the README shows of a run is what this one printed.
    form = re.compile(r"[ \d.+-]+")
    shown = re.findall(r"^    ((?:step|held out) .*)$", readme, flags=re.M)
    assert {form.sub(" ", line) for line in shown} <= {form.sub(" ", line) for line in done.stdout.splitlines()}
