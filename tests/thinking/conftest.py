"""What the tests of thoughts share: the kinds of models, and how to look at pairs."""

import pytest

from helpers.thinking.check import check_thinking


@pytest.fixture(params=["ordinary", "hybrid", "hybrid on", "hybrid off", "thinking-only"])
def case(request):
    """(tokenizer, enable_thinking) for each kind of model and each way to use it."""
    fixture = {"ordinary": "tokenizer", "thinking-only": "thinking_2507"}.get(request.param, "qwen3")
    switch = {"hybrid on": True, "hybrid off": False}.get(request.param)
    return request.getfixturevalue(fixture), switch


@pytest.fixture(scope="session")
def as_trained():
    """A function: prompt, chosen and rejected ids of a pair, as DPOTrainer makes them."""

    def ids_of(pair, tokenizer):
        options = {"tokenize": True, "return_dict": True, **pair.get("chat_template_kwargs", {})}
        sides = [tokenizer.apply_chat_template(pair["prompt"] + pair[s], **options) for s in ("chosen", "rejected")]
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, **options)
        return [encoded["input_ids"] for encoded in (prompt, *sides)]

    return ids_of


@pytest.fixture(scope="session")
def codes():
    """A function: the codes of what is found, without the one that an ordinary model always gets."""

    def codes_of(rows, tokenizer, max_length=None):
        return {finding.code for finding in check_thinking(rows, tokenizer, max_length)} - {"tags_are_text"}

    return codes_of


@pytest.fixture(scope="session")
def texts():
    """A function: thought and answer of the chosen and the rejected side of each pair, as one text each."""

    def texts_of(pairs):
        return [
            [f"{pair[f'{s}_thought'] or ''} {pair[f'{s}_answer']}" for s in ("chosen", "rejected")] for pair in pairs
        ]

    return texts_of


@pytest.fixture(scope="session")
def accuracy(texts):
    """A function: how often guessing "the side with more of this is chosen" is right; ties count half."""

    def accuracy_of(pairs, feature):
        scores = [(feature(chosen), feature(rejected)) for chosen, rejected in texts(pairs)]
        return sum((a > b) + (a == b) / 2 for a, b in scores) / len(scores)

    return accuracy_of
