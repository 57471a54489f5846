"""Prompts with too many tokens: shortened by whole turns, or left out."""

from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from helpers.data.measure import measure_table, measures_of
from helpers.data.render import BATCH, Renderer, batch_options, encode
from helpers.session import quiet_progress


class FittedPrompts(NamedTuple):
    """Pairs whose prompts fit, their rows of `measure_table`, and positions in the pairs that were given."""

    pairs: Dataset
    table: Dataset
    shortened: np.ndarray
    dropped: np.ndarray


def _from_turn(prompt: list[dict[str, str]], start: int) -> list[dict[str, str]]:
    return [turn for turn in prompt[:1] if turn["role"] == "system"] + prompt[start:]


def _fitting_starts(pairs: Dataset, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[int, int]:
    """row -> the earliest turn from which its prompt has at most `limit` tokens; rows without such a turn are not in.

    A system turn stays. Turns are dropped whole, from the left.
    """
    renderer, starts = Renderer(tokenizer), {}
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        batch = pairs.select(part)[:]
        tries = [
            (int(row), start, _from_turn(prompt, start), options)
            for row, prompt, options in zip(part, batch["prompt"], batch_options(batch), strict=True)
            for start in [place for place, turn in enumerate(prompt) if turn["role"] == "user"][1:]
        ]
        if not tries:
            continue
        texts = renderer.texts([one[2] for one in tries], [one[3] for one in tries], add_generation_prompt=True)
        sizes = map(len, encode(tokenizer, [text or "" for text in texts]))
        for (row, start, _, _), size in zip(tries, sizes, strict=True):
            if size <= limit:
                starts.setdefault(row, start)
    return starts


def fit_prompts(
    pairs: Dataset, table: Dataset, tokenizer: PreTrainedTokenizerBase, long: np.ndarray, limit: int, how: str
) -> FittedPrompts:
    """The pairs with their long prompts shortened, left out or kept, in the same order.

    `long` are the positions of pairs whose prompt has more than `limit` tokens, `how` is as in `check_pairs`.
    """
    starts = _fitting_starts(pairs, long, tokenizer, limit) if how == "shorten" else {}
    shortened = np.array(sorted(starts), dtype=int)
    dropped = np.setdiff1d(long, shortened) if how != "keep" else long[:0]
    same = np.setdiff1d(np.arange(len(pairs)), np.concatenate([shortened, dropped]))
    if not len(shortened):
        return FittedPrompts(pairs.select(same), table.select(same), shortened, dropped)
    cut_at = [starts[row] for row in shortened.tolist()]
    with quiet_progress(len(shortened)):
        short = pairs.select(shortened).map(
            lambda row, place: {"prompt": _from_turn(row["prompt"], cut_at[place])},
            with_indices=True,
            features=pairs.features,
            desc="Shortening prompts",
        )
    order = np.argsort(np.concatenate([same, shortened]))
    parts = ((pairs, short), (table, measure_table(short, tokenizer)))
    fitted = [concatenate_datasets([whole.select(same), part]).select(order) for whole, part in parts]
    return FittedPrompts(*fitted, shortened, dropped)


def fitted_measures(measures: dict[str, np.ndarray], fitted: FittedPrompts) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Measures by position in the pairs that were given, those of shortened prompts anew, and the positions kept."""
    kept = np.setdiff1d(np.arange(len(measures["prompt"])), fitted.dropped)
    if not len(fitted.shortened):
        return measures, kept
    renewed = {name: values.copy() for name, values in measures.items()}
    for name, values in measures_of(fitted.table).items():
        renewed[name][kept] = values
    return renewed, kept
