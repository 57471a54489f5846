"""What is wrong with pairs for a tokenizer, found before a training step is spent.

`check_pairs` measures every pair once (`helpers.data.measure`) and judges the whole table afterwards.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.common import UserError
from helpers.data.findings import FINDINGS, WORST, Finding, Report
from helpers.data.measure import BIT, FEATURES, THOUGHT, WHAT, first_words, measure_table, measures_of
from helpers.data.messages import MESSAGES
from helpers.data.prompts import fit_prompts, fitted_measures
from helpers.data.render import BATCH, IDS, Renderer, batch_options
from helpers.data.report import load_report
from helpers.data.split import prompt_families

MAX_PROMPT_LENGTH = 256  # tokens; a longer prompt leaves too little of max_length to the answers
# A feature tells chosen from rejected when guessing by it alone is right this much more (or less) often than a coin,
# and by more than chance does once in a hundred sets of that size.
LEAK = 0.05
LEAK_SIGMAS = 2.6
# Median of chosen / rejected tokens outside of which the lengths differ enough to be learned before anything else.
LENGTH_RATIOS = (0.8, 1.25)
SCORE = re.compile("score|rating|reward")  # of a column: what a judge gave to an answer


def _accuracy(chosen: np.ndarray, rejected: np.ndarray) -> tuple[float, bool]:
    """How often "the side with more of it is chosen" is right, ties counted half, and whether that is a leak.

    The spread of a coin's accuracy over n pairs, m of which the feature decides, is sqrt(m) / 2n.
    """
    more, less, size = int((chosen > rejected).sum()), int((chosen < rejected).sum()), len(chosen)
    spread = np.sqrt(more + less) / (2 * size)
    accuracy = 0.5 + (more - less) / (2 * size)
    return accuracy, bool(abs(accuracy - 0.5) > max(LEAK, LEAK_SIGMAS * spread))


class _Judge:
    """Turns measures into findings; `rows` in its methods are positions in the checked pairs."""

    def __init__(self, pairs: Dataset, measures: dict[str, np.ndarray], live: np.ndarray):
        self.pairs, self.measures, self.live = pairs, measures, live
        self.findings: list[Finding] = []

    def column(self, name: str) -> np.ndarray:
        return self.measures[name][self.live]

    def find(self, code: str, rows: np.ndarray, what: str, worst: np.ndarray | None = None) -> None:
        """Add a finding about these rows, if there are any; `worst` (one number a checked pair) sorts them."""
        if not len(rows):
            return
        if worst is not None:
            rows = rows[np.argsort(-worst[rows], kind="stable")]
        named = [f"row {row + 1}" for row in rows[:WORST]]
        if "origin" in self.pairs.column_names:
            named = self.pairs.select(rows[:WORST])["origin"][:]
        self._add(code, len(rows), what, named, rows.tolist())

    def _add(self, code: str, count: int, what: str, named: list[str], rows: Sequence[int] = ()) -> None:
        severity, why, cure = FINDINGS[code]
        self.findings.append(Finding(code, severity, count, what, why, cure, tuple(rows), tuple(named)))

    def marks(self) -> None:
        marks = self.column("marks")
        for code, what in WHAT.items():
            self.find(code, self.live[marks & BIT[code] > 0], what)

    def repeats(self, test: Dataset | None) -> None:
        texts = pd.DataFrame({name: self.column(f"{name}_text") for name in ("prompt", "chosen", "rejected")})
        same, again = texts.chosen == texts.rejected, texts.duplicated()
        exchanged = pd.MultiIndex.from_frame(texts[["prompt", "rejected", "chosen"]])
        swapped = exchanged.isin(pd.MultiIndex.from_frame(texts)) & ~same
        self.find("same_text", self.live[same], "chosen and rejected are the same")
        self.find("swapped_labels", self.live[swapped], "the same pair with chosen and rejected swapped")
        self.find("duplicate_pair", self.live[again], "a pair that was there before")
        if test is not None:  # by the rule of split_pairs
            families = pd.Series(prompt_families([*self.pairs["prompt"][:], *test["prompt"][:]]))
            overlap = families.isin(families[len(self.pairs) :]).to_numpy()
            self.find("test_overlap", self.live[overlap[self.live]], "a question or talk that is in the test set")
        counts = texts.prompt[~again].value_counts()
        if counts.iloc[0] > max(counts.sum() / 2, 2):
            rows = self.live[texts.prompt == counts.index[0]]
            self.find("one_prompt", rows, f"the same prompt in {len(rows)} of {len(self.live)} pairs")

    def not_rendered(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Calls of tools and reasoning in messages that the chat template leaves out."""
        if self.pairs.features["chosen"] == MESSAGES:  # roles and texts only
            return
        renderer, rows = Renderer(tokenizer), {"tool_calls": set(), "reasoning_content": set()}
        for begin in range(0, len(self.live), BATCH):
            part = self.live[begin : begin + BATCH]
            batch = self.pairs.select(part)[:]
            options = batch_options(batch)
            for side, key in itertools.product(("chosen", "rejected"), rows):
                talks = [prompt + answer for prompt, answer in zip(batch["prompt"], batch[side], strict=True)]
                bare = [[{k: v for k, v in turn.items() if k != key} for turn in talk] for talk in talks]
                shown, hidden = (renderer.texts(some, options) for some in (talks, bare))
                same = zip(part.tolist(), talks, bare, shown, hidden, strict=True)
                rows[key] |= {row for row, talk, less, text, other in same if talk != less and text == other}
        for key, found in rows.items():
            self.find("not_rendered", np.array(sorted(found), dtype=int), f"{key} that the chat template leaves out")

    def scores(self) -> None:
        """Columns such as score_chosen and score_rejected, or margin, that say the opposite of the labels."""
        names = self.pairs.column_names
        twins = [(name, name.replace("chosen", "rejected")) for name in names if SCORE.search(name)]
        gaps = {f"{a} below {b}": self._numbers(a) - self._numbers(b) for a, b in twins if a != b and b in names}
        gaps |= {"margin below zero": self._numbers("margin")} if "margin" in names else {}
        for what, gap in gaps.items():
            self.find("score_below", self.live[gap[self.live] < 0], what, -gap)

    def _numbers(self, column: str) -> np.ndarray:
        """What is no number, as NaN."""
        return pd.to_numeric(pd.Series(self.pairs[column][:], dtype=object), errors="coerce").to_numpy(float)

    def lengths(self, max_length: int) -> None:
        shared, longest = self.measures["shared"], np.maximum(self.measures["chosen"], self.measures["rejected"])
        prompt_fills = self.column("shared") >= max_length
        self.find("no_room", self.live[prompt_fills], f"a prompt that fills all {max_length} tokens", shared)
        over = self.live[~prompt_fills & (self.column("shared") + longest[self.live] > max_length)]
        lost = {name: np.maximum(shared + self.measures[name] - max_length, 0) for name in ("chosen", "rejected")}
        cut = int(sum(tokens[over].sum() for tokens in lost.values()))
        total = int(self.column("chosen").sum() + self.column("rejected").sum())
        what = f"pairs over {max_length} tokens; {cut} of {total} completion tokens would be cut"
        self.find("over_max_length", over, what, lost["chosen"] + lost["rejected"])

    def leaks(self) -> dict[str, Any]:
        """Findings of what tells the sides apart; returns the figures."""
        chosen, rejected = self.column("chosen"), self.column("rejected")
        ratio = float(np.median(chosen / np.maximum(rejected, 1)))
        sides, far = (self.live[chosen < rejected], self.live[chosen > rejected]), np.zeros(len(self.pairs))
        far[self.live] = np.abs(np.log(np.maximum(chosen, 1) / np.maximum(rejected, 1)))
        if not LENGTH_RATIOS[0] <= ratio <= LENGTH_RATIOS[1]:
            self.find("length_ratio", sides[ratio > 1], f"median length of chosen / rejected is {ratio:.2f}", far)
        longer, leak = _accuracy(chosen, rejected)
        if leak:
            self.find("length_leak", sides[longer > 0.5], f"the longer side is chosen in {longer:.0%}", far)

        features: dict[str, float] = {}
        bits = self.column("chosen_features"), self.column("rejected_features")
        for place, name in enumerate(FEATURES):
            features[name] = self._feature(name, *(side >> place & 1 for side in bits))
        starts = self.column("chosen_start"), self.column("rejected_start")
        counts = [pd.Series(side).value_counts() for side in starts]
        words = counts[0].sub(counts[1], fill_value=0).abs().sort_index().idxmax()  # a hash
        where = np.flatnonzero((starts[0] == words) | (starts[1] == words))[0]
        side = "chosen" if starts[0][where] == words else "rejected"
        turns = self.pairs[int(self.live[where])][side]
        text = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
        phrase = first_words(THOUGHT.sub("", text).strip())
        features["starts alike"] = self._feature(f'starts with "{phrase}"', *(side == words for side in starts))
        characters = self.column("chosen_characters"), self.column("rejected_characters")
        return {
            "pairs": len(self.live),
            **{f"{name}_tokens": float(np.median(self.column(name))) for name in ("prompt", "chosen", "rejected")},
            "length_ratio": ratio,
            "longer_is_chosen": longer,
            "longer_is_chosen_characters": _accuracy(*characters)[0],
            "features": features,
        }

    def _feature(self, name: str, chosen: np.ndarray, rejected: np.ndarray) -> float:
        accuracy, leak = _accuracy(chosen, rejected)
        if leak:
            rows = self.live[(chosen > rejected) if accuracy > 0.5 else (chosen < rejected)]
            shares = f"in {chosen.mean():.0%} of chosen, {rejected.mean():.0%} of rejected"
            right = max(accuracy, 1 - accuracy)
            self.find("feature_leak", rows, f"{name}: {shares}; guessing by it is right in {right:.0%}")
        return accuracy

    def left_out(self) -> None:
        loaded = load_report(self.pairs)
        if loaded and loaded.left_out:
            reasons = "; ".join(f"{rows['count']} {reason}" for reason, rows in loaded.left_out.items())
            named = [origin for rows in loaded.left_out.values() for origin in rows["origins"]][:WORST]
            self._add("left_out", loaded.rows - loaded.pairs, f"left out when read: {reasons}", named)


def check_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    test: Dataset | None = None,
    on_long_prompt: Literal["shorten", "drop", "keep"] = "shorten",
) -> Report:
    """What is wrong with these pairs for this tokenizer; nothing is trained.

    Every pair is rendered with the chat template and tokenised as TRL's DPOTrainer would do it. The report keeps the
    ids: they are what `train_dpo` trains on. Errors are what spoils training; `report.raise_for_errors()` stops on
    them. Warnings are for the reader. Checking pairs from a file a second time reads the measures from datasets' cache.

    Args:
        pairs: in the form that `load_pairs` gives.
        tokenizer: of the model that is to be trained, with its chat template.
        max_length: tokens of prompt and completion together that the trainer keeps.
        max_prompt_length: tokens of a prompt, the template's opening of the answer included.
        test: the held-out set, whose questions and talks must not be among `pairs` (by the rule of `split_pairs`).
        on_long_prompt: what becomes of prompts over `max_prompt_length`: "shorten" drops whole turns from the left and
            keeps the system turn (what can't be shortened is left out), "drop" leaves the rows out, "keep" leaves them
            as they are.

    Returns:
        A Report, which prints as a short table.

    Raises:
        UserError: pairs in another form, a tokenizer without chat template or EOS, or no pair remains.
    """
    _check_arguments(pairs, test, tokenizer, on_long_prompt)
    table = measure_table(pairs, tokenizer)
    measures = measures_of(table)
    tokens = measures["prompt"]
    long = np.flatnonzero(tokens > max_prompt_length)
    fitted = fit_prompts(pairs, table, tokenizer, long, max_prompt_length, on_long_prompt)
    shortened, left_out = len(fitted.shortened), len(fitted.dropped)
    if left_out == len(pairs):
        raise UserError(
            f"Every prompt has more than {max_prompt_length} tokens and none can be shortened by whole turns: raise "
            'max_prompt_length, or pass on_long_prompt="keep".'
        )
    measures, kept = fitted_measures(measures, fitted)
    judge = _Judge(pairs, measures, kept)
    judge.marks()
    judge.repeats(test)
    judge.not_rendered(tokenizer)
    judge.scores()
    judge.find(
        "long_prompt",
        long,
        f"prompts over {max_prompt_length} tokens: {shortened} shortened, {left_out} left out, "
        f"{len(long) - shortened - left_out} kept",
        tokens,
    )
    judge.lengths(max_length)
    figures = judge.leaks()
    judge.left_out()
    return Report(
        checked=len(pairs),
        pairs=fitted.pairs,
        ids=fitted.table.select_columns(list(IDS)),
        kept=kept,
        figures=figures,
        prompts={"shortened": shortened, "left_out": left_out},
        lengths={name: measures[name][kept] for name in ("prompt", "chosen", "rejected")},
    ).add(judge.findings)


def _check_arguments(
    pairs: Dataset, test: Dataset | None, tokenizer: PreTrainedTokenizerBase, on_long_prompt: str
) -> None:
    for data, name in ((pairs, "pairs"), (test if test is not None else pairs, "test")):
        if not (isinstance(data, Dataset) and {"prompt", "chosen", "rejected"} <= set(data.features)):
            raise UserError(f"{name} is not in the form that load_pairs gives: pass load_pairs(...).")
        if not (len(data) and isinstance(data[0]["prompt"], list)):
            raise UserError(f"{name} is empty, or its prompts are no lists of messages: pass load_pairs(...).")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The tokenizer has no chat template; set tokenizer.chat_template first.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no EOS token; set tokenizer.eos_token first.")
    if on_long_prompt not in ("shorten", "drop", "keep"):
        raise UserError(f"on_long_prompt is 'shorten', 'drop' or 'keep', not {on_long_prompt!r}.")
