"""Findings of a check, their catalogue, and the report that holds them; `helpers.thinking.check` adds its own."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset

from helpers.common import UserError, html_table, visible
from helpers.data import tables
from helpers.data.layouts import QUESTIONS
from helpers.data.render import data_hash, shared_options

Severity = Literal["error", "warning"]
WORST = 5  # rows that a finding names
SHOWN_CHARACTERS = 200  # characters of a text that a report shows
_CATALOGUE: dict[str, dict[str, Any]] = tables("findings.yaml")[0]
# code: (severity, why it matters, what to do)
FINDINGS: dict[str, tuple[Severity, str, str]] = {
    code: (one["severity"], one["why"], one["cure"]) for code, one in _CATALOGUE.items()
}
WHAT: dict[str, str] = {code: one["what"] for code, one in _CATALOGUE.items() if "what" in one}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with some pairs: `rows` are their positions in what was checked, the worst first;
    `origins` names the worst for the reader."""

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
    names, before = [], None
    for origin in finding.origins:
        head, place = re.findall(r"^(.*[: ](?=\d+$))?(.*)$", origin, re.DOTALL)[0]
        names.append(place if head and head == before else origin)
        before = head
    return visible(", ".join(names), SHOWN_CHARACTERS) + (", ..." if finding.count > len(names) > 0 else "")


@dataclass(repr=False, eq=False)
class Report:
    """What a check found. It prints as a short table; `to_frame()` has the reasons and the cures as well."""

    checked: int  # pairs that were looked at
    kept: np.ndarray  # positions of `pairs` among them
    pairs: Dataset  # to train on: long prompts shortened or left out as asked
    ids: Dataset  # of `pairs`, as `tokenize_pairs` gives them
    lengths: dict[str, np.ndarray]  # tokens of each of `pairs`: "prompt", "chosen", "rejected"
    prompts: dict[str, int]  # long ones that were "shortened" and "left_out"
    figures: dict[str, Any]  # median tokens, length ratio, how often the longer side or a feature alone is chosen
    findings: list[Finding] = field(default_factory=list)  # errors first

    @functools.cached_property
    def hash(self) -> str:
        """`data_hash` of `ids`: the fingerprint of what is trained."""
        return data_hash(self.ids)

    def take(self, ids: Dataset) -> None:
        """Put other token `ids` in the place of those that were checked."""
        self.ids = ids
        self.__dict__.pop("hash", None)

    @property
    def longest(self) -> int:
        """Tokens of the longest of `pairs`, prompt and answer, before any is cut."""
        answers = np.maximum(self.lengths["chosen"], self.lengths["rejected"])
        return int((self.lengths["prompt"] + answers).max(initial=0))

    @functools.cached_property
    def template(self) -> dict[str, Any]:
        """What the chat template gets for each of `pairs` besides its messages, if it is the same for all."""
        return shared_options(self.pairs)

    def add(self, findings: Iterable[Finding]) -> "Report":
        """Take in further `findings` about the same pairs; returns the report."""
        self.findings = sorted([*self.findings, *findings], key=lambda finding: finding.severity)  # "error" comes first
        return self

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop a run."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def clean(self) -> Dataset:
        """`pairs` without the rows of any error."""
        bad = {row for finding in self.errors for row in finding.rows}
        return self.pairs.select([place for place, row in enumerate(self.kept) if int(row) not in bad])

    def raise_for_errors(self) -> None:
        """Raise UserError if the report holds an error; it names the rows, the cures and how to go on anyway."""
        if self.errors:
            lines = [
                f"- {visible(error.what, SHOWN_CHARACTERS)}: {error.count} ({_worst_rows(error)}). {error.cure}"
                for error in self.errors
            ]
            cure = QUESTIONS["errors"].format(clean=len(self.clean), checked=self.checked)
            raise UserError("\n".join(["These pairs have errors that would spoil training:", *lines, cure]))

    def to_frame(self) -> pd.DataFrame:
        """One row for each finding: severity, code, count, what, rows (the worst), why, cure."""
        rows = [
            (f.severity, f.code, f.count, visible(f.what, SHOWN_CHARACTERS), _worst_rows(f), f.why, f.cure)
            for f in self.findings
        ]
        return pd.DataFrame(rows, columns=["severity", "code", "count", "what", "rows", "why", "cure"])

    def _summary(self) -> str:
        kinds = f"{len(self.errors)} kinds of error, {len(self.findings) - len(self.errors)} of warning"
        given = ", ".join(f"{name}={value!r}" for name, value in self.template.items())
        given = f" The chat template gets {given}." if given else ""
        return f"{self.checked} pairs checked: {kinds if self.findings else 'nothing found'}.{visible(given)}"

    def __str__(self) -> str:
        lines = (
            f"{severity:8}{count:>7}  {code:24}{what}" + (f" ({rows})" if rows else "")
            for severity, code, count, what, rows, *_ in self.to_frame().itertuples(index=False)
        )
        return "\n".join([self._summary(), *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(self.to_frame(), index=False) if self.findings else ""
        return f"<p>{self._summary()}</p>{table}"
