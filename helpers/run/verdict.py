"""Keep an adapter or discard it: one table and one line, from what a run left in its folder. No model is loaded."""

import html
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.common import documents, html_table, why_not_written, write_json
from helpers.data.render import BOTH
from helpers.run import unreadable
from helpers.run.diagnosis import ENOUGH_PAIRS, LIMITS, Diagnosis, diagnose
from helpers.run.folder import DataInfo, Run
from helpers.run.metrics import pairs_to_decide, wilson_interval
from helpers.run.retained import lost_parts, retained_line, retained_parts

# What this table adds to the limits of diagnosis, and the rules by name: decision, reason, what would change it.
BOUNDS, WORDING = documents(__file__, "verdict.yaml")
MODELS = ("reference", "policy")
# Which rule holds, by the numbers of a run; the first decides.
DECIDES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "symptom": lambda f: bool(f["harm"]),
    "not_numbers": lambda f: f["not_numbers"],
    "stopped": lambda f: f["asked"] and f["after_ends"][1] < f["before_ends"][0],
    "below": lambda f: f["high"] < 0.5,
    "lost": lambda f: bool(f["lost"]),
    "unknown": lambda f: f["pairs"] == 0,
    "few": lambda f: f["pairs"] < ENOUGH_PAIRS,
    "half": lambda f: f["low"] <= 0.5,
    "unsure": lambda f: bool(f["codes"]),
    "fell": lambda f: not f["asked"] and f["chosen_fall"] > LIMITS["chosen_fall"],
    "none_ends": lambda f: f["asked"] and f["after_ended"] == 0,
    "longer": lambda f: f["asked"] and f["longer"] > BOUNDS["longer"]["limit"],
    "keep": lambda f: True,
}


@dataclass(frozen=True, repr=False)
class Verdict:
    """What to do with an adapter: `decision` ("keep", "discard" or "undecided"), `why`, what would `change` it, and the
    `table` behind it. It prints as text, as escaped HTML in a notebook, and as Markdown on a model card."""

    decision: str
    why: str
    change: str
    table: pd.DataFrame  # of texts; columns "before" and "after"

    line = property(lambda self: f"{self.decision.capitalize()}: {self.why}. What would change it: {self.change}.")

    def __str__(self) -> str:
        rows = [("", *self.table.columns), *self.table.itertuples(name=None)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([*cells, "", self.line])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{html_table(self.table)}<p>{html.escape(self.line)}</p>"

    def to_markdown(self) -> str:
        """Line and table for a model card, escaped."""
        rows = [("", *self.table.columns), ("---",) * 3, *self.table.itertuples(name=None)]
        return "\n".join([html.escape(self.line), "", *(html.escape(f"| {' | '.join(row)} |") for row in rows)])


def _interval(right: pd.Series) -> str:
    low, high = wilson_interval(int(right.sum()), len(right))
    return f"{right.mean():.2f} (95%: {low:.2f} to {high:.2f})"


def _held_out(table: pd.DataFrame | None, f: dict[str, Any], rows: dict[str, tuple[str, str]]) -> None:
    """Put what the held-out pairs say into the numbers `f` and the `rows`, each measure next to itself only."""
    names = [f"{side}_{what}" for side in BOTH for what in ("reference", "policy", "tokens")] + ["log_ratio_gap"]
    known = table is not None and {*names} <= {*table.columns} and len(table) > 0
    numbers = table[names].apply(pd.to_numeric, errors="coerce") if known else pd.DataFrame()
    f |= {"pairs": len(numbers), "not_numbers": not np.isfinite(numbers).all(axis=None)}
    gained, likelier = "implicit reward: chosen gained more", "likelihood per token: chosen likelier"
    if not known or f["not_numbers"]:
        rows |= dict.fromkeys((gained, likelier), ("not known", "not a number" if known else "not known"))
        return
    right = numbers.log_ratio_gap > 0
    f["share"], (f["low"], f["high"]) = right.mean(), wilson_interval(int(right.sum()), len(right))
    rows[f"{gained} (of {len(right)})"] = "a tie, by definition", _interval(right)
    per_token = {m: [numbers[f"{side}_{m}"] / numbers[f"{side}_tokens"] for side in BOTH] for m in MODELS}
    before, after = (_interval(per_token[m][0] > per_token[m][1]) for m in MODELS)
    rows[f"{likelier} (of {len(right)})"] = before, after
    for side in BOTH:
        before, after = (numbers[f"{side}_{model}"].mean() for model in MODELS)
        f |= {f"{side}_from": before, f"{side}_to": after, f"{side}_fall": after / before - 1}
        moved = f"{'fell' if after < before else 'rose'} by {abs(after - before):.1f}, {abs(after / before - 1):.1%}"
        rows[f"log-prob of a {side} answer, nats"] = f"{before:.1f}", f"{after:.1f} ({moved})"


def _kept(run: Run, replies: pd.DataFrame | None) -> pd.DataFrame:
    """Whether `replies` end and how long they are, kept in the folder of `run`; if there are none, those kept there."""
    file, names = run.folder / "replies.json", [f"{model}_{what}" for model in MODELS for what in ("ended", "tokens")]
    if replies is None or not len(replies):
        return pd.DataFrame(json.loads(file.read_bytes()) if file.is_file() else {})
    if missing := [name for name in names if name not in replies.columns]:
        raise unreadable("not_replies", missing=", ".join(missing))
    try:
        write_json(file, replies[names].to_dict(orient="list"))
    except OSError as error:
        print(f"The replies could not be kept in {run.folder.name} ({why_not_written(error)}), so no card has them.")
    return replies


def _replies(replies: pd.DataFrame, f: dict[str, Any], rows: dict[str, tuple[str, str]]) -> None:
    """The same for what `compare_generations` found."""
    f["asked"] = len(replies) > 0
    if not f["asked"]:
        rows["replies that end"] = "not asked", "not asked: replies=compare_generations(run, prompts)"
        return
    ended, tokens = ([replies[f"{model}_{what}"] for model in MODELS] for what in ("ended", "tokens"))
    rows[f"replies that end (of {len(replies)})"] = _interval(ended[0]), _interval(ended[1])
    rows["tokens of a reply"] = f"{tokens[0].mean():.0f}", f"{tokens[1].mean():.0f}"
    f |= {"replies": len(replies), "longer": tokens[1].mean() / max(tokens[0].mean(), 1)}
    for when, one in zip(("before", "after"), ended, strict=True):
        f |= {f"{when}_ended": one.mean(), f"{when}_ends": wilson_interval(int(one.sum()), len(one))}


def _left_out(data: DataInfo) -> str:
    """What of the training pairs was left out or cut."""
    counts = {
        "rows when they were read": data.findings.get("left_out", 0),
        "long prompts": data.prompts.get("left_out", 0),
        "prompts shortened": data.prompts.get("shortened", 0),
        "answers cut": data.findings.get("over_max_length", 0),
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join(parts + ["long prompts not recorded"] * (not data.prompts)) or "nothing"


def _diagnosed(found: Diagnosis, f: dict[str, Any]) -> str:
    """What `diagnose` says, in short; the symptom that decides goes into `f`."""
    f |= {"codes": found.codes, "harm": [code for code in found.codes if code not in BOUNDS["unsure"]["codes"]]}
    for one in found.findings:
        if one.code in (f["harm"] or f["codes"])[:1]:
            f |= {"what": one.what.rstrip("."), "cure": one.causes[0][1] if one.causes else one.test.rstrip(".")}
    f["notes"] = "".join(f" (a note: {one.what.rstrip('.')})" for one in found.notes)
    notes = [f"note: {one.code}" for one in found.notes]
    unseen = [f"{len(found.unseen)} not judged"] * bool(found.unseen)
    return "; ".join([", ".join(found.codes) or "no symptom", *notes, *unseen])


def verdict(run: Run | str | Path, replies: pd.DataFrame | None = None) -> Verdict:
    """Keep the adapter of a finished `run` (or of its folder) or discard it: a table, and a line that says why and what
    would change it. It never keeps a run that `diagnose` names a symptom of.

    `replies`, the table of `compare_generations(run, prompts)`, adds whether replies end and how long they are. These
    figures are kept in the run's folder: later calls without replies have them, and the cards that `export_run` writes.
    So it is with what `retention(run)` found. Raises UserError if `replies` is another table, or the folder no finished
    run.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    f: dict[str, Any] = {"enough": ENOUGH_PAIRS, "share": 0.5, "low": 0.0, "high": 1.0, "chosen_fall": 0.0}
    rows: dict[str, tuple[str, str]] = {}
    _held_out(run.held_out, f, rows)
    _replies(_kept(run, replies), f, rows)
    parts = retained_parts(run.folder)
    f |= {"lost": lost_parts(parts), "retained": retained_line(parts)}
    rows |= {"retention(run)": ("", f["retained"])} if parts else {}
    rows["diagnose(run)"] = "", _diagnosed(diagnose(run), f)
    rows["left out of the training data"] = _left_out(run.info.data), ""
    needed = pairs_to_decide(f["share"])
    f["needed"] = f"some {needed} pairs, if the share stays {f['share']:.2f}" if needed < math.inf else "a longer run"
    words = WORDING[next(name for name, holds in DECIDES.items() if holds(f))]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["before", "after"])
    return Verdict(words["decision"], *(words[name].format_map(f) for name in ("why", "change")), table)
