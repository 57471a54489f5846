"""What a model card says of a run, and that the code on it does what it says."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import trl
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers import add_lora, check_pairs, export_run, load_model, load_pairs, train_dpo, verdict
from helpers.run.card import changed_settings, model_card
from helpers.run.folder import Run, RunInfo, describe_config

CONFIG = describe_config(trl.DPOConfig(output_dir="output", learning_rate=1e-3, bf16=False, report_to="none"))


@pytest.fixture
def run(first, tmp_path) -> Run:
    held_out = pd.DataFrame({"origin": [f"pairs.jsonl:{line}" for line in range(1, 7)]})
    return Run(tmp_path, RunInfo.from_json(first | {"config": CONFIG}), [], {}, held_out)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_card_names_data_settings_figures_and_limits(run):
    card = model_card(run, "adapter")
    assert front_matter(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for part in ("192 preference pairs", "120 held out, from `pairs.jsonl`", "learning_rate: 0.001", "## Limits"):
        assert part in card
    assert "rounded to 4 bits" in card
    assert verdict(run).to_markdown() in card and "\n\n|  | before | after |\n| --- |" in card
    assert "the weights keep 93% of the adapter's update" in model_card(run, "merged", kept=0.93)
    (run.folder / "reference").mkdir()
    assert "an adapter trained before" in model_card(run, "gguf")


# ------------------------------------------------------------------------------------------------ how to ask it

QUESTION = "What is a hash table?"  # of the code on a card


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)\n```\n", card, re.DOTALL)[1]


def test_template_options_are_on_every_card_and_are_data_only(run):
    for form in ("run", "adapter", "merged", "gguf"):
        assert "chat_template_kwargs" not in model_card(run, form)
    run.info.template = {"enable_thinking": False, "x=1); print(7 #": "```\n`{info}`"}
    for form in ("run", "adapter", "merged"):
        tree = ast.parse(code_of(model_card(run, form)))
        options = next(line for line in tree.body if isinstance(line, ast.Assign) and line.targets[0].id == "options")
        assert ast.literal_eval(options.value) == run.info.template
    card = model_card(run, "gguf")
    assert '{"enable_thinking": false,' in card and "```python" not in card
    assert code_of(model_card(run, "merged")).startswith("from transformers import AutoModelForCausalLM\n")


PROBE = """
import json, sys
assert not {"helpers", "trl", "unsloth"} & set(sys.modules)
print("\\nIDS" + json.dumps([prompt["input_ids"][0].tolist(), type(model).__name__]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["run", "adapter", "merged"])
def test_code_of_a_card_asks_as_it_was_trained(hybrid, form, tmp_path):
    """In a new process, as it stands on the card, in the folder of the card."""
    run, base, trained = hybrid
    assert run.info.template == {"enable_thinking": False}
    folder = run.folder if form == "run" else export_run(run, form, tmp_path / form)
    if form != "merged":  # the card names the base as the hub would, or as a folder next to it
        (folder / run.info.model).symlink_to(base)
    code = code_of((folder / "README.md").read_text(encoding="utf-8"))
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code + PROBE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids, kind = json.loads(done.stdout.rpartition("IDS")[2])
    assert kind == ("Qwen3ForCausalLM" if form == "merged" else "PeftModelForCausalLM")
    assert ids == trained  # not only its beginning: without the empty thought it would be that too


@pytest.fixture(scope="module")
def hybrid(qwen3, tmp_path_factory):
    """(run, base folder, ids of the prompt of the pair about QUESTION): two steps of a tiny random Qwen3."""
    folder = tmp_path_factory.mktemp("hybrid")
    base = folder / "tiny-qwen3"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(qwen3), **sizes, **heads)).save_pretrained(base)
    qwen3.save_pretrained(base)
    say = {"chosen": "A table that finds a value by its key.", "rejected": "A table for breakfast."}
    pairs = load_pairs([{"prompt": text} | say for text in (QUESTION, "What is a heap?", "A tree?", "A trie?")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_MODEL", str(base))
        model, tokenizer = load_model()
        model = add_lora(model.float(), rank=2)
        steps = {"max_steps": 2, "bf16": False, "eval_strategy": "no", "load_best_model_at_end": False}
        run = train_dpo(model, tokenizer, pairs.select(range(3)), pairs.select([3]), folder / "run", **steps)
        yield run, base, check_pairs(pairs, tokenizer).ids[0]["prompt_ids"]


def test_only_a_licence_that_is_known_is_named(run):
    card = model_card(run, "run")
    assert "license" not in front_matter(card) and "state it before you publish" in card
    run.info.data.bundled = True
    card = model_card(run, "run")
    assert front_matter(card)["license"] == "apache-2.0" and "state it before you publish" not in card
    run.info.model = "someone/model"
    card = model_card(run, "run")
    assert "license" not in front_matter(card) and "see the card of `someone/model`" in card


def test_prompts_that_were_shortened_or_left_out_are_counted(run):
    assert "shortened" not in model_card(run, "run")
    run.info.data.prompts = {"shortened": 0, "left_out": 0}
    assert "shortened" not in model_card(run, "run")
    run.info.data.prompts = {"shortened": 3, "left_out": 2}
    card = model_card(run, "run")
    assert "over 256 tokens, 3 were shortened by whole turns from the left and 2 left out" in card


def test_settings_of_the_machine_are_left_out(run):
    as_on_a_gpu = CONFIG | {"dataset_num_proc": 4, "beta": 0.2}  # the first as Unsloth sets it there
    assert changed_settings(as_on_a_gpu) == changed_settings(CONFIG) | {"beta": 0.2}
    assert str(Path.cwd()) not in model_card(run, "run") and str(run.folder) not in model_card(run, "run")


def test_a_run_on_a_gpu_without_bf16_gets_a_card(monkeypatch):
    check = trl.DPOConfig.__post_init__

    def as_before_ampere(config):
        if config.bf16 is not False:
            raise ValueError("Your setup doesn't support bf16/gpu.")
        check(config)

    monkeypatch.setattr(trl.DPOConfig, "__post_init__", as_before_ampere)
    assert changed_settings({"bf16": False, "fp16": True, "beta": 0.1}) == {"bf16": False, "fp16": True}


def test_settings_that_are_unsloths_defaults_are_kept(monkeypatch):
    """On a GPU Unsloth puts its own class in the place of TRL's, under the same name: an export would lose these."""

    @dataclasses.dataclass
    class DPOConfig(trl.DPOConfig):
        logging_steps: float = 1

    DPOConfig.__module__ = trl.DPOConfig.__module__
    DPOConfig.__qualname__ = trl.DPOConfig.__qualname__
    monkeypatch.setattr(trl, "DPOConfig", DPOConfig)
    assert changed_settings({"logging_steps": 1, "beta": 0.1}) == {"logging_steps": 1}
