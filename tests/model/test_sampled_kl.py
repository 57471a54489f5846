"""KL(policy || reference) of sampled replies: against all replies that a tiny model can give, and one by one."""

import itertools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedTokenizerFast,
)

import helpers
from helpers.data.render import prompt_ids
from helpers.model import logps
from helpers.model.logps import sampled_kl

WORDS, END, TOKENS = "abcde", "<end>", 3
PROMPTS = ["a", "b c", "d d d e a", "c a b"] * 4

SIZES = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "eos_token_id": 5}
# Far from uniform, as a trained model is.
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}


def move(policy, scale: float) -> None:
    """Give the adapter of `policy` something to say."""
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, scale, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny():
    """(policy, tokenizer) of a model of seven tokens, of which all replies of three tokens can be listed."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, END, "<pad>"])}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    policy = helpers.add_lora(model, seed=0)
    move(policy, 2.0)
    return policy, tokenizer


def next_logps(policy, prompt: list[int], reply: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all tokens under policy and reference at each position of one reply, without padding."""
    ids = torch.tensor([prompt + reply])
    with torch.no_grad():
        ours = policy(input_ids=ids).logits
        with policy.disable_adapter():
            theirs = policy(input_ids=ids).logits
    return tuple(one[0, len(prompt) - 1 : -1].double().log_softmax(-1) for one in (ours, theirs))


def log_ratio(policy, prompt: list[int], reply: list[int]) -> float:
    """Log policy - log reference of the tokens of one reply."""
    p, q = next_logps(policy, prompt, reply)
    return float((p - q).gather(1, torch.tensor(reply)[:, None]).sum())


def every_reply() -> list[list[int]]:
    """All replies: three tokens, or fewer that end in the token that ends a turn."""
    end, every = len(WORDS), range(len(WORDS) + 2)
    found = [ids[: ids.index(end) + 1] if end in ids else ids for ids in itertools.product(every, repeat=TOKENS)]
    return [list(ids) for ids in dict.fromkeys(found)]


def true_kl(policy, prompt: list[int]) -> float:
    """The KL as it is defined: the sum over all replies."""
    total = 0.0
    for reply in every_reply():
        p, q = (one.gather(1, torch.tensor(reply)[:, None]).sum() for one in next_logps(policy, prompt, reply))
        total += float(p.exp() * (p - q))
    return total


@pytest.mark.slow  # two forward passes for each of a thousand replies
def test_it_estimates_the_sum_over_all_replies_with_less_variance_than_log_ratios(tiny):
    policy, tokenizer = tiny
    asked = prompt_ids(tokenizer, PROMPTS)
    expected = np.mean([true_kl(policy, prompt) for prompt in asked[:4]])
    found, of_tokens = [], []
    for seed in range(12):
        one = sampled_kl(policy, tokenizer, PROMPTS, max_new_tokens=TOKENS, seed=seed)
        pairs = zip(2 * asked, (reply.ids for reply in one.replies), strict=True)
        found.append(one.kl)
        of_tokens.append(np.mean([log_ratio(policy, *pair) for pair in pairs]))
    assert expected > 1
    for values in (found, of_tokens):
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values, ddof=1) / math.sqrt(len(values)))
    assert np.std(found, ddof=1) < 0.5 * np.std(of_tokens, ddof=1)


def test_a_small_move_is_never_negative(tiny):
    policy, tokenizer = tiny
    move(policy, 0.05)
    asked, negative = prompt_ids(tokenizer, PROMPTS[:4]), 0
    for seed in range(12):
        found = sampled_kl(policy, tokenizer, PROMPTS[:4], max_new_tokens=TOKENS, seed=seed)
        pairs = zip(2 * asked, (reply.ids for reply in found.replies), strict=True)
        negative += np.mean([log_ratio(policy, *pair) for pair in pairs]) < 0
        assert found.kl >= 0
    assert negative  # the mean of the log-ratios was
    move(policy, 0.0)
    still = sampled_kl(policy, tokenizer, PROMPTS[:4], max_new_tokens=TOKENS)
    assert (still.kl, still.error) == (0, 0)
    move(policy, 2.0)


def check_each(policy, tokenizer, prompts, **sampling) -> None:
    """Replies of unequal length, in batches, against one row at a time from the model's own logits."""
    found = sampled_kl(policy, tokenizer, prompts, **sampling)
    pairs = zip(2 * prompt_ids(tokenizer, prompts), (reply.ids for reply in found.replies), strict=True)
    each = []
    for pair in pairs:
        p, q = next_logps(policy, *pair)
        each.append(float((p.exp() * (p - q)).sum()))
    by_prompt = np.reshape(each, (2, len(prompts))).mean(axis=0)
    assert found.kl == pytest.approx(np.mean(each), rel=1e-4) and found.kl > 0.05
    assert found.error == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(len(prompts)), rel=1e-3)


@pytest.mark.slow
def test_batches_give_each_reply_its_kl(tiny, small):
    for seed in range(3):
        check_each(*tiny, PROMPTS, max_new_tokens=TOKENS, seed=seed)
    model, tokenizer = helpers.load_model(str(small))
    policy = helpers.add_lora(model.float(), seed=0)
    move(policy, 0.3)
    prompts = [*list(helpers.load_pairs()["prompt"])[:4], "Hi"]
    check_each(policy, tokenizer, prompts, max_new_tokens=70)  # more than are computed at a time


@pytest.mark.parametrize(
    "kind, settings",
    [
        (Gemma2Config, {"final_logit_softcapping": 0.7, "head_dim": 8}),
        (CohereConfig, {"logit_scale": 0.25}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (PhiConfig, {}),  # its head has a bias
    ],
)
def test_models_that_change_their_logits(kind, settings, tiny):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, pad_token_id=6, bos_token_id=None, **settings))
    if kind is PhiConfig:
        model.lm_head.bias.data.normal_()
    policy = helpers.add_lora(model, seed=0)
    move(policy, 2.0)
    check_each(policy, tiny[1], PROMPTS[:4], max_new_tokens=TOKENS)


def test_rounded_logits_add_little(small):
    """As on a GPU, whose models stay in 16 bits; a CPU has them in 32 here."""
    model, tokenizer = helpers.load_model(str(small))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)  # logits of several nats, as a trained model has
    policy = helpers.add_lora(model.float(), seed=0)
    move(policy, 0.02)
    ids = prompt_ids(tokenizer, list(helpers.load_pairs()["prompt"])[:4])  # as prompts, and as replies to themselves

    def from_logits() -> float:
        return sum(float((p.exp() * (p - q)).sum()) for p, q in (next_logps(policy, one, one) for one in ids))

    exact = from_logits()
    policy.bfloat16()
    found = sum(logps._reply_kl(policy, tokenizer, ids, ids))  # noqa: SLF001  (`sampled_kl` would go to 32 bits)
    assert abs(found - exact) < (from_logits() - exact) / 3
