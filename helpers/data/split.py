"""Pairs to train on and pairs held out, without a question or a talk on both sides."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from datasets import Dataset, DatasetDict

from helpers.common import UserError, visible
from helpers.data.layouts import asked
from helpers.data.messages import prompt_text
from helpers.data.report import load_report

# Of the bundled pairs: one topic of programming, one of science, one of the body.
HELD_OUT_TOPICS = ["astronomy", "databases", "health"]


def prompt_families(prompts: Iterable[list[dict[str, str]]]) -> list[str]:
    """For each prompt, the shortest of all these prompts that it begins with, as text without system turns: one for a
    question under several system prompts, and one for the turns of a talk. If two prompts begin a third, one of the two
    begins the other, so the shortest one is the same for the whole family."""
    talks = [tuple(prompt_text([turn]) for turn in one if turn["role"] != "system") or ("",) for one in prompts]
    known = set(talks)
    return ["\n".join(next(talk[:n] for n in range(1, len(talk) + 1) if talk[:n] in known)) for talk in talks]


def split_pairs(
    pairs: Dataset, test_size: float = 0.2, seed: int = 0, by: str | None = None, held_out: list[str] | None = None
) -> DatasetDict:
    """Pairs to train on and pairs held out, as DatasetDict(train, test).

    The same question, under whatever system prompt, and the turns of one talk (a prompt that begins another) stay on
    one side. The held-out part is at most what was asked for, and less than one group smaller if the groups allow it.

    Args:
        pairs: in the form that `load_pairs` gives.
        test_size: the share of pairs to hold out.
        seed: of the drawing.
        by: a column whose equal values stay together: by="topic" makes two sides without a common topic. Left out,
            prompts are drawn; of the bundled pairs, the topics HELD_OUT_TOPICS are held out instead.
        held_out: the values of that column to hold out; test_size and seed then have no say.

    Raises:
        UserError: a side would be empty, a column or a topic is not there, or (by a column) one question or talk
            has two topics that fall on different sides.
    """
    if by is None:
        report = load_report(pairs)
        ours = report is not None and report.bundled and "topic" in pairs.column_names  # not a reader's own topics
        bundled = ours and held_out is None and set(HELD_OUT_TOPICS) <= set(pairs["topic"])
        by, held_out = ("topic", HELD_OUT_TOPICS) if bundled else ("prompt", held_out)
    if by not in pairs.column_names:
        raise UserError(f"There is no column {by!r} to split by. Columns: {', '.join(pairs.column_names)}.")
    prompts = prompt_families(pairs["prompt"][:])
    keys = prompts if by == "prompt" else [str(value) for value in pairs[by]]
    sizes = Counter(keys)
    if held_out is not None:
        held = {str(value) for value in held_out}
        if isinstance(held_out, str) or not held <= set(sizes):
            raise UserError(f"held_out is a list of values of {by!r}; it has {visible(', '.join(sorted(sizes)[:20]))}.")
    else:
        if not 0 < test_size < 1:
            raise UserError(f"test_size is the share of pairs held out, between 0 and 1, not {test_size!r}.")
        held, room, groups = set(), round(test_size * len(pairs)), sorted(sizes)
        for index in np.random.default_rng(seed).permutation(len(groups)):
            if sizes[groups[index]] <= room:
                held.add(groups[index])
                room -= sizes[groups[index]]
    in_test = np.array([key in held for key in keys])
    train, test = np.flatnonzero(~in_test), np.flatnonzero(in_test)
    if not (len(train) and len(test)):
        raise asked("empty side", count=len(pairs), by=by, different=len(sizes))
    if both := {prompts[row] for row in train} & {prompts[row] for row in test}:
        rows = ", ".join([pairs[row]["origin"] for row, prompt in enumerate(prompts) if prompt in both][:5])
        raise UserError(f"The same question or talk has two values of {by!r} ({rows}): make them one.")
    return DatasetDict(train=pairs.select(train), test=pairs.select(test))
