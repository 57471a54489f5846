"""Replies in batches equal replies one by one, and what is counted in them."""

import pytest
import torch

from helpers import load_model
from helpers.model.generate import generate_replies, repetition

# Of very different lengths, so that a batch of them holds much padding.
QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "List three fruits, and for each of them say in one short sentence where it grows and what colour it has.",
    "Say yes.",
)


def test_repetition_of_short_and_of_looping_replies():
    assert repetition([]) == repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(20))) == 0.0
    assert repetition([7] * 12) == pytest.approx(1 - 1 / 9)


@pytest.fixture(scope="module")
def model():
    model, tokenizer = load_model("embedded")  # its own: there and back to bf16 would round the shared one
    return model.float(), tokenizer


@pytest.fixture
def prompts():
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.mark.slow
def test_batched_replies_equal_those_one_by_one(model, prompts):
    """Greedy and in fp32, where padding does not change the rounding enough to change a word."""
    together = generate_replies(*model, prompts, max_new_tokens=30)
    assert together == generate_replies(*model, prompts, max_new_tokens=30, batch_size=1)
    assert together == generate_replies(*model, prompts, max_new_tokens=30, batch_size=3)
    assert "Paris" in together[1].text
    backwards = generate_replies(*model, prompts[::-1], max_new_tokens=30)
    assert backwards == together[::-1]


@pytest.mark.slow
def test_a_reply_that_ended_holds_its_end_and_one_that_was_cut_does_not(model, prompts):
    tokenizer = model[1]
    replies = generate_replies(*model, prompts, max_new_tokens=12)
    paris, fruits = replies[1], replies[2]
    assert paris.ended and paris.ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in paris.ids[:-1]
    assert not fruits.ended and len(fruits.ids) == 12 and tokenizer.eos_token_id not in fruits.ids
    assert tokenizer.eos_token not in paris.text and tokenizer.decode(fruits.ids) == fruits.text


@pytest.mark.slow
def test_sampling_follows_its_seed_and_leaves_that_of_the_caller_alone(model, prompts):
    def sample(seed):
        return [
            reply.text for reply in generate_replies(*model, prompts, max_new_tokens=20, temperature=1.0, seed=seed)
        ]

    before = torch.get_rng_state()
    first = sample(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(0) == first and sample(1) != first


@pytest.mark.slow
def test_a_model_in_training_is_left_in_training(model, prompts):
    model[0].train()
    generate_replies(*model, prompts[:1], max_new_tokens=2)
    assert model[0].training
    model[0].eval()
