"""What becomes of each setting: a table of all of them, one sentence for each that cannot be had, TRL's own losses.

The runs are of a model of two small layers, in 32 bits.
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import re
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

import helpers
from helpers import UserError, train_dpo
from helpers.data.load import load_pairs
from helpers.model.fingerprint import adapter_hash
from helpers.model.policy import Policy
from helpers.patches import shared_prompt
from helpers.run.folder import Run
from helpers.train import dpo
from helpers.train.settings import (
    TABLE,
    check_optimizer,
    complete_settings,
    dpo_settings,
    passes_ahead,
    run_config,
    too_little_or_far,
    what_will_happen,
)
from tests.conftest import strip
from tools.tables import result


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "reference"


@pytest.fixture(scope="module")
def loaded(small):
    """(model, tokenizer), in 32 bits."""
    model, tokenizer = helpers.load_model(str(small))
    return model.float(), tokenizer


@pytest.fixture
def policy(loaded):
    yield helpers.add_lora(loaded[0], seed=0)
    strip(loaded[0])


# ------------------------------------------------------------------------------------------------ the table


def names_of(kind: str) -> list[str]:
    table = TABLE[kind]
    return table.split() if isinstance(table, str) else [name for name in table if "=" not in name]


def test_every_setting_of_trl_is_in_one_list():
    """A setting that a new version of TRL brings fails here: decide what it does to a log-prob, then list it."""
    listed = [name for kind in ("heeded", "result", "harmless", "refused") for name in names_of(kind)]
    own = [one for one in trl.DPOConfig.__mro__ if one.__name__ == "DPOConfig"][-1]  # Unsloth puts its own in front
    known = {field.name for field in dataclasses.fields(own)}
    assert sorted(known - set(listed)) == []
    assert sorted(set(listed) - known) == []
    assert len(listed) == len(set(listed))


def test_losses_and_divergences_are_those_that_trl_has():
    source = inspect.getsource(inspect.getmodule(trl.trainer.dpo_trainer.DPOTrainer))
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(TABLE["choices"]["loss_type"].split())
    divergences = re.findall(r'f_divergence_type == "(\w+)"', source)
    assert set(divergences) == set(TABLE["choices"]["f_divergence_type"].split())
    logged = set(re.findall(r'_metrics\[mode\]\["([\w/]+)"\]', source)) | {"loss"}
    assert set(TABLE["choices"]["metric_for_best_model"].split()) <= logged


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"beta": 0}, r"beta=0: it has to be a number above 0; left out, it is 0\.1"),
        ({"beta": -0.1}, "beta=-0.1: it has to be a number above 0"),
        ({"beta": math.nan}, "beta=nan: it has to be a number above 0"),
        ({"beta": None}, "beta=None: it has to be a number above 0"),
        ({"beta": "high"}, "beta='high': it has to be a number"),
        ({"max_length": None}, r"max_length=None: it has to be a whole number above 0; left out, it is \d+\."),
        ({"max_length": 64.5}, "max_length=64.5: it has to be a whole number"),
        ({"num_train_epochs": 0}, "num_train_epochs=0: it has to be a number above 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: it has to be a whole number above 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0: it has to be a whole number above 0"),
        ({"gradient_accumulation_steps": "two"}, "steps='two': it has to be a whole number above 0"),
        ({"learning_rate": None}, "learning_rate=None: it has to be a number above 0; left out, it is"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05: it has to be a number above 0"),
        ({"max_steps": None}, "max_steps=None: it has to be a whole number"),
        ({"max_steps": math.inf}, "max_steps=inf: it has to be a whole number"),
        ({"eval_steps": 0}, r"eval_steps=0: it has to be a number above 0\."),
        ({"save_steps": -1}, "save_steps=-1: it has to be a number above 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0: it has to be a whole number above 0"),
        ({"bf16": "half"}, "bf16='half': it has to be True or False"),
        ({"ld_alpha": [0.5]}, r"ld_alpha=\[0.5\]: it has to be a number"),
        ({"seed": 0.5}, "seed=0.5: it has to be a whole number"),
        ({"weight_decay": math.nan}, "weight_decay=nan: it has to be a number"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy='sorted': TRL .* has random, sequential"),
        ({"metric_for_best_model": []}, r"metric_for_best_model=\[\]: TRL .* has loss"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps=0: it has to be a whole number above 0"),
        ({"adam_epsilon": 0}, "adam_epsilon=0: it has to be a number above 0"),
        ({"weight_decay": -1}, "weight_decay=-1: it has to be a number, 0 or above; left out, it is 0.0"),
        ({"seed": -1}, "seed=-1: it has to be a whole number, 0 or above; left out, it is 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1: it has to be a whole number, 0 or above"),
        ({"dataloader_multiprocessing_context": "thread"}, "context='thread': TRL .* has fork, forkserver, spawn"),
        ({"dataloader_multiprocessing_context": "fork"}, "context='fork': there are none without"),
        ({"log_level": "loud"}, "log_level='loud': TRL .* has passive, debug"),
        ({"optim_args": {"momentum": 0.9}}, "optim_args={'momentum': 0.9}: it has to be a text"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "hinge"]}, "use_weighting=True: .*the loss hinge"),
        ({"bf16": True, "fp16": True}, "bf16=True, fp16=True: .*one of the two"),
        ({"batch_size": 0}, "no setting 'batch_size'.*gradient_accumulation_steps are the pairs of a step"),
        ({"loss_type": "dpo"}, "loss_type='dpo': TRL .* has sigmoid, hinge, ipo"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type='kto': TRL"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights.*same length"),
        ({"loss_type": []}, r"loss_type=\[\]: TRL .* has sigmoid"),
        ({"loss_weights": [math.nan]}, r"loss_weights=\[nan\]: it has to be a list of numbers"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.1]}, "loss_weights=.*none of them below 0"),
        ({"loss_weights": [0.0]}, "loss_weights=.*at least one"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": "1,2"}, "loss_weights='1,2': it has to be a list"),
        ({"loss_type": "discopop", "discopop_tau": 0}, "discopop_tau=0: it has to be a number above 0"),
        ({"dataloader_persistent_workers": True}, "persistent_workers=True: there are none without"),
        ({"activation_offloading": True}, "activation_offloading=True: it moves what is on a GPU"),
        ({"ddp_backend": "gloo"}, "ddp_backend='gloo': this is a run in one process"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl': TRL .* has reverse_kl"),
        ({"loss_type": "exo_pair"}, "label_smoothing=0: the loss exo_pair takes it from 1e-06 to below 1"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "the loss robust takes it from 0 to below 0.5"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5: it is a weight from 0 to 1"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model='accuracy': TRL .* has loss, rewards/acc"),
        ({"output_dir": "here"}, "output_dir='here': a run's folder is the fifth argument"),
        ({"report_to": "tensorbord"}, "report_to='tensorbord': transformers knows .*tensorboard"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end': .*max_prompt_length"),
        ({"sync_ref_model": True}, "sync_ref_model=True: .*cannot follow the policy"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: .*after its reference was scored"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length': "),
        ({"dataloader_in_order": False}, "dataloader_in_order=False: .*another order each time"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True: a resumed run would train on other pairs"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha=5: it would add noise"),
        ({"torch_compile_backend": "eager"}, "torch_compile_backend='eager': .*another shape in every batch"),
        ({"torch_compile_mode": "default"}, "torch_compile_mode='default': .*another shape in every batch"),
        ({"metric_for_best_model": "eval_entropy"}, "of this figure neither .*greater_is_better=True or False"),
        ({"metric_for_best_model": "logits/rejected"}, "metric_for_best_model='logits/rejected': of this figure"),
        ({"eval_strategy": "sometimes"}, "DPOConfig does not take these settings: .*sometimes"),
        ({"eval_steps": 10, "save_steps": 15}, "multiple"),
        ({"eval_strategy": "epoch", "save_steps": 5}, "save and eval strategy to match"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_a_value_that_cannot_be_had_is_one_sentence(policy, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        run_config(Path("run"), 64, complete_settings(policy, settings), complete_settings(policy, settings))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"lr_scheduler_kwargs": {"lowest": 1}}, "lowest"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"optim": "adamw_torch", "optim_args": "lowest"}, "unpack"),
        ({"adam_beta1": 1.5}, "1.5"),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_made_is_said_before_anything_is_scored(policy, settings, reason):
    values = complete_settings(policy, settings)
    with pytest.raises(UserError, match=f"optimizer or of its schedule .* cannot be had: .*{reason}"):
        check_optimizer(run_config(Path("run"), 64, values, values), policy)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adamw_bnb_8bit"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ],
)
def test_an_optimizer_or_schedule_that_can_be_made_is_not_refused(policy, settings):
    values = complete_settings(policy, settings)
    check_optimizer(run_config(Path("run"), 64, values, values), policy)


def test_a_batch_that_cannot_be_filled_is_no_run_of_no_steps(policy, loaded, pairs, tmp_path):
    with pytest.raises(UserError, match="dataloader_drop_last=True .* 8 pairs fill none of 16"):
        train_dpo(
            policy, loaded[1], *pairs, tmp_path / "run", dataloader_drop_last=True, per_device_train_batch_size=16
        )


@pytest.mark.parametrize("callbacks", [None, TrainerCallback(), [None]], ids=["none", "one", "list of none"])
def test_callbacks_that_are_no_list_of_them(policy, loaded, pairs, tmp_path, callbacks):
    with pytest.raises(UserError, match="callbacks=.*it has to be a list"):
        train_dpo(policy, loaded[1], *pairs, tmp_path / "run", callbacks=callbacks)


def test_every_refused_setting_is_refused_and_at_its_default_is_not(policy):
    defaults = {field.name: field.default for field in dataclasses.fields(trl.DPOConfig)}
    for name in TABLE["refused"]:
        name, _, value = name.partition("=")
        with pytest.raises(UserError, match=f"^{name}="):
            complete_settings(policy, {name: value or "another"})
        complete_settings(policy, {name: defaults[name]})


def test_values_with_one_obvious_meaning_have_it(policy):
    given = {"beta": "0.2", "learning_rate": "5e-6", "max_steps": "4", "eval_steps": "2", "report_to": None}
    values = complete_settings(policy, given | {"precompute_ref_log_probs": True, "sync_ref_model": False})
    expected = {"beta": 0.2, "learning_rate": 5e-6, "max_steps": 4, "eval_steps": 2, "report_to": "none"}
    assert expected.items() <= values.items() and isinstance(values["max_steps"], int)
    config = run_config(Path("run"), 64, values, values)
    assert config.report_to == [] and not config.precompute_ref_log_probs


def test_what_will_happen_is_said_with_the_steps_that_the_trainer_makes():
    eight = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-5}
    said = what_will_happen(eight | {"num_train_epochs": 1}, 412, 0, 840.0)
    assert said == "412 pairs to train on, 52 steps of 8, learning rate 5e-05, about 14 minutes on this machine."
    said = what_will_happen(eight | {"num_train_epochs": 2}, 412, 20, 70.0)
    assert "104 steps of 8 (20 are done), learning rate 5e-05, about 1 minute on" in said
    said = what_will_happen(eight | {"num_train_epochs": 2, "max_steps": 1}, 412, 0, 59.0)
    assert "1 step of 8, learning rate 5e-05, less than a minute on" in said
    assert "how long is said after the first step" in what_will_happen(eight | {"num_train_epochs": 2}, 412, 0, None)


def test_what_is_ahead_counts_steps_evaluations_and_the_scoring_at_the_end(policy):
    def ahead(done=0, on_cpu=True, **settings):
        given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1} | settings
        return passes_ahead(complete_settings(policy, given), 80, 12, done, on_cpu)

    cost = TABLE["passes"]
    assert ahead(eval_strategy="no") == pytest.approx(80 * cost["cpu"] + 2 * 12)
    assert ahead(eval_strategy="no", on_cpu=False) == pytest.approx(80 * cost["gpu"] + 12)
    assert ahead() == pytest.approx(80 * cost["cpu"] + 10 / 4 * 12 + 2 * 12)
    assert ahead(eval_steps=5) == ahead(eval_steps=0.5) == pytest.approx(80 * cost["cpu"] + 2 * 12 + 2 * 12)
    assert ahead(eval_strategy="epoch") == pytest.approx(80 * cost["cpu"] + 12 + 2 * 12)
    assert ahead(done=5, eval_steps=5) == pytest.approx(40 * cost["cpu"] + 12 + 2 * 12)
    assert ahead(done=10) == pytest.approx(2 * 12)
    assert ahead(gradient_checkpointing=True) == pytest.approx(ahead() + 80 * cost["checkpointing"])


def test_a_step_costs_so_many_passes_in_what_was_measured_within_a_factor_of_two():
    hosts = [result("gpu"), result("gpu_recorded"), *result("gpu_expert")["hosts"]]
    cost, seen = TABLE["passes"], []
    ours = {"ours", "kept", "ours_1024", "kept_1024", "ours_one_by_one", "kept_one_by_one"}
    for host in hosts:
        for name in ours & set(host["sides"]):
            side = host["sides"][name]
            said = cost["gpu"] + cost["checkpointing"] * name.startswith("ours")
            seen.append(said / (side["reference_pairs_per_s"] / side["pairs_per_s"]))
    one = result("train")["sides"]["grouped"]  # one epoch: each pair is trained on once
    of_reference = one["before_first_step_seconds"] / (8 * one["steps"])
    seen.append(cost["cpu"] / (one["step_seconds"] / 8 / of_reference))
    assert len(seen) == 13 and min(seen) > 0.5 and max(seen) < 2


def test_ld_alpha_in_several_processes_is_refused(policy, monkeypatch):
    monkeypatch.setattr("helpers.train.settings.processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match="ld_alpha needs a run in one process"):
        complete_settings(policy, {"ld_alpha": 0.5})


def test_a_value_of_another_type_is_what_it_says(policy):
    """From YAML, a command line or numpy; `bool("no")` would be True."""
    given = {"gradient_checkpointing": "no", "disable_dropout": "false", "max_length": 64.0, "seed": np.int64(3)}
    values = complete_settings(policy, given | {"beta": np.float64(0.3), "accelerator_config": False})
    assert values["gradient_checkpointing"] is False and values["disable_dropout"] is False
    assert [(type(values[name]), values[name]) for name in ("max_length", "seed")] == [(int, 64), (int, 3)]
    assert values["beta"] == 0.3
    one_half = {"beta": np.float32(0.5), "learning_rate": torch.tensor(0.5), "weight_decay": Decimal("0.5")}
    values = complete_settings(policy, one_half)
    assert [(type(values[name]), values[name]) for name in one_half] == [(float, 0.5)] * 3  # as run.json writes them
    run_config(Path("run"), 64, values, values)


def test_a_run_is_told_where_the_measured_ones_hardly_moved_or_went_too_far():
    told, far, lora = 0, [], LoraConfig(r=16, lora_alpha=16)
    for row in result("learning_rate")["table"]:
        gap, call = row["gap"][0], {"learning_rate": row["rate"], "max_steps": row["steps"]}
        words = too_little_or_far(call, 360, lora)
        assert ("will hardly move" in words) == (gap < 0.3)
        assert ("go further" in words) == (row["kl"][0] > 10)
        if "hardly" in words:
            assert float(re.search(r"near (\d\.\d+) nats", words)[1]) == pytest.approx(gap, rel=0.25)
            told += 1
        if words:
            better = {"learning_rate": float(re.search("=([^ ]+)[. ]", words)[1]), "max_steps": row["steps"]}
            assert too_little_or_far(better, 360, lora) == ""
        if "further" in words:
            far.append(row["accuracy"][0])
            assert too_little_or_far(call, 59, lora) == ""
    assert told == 3 and len(far) == 9
    best = [row for row in result("learning_rate")["table"] if 0.007 <= row["rate"] * row["steps"] <= 0.0091]
    assert len(best) == 2 and max(far) < min(row["accuracy"][0] for row in best)
    assert "90 steps" in too_little_or_far(
        {"learning_rate": 5e-6, "num_train_epochs": 2}
        | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        360,
        lora,
    )
    assert "go further" in too_little_or_far({"learning_rate": 5e-5, "max_steps": 90}, 360, LoraConfig(lora_alpha=64))


# Rank, alpha, rank-stabilised -> how far it goes against rank 16 and alpha 16.
SCALES = {(4, 16, False): 1, (16, 64, False): 4, (64, 64, False): 4, (16, 16, True): 4}


@pytest.mark.slow
def test_the_gap_grows_with_alpha_whatever_the_rank(loaded, tmp_path):
    """So it is alpha that decides whether a short run hardly moves. Within a quarter, as the rule itself."""
    rows, gaps, targets = load_pairs(), {}, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    for rank, alpha, stable in [(16, 16, False), *SCALES]:
        torch.manual_seed(0)
        lora = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=stable, target_modules=targets, task_type="CAUSAL_LM")
        call = {"max_steps": 12, "learning_rate": 3e-5, "max_length": 64, "bf16": False, "num_train_epochs": 3}
        call |= {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 6}
        folder = tmp_path / f"{rank}-{alpha}-{stable}"
        model = get_peft_model(loaded[0], lora)
        run = train_dpo(model, loaded[1], rows.select(range(32)), rows.select(range(32, 36)), folder, **call)
        strip(loaded[0])
        gaps[rank, alpha, stable] = [row["rewards/margins"] for row in run.history if "rewards/margins" in row][-1]
        short = {"learning_rate": 5e-6, "max_steps": 90}
        assert bool(too_little_or_far(short, 360, lora)) == (alpha == 16 and not stable)
    for scale, times in SCALES.items():
        assert gaps[scale] / gaps[16, 16, False] == pytest.approx(times, rel=0.25), gaps


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ("steps", 8, "steps", 8, True)),  # 24 steps
        ({"eval_steps": 10}, ("steps", 10, "steps", 10, True)),
        ({"save_steps": 10}, ("steps", 10, "steps", 10, True)),
        ({"eval_steps": 0.25}, ("steps", 0.25, "steps", 0.25, True)),
        ({"eval_steps": 5, "save_steps": 10}, ("steps", 5, "steps", 10, True)),
        ({"eval_strategy": "no"}, ("no", None, "steps", 8, False)),
        ({"eval_strategy": "no", "save_steps": 10}, ("no", None, "steps", 10, False)),
        ({"save_strategy": "no"}, ("steps", 8, "no", None, False)),
        ({"save_strategy": "no", "eval_steps": 5}, ("steps", 5, "no", None, False)),
        ({"eval_strategy": "epoch"}, ("epoch", None, "epoch", None, True)),
        ({"save_strategy": "epoch"}, ("epoch", None, "epoch", None, True)),
        ({"save_strategy": "epoch", "load_best_model_at_end": False}, ("epoch", None, "epoch", None, False)),
        ({"load_best_model_at_end": False, "eval_steps": 5, "save_steps": 7}, ("steps", 5, "steps", 7, False)),
    ],
)
def test_evaluating_and_saving_follow_each_other(policy, settings, expected):
    values = complete_settings(policy, settings | {"num_train_epochs": 3})
    config = run_config(Path("run"), 64, values, values)
    steps = {part: getattr(config, f"{part}_steps") for part in ("eval", "save")}
    strategies = {part: getattr(config, f"{part}_strategy").value for part in ("eval", "save")}
    shown = {part: steps[part] if strategies[part] == "steps" else None for part in steps}
    found = (strategies["eval"], shown["eval"], strategies["save"], shown["save"], config.load_best_model_at_end)
    assert found == expected


@pytest.mark.parametrize(
    "metric, better",
    [
        ("eval_loss", False),
        ("eval_rewards/accuracies", True),
        ("rewards/margins", True),
        ("eval_rewards/rejected", False),
        ("logps/rejected", False),
        ("logps/chosen", True),
    ],
)
def test_the_best_checkpoint_by_another_metric_is_not_its_worst(policy, metric, better):
    values = complete_settings(policy, {"metric_for_best_model": metric})
    assert run_config(Path("run"), 64, values, values).greater_is_better is better
    values["greater_is_better"] = not better  # who says so gets it
    assert run_config(Path("run"), 64, values, values).greater_is_better is not better


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("metric, mode", [("eval_loss", None), ("rewards/accuracies", "max"), ("logps/rejected", None)])
def test_a_schedule_that_waits_for_a_metric_waits_for_its_better_end(policy, schedule, metric, mode):
    """By itself it waits for a lower one."""
    given = {"lr_scheduler_type": schedule, "metric_for_best_model": metric, "lr_scheduler_kwargs": {"patience": 0}}
    values = complete_settings(policy, given)
    assert run_config(Path("run"), 64, values, values).lr_scheduler_kwargs.get("mode") == mode
    values["lr_scheduler_kwargs"] = {"mode": "min"}  # who says so gets it
    assert run_config(Path("run"), 64, values, values).lr_scheduler_kwargs == {"mode": "min"}


def test_one_of_the_16_bits_takes_the_place_of_the_other_and_is_said_where_there_is_none(policy, monkeypatch, capsys):
    monkeypatch.setattr("helpers.train.settings.unsloth.is_bfloat16_supported", lambda: True)
    values = complete_settings(policy, {"fp16": True})
    assert (values["fp16"], values["bf16"]) == (True, False)
    assert "fp16=True changes nothing: on this CPU training computes in bf16" in capsys.readouterr().out
    complete_settings(policy, {"bf16": True})
    assert "changes nothing" not in capsys.readouterr().out
    monkeypatch.setattr("helpers.train.settings.unsloth.is_bfloat16_supported", lambda: False)
    complete_settings(policy, {"bf16": True})
    assert "bf16=True changes nothing: on this CPU training computes in 32 bits" in capsys.readouterr().out


def test_either_end_of_the_entropy_is_kept_if_it_is_said(policy):
    for better in (True, False):
        values = complete_settings(policy, {"metric_for_best_model": "entropy", "greater_is_better": better})
        assert run_config(Path("run"), 64, values, values).greater_is_better is better
    sides = [set(TABLE[name].split()) for name in ("lower_is_better", "either_may_be_better")]
    higher = {"rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "mean_token_accuracy"}
    assert set(TABLE["choices"]["metric_for_best_model"].split()) == {"loss"}.union(higher, *sides)


def test_label_smoothing_that_the_loss_does_not_read_is_said(policy, capsys):
    complete_settings(policy, {"label_smoothing": 0.1, "loss_type": "robust"})
    complete_settings(policy, {"label_smoothing": 0.1, "loss_type": ["sigmoid", "aot"]})
    assert capsys.readouterr().out == ""
    complete_settings(policy, {"label_smoothing": 0.1})
    assert "label_smoothing=0.1 changes nothing: the loss sigmoid does not read it" in capsys.readouterr().out


def test_early_stopping_without_evaluations_and_sets_that_are_none(policy, loaded, pairs, tmp_path):
    for number in (0, -1, "2", 1.5, True, False):
        with pytest.raises(UserError, match=f"^early_stopping={number!r}: it is the number of evaluations to wait"):
            train_dpo(policy, loaded[1], *pairs, tmp_path / "run", early_stopping=number)
    with pytest.raises(UserError, match='early_stopping.*eval_strategy="no"'):
        train_dpo(policy, loaded[1], *pairs, tmp_path / "run", early_stopping=1, eval_strategy="no")
    with pytest.raises(UserError, match="test has to be pairs.*NoneType.*others to measure on"):
        train_dpo(policy, loaded[1], pairs[0], None, tmp_path / "run")
    with pytest.raises(UserError, match="train has to be pairs.*list"):
        train_dpo(policy, loaded[1], [{"prompt": "a"}], pairs[1], tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ runs

QUICK = {
    "max_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "seed": 3,
}
WORDS = "green blue paint is why grass sky chlorophyll the of a light seven nine answer then".split()


@pytest.fixture(scope="module")
def pairs():
    """8 pairs and 3, whose sides differ in length by up to 30 words."""
    draw = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=draw))

    def rows(first: int, last: int):
        return load_pairs(
            [
                {"prompt": f"{text(5)} {n}?", "chosen": text(4 + 3 * (n % 7)), "rejected": text(25 - 3 * (n % 8))}
                for n in range(first, last)
            ]
        )

    return rows(0, 8), rows(8, 11)


@pytest.fixture(scope="module")
def measured():
    """What is measured here; written to the file that SETTINGS_JSON names, from which docs/settings.md is made."""
    found: dict[str, dict[str, float]] = {"rounding": {}}
    yield found
    if "SETTINGS_JSON" in os.environ:
        command = "SETTINGS_JSON=benchmarks/results/settings.json pytest tests/train/test_settings.py -k measured"
        of_run = {"command": command, "versions": helpers.versions(), "machine": helpers.machine()}
        Path(os.environ["SETTINGS_JSON"]).write_text(json.dumps(found | of_run, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ the first step

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def policy_of(kind, config, tokenizer, seed=0, **more):
    torch.manual_seed(seed)
    values = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.3}
    values["num_key_value_heads"] = 4  # Qwen2's default is 32
    return helpers.add_lora(kind(config(**SIZES | values | more)))


KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
KINDS |= {"qwen3": (Qwen3ForCausalLM, Qwen3Config)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_in_bf16_is_far_from_what_is_allowed_measured(kind, loaded, pairs, measured, tmp_path, monkeypatch):
    """Over three seeds, with an adapter trained before: the share of the tolerance that a healthy run takes."""
    shares, check = [], dpo.check_start
    monkeypatch.setattr(dpo, "check_start", lambda *given: shares.append(check(*given)))
    for seed in range(3):
        policy = policy_of(*KINDS[kind], loaded[1], seed=seed).bfloat16()
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.data = (weight + 0.05 * torch.randn_like(weight)).float()
        train_dpo(policy, loaded[1], *pairs, tmp_path / str(seed), **QUICK | {"bf16": True, "max_steps": 1})
    measured["rounding"][kind] = max(shares)
    assert len(shares) == 3 and 0 < max(shares) < 0.5


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(policy, loaded, small, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DPO_MODEL", str(small))
    run = train_dpo(policy, loaded[1], *pairs, "~/run", **QUICK | {"max_steps": 1})
    assert run.folder == tmp_path / "run" and Run.load("~/run").info == run.info
    helpers.export_run(run, "torchrun", "~/export", train=pairs[0], test=pairs[1])
    assert (tmp_path / "export").is_dir() and not Path("~").exists()


class Steps(TrainerCallback):
    def __init__(self):
        self.done = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.done += 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype, shift", [(torch.float32, 1.5), (torch.bfloat16, 8.0)])
def test_a_cache_that_is_not_of_this_model_stops_the_run(dtype, shift, loaded, pairs, cache, tmp_path):
    """In bf16 by what rounding, which allows some two nats here, does not explain."""
    settings = QUICK | {"bf16": dtype == torch.bfloat16, "max_steps": 1}
    model, steps = helpers.add_lora(copy.deepcopy(loaded[0]).to(dtype), seed=0), Steps()
    before, fresh = adapter_hash(model), Policy(model, loaded[1]).weights()
    train_dpo(model, loaded[1], *pairs, tmp_path / "first", **settings)
    Policy(model, loaded[1]).put_back(fresh)
    for path in cache.iterdir():
        save_file({name: values + shift * (name == "chosen") for name, values in load_file(path).items()}, path)
    message = r"differ by (.*) nats \(rounding .*cached for another model \(delete .*reference"
    with pytest.raises(UserError, match=message) as error:
        train_dpo(model, loaded[1], *pairs, tmp_path / "second", callbacks=[steps], **settings)
    assert float(re.search(message, str(error.value))[1]) == pytest.approx(shift, abs=0.01 * shift)
    assert steps.done == 0 and adapter_hash(model) == before


@pytest.mark.slow
def test_a_setting_that_trl_heeds_otherwise_than_the_reference_is_named(policy, loaded, pairs, tmp_path, monkeypatch):
    """As if a version of TRL weighed the policy's tokens by itself. Of the given settings one is about log-probs."""
    make, steps, before = dpo.make_trainer, Steps(), adapter_hash(policy)

    def weighed(*given):
        trainer = make(*given)
        trainer.ld_alpha = 0.5
        return trainer

    monkeypatch.setattr(dpo, "make_trainer", weighed)
    with pytest.raises(UserError, match=r"so nothing was trained\. Likely cause: use_weighting\.$"):
        train_dpo(policy, loaded[1], *pairs, tmp_path / "run", callbacks=[steps], use_weighting=True, **QUICK)
    assert steps.done == 0 and adapter_hash(policy) == before


@pytest.mark.slow
def test_a_model_whose_rows_depend_on_each_other_stops_the_run(loaded, pairs, tmp_path, monkeypatch):
    """A window that a packed row does not have, and a rotary frequency that follows the longest row."""
    monkeypatch.setattr(
        shared_prompt, "SHARED_KINDS", (*shared_prompt.SHARED_KINDS, "mistral")
    )  # as it would be, wrongly
    window = policy_of(MistralForCausalLM, MistralConfig, loaded[1], sliding_window=8, num_key_value_heads=2)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    dynamic = policy_of(LlamaForCausalLM, LlamaConfig, loaded[1], rope_parameters=rope, max_position_embeddings=24)
    for model in (window, dynamic):
        kind = model.config.model_type
        with pytest.raises(UserError, match=f"nats .*a {kind} model gives a row other log-probs if more rows"):
            train_dpo(model, loaded[1], *pairs, tmp_path / kind, **QUICK)


@pytest.mark.slow
def test_a_model_whose_logits_are_not_what_trl_computes_stops_the_run(loaded, pairs, tmp_path):
    """ModernBERT has a layer between the one that TRL takes and the logits; GraniteMoe has no name that TRL reads."""
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), loaded[1].pad_token_id)
    sizes = SIZES | ids | {"vocab_size": len(loaded[1]), "eos_token_id": loaded[1].eos_token_id}
    with_head = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes))
    experts = GraniteMoeForCausalLM(GraniteMoeConfig(**sizes, num_local_experts=4, num_key_value_heads=4))
    for model, reason in ((with_head, "differ by .* nats from those of its own logits"), (experts, "num_experts")):
        policy = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        with pytest.raises(UserError, match=reason):
            train_dpo(policy, loaded[1], *pairs, tmp_path / model.config.model_type, **QUICK)


@pytest.mark.slow
def test_a_window_and_changed_rotary_parameters_are_heeded(loaded, pairs, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "num_key_value_heads": 2}
    model = policy_of(Qwen2ForCausalLM, Qwen2Config, loaded[1], **window)
    run = train_dpo(model, loaded[1], *pairs, tmp_path / "window", **QUICK)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **dpo_settings() | QUICK | {"max_length": 512}),
        train_dataset=pairs[1],
        processing_class=loaded[1],
    )
    with torch.no_grad(), model.disable_adapter():
        rows = trainer.data_collator(trainer.train_dataset.to_list())
        chosen, rejected = trainer.compute_ref_log_probs(model, rows)
    assert run.held_out.chosen_reference.tolist() == pytest.approx(chosen.tolist(), abs=1e-3)
    assert run.held_out.rejected_reference.tolist() == pytest.approx(rejected.tolist(), abs=1e-3)

    for number, theta in enumerate((10000.0, 100.0)):
        rope = {"rope_type": "default", "rope_theta": theta}
        changed = policy_of(LlamaForCausalLM, LlamaConfig, loaded[1], rope_parameters=rope)
        if number:
            with pytest.raises(UserError, match="another run .other settings of the base"):
                train_dpo(changed, loaded[1], *pairs, tmp_path / "rope-0", **QUICK)
        train_dpo(changed, loaded[1], *pairs, tmp_path / f"rope-{number}", **QUICK)
