"""Findings of a check, their catalogue, and the report that holds them.

Other wings add findings of the same type (`helpers.thinking.check`).
"""

import functools
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset

from helpers.common import UserError, visible
from helpers.data.render import data_hash

Severity = Literal["error", "warning"]
WORST = 5  # rows that a finding names
SHOWN_CHARACTERS = 200  # characters of a text that a report shows
# code: (severity, why it matters, what to do). Errors stop a run, warnings do not.
FINDINGS: dict[str, tuple[Severity, str, str]] = {
    "template_refuses": (
        "error",
        "The chat template raises an error for these rows, and so would the trainer.",
        "Bring the rows into the order of turns that the template wants, or leave them out.",
    ),
    "prompt_not_prefix": (
        "error",
        "The prompt's tokens are not the first tokens of prompt + completion. The trainer then cuts where they part, "
        "and the model is trained on a context that it never sees at inference.",
        "Take white space off the beginning of the completion, or use a chat template (or chat_template_kwargs) that "
        "renders the prompt the same way alone and with an answer.",
    ),
    "completion_empty": (
        "error",
        "A side without text teaches to end at once, or to end never.",
        "Write the missing answer, or leave the row out.",
    ),
    "eos_missing": (
        "error",
        "Nothing teaches the model to stop: replies run on until the limit.",
        "Check tokenizer.eos_token (it must be the token that the chat template puts after a turn), or the template.",
    ),
    "eos_doubled": (
        "error",
        "An EOS inside the completion, or two at its end: the model learns to stop early, or to go on after the end.",
        "Take the EOS out of the texts; the chat template writes it.",
    ),
    "bos_doubled": (
        "error",
        "Two beginning-of-text tokens in a row, which the model has not seen in pre-training.",
        "Take the token out of the texts; the chat template writes it.",
    ),
    "special_token_in_text": (
        "error",
        "A control token of this model inside a text is read as control: it ends or opens a turn in mid-text.",
        "Take the token out of the text.",
    ),
    "same_text": (
        "error",
        "Chosen and rejected are the same: the pair has no gradient and counts as a wrong answer in every accuracy.",
        "Leave the row out.",
    ),
    "swapped_labels": (
        "error",
        "The same two answers to the same prompt stand in both orders, so one of the labels is wrong.",
        "Decide which one is right and take out the other.",
    ),
    "no_room": (
        "error",
        "The prompt alone fills max_length: the trainer drops such rows without a word.",
        "Shorten the prompt (on_long_prompt), or raise max_length.",
    ),
    "test_overlap": (
        "error",
        "These prompts are in the test set too, so its accuracy would measure memory.",
        "Split again with split_pairs, or leave the rows out of the training set.",
    ),
    "duplicate_pair": (
        "warning",
        "A pair that stands twice counts twice.",
        "Keep one of them.",
    ),
    "long_prompt": (
        "warning",
        "DPOTrainer has no max_prompt_length any more; long prompts eat the room of the answers.",
        "Nothing, if this is what you want; else raise max_prompt_length, or pass on_long_prompt.",
    ),
    "over_max_length": (
        "warning",
        "The trainer cuts the end of these completions off, their EOS with it.",
        "Raise max_length, shorten the texts, or leave the rows out.",
    ),
    "user_turn_in_completion": (
        "warning",
        "A completion holds turns of the user as well, and the model is trained to write them.",
        "Split the dialogue so that one assistant turn is the completion.",
    ),
    "template_leftover": (
        "warning",
        "Markup of another model's chat template stands in a text and will be learned as text.",
        "Take the markup out.",
    ),
    "not_utf8": (
        "warning",
        "Bytes that were no UTF-8, or UTF-8 that was once read as Latin-1: the model learns the broken characters.",
        "Save the source as UTF-8 and load it again.",
    ),
    "length_ratio": (
        "warning",
        "One side is much longer than the other in most pairs.",
        "Compare answers of like length, or train with a loss that divides by length (sigmoid_norm).",
    ),
    "length_leak": (
        "warning",
        "Length alone tells chosen from rejected, so length may be all that is learned.",
        "Balance it: as many pairs with the shorter answer chosen.",
    ),
    "feature_leak": (
        "warning",
        "One surface feature alone tells chosen from rejected, so it may be all that is learned.",
        "Bring the feature into both sides, or into neither.",
    ),
    "left_out": (
        "warning",
        "These rows of the source are no pairs and were left out when it was read.",
        "Look at them with load_report(pairs); mend the source if they should count.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with some pairs.

    `rows` are positions in the pairs that were checked (from 0), the worst first; `origins` names the worst of them
    for the reader. `what` says it in a few words, `why` says why it matters, `cure` what to do.
    """

    code: str
    severity: Severity
    count: int
    what: str
    why: str
    cure: str
    rows: tuple[int, ...] = ()
    origins: tuple[str, ...] = ()


def _worst_rows(finding: Finding) -> str:
    """The worst rows in short: "pairs.jsonl:3, 7, 9, ..."."""
    names: list[str] = []
    before = None
    for origin in finding.origins:
        place = re.fullmatch(r"(.*[: ])(\d+)", origin)
        same = place is not None and place[1] == before
        names.append(place[2] if same else origin)
        before = place[1] if place else None
    return visible(", ".join(names), SHOWN_CHARACTERS) + (", ..." if finding.count > len(names) > 0 else "")


class Report:
    """The findings of a check. It prints as a short table; `to_frame()` has the reasons and the cures as well.

    `findings`: list of Finding, errors first. `figures`: numbers of the whole set (pairs, median lengths in tokens,
    length ratio, how often the longer side is chosen, accuracy of each feature alone). `lengths`: tokens of each pair
    that remains, as arrays "prompt", "chosen", "rejected". `pairs`: the pairs to train on: long prompts shortened or
    left out as asked. `prompts`: how many those are, {"shortened": ..., "left_out": ...}. `ids`: token ids of `pairs`,
    as `tokenize_pairs` gives them. `clean`: `pairs` without the rows of any error.
    """

    def __init__(
        self,
        checked: int,
        pairs: Dataset,
        ids: Dataset,
        kept: np.ndarray,
        figures: dict[str, Any],
        prompts: dict[str, int],
        lengths: dict[str, np.ndarray],
    ):
        self.findings: list[Finding] = []
        self.pairs, self.ids, self.figures, self.prompts, self.lengths = pairs, ids, figures, prompts, lengths
        self._checked, self._kept = checked, kept  # kept: positions in what was checked, shape (len(pairs),)

    @functools.cached_property
    def hash(self) -> str:
        """`data_hash` of `ids`: the fingerprint of what is trained."""
        return data_hash(self.ids)

    def add(self, findings: "Finding | Iterable[Finding]") -> "Report":
        """Take in further findings about the same pairs; returns the report."""
        self.findings += [findings] if isinstance(findings, Finding) else list(findings)
        self.findings.sort(key=lambda finding: finding.severity)  # stable; "error" comes before "warning"
        return self

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop a run."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def clean(self) -> Dataset:
        """`pairs` without the rows of any error."""
        bad = {row for finding in self.errors for row in finding.rows}
        return self.pairs.select([place for place, row in enumerate(self._kept) if int(row) not in bad])

    def raise_for_errors(self) -> None:
        """Raise UserError if the report holds an error; it names the rows, the cures and how to go on anyway."""
        if not self.errors:
            return
        lines = [
            f"- {visible(error.what, SHOWN_CHARACTERS)}: {error.count} ({_worst_rows(error)}). {error.cure}"
            for error in self.errors
        ]
        raise UserError(
            "These pairs have errors that would spoil training:\n"
            + "\n".join(lines)
            + "\nMend the data, or go on with "
            "check_pairs(...).clean in its place, which leaves the rows with errors out "
            f"({len(self.clean)} of {self._checked} pairs remain)."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row for each finding: severity, code, count, what, rows (the worst), why, cure."""
        rows = [
            (f.severity, f.code, f.count, visible(f.what, SHOWN_CHARACTERS), _worst_rows(f), f.why, f.cure)
            for f in self.findings
        ]
        return pd.DataFrame(rows, columns=["severity", "code", "count", "what", "rows", "why", "cure"])

    def _summary(self) -> str:
        errors = len(self.errors)
        warnings = len(self.findings) - errors
        found = f"{errors} kinds of error, {warnings} of warning" if self.findings else "nothing found"
        return f"{self._checked} pairs checked: {found}."

    def __str__(self) -> str:
        lines = [self._summary()]
        for f in self.findings:
            rows = _worst_rows(f)
            lines.append(
                f"{f.severity:8}{f.count:>7}  {f.code:24}{visible(f.what, SHOWN_CHARACTERS)}"
                + (f" ({rows})" if rows else "")
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        if not len(frame):
            return f"<p>{self._summary()}</p>"
        cells = [[html.escape(str(value)) for value in row] for row in frame.itertuples(index=False)]
        head = "".join(f"<th>{name}</th>" for name in frame.columns)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
        return f"<p>{self._summary()}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
