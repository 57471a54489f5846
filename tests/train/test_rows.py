"""Rows of every kind through `train_dpo` on a model of two small layers, in 32 bits: what was checked is trained.

A test that trains is slow: a run of two steps takes seconds, most of them in making the trainer.
"""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

import helpers
from helpers import UserError, train_dpo
from helpers.data.load import load_pairs
from helpers.model.logps import pair_logps
from tests.data.test_render import ROWS, WEATHER, say, sides, with_options  # noqa: F401  (a fixture)

QUICK = {
    "max_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "bf16": False,
}
TEST = [{"prompt": say("Why is grass green?"), **sides("Chlorophyll.", "Paint.")}]


@pytest.fixture(scope="module")
def loaded(small):
    return helpers.load_model(str(small))[0].float()


@pytest.fixture
def policy(loaded, small, tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.model.logps.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("DPO_MODEL", str(small))
    return helpers.add_lora(copy.deepcopy(loaded))


@pytest.mark.slow
def test_step_zero_is_ln_2_for_rows_of_every_kind(policy, with_options, tmp_path):  # noqa: F811  (a fixture)
    train = load_pairs(ROWS * 2)
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
            seen.extend(batch["input_ids"] for batch in train_dataloader)

    run = train_dpo(policy, with_options, train, load_pairs(TEST), tmp_path / "run", callbacks=[Look()], **QUICK)
    first = run.history[0]
    assert float(first["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    for side in ("chosen", "rejected"):
        assert float(first[f"rewards/{side}"]) == pytest.approx(0, abs=1e-4)
    trained = " ".join(with_options.batch_decode(torch.cat([ids.flatten() for ids in seen])[:, None]))
    assert "weather" in trained.replace(" ", "") and "Style" in trained


@pytest.mark.slow
def test_prompts_that_are_too_long_are_counted_aloud(policy, tokenizer, tmp_path, capsys):
    long = " ".join(["word"] * 300)
    rows = [{"prompt": say(f"{long} {number}?"), **sides(f"{number}", f"{number + 1}")} for number in range(3)]
    turns = [{"prompt": say(long, "Yes.", f"And {n}?"), **sides(f"{n}.", f"{n + 1}.")} for n in range(2)]
    short = [{"prompt": say(f"What is {number}?"), **sides(f"{number}.", "None.")} for number in range(2)]
    pairs, test = load_pairs(rows + turns + short), load_pairs(TEST)
    run = train_dpo(policy, tokenizer, pairs, test, tmp_path / "run", **QUICK)
    said = "Prompts over 256 tokens among 7 training pairs: 2 shortened, 3 pairs left out"
    assert said in capsys.readouterr().out
    assert run.info.train_pairs == 4 and run.info.data.prompts == {"shortened": 2, "left_out": 3}
    card = (run.folder / "README.md").read_text()
    assert "2 were shortened by whole turns from the left and 3 left out" in " ".join(card.split())

    kept = train_dpo(policy, tokenizer, pairs, test, tmp_path / "all", max_prompt_length=400, **QUICK)
    assert kept.info.train_pairs == 7 and "Prompts over" not in capsys.readouterr().out
    few = train_dpo(policy, tokenizer, pairs, test, tmp_path / "few", on_long_prompt="drop", **QUICK)
    assert few.info.train_pairs == 2


@pytest.mark.slow
def test_a_run_leaves_the_forward_of_its_model_as_it_was(policy, tokenizer, tmp_path):
    inner = policy.get_base_model()
    before = vars(inner).get("forward")
    for name in "ab":
        train_dpo(policy, tokenizer, load_pairs(ROWS[:1] * 4), load_pairs(TEST), tmp_path / name, **QUICK)
        assert vars(inner).get("forward") is before


def test_scoring_and_sampling_put_the_mode_back_after_an_error(policy, tokenizer, monkeypatch):
    policy.train()

    def fails(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(policy.get_base_model(), "generate", fails)
    with pytest.raises(RuntimeError, match="no"):
        helpers.generate_replies(policy, tokenizer, ["Hi"], max_new_tokens=2)
    assert policy.training
    monkeypatch.setattr("trl.trainer.dpo_trainer.DataCollatorForPreference", lambda **options: fails)
    with pytest.raises(RuntimeError, match="no"):
        pair_logps(policy, tokenizer, load_pairs(TEST))
    assert policy.training


def test_a_fresh_adapter_is_not_computed_and_comes_back(policy, tokenizer):
    asked = []
    name, layer = next((name, one) for name, one in policy.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_hook(lambda *given: asked.append(name))
    frozen = policy.get_parameter(f"{name}.weight").requires_grad_(False)
    fresh = pair_logps(policy, tokenizer, load_pairs(TEST))
    assert not asked and not frozen.requires_grad
    with policy.disable_adapter():
        assert pair_logps(policy, tokenizer, load_pairs(TEST)).chosen == fresh.chosen
        pair_logps(policy, tokenizer, load_pairs(TEST))
        assert not asked  # an inner call leaves it disabled
    trained = policy.get_parameter(f"{name.replace('lora_A', 'lora_B')}.weight")
    assert trained.requires_grad
    trained.data += 1
    assert pair_logps(policy, tokenizer, load_pairs(TEST)).chosen != fresh.chosen and asked


def test_the_base_is_hashed_once_and_again_when_it_was_changed(policy, monkeypatch):
    from helpers.model import fingerprint

    hashed = []
    real = fingerprint.hash_tensors
    monkeypatch.setattr(fingerprint, "hash_tensors", lambda tensors: hashed.append(len(tensors)) or real(tensors))
    first = fingerprint.base_hash(policy)
    whole = max(hashed)
    assert fingerprint.base_hash(policy) == fingerprint.base_hash(policy.get_base_model()) == first
    assert hashed.count(whole) == 4  # one sample a call, and all tensors the first time
    weight = policy.get_base_model().model.norm.weight
    with torch.no_grad():
        weight[5] += 1
    assert fingerprint.base_hash(policy) != first
    with torch.no_grad():
        weight[5] -= 1
    assert fingerprint.base_hash(policy) == first


def test_a_report_of_errors_stops_the_run(policy, tokenizer, tmp_path):
    train = load_pairs([{**TEST[0], **sides("a", "a")}])
    with pytest.raises(UserError, match="chosen and rejected are the same"):
        train_dpo(policy, tokenizer, train, load_pairs(ROWS[:1]), tmp_path / "run")


@pytest.mark.slow
def test_replies_are_asked_with_the_options_that_training_had(policy, with_options, tmp_path, monkeypatch):  # noqa: F811
    train = load_pairs([ROWS[2] | {"prompt": say(f"Say {word}.")} for word in ("hello", "yes", "no", "so")])
    run = train_dpo(policy, with_options, train, load_pairs(TEST), tmp_path / "run", **QUICK)
    assert run.info.template == {"style": "short"}
    asked = []
    real = with_options.__class__.apply_chat_template

    def apply(self, *args, **options):
        asked.append(options.get("style"))
        return real(self, *args, **options)

    monkeypatch.setattr(with_options.__class__, "apply_chat_template", apply)
    rows = [{"prompt": say("Hi"), "chat_template_kwargs": {"style": "long"}}]
    helpers.compare_generations(run, ["Hi", say("Hi"), *rows], max_new_tokens=2)
    assert asked == ["short", "short", "long"] * 2  # of the reference and of the policy


@pytest.mark.slow
def test_token_rewards_of_a_row_with_tools_add_up_to_its_rewards(policy, with_options, tmp_path):  # noqa: F811
    """Two tools with different parameters: neither may get the keys of the other."""
    calendar = {"type": "function", "function": {"name": "calendar", "parameters": {"day": {"type": "string"}}}}
    row = ROWS[0] | {"tools": [WEATHER, calendar]}
    run = train_dpo(policy, with_options, load_pairs([row] + ROWS[1:3]), load_pairs(TEST), tmp_path / "run", **QUICK)
    opened, pairs = helpers.open_run(run), load_pairs([row])
    rewards, words = helpers.implicit_rewards(opened, pairs), helpers.token_rewards(opened, pairs[0])
    for side in ("chosen", "rejected"):
        assert words[words.side == side].reward.sum() == pytest.approx(rewards[f"{side}_reward"][0], abs=1e-5)
