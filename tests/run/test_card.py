"""What a model card says of a run. No model is loaded."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import trl
import yaml

from helpers.run.card import changed_settings, model_card
from helpers.run.folder import Run, RunInfo, describe_config

CONFIG = describe_config(trl.DPOConfig(output_dir="output", learning_rate=1e-3, bf16=False, report_to="none"))


@pytest.fixture
def run(first, tmp_path) -> Run:
    metrics = {"accuracy": 0.75, "accuracy_interval": [0.5, 0.875]}
    held_out = pd.DataFrame({"origin": [f"pairs.jsonl:{line}" for line in range(1, 7)]})
    return Run(tmp_path, RunInfo.from_json(first | {"config": CONFIG}), [], metrics, held_out)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_card_names_data_settings_figures_and_limits(run):
    card = model_card(run, "adapter")
    assert front_matter(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for part in ("192 preference pairs", "120 held out, from `pairs.jsonl`", "learning_rate: 0.001", "## Limits"):
        assert part in card
    assert "| accuracy | 0.75 |\n| accuracy_interval | 0.500 to 0.875 |" in card
    assert "rounded to 4 bits" in card and "`AutoPeftModelForCausalLM.from_pretrained(FOLDER)`" in card
    assert "the weights keep 93% of the adapter's update" in model_card(run, "merged", kept=0.93)
    (run.folder / "reference").mkdir()
    assert "an adapter trained before" in model_card(run, "gguf")


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


def test_settings_that_are_unsloths_defaults_are_kept(monkeypatch):
    """On a GPU Unsloth puts its own class in the place of TRL's, under the same name: an export would lose these."""

    @dataclasses.dataclass
    class DPOConfig(trl.DPOConfig):
        logging_steps: float = 1

    DPOConfig.__module__ = trl.DPOConfig.__module__
    DPOConfig.__qualname__ = trl.DPOConfig.__qualname__
    monkeypatch.setattr(trl, "DPOConfig", DPOConfig)
    assert changed_settings({"logging_steps": 1, "beta": 0.1}) == {"logging_steps": 1}
