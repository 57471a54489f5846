"""The short SFT that gives a model the habit of thinking, with the real model."""

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from helpers import add_lora
from helpers.model.fingerprint import is_fresh
from helpers.model.logps import pair_logps
from helpers.thinking.pairs import render_thinking
from helpers.thinking.word_problems import make_thinking_pairs
from helpers.train.sft import train_sft

pytestmark = pytest.mark.slow


@pytest.fixture
def policy(base):
    model, tokenizer = base
    model = add_lora(model, seed=0)
    yield model, tokenizer
    model.unload()


def test_sft_learns_the_chosen_replies_and_leaves_the_model_s_forward(policy):
    model, tokenizer = policy
    pairs = render_thinking(make_thinking_pairs(16, seed=3), tokenizer)
    forwards = [vars(one).get("forward") for one in (model, model.get_base_model())]
    before = pair_logps(model, tokenizer, pairs)
    losses = train_sft(model, tokenizer, pairs, learning_rate=1e-3)
    assert [vars(one).get("forward") for one in (model, model.get_base_model())] == forwards
    assert not is_fresh(model)
    after = pair_logps(model, tokenizer, pairs)
    assert after.chosen.sum() > before.chosen.sum() + 100
    # The loss is that of the replies alone, in nats per token: before any step, in the first batch of 8.
    expected = -(before.chosen.sum() / before.chosen_tokens.sum()).item()
    assert losses[0] == pytest.approx(expected, rel=0.08)


def test_sft_repeats(policy):
    model, tokenizer = policy
    pairs = render_thinking(make_thinking_pairs(16, seed=3), tokenizer)
    fresh = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    ends = []
    for _ in range(2):
        set_peft_model_state_dict(model, fresh)
        train_sft(model, tokenizer, pairs, learning_rate=1e-3)
        ends.append({name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in fresh)
