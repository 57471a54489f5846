"""Equal to TRL: each loss and each heeded setting, for models of several families with their real tokenizers.

The same two steps are trained twice, in 32 bits: by `train_dpo` here, and by TRL's DPOTrainer in a process that has
neither Unsloth nor this package (stock_trl.py). The models are tiny and random; tokenizers and chat templates are those
of the families.
"""

import functools
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import helpers
from helpers import train_dpo
from helpers.data.render import pair_lengths, tokenize_pairs
from helpers.model.policy import Policy
from helpers.train import TABLE
from helpers.train.settings import dpo_settings
from tests.train.test_settings import QUICK, pairs  # noqa: F401  (a fixture)
from tools.tables import result

SECONDS = 360  # that the selected cases together may take

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIZES |= {"num_hidden_layers": 2, "initializer_range": 0.3, "tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
BOTH = ["sliding_attention", "full_attention"]
CAPPED = {"final_logit_softcapping": 30.0}
FAMILIES = {  # of the npm packages, with what is peculiar about their models
    # The first is tried with every setting.
    "qwen3": (Qwen3Config, {}),
    "llama3_2": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 16, "layer_types": BOTH, "query_pre_attn_scalar": 8} | CAPPED),
    "mistral_nemo": (MistralConfig, {"sliding_window": 16}),
    "command_r_plus": (CohereConfig, {"use_qk_norm": True}),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory, pairs):  # noqa: F811  (a fixture)
    """The process of TRL alone. `ask` what it is to train, and get its log history later."""
    folder = tmp_path_factory.mktemp("stock")
    for name, rows in zip(("train", "test"), pairs, strict=True):
        # As `train_dpo` takes ordinary pairs for a hybrid thinker; other templates do not read it.
        off = [{"enable_thinking": False}] * len(rows)
        rows = rows.select_columns(["prompt", "chosen", "rejected"]).add_column("chat_template_kwargs", off)
        rows.to_json(folder / f"{name}.jsonl")
    command = [sys.executable, str(Path(__file__).with_name("stock_trl.py"))]
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    with (folder / "stderr").open("w") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        process = subprocess.Popen(command, text=True, env=environment, cwd=folder, **pipes)

    def ask(**asked):
        print(json.dumps(asked | {"pairs": str(folder), "output": str(folder / "trl")}), file=process.stdin, flush=True)

    def answer():
        line = process.stdout.readline()
        assert line, (folder / "stderr").read_text()[-2000:]
        return json.loads(line)

    yield SimpleNamespace(ask=ask, answer=answer, folder=folder)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def model_of(from_npm, tmp_path_factory):
    """A function: the policy of a family, the folder of its model, and what adapters it may start from."""

    @functools.cache
    def made(family):
        kind, more = FAMILIES[family]
        folder, tokenizer = tmp_path_factory.mktemp(family), from_npm(family)
        tokenizer.save_pretrained(folder)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **SIZES | ends | more))
        model.to(torch.bfloat16).save_pretrained(folder)  # as `load_model` loads them
        model, tokenizer = helpers.load_model(str(folder))
        policy = Policy(helpers.add_lora(model.float(), seed=0), tokenizer)
        starts = {"fresh": policy.weights()}
        draw = torch.Generator().manual_seed(1)
        starts["trained"] = {
            name: torch.randn(value.shape, generator=draw) * 0.05 if "lora_B" in name else value
            for name, value in starts["fresh"].items()
        }
        for name, weights in starts.items():
            policy.put_back(weights)
            policy.model.save_pretrained(folder / name)
        return SimpleNamespace(policy=policy, folder=folder, starts=starts)

    return made


SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "aot_unpaired": 0.1}
LOSSES = {
    loss: {"loss_type": loss} | ({"label_smoothing": SMOOTHED[loss]} if loss in SMOOTHED else {})
    for loss in TABLE["choices"]["loss_type"].split()
}
CUT = 12  # tokens that `max_length` takes off the longest pair
HEEDED = {
    "sigmoid and sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "max_length": {"max_length": CUT},
    "precompute_ref_log_probs": {"precompute_ref_log_probs": True},
    "pad_to_multiple_of": {"pad_to_multiple_of": 16},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "beta": {"beta": 0.7},
    "sequential": {"train_sampling_strategy": "sequential"},
    # Three held-out pairs, in batches of two and one.
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1},
}
SAME = LOSSES | HEEDED
NAMES = {"fresh": "{}", "trained": "{}, reference trained before"}
FIRST = next(iter(FAMILIES))
TRAINED = [  # with another reference
    (FIRST, name, "trained")
    for name in ("sigmoid", "ld_alpha", "use_weighting", "max_length", "per_device_eval_batch_size")
]
EVERY = [(family, name, "fresh") for family in FAMILIES for name in SAME] + TRAINED  # on the page
# CI tries all of the first family, and of the others what reads more of the model than the sums of two completions: all
# else is computed from these.
READ_MORE = ("sigmoid", "ipo", "sft", "sigmoid_norm", "ld_alpha", "use_weighting", "max_length")
SELECTED = [case for case in EVERY if case[0] == FIRST or case[1] in READ_MORE]
CASES = EVERY if "EQUAL_JSON" in os.environ else SELECTED


def logged(history: list[dict]) -> list[list[float]]:
    """Of each step; without the accuracy of the first, where every pair is a tie and rounding decides."""
    names = ("loss", "rewards/margins", "rewards/chosen", "rewards/accuracies", "grad_norm")
    rows = [row for row in history if "loss" in row]
    figures = [[float(row[name]) for name in names if row is not rows[0] or name != names[3]] for row in rows]
    held_out = [row for row in history if "eval_loss" in row]
    return figures + [[float(row[f"eval_{name}"]) for name in names[:4]] for row in held_out]


def test_every_loss_and_heeded_setting_has_a_case_and_every_case_is_on_the_page():
    assert set(TABLE["heeded"].split()) <= {setting for settings in SAME.values() for setting in settings}
    assert len(FAMILIES) >= 5
    cases: dict[str, list[str]] = {}
    for family, name, start in EVERY:
        cases.setdefault(NAMES[start].format(name), []).append(family)
    assert {name: list(found) for name, found in result("equal")["differences"].items()} == cases


@pytest.fixture(scope="module")
def differences():
    """What is measured here; written to the file that EQUAL_JSON names, from which docs/settings.md is made."""
    found: dict[str, dict[str, float]] = {}
    yield found
    if "EQUAL_JSON" in os.environ:
        command = "EQUAL_JSON=benchmarks/results/equal.json pytest tests/train/test_equal.py"
        whole = {"differences": found, "command": command, "versions": helpers.versions(), "machine": helpers.machine()}
        Path(os.environ["EQUAL_JSON"]).write_text(json.dumps(whole, indent=1) + "\n")


@pytest.fixture(scope="module")
def began():
    gc.collect()
    gc.freeze()  # or accelerate would look through all modules after each training, half a second
    yield time.process_time()
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family, name, start", CASES)
def test_losses_are_those_of_trl_alone(
    family,
    name,
    start,
    began,
    model_of,
    stock,
    pairs,  # noqa: F811  (a fixture)
    differences,
    tmp_path,
    monkeypatch,
):
    taken = time.process_time() - began  # what other programs take does not count; the other process has its own core
    assert taken < SECONDS or CASES is EVERY, f"the cases before this one took {taken:.0f} seconds"
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    settings, model = dpo_settings() | {"max_length": 512} | QUICK | SAME[name], model_of(family)
    if name == "max_length":
        settings["max_length"] = int(pair_lengths(tokenize_pairs(pairs[0], model.policy.tokenizer)).max()) - CUT
    stock.ask(model=str(model.folder), adapter=str(model.folder / start), settings=settings)
    model.policy.put_back(model.starts[start])
    run = train_dpo(model.policy.model, model.policy.tokenizer, *pairs, tmp_path / "run", **settings)
    ours, theirs = (torch.tensor(sum(logged(one), [])) for one in (run.history, stock.answer()))
    assert len(ours) == (17 if "eval_steps" in settings else 9) and ours[0] != ours[4]
    differences.setdefault(NAMES[start].format(name), {})[family] = float((ours - theirs).abs().max())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
