"""Prompts with too many tokens: shortened by whole turns, or left out."""

from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from helpers.data.measure import measure_table, measures_of
from helpers.data.render import Renderer, batch_options, encode
from helpers.session import quiet_progress


class FittedPrompts(NamedTuple):
    """Pairs whose prompts fit, their rows of `measure_table`, and positions in the pairs that were given."""

    pairs: Dataset
    table: Dataset
    shortened: np.ndarray
    dropped: np.ndarray


def _shorter(prompt: list[dict], options: dict | None, renderer: Renderer, limit: int) -> list[dict] | None:
    """The prompt from the earliest turn of a user from which it has at most `limit` tokens; a system turn stays."""
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    for start in [place for place, turn in enumerate(prompt) if turn["role"] == "user"][1:]:
        short = system + prompt[start:]
        (text,) = renderer.texts([short], [options], add_generation_prompt=True)
        if len(encode(renderer.tokenizer, [text or ""])[0]) <= limit:
            return short
    return None


def fit_prompts(
    pairs: Dataset, table: Dataset, tokenizer: PreTrainedTokenizerBase, long: np.ndarray, limit: int, how: str
) -> FittedPrompts:
    """The pairs with their long prompts shortened by whole turns, left out or kept, in the same order.

    `long` are the positions of pairs whose prompt has more than `limit` tokens, `how` is as in `check_pairs`.
    """
    found: dict[int, list[dict]] = {}
    if how == "shorten" and len(long):
        renderer = Renderer(tokenizer)
        for row, pair in zip(long.tolist(), pairs.select(long), strict=True):
            (options,) = batch_options({name: [value] for name, value in pair.items()})
            if short := _shorter(pair["prompt"], options, renderer, limit):
                found[row] = short
    shortened = np.array(list(found), dtype=int)
    dropped = np.setdiff1d(long, shortened) if how != "keep" else long[:0]
    same = np.setdiff1d(np.arange(len(pairs)), np.concatenate([shortened, dropped]))
    if not found:
        return FittedPrompts(pairs.select(same), table.select(same), shortened, dropped)
    prompts = list(found.values())
    with quiet_progress(len(found)):
        short = pairs.select(shortened).map(
            lambda row, place: {"prompt": prompts[place]},
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
