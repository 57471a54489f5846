"""How far a policy moved from its reference, by replies of its own."""

import math
from typing import NamedTuple

from datasets import Dataset
from peft import PeftModel

from helpers.data.render import IDS, prompt_ids
from helpers.model import Model, Prompts, Tokenizer
from helpers.model.generate import Reply, generate_replies
from helpers.model.logps import pair_logps


def sample_twice(
    model: Model, tokenizer: Tokenizer, prompts: Prompts, *, max_new_tokens: int, seed: int
) -> list[Reply]:
    """Two replies to each prompt at temperature 1: first one to each, then the second ones.

    The model, tokenizer, prompts, max_new_tokens and seed are as in `generate_replies`.
    """
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "seed": seed, "batch_size": 32}
    return generate_replies(model, tokenizer, [*prompts, *prompts], **sampling)


class SampledKL(NamedTuple):
    """`kl`, mean log-ratio of sampled replies in nats, `error`, its standard error, and the replies."""

    kl: float
    error: float
    replies: list[Reply]


def sampled_kl(
    policy: PeftModel, tokenizer: Tokenizer, prompts: Prompts, *, max_new_tokens: int, seed: int = 0
) -> SampledKL:
    """How far the policy moved from the model under its adapter: KL(policy || reference) of whole replies.

    Two replies to each prompt are sampled from the policy (temperature 1) and scored under both models; the mean of
    log policy - log reference estimates the KL without bias (as on the x-axis of Rafailov et al. 2023, figure 2). The
    standard error is over prompts. policy, tokenizer, prompts, max_new_tokens and seed are as in `generate_replies`.
    """
    replies = sample_twice(policy, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed)
    first, second = replies[: len(prompts)], replies[len(prompts) :]
    # In the two columns that `pair_logps` scores; neither reply is preferred.
    columns = (prompt_ids(tokenizer, prompts), [reply.ids for reply in first], [reply.ids for reply in second])
    rows = Dataset.from_dict(dict(zip(IDS, columns, strict=True)), features=IDS)
    of_policy = pair_logps(policy, tokenizer, rows)
    with policy.disable_adapter():
        of_reference = pair_logps(policy, tokenizer, rows)
    ratios = (of_policy.chosen - of_reference.chosen + of_policy.rejected - of_reference.rejected) / 2
    return SampledKL(float(ratios.mean()), float(ratios.std() / math.sqrt(len(ratios))), replies)
