"""Held-out figures of a model in 16 bits: a CPU scores it in 32."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import helpers
from helpers import pair_logps, train_dpo
from helpers.model.fingerprint import base_hash
from helpers.model.logps import sampled_kl
from helpers.train.job import Job

SETTINGS = {
    "bf16": False,
    "max_steps": 3,
    "learning_rate": 2e-2,
    "warmup_steps": 0,
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["trained in 32 bits", "trained by autocast"])
@pytest.mark.parametrize("begun", [False, True], ids=["a fresh adapter", "an adapter that was trained before"])
def test_held_out_figures_are_in_32_bits_and_the_weights_come_back(begun, bf16, small, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    model, tokenizer = helpers.load_model(str(small))
    policy = helpers.add_lora(model.bfloat16(), seed=0)
    if begun:
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    start, base = copy.deepcopy(policy).float(), base_hash(policy)
    pairs = helpers.load_pairs()
    test = pairs.select(range(8, 14))
    run = train_dpo(policy, tokenizer, pairs.select(range(8)), test, tmp_path / "run", **SETTINGS | {"bf16": bf16})
    assert base_hash(policy) == base  # in bf16 again, each bit
    exact = copy.deepcopy(policy).float()
    now, before = (pair_logps(one, tokenizer, test, max_length=128) for one in (exact, start))
    gap = (now.chosen - before.chosen) - (now.rejected - before.rejected)
    assert gap.abs().mean() > 0.1
    assert run.held_out.log_ratio_gap.tolist() == pytest.approx(gap.tolist(), abs=1e-4)
    rounded = pair_logps(policy, tokenizer, test, max_length=128)
    assert (rounded.chosen - now.chosen).abs().max() > 1e-3  # what it would be in 16 bits

    found = sampled_kl(policy, tokenizer, test["prompt"][:3], max_new_tokens=8, seed=0)
    assert math.isfinite(found.kl) and base_hash(policy) == base


@pytest.mark.parametrize(
    "given, checkpointing, pairs",
    [
        ({}, False, 16),
        ({}, True, 8),
        ({"per_device_eval_batch_size": 1}, False, 1),
        ({"per_device_eval_batch_size": 1, "precompute_ref_batch_size": 3}, True, 3),
    ],
)
def test_a_gpu_scores_more_pairs_at_once_than_it_trains_on(given, checkpointing, pairs):
    values = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "gradient_accumulation_steps": 2}
    values |= {"gradient_checkpointing": checkpointing} | given

    def at_once(device: str) -> int:
        policy = SimpleNamespace(device=torch.device(device))
        return Job.scored_at_once.fget(SimpleNamespace(policy=policy, settings=given, values=values))

    assert at_once("cuda") == pairs
    assert at_once("cpu") == (pairs if given else 5)
