"""A gradient that is not finite stops a run, names its step, and leaves the adapter as it was."""

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

import helpers
from helpers import UserError, diagnose, sweep_beta, train_dpo

SETTINGS = {
    "bf16": False,
    "max_steps": 8,
    "logging_steps": 4,
    "eval_strategy": "no",
    "save_strategy": "no",
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}


class SpoilGradient(TrainerCallback):
    """One number of one gradient is not finite at step 3, as a kernel at fault may leave it."""

    def __init__(self, value):
        self.value, self.steps = value, 0

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.steps = state.global_step + 1
        if self.steps == 3:
            optimizer.param_groups[0]["params"][-1].grad[0, 0] = self.value


@pytest.fixture
def data():
    pairs = helpers.load_pairs()
    return pairs.select(range(16)), pairs.select(range(16, 20))


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_is_named_and_the_adapter_comes_back(small, data, tmp_path, monkeypatch, value):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    model, tokenizer = helpers.load_model(str(small))
    policy, spoil = helpers.add_lora(model, seed=0), SpoilGradient(value)
    before = {name: weight.clone() for name, weight in get_peft_model_state_dict(policy).items()}
    with pytest.raises(
        UserError, match=r"gradient of step 3 is not finite(?s:.*)learning rate(?s:.*)diagnose\(folder\)"
    ):
        train_dpo(policy, tokenizer, *data, tmp_path / "run", callbacks=[spoil], **SETTINGS)
    assert spoil.steps == 4  # where it is next logged
    assert all(torch.equal(weight, before[name]) for name, weight in get_peft_model_state_dict(policy).items())
    assert diagnose(tmp_path / "run").codes == ["nan"]
    run = train_dpo(policy, tokenizer, *data, tmp_path / "run", **SETTINGS)  # the same call, with nothing in its way
    assert run.info.steps == 8 and run.info.status == "finished"


@pytest.mark.slow
def test_sweep_goes_on_with_the_next_beta(small, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    model, tokenizer = helpers.load_model(str(small))
    spoil = SpoilGradient(float("nan"))

    class OnlyFirst(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if args.beta == 0.1:
                spoil.on_pre_optimizer_step(args, state, control, **kwargs)

    sweep = sweep_beta(
        model, tokenizer, *data, tmp_path, betas=(0.1, 0.3), prompts=0, callbacks=[OnlyFirst()], **SETTINGS
    )
    first, second = sweep.table.status
    assert "step 3 is not finite" in first and second == "finished"
