"""The beta sweep: one run for each beta and seed on one loaded model, measured alike, kept as it goes.

Each run is a `train_dpo` run in a folder of its own, from a fresh adapter, so that it equals the same run made alone.
What betas and seeds have in common is done once: the model is loaded, and the reference's log-probs are in the cache.
"""

import math
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.model.generate import Reply, generate_replies
from helpers.model.logps import pair_logps


def sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    max_new_tokens: int,
    seed: int,
    template_options: dict,
) -> list[Reply]:
    """Two replies to each prompt: first one to each, then the second ones."""
    return generate_replies(
        model,
        tokenizer,
        prompts * 2,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
        batch_size=32,
        **template_options,
    )


class SampledKL(NamedTuple):
    """`kl`, mean log-ratio of sampled replies in nats, `error`, its standard error, and the replies."""

    kl: float
    error: float
    replies: list[Reply]


def sampled_kl(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    **template_options: Any,
) -> SampledKL:
    """How far the policy moved from the model under its adapter: KL(policy || reference) of whole replies.

    Two replies to each prompt are sampled from the policy (temperature 1) and scored under both models; the mean of
    log policy - log reference estimates the KL without bias (as on the x-axis of Rafailov et al. 2023, figure 2). A
    reply that is cut at `max_new_tokens` counts up to there. The standard error is over prompts.

    Args:
        policy, tokenizer: with a LoRA adapter, and its tokenizer.
        prompts: conversations, as in the `prompt` column of `load_pairs`.
        max_new_tokens: where a reply is cut.
        seed: of the sampling.
        template_options: for the chat template, e.g. enable_thinking=False.
    """
    replies = sample(policy, tokenizer, prompts, max_new_tokens, seed, template_options)
    first, second = replies[: len(prompts)], replies[len(prompts) :]
    rows = Dataset.from_list(
        [
            {
                "prompt_ids": tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_options
                )["input_ids"],
                "chosen_ids": a.ids,  # the two columns that `pair_logps` scores; neither reply is preferred
                "rejected_ids": b.ids,
            }
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
    )
    of_policy = pair_logps(policy, tokenizer, rows)
    with policy.disable_adapter():
        of_reference = pair_logps(policy, tokenizer, rows)
    ratios = (of_policy.chosen - of_reference.chosen + of_policy.rejected - of_reference.rejected) / 2
    return SampledKL(float(ratios.mean()), float(ratios.std() / math.sqrt(len(ratios))), replies)
