"""What is wrong with pairs for a tokenizer, found before a training step is spent: `check_pairs` measures every pair
once (`helpers.data.measure`) and judges the whole table afterwards."""

import itertools
import re
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset, Features, Json
from transformers import PreTrainedTokenizerBase

from helpers.common import UserError
from helpers.data.findings import FINDINGS, WHAT, WORST, Finding, Report
from helpers.data.layouts import asked
from helpers.data.measure import BIT, FEATURES, HIDDEN, MEASURES, from_turn, measure_table
from helpers.data.render import BOTH, IDS, is_hybrid, mapped, rows_of, template_options, thinking_off
from helpers.data.report import load_report
from helpers.data.split import prompt_families

MAX_PROMPT_LENGTH = 256  # tokens; a longer prompt leaves too little of max_length to the answers
# A feature tells chosen from rejected when guessing by it alone is right this much more (or less) often than a coin,
# and by more than chance does once in a hundred sets of that size.
LEAK = 0.05
LEAK_SIGMAS = 2.6
# Median of chosen / rejected tokens outside of which the lengths differ enough to be learned before anything else.
LENGTH_RATIOS = (0.8, 1.25)
SCORE = re.compile("score|rating|reward|points|grade|quality")  # of a column: what a judge gave to an answer
FLAGS = {  # a column of 0 and 1 -> which of them says that the answers are exchanged
    re.compile("(?:is_)?chosen_(?:is_)?better"): 0,
    re.compile("(?:is_|was_)?(?:swapped|flipped|exchanged)"): 1,
}


def _accuracy(chosen: np.ndarray, rejected: np.ndarray) -> tuple[float, bool]:
    """How often "the side with more of it is chosen" is right, ties counted half, and whether that is a leak. The
    spread of a coin's accuracy over n pairs, m of which the feature decides, is sqrt(m) / 2n."""
    more, less, size = int((chosen > rejected).sum()), int((chosen < rejected).sum()), len(chosen)
    spread = np.sqrt(more + less) / (2 * size)
    accuracy = 0.5 + (more - less) / (2 * size)
    return accuracy, bool(abs(accuracy - 0.5) > max(LEAK, LEAK_SIGMAS * spread))


class _Judge:
    """Turns measures into findings. The measures, `where` (a mask or positions) and `worst` are of the `pairs` that
    remain, at `kept` of those `given`."""

    def __init__(self, given: Dataset, pairs: Dataset, kept: np.ndarray, measures: dict[str, np.ndarray]):
        self.given, self.pairs, self.kept, self.measures = given, pairs, kept, measures
        self.sides = np.stack([measures[side] for side in BOTH])  # tokens, shape (2, pairs)
        self.findings: list[Finding] = []

    def find(self, code: str, where: np.ndarray | pd.Series, what: str, worst: np.ndarray | None = None) -> None:
        """Add a finding about these rows, if there are any; the highest of `worst` comes first."""
        rows = np.arange(len(self.kept))[where]
        if worst is not None:
            rows = rows[np.argsort(-worst[rows], kind="stable")]
        self.add(code, what, self.kept[rows])

    def add(self, code: str, what: str, rows: np.ndarray) -> None:
        """Add a finding about these rows of the given pairs, the worst first, if there are any."""
        if len(rows):
            named = [f"row {row + 1}" for row in rows[:WORST]]
            if "origin" in self.given.column_names:
                named = self.given.select(rows[:WORST])["origin"][:]
            self._found(code, len(rows), what, rows.tolist(), named)

    def _found(self, code: str, count: int, what: str, rows: list[int], origins: list[str]) -> None:
        severity, why, cure = FINDINGS[code]
        self.findings.append(Finding(code, severity, count, what, why, cure, tuple(rows), tuple(origins)))

    def marks(self) -> None:
        hidden = {key: ("not_rendered", f"{key} that the chat template leaves out") for key in HIDDEN}
        for mark, (code, what) in ({code: (code, what) for code, what in WHAT.items()} | hidden).items():
            self.find(code, self.measures["marks"] & BIT[mark] > 0, what)

    def repeats(self, test: Dataset | None) -> None:
        texts = pd.DataFrame({name: self.measures[f"{name}_text"] for name in ("prompt", *BOTH)})
        same, again = texts.chosen == texts.rejected, texts.duplicated()
        exchanged = pd.MultiIndex.from_frame(texts[["prompt", "rejected", "chosen"]])
        swapped = exchanged.isin(pd.MultiIndex.from_frame(texts)) & ~same
        self.find("same_text", same, "chosen and rejected are the same")
        self.find("swapped_labels", swapped, "the same pair with chosen and rejected swapped")
        self.find("duplicate_pair", again, "a pair that was there before")
        if test is not None:  # by the rule of split_pairs, also for what was shortened
            families = pd.Series(prompt_families([*self.given["prompt"][:], *test["prompt"][:]]))
            overlap = families.isin(families[len(self.given) :]).to_numpy()[self.kept]
            self.find("test_overlap", overlap, "a question or talk that is in the test set")
        counts = texts.prompt[~again].value_counts()
        if counts.iloc[0] > max(counts.sum() / 2, 2):
            one = texts.prompt == counts.index[0]
            self.find("one_prompt", one, f"the same prompt in {one.sum()} of {len(texts)} pairs")

    def scores(self) -> None:
        """Columns such as score_chosen and score_rejected, margin or swapped that say the opposite of the labels."""
        names, of = self.pairs.column_names, self._numbers
        words = (("chosen", "rejected"), ("better", "worse"), ("preferred", "dispreferred"), ("_j", "_k"))
        both = [(a, a.replace(one, other)) for a in names for one, other in words if one in a and other not in a]
        twins = [(a, b) for a, b in dict.fromkeys(both) if b in names]
        gaps = {f"{a} below {b}": of(a) - of(b) for a, b in twins if SCORE.search(a)}
        gaps |= {
            f"{a} above {b}": of(b) - of(a) for a, b in twins if re.search("(?:^|_)rank$|^rank_", a)
        }  # 1 is the best
        gaps |= {"margin below zero": of("margin")} if "margin" in names else {}
        for name, (flag, bad) in itertools.product(names, FLAGS.items()):
            if flag.fullmatch(name):
                gaps[f"{name} says that the answers are exchanged"] = np.where(of(name) == bad, -1.0, np.nan)
        for what, gap in gaps.items():
            self.find("score_below", gap < 0, what, -gap)

    def _numbers(self, column: str) -> np.ndarray:
        """What is no number, as NaN."""
        return pd.to_numeric(pd.Series(self.pairs[column][:], dtype=object), errors="coerce").to_numpy(float)

    def lengths(self, max_length: int) -> None:
        shared = self.measures["shared"]
        full = shared >= max_length
        self.find("no_room", full, f"a prompt that fills all {max_length} tokens", shared)
        lost = np.maximum(shared + self.sides - max_length, 0).sum(axis=0)
        over = ~full & (lost > 0)
        cut = f"{lost[over].sum()} of {self.sides.sum()} completion tokens would be cut"
        self.find("over_max_length", over, f"pairs over {max_length} tokens; {cut}", lost)

    def leaks(self) -> dict[str, Any]:
        """Findings of what tells the sides apart; returns the figures."""
        chosen, rejected = self.sides
        far = np.abs(np.log(np.maximum(chosen, 1) / np.maximum(rejected, 1)))
        ratio = float(np.median(chosen / np.maximum(rejected, 1)))
        if not LENGTH_RATIOS[0] <= ratio <= LENGTH_RATIOS[1]:
            what = f"median length of chosen / rejected is {ratio:.2f}"
            self.find("length_ratio", chosen > rejected if ratio > 1 else chosen < rejected, what, far)
        longer, leak = _accuracy(chosen, rejected)
        if leak:
            what = f"the longer side is chosen in {longer:.0%}"
            self.find("length_leak", chosen > rejected if longer > 0.5 else chosen < rejected, what, far)

        bits, starts = ([self.measures[f"{side}_{name}"] for side in BOTH] for name in ("features", "start"))
        features = {name: self._feature(name, *(side >> n & 1 for side in bits)) for n, name in enumerate(FEATURES)}
        counts = [pd.Series(side).value_counts() for side in starts]
        words = counts[0].sub(counts[1], fill_value=0).abs().sort_index().idxmax()
        features["starts alike"] = self._feature(f'starts with "{words}"', *(side == words for side in starts))
        return {
            "pairs": len(self.kept),
            **{f"{name}_tokens": float(np.median(self.measures[name])) for name in ("prompt", *BOTH)},
            "length_ratio": ratio,
            "longer_is_chosen": longer,
            "longer_is_chosen_characters": _accuracy(*(self.measures[f"{side}_characters"] for side in BOTH))[0],
            "features": features,
        }

    def _feature(self, name: str, chosen: np.ndarray, rejected: np.ndarray) -> float:
        accuracy, leak = _accuracy(chosen, rejected)
        if leak:
            shares = f"in {chosen.mean():.0%} of chosen, {rejected.mean():.0%} of rejected"
            what = f"{name}: {shares}; guessing by it is right in {max(accuracy, 1 - accuracy):.0%}"
            self.find("feature_leak", chosen > rejected if accuracy > 0.5 else chosen < rejected, what)
        return accuracy

    def left_out(self) -> None:
        loaded = load_report(self.given)
        if loaded and loaded.left_out:
            reasons = "; ".join(f"{rows['count']} {reason}" for reason, rows in loaded.left_out.items())
            named = [origin for rows in loaded.left_out.values() for origin in rows["origins"]][:WORST]
            self._found("left_out", loaded.rows - loaded.pairs, f"left out when read: {reasons}", [], named)


def check_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    test: Dataset | None = None,
    on_long_prompt: Literal["shorten", "drop", "keep"] = "shorten",
) -> Report:
    """What is wrong with these pairs for this tokenizer; nothing is trained.

    Every pair is rendered and tokenised as TRL's DPOTrainer would do it, and the report keeps the ids that `train_dpo`
    trains on. Errors are what spoils training (`report.raise_for_errors()`); warnings are for the reader. datasets
    keeps the measures of pairs from a file.

    Args:
        pairs: in the form that `load_pairs` gives.
        tokenizer: of the model that is to be trained, with its chat template.
        max_length: tokens of prompt and completion together that the trainer keeps.
        max_prompt_length: tokens of a prompt, the template's opening of the answer included.
        test: the held-out set, whose questions and talks must not be among `pairs` (by the rule of `split_pairs`).
        on_long_prompt: what becomes of prompts over `max_prompt_length`: "shorten" drops whole turns from the left and
            keeps the system turn (what can't be shortened is left out), "drop" leaves the rows out, "keep" leaves them
            as they are.

    Raises:
        UserError: pairs in another form, a tokenizer without chat template or EOS, or no pair remains.
    """
    for name, limit in {"max_length": max_length, "max_prompt_length": max_prompt_length}.items():
        if not isinstance(limit, int | np.integer) or limit < 1:
            raise UserError(f"{name}={limit!r}: it has to be a whole number above 0.")
    _check_arguments(pairs, test, tokenizer, on_long_prompt)
    table = measure_table(pairs, tokenizer, max_prompt_length if on_long_prompt == "shorten" else None)
    tokens, begins = (table.with_format("numpy")[name][:] for name in ("prompt_given", "prompt_begin"))
    long = tokens > max_prompt_length
    dropped = long & (begins == 0) & (on_long_prompt != "keep")
    if dropped.all():
        raise asked("all long", most=max_prompt_length)
    kept, counts = np.flatnonzero(~dropped), {"shortened": int((begins > 0).sum()), "left_out": int(dropped.sum())}
    table = table.select(kept)
    columns = table.select_columns(list(MEASURES)).with_format("arrow")[:]
    measures = {name: columns[name].to_numpy() for name in MEASURES}
    judge = _Judge(pairs, _as_trained(pairs, begins, is_hybrid(tokenizer)).select(kept), kept, measures)
    judge.marks()
    judge.repeats(test)
    judge.scores()
    places = np.flatnonzero(long)
    said = {**counts, "kept": len(places) - sum(counts.values())}
    what = ", ".join(f"{count} {fate.replace('_', ' ')}" for fate, count in said.items())
    order = places[np.argsort(-tokens[places], kind="stable")]
    judge.add("long_prompt", f"prompts over {max_prompt_length} tokens: {what}", order)
    judge.lengths(max_length)
    figures = judge.leaks()
    judge.left_out()
    ids, lengths = table.select_columns(list(IDS)), {name: measures[name] for name in ("prompt", *BOTH)}
    return Report(len(pairs), kept, judge.pairs, ids, lengths, counts, figures).add(judge.findings)


def _as_trained(pairs: Dataset, begins: np.ndarray, hybrid: bool) -> Dataset:
    """The pairs with each prompt from its turn in `begins` on, and what the renderer adds to their options."""
    if not (hybrid or begins.any()):
        return pairs

    def changed(batch: dict[str, list], places: list[int]) -> dict[str, list]:
        rows = rows_of(batch)
        result = {**batch, "prompt": [from_turn(row["prompt"], begins[n]) for row, n in zip(rows, places, strict=True)]}
        if hybrid:
            options = [thinking_off(row, hybrid) | template_options(row | {"tools": None}) for row in rows]
            result["chat_template_kwargs"] = options
        return result

    features = pairs.features | ({"chat_template_kwargs": Json()} if hybrid else {})
    return mapped(pairs, changed, Features(features), with_indices=True, desc="Writing pairs")


def _check_arguments(pairs: Dataset, test: Dataset | None, tokenizer: Any, on_long_prompt: str) -> None:
    for name, data in {"pairs": pairs, "test": pairs if test is None else test}.items():
        table = isinstance(data, Dataset) and {"prompt", *BOTH} <= set(data.features) and len(data)
        if not (table and isinstance(data[0]["prompt"], list)):
            raise UserError(f"{name} is empty, or not in the form that load_pairs gives: pass load_pairs(...).")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The tokenizer has no chat template; set tokenizer.chat_template first.")
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no EOS token; set tokenizer.eos_token first.")
    if on_long_prompt not in ("shorten", "drop", "keep"):
        raise UserError(f"on_long_prompt is 'shorten', 'drop' or 'keep', not {on_long_prompt!r}.")
