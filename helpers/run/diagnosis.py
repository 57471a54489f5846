"""Diagnosis of a training run: the symptom by name, with its numbers, its likely causes in order, and the cure.

It reads a history of TRL's DPOTrainer, from wherever it is, and loads no model. `measure` turns it into a few numbers,
`RULES` compare them with the limits of symptoms.yaml, which also says what is behind each symptom.
"""

import ast
import contextlib
import html
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import Trainer, TrainingArguments

from helpers.common import documents
from helpers.data.findings import Report
from helpers.run import unreadable
from helpers.run.folder import Run, Status, describe_config, read_info
from helpers.run.metrics import wilson_interval

OTHERS = {"kl": "KTO", "log_odds_ratio": "ORPO", "reward": "GRPO"}  # a key that DPO does not log: whose log it is
NUMBERS = ("beta", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "max_length")
PER_TOKEN = ("ipo", "sigmoid_norm")  # losses that count per token: no limit on a sum over an answer fits them
NOTE = "note"
LN2 = math.log(2)  # the loss of a policy that equals its reference
# Limits by name with their reasons; the catalogue by code: what is seen, evidence, causes with their cures, the test
# that decides between them; and what cannot be judged without more.
LIMIT_TABLE, SYMPTOMS, UNSEEN = documents(__file__, "symptoms.yaml")
LIMITS: dict[str, float] = {name: row["limit"] for name, row in LIMIT_TABLE.items()}
ENOUGH_PAIRS = LIMIT_TABLE["enough_pairs"]["limit"]


@dataclass(frozen=True)
class Symptom:
    """What is wrong with a run, with pairs (cause, its cure), the likeliest first; or a `note`, which has no causes:
    what may be in order, since it is usual with these settings, or undecided."""

    code: str
    what: str
    evidence: str
    causes: tuple[tuple[str, str], ...]
    test: str
    note: bool = False


class Diagnosis:
    """The symptoms of a run, what hides others first, then the `notes`; `codes` are those of the symptoms. `unseen` is
    what its history could not show, and what would. It prints as text, and as escaped HTML in a notebook."""

    def __init__(self, findings: list[Symptom], unseen: list[str]):
        self.findings, self.unseen = findings, unseen
        self.codes = [finding.code for finding in findings if not finding.note]
        self.notes = [finding for finding in findings if finding.note]
        counts = [(len(self.codes), "symptom"), (len(self.notes), "note")]
        found = [f"{count} {word}{'s' * (count > 1)} found." for count, word in counts if count]
        self._summary = " ".join(found if self.codes else ["No symptom found.", *found])

    def __str__(self) -> str:
        lines = [self._summary]
        for one in self.findings:
            lines += ["", f"{'note, ' * one.note}{one.code}: {one.what}", f"  evidence: {one.evidence}"]
            lines += [f"  cause {place}: {why}. Cure: {cure}." for place, (why, cure) in enumerate(one.causes, 1)]
            lines.append(f"  {one.test}")
        return "\n".join(lines + [f"Not judged: {text}" for text in self.unseen])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        e = html.escape
        parts = [f"<p>{self._summary}</p>"]
        for one in self.findings:
            causes = "".join(f"<li>{e(why)}. <b>Cure:</b> {e(cure)}.</li>" for why, cure in one.causes)
            parts.append(
                f"<p>{'Note: ' * one.note}<code>{e(one.code)}</code> <b>{e(one.what)}</b><br>{e(one.evidence)}</p>"
                f"<ol>{causes}</ol><p>{e(one.test)}</p>"
            )
        return "".join(parts + [f"<p>Not judged: {e(text)}</p>" for text in self.unseen])


def _table(history: list[dict], prefix: str = "") -> pd.DataFrame:
    """The rows that have a loss or rewards under this prefix, as numbers; "place" is what all rows of the history have:
    the step, or the epoch, or their order."""
    told = ["loss", "logps/chosen", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))]
    names = [*told, "grad_norm", "learning_rate"]
    place = next((name for name in ("step", "epoch") if all(row.get(name) is not None for row in history)), "order")
    rows = [
        row | {"order": order} | {name: row.get(prefix + name) for name in names}
        for order, row in enumerate(history)
        if any(prefix + name in row for name in told)
    ]
    table = pd.DataFrame(rows, columns=["step", "epoch", "order", *names]).astype(float)  # text such as "nan" too
    return table.assign(place=table[place]).sort_values("place", kind="stable", ignore_index=True)


def _beta(held: pd.DataFrame) -> float:
    """As two evaluations of the same pairs show it: how far the reward of a side moves with its log-prob."""
    reward, logp = (held[name].max() - held[name].min() for name in ("rewards/chosen", "logps/chosen"))
    return float(f"{reward / logp:.2g}") if reward > 0 and logp > LIMITS["beta_seen"] else math.nan


def to_try(config: dict[str, Any], train_pairs: int = 0, longest: int = 0) -> dict[str, str]:
    """Numbers to try, for the cures: phrases by name, empty where nothing says what they start from.

    They start from the rate and the batch of `config` (DPOConfig's names), the number of pairs (`train_pairs`), and the
    tokens of the longest one before it was cut (`longest`).
    """
    rate, micro = config.get("learning_rate") or 0, config.get("per_device_train_batch_size") or 0
    values = {"tenth": rate * 0.1, "half": rate * 0.5, "tenfold": rate * 10, "micro_half": micro // 2}
    values |= {"longest": longest, "twice": 2 * train_pairs}
    return {name: f" ({value:.15g})" if value else "" for name, value in values.items()}


def _setting(known: dict[str, Any], config: dict[str, Any], train: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    """What the settings and the logged rates say: beta, the loss of knowing nothing, how much of the run is over."""
    beta, loss, steps = config.get("beta") or math.nan, config.get("loss_type"), config.get("max_steps") or 0
    loss = str(loss[0] if isinstance(loss, list) and len(loss) == 1 else loss)
    loss += ", weighted" * bool(config.get("use_weighting"))
    starts = {"sigmoid": LN2, "sigmoid_norm": LN2, "hinge": 1.0, "ipo": 1 / (4 * beta**2)}
    names = ("max_length", "num_train_epochs", "fp16", "per_device_train_batch_size")
    f = {name: config.get(name) or math.nan for name in names}
    f |= {"beta": beta, "loss": loss, "start": starts.get(loss, math.nan)}
    warming_up = train.learning_rate.diff().tail(1).max() > 0
    over = rows.step.max() / steps if steps > 0 else rows.epoch.max() / f["num_train_epochs"]
    f["over"] = 0.0 if warming_up else over
    f["checkpointing"] = "on" if config.get("gradient_checkpointing") else "off"
    logged = {} if train.learning_rate.isna().all() else {"learning_rate": train.learning_rate.max()}
    return f | to_try(logged | config, known.get("train_pairs") or 0, known.get("longest") or 0)


def _moves(rows: pd.DataFrame, ends: pd.DataFrame, f: dict[str, Any]) -> dict[str, float]:
    """How far both sides moved, in nats (log-ratios are TRL's rewards divided by beta): the mean of `ends`, and how the
    first of `rows` is to the last."""
    last, beta = ends.mean(), f["beta"]
    chosen, rejected, logp = last["rewards/chosen"] / beta, last["rewards/rejected"] / beta, last["logps/chosen"]
    means = f["loss"] in PER_TOKEN and abs(logp) < LIMITS["token_logp"]  # over the tokens of an answer were logged
    found = {"chosen_end": chosen, "rejected_end": rejected, "gap": chosen - rejected, "logp_end": logp}
    still = last["rewards/chosen"] == last["rewards/rejected"] == 0  # at any beta
    found |= {"still": bool(still), "logp_start": logp - chosen}
    found["moved"] = 0.0 if still else max(abs(chosen), abs(rejected))
    found["ahead"] = last["rewards/chosen"] - last["rewards/rejected"]
    found["moved"] *= LIMITS["answer_tokens"] if means else 1
    found["chosen_fall"] = chosen / (logp - chosen or math.nan)
    found["fall_speed"] = found["chosen_fall"] / (ends.step.max() or math.nan)
    if not f["started"] and len(rows):
        first, end = rows.iloc[0], rows.iloc[-1]
        chosen, rejected = first["rewards/chosen"], first["rewards/rejected"]
        found |= {"first_chosen": chosen / beta, "flat_from": min(chosen, rejected) / beta}
        found["first_at"] = first.place / (rows.place.max() or math.nan)
        found["flat_by"] = abs(end["rewards/chosen"] / (chosen or math.nan) - 1)
        found |= {"back_from": -max(chosen, rejected) / beta, "back_to": end["rewards/chosen"] / (chosen or math.nan)}
    return found


def _held_out_sets(history: list[dict]) -> list[str]:
    """The prefixes of the evaluation sets that a history has: "eval_", or several such as "eval_new_"."""
    name = "rewards/accuracies"
    sets = dict.fromkeys(key.removesuffix(name) for row in history for key in row if key.endswith(name))
    return [prefix for prefix in sets if prefix.startswith("eval_")] or ["eval_"]


def measure(known: dict[str, Any], prefix: str = "eval_") -> dict[str, Any]:
    """The numbers that a diagnosis is made from, with what words them; NaN where something needed is not known. Of
    several evaluation sets it takes the one with the `prefix`.

    "end" is the last held-out evaluation, or for training a mean over the last half of its rows: rounding moves one
    batch as much as a run that does not learn. In `known` are the history, rows as TRL logs them, and what is known of
    config (settings by name), train_pairs, test_pairs, findings of `check_pairs` (code to count), status, memory_gb.
    """
    history, findings, pairs = known["history"], known.get("findings"), known.get("test_pairs") or 0
    accuracy, curves = "rewards/accuracies", ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
    train, evaluated = _table(history), _table(history, prefix)
    held = evaluated[evaluated.step != 0]
    rows = pd.concat([train, held])
    middle = rows.place.max() / 2
    first_half, last_half = train[train.place <= middle], train[~(train.place <= middle)]
    values = [row[name] for row in history for name in row if name.endswith(curves) and not name.startswith("train_")]
    # What was not measured is NaN: every comparison with it is false, so it is never a sign.
    config = known.get("config", {})
    config = config if config.get("beta") else config | {"beta": _beta(held)}
    f: defaultdict[str, Any] = defaultdict(
        lambda: math.nan, known.get("memory_gb", {}) | _setting(known, config, train, rows)
    )
    f |= {"status": known.get("status"), "findings": findings, "steps": len(train), "evaluations": len(held)}
    f |= {"train_pairs": known.get("train_pairs") or math.nan, "pairs": pairs}
    f["not_numbers"] = sum(not math.isfinite(float(value)) for value in values if value is not None) or math.nan
    f["stopped_at"] = known.get("steps") if f["status"] == Status.NOT_FINITE else math.nan
    if findings is not None:
        surface = max(findings.get("length_leak", 0), findings.get("feature_leak", 0))
        f |= {"findings_cut": findings.get("over_max_length", 0), "surface": surface / f["train_pairs"]}
        f["cut"] = f["findings_cut"] / f["train_pairs"]
    tenth = max(math.ceil(len(train) / 10), 2 if len(train) > 4 else 1)
    f |= {"loss_end": last_half.loss.mean(), "loss_half": first_half.loss.tail(2).mean()}
    f |= {"loss_peak": train.loss.rolling(tenth).mean().max(), "gradient": train.grad_norm.max()}
    f["margin_end"] = last_half["rewards/margins"].mean()
    f["falls"] = bool(train.loss.head(1).max() == train.loss.max())
    # The loss of step 1 is taken before its update, as is an evaluation at step 0.
    start = pd.concat([evaluated[evaluated.step == 0], train[train.step <= 1]]).head(1)
    off = start[["rewards/chosen", "rewards/rejected"]].abs().max(axis=1) / f["beta"]
    f |= {"started": len(start) > 0, "start_loss": start.loss.mean(), "start_off": off.mean()}
    f |= {"held_loss_best": held.loss.min(), "held_loss_end": held.loss.tail(1).mean()}
    f["loss_rise"], gain = f["held_loss_end"] - f["held_loss_best"], f["start"] - f["held_loss_best"]
    f["gain_lost"] = math.inf if gain <= 0 else f["loss_rise"] / gain
    f["noise"] = LIMITS["noise"] / math.sqrt(pairs or math.inf)
    best = held.nsmallest(1, "loss")
    f["best_at"] = f"step {best.step.mean():g}" if best.step.any() else f"epoch {best.epoch.mean():g}"
    for name, one in (("first", held.head(1)), ("best", held.nlargest(1, accuracy)), ("end", held.tail(1))):
        f[f"accuracy_{name}"] = value = one[accuracy].mean()
        if pairs and value >= 0:
            f[f"low_{name}"], f[f"high_{name}"] = wilson_interval(round(value * pairs), pairs)
    f["early"] = held.place.min() / (rows.place.max() or math.nan)
    f |= _moves(held if len(held) > 1 else train, held.tail(1) if len(held) else last_half, f)
    f["alike"] = f["ahead"] == f["accuracy_end"] == 0 and f["still"] is False
    f["alike_at"] = held["rewards/chosen"].tail(1).mean() if f["alike"] else math.nan
    if _breaks(f):
        f |= {"lost_chosen": f["chosen_end"], "lost_rejected": f["rejected_end"]}
    return f | _second_signs(f)


def _leaks(f: dict[str, Any]) -> bool:
    """An accuracy that the surface explains, or too good to be true, before half of the run is over."""
    explained = f["low_first"] > LIMITS["leak_explained"] and f["surface"] >= f["low_first"]
    early = f["early"] <= LIMITS["leak_early"] and f["pairs"] >= ENOUGH_PAIRS
    return early and (explained or f["low_first"] > LIMITS["leak"])


def _rises(f: dict[str, Any], limit: str) -> bool:
    """Whether the held-out loss rose from its best by more than it wavers, and took this share of the gain back."""
    return f["loss_rise"] > max(LIMITS["loss_rise"], f["noise"]) and f["gain_lost"] > LIMITS[limit]


def _second_signs(f: dict[str, Any]) -> dict[str, float]:
    """What makes a chosen that falls a symptom, one of three: it falls "fast", at any beta; it fell far at a beta that
    should have "held" it; the held-out loss "rose" again. Each with its number, NaN where it is no sign."""
    far = f["chosen_fall"] > LIMITS["fall_held"] and -f["chosen_end"] > LIMITS["fall_nats"]
    signs = {
        "fast": (f["fall_speed"] > LIMITS["fall_speed"], f["fall_speed"] * -f["logp_start"]),  # in nats
        "held": (f["beta"] >= LIMITS["beta_holds"] and far, f["beta"]),
        "rose": (_rises(f, "gain_waver"), f["loss_rise"]),
    }
    return {name: number if holds else math.nan for name, (holds, number) in signs.items()}


def _breaks(f: dict[str, Any]) -> bool:
    """Both sides lost by far, the chosen more, and the held-out loss is above that of knowing nothing."""
    lost = f["chosen_fall"] > LIMITS["fall_held"] and f["rejected_end"] < -LIMITS["fall_nats"]
    return lost and f["chosen_end"] < f["rejected_end"] and f["held_loss_end"] > f["start"]


def _came_back(f: dict[str, Any]) -> bool:
    """Both sides much unlikelier than under the reference in the first row, which is the worst, and less so later."""
    worst_first = f["first_at"] < LIMITS["flat_at"] and f["falls"] is True
    return worst_first and f["back_from"] > LIMITS["flat_from"] and f["back_to"] < LIMITS["back_to"]


def _below_half(f: dict[str, Any]) -> bool | str:
    """A note if the chosen are ahead in spite of it: ties, which count as wrong, bring an accuracy down as well."""
    low = f["high_end"] < 0.5 and f["accuracy_best"] < 0.5 and f["pairs"] >= ENOUGH_PAIRS
    return low and f["moved"] >= LIMITS["moved"] and (f["ahead"] < 0 or NOTE)


def _falls(f: dict[str, Any]) -> bool | str:
    """A symptom with a second sign, a note without."""
    fell = f["chosen_fall"] > LIMITS["chosen_fall"] and f["chosen_end"] > f["rejected_end"]
    harms = not all(math.isnan(f[name]) for name in ("fast", "held", "rose"))
    return fell and f["loss"] not in (*PER_TOKEN, "None") and (harms or NOTE)


# code -> whether a run has the symptom, in the order in which symptoms are named; NOTE where it is worth a note only.
RULES: dict[str, Callable[[dict[str, Any]], bool | str]] = {
    "out_of_memory": lambda f: f["status"] == Status.OUT_OF_MEMORY,
    "nan": lambda f: f["not_numbers"] > 0 or f["stopped_at"] > 0,
    "wrong_reference": lambda f: (
        f["start_off"] > LIMITS["start_off"]
        # Without step 1: both sides much likelier than under the reference in the first row already, and no more later.
        or (
            f["first_at"] < LIMITS["flat_at"]
            and f["flat_from"] > LIMITS["flat_from"]
            and f["flat_by"] < LIMITS["flat_by"]
        )
        or _came_back(f)
    ),
    "diverged": lambda f: (f["loss_peak"] > LIMITS["loss_peak"] * f["start"] / LN2 and not _came_back(f)) or _breaks(f),
    "leak": lambda f: _leaks(f) or f["low_best"] > LIMITS["leak_note"] and NOTE,
    "below_half": _below_half,
    "overfitting": lambda f: (
        (_rises(f, "gain_lost") and not f["loss_end"] >= f["held_loss_best"]) or (_rises(f, "gain_waver") and NOTE)
    ),
    "loss_zero": lambda f: f["loss"] == "sigmoid" and f["loss_half"] < LIMITS["loss_half"],
    "chosen_falls": _falls,
    "not_moving": lambda f: f["moved"] < LIMITS["moved"] and not f["over"] < LIMITS["over"],
    "never_ends": lambda f: f["cut"] > LIMITS["cut"],
    "no_preference": lambda f: (
        f["alike"]
        or (
            f["low_end"] < 0.5 <= f["high_end"]
            and f["accuracy_end"] < LIMITS["accuracy_end"]
            and f["pairs"] >= ENOUGH_PAIRS
            and f["moved"] >= LIMITS["moved"]
            and not f["over"] < LIMITS["over"]
        )
    ),
}


def _named(sets: dict[str, dict[str, Any]]) -> dict[tuple[str, bool], list[str]]:
    """Codes of the symptoms, then of the notes (True), without those that a symptom explains; each with the evaluation
    sets that show it, by whose numbers in `sets` the rules go."""
    found: dict[tuple[str, bool], list[str]] = {}
    for code, rule in RULES.items():
        for prefix, f in sets.items():
            if holds := rule(f):
                found.setdefault((code, holds is NOTE), []).append(prefix)
    for code in ("out_of_memory", "nan"):  # after these no other number means anything
        if (code, False) in found:
            return {(code, False): found[code, False]}
    explained = {other for code, note in found if not note for other in SYMPTOMS[code].get("explains", ())}
    named = sorted(found, key=lambda one: one[1])
    return {
        (code, note): found[code, note]
        for code, note in named
        if code not in explained and not (note and (code, False) in found)
    }


def _symptom(code: str, note: bool, f: dict[str, Any]) -> Symptom:
    """In the catalogue's words, without the causes that the run's own numbers rule out, the likelier first."""
    ruled_out = {
        ("nan", 1): f["fp16"] is not True,
        ("loss_zero", 1): f["accuracy_first"] <= LIMITS["leak_note"],
        ("chosen_falls", 1): f["beta"] >= LIMITS["beta_holds"],
        ("diverged", 2): not f["high_end"] < 0.5,
        ("no_preference", 0): f["alike"],
        ("no_preference", 1): f["alike"],
        ("no_preference", 2): not f["alike"],
        ("not_moving", 0): f["gradient"] == 0 or f["logp_end"] == 0,
        ("not_moving", 1): f["gradient"] > 0,
        ("not_moving", 2): f["logp_end"] != 0,
        ("out_of_memory", 0): f["per_device_train_batch_size"] == 1,
        ("out_of_memory", 1): f["checkpointing"] == "on",
    }
    likely = {
        ("leak", 1): f["findings"] is not None and not f["surface"],
        ("loss_zero", 1): f["surface"] > 0,
        ("chosen_falls", 1): f["beta"] < LIMITS["beta_holds"],
        ("nan", 1): f["fp16"] is True,
        ("overfitting", 1): f["num_train_epochs"] <= 1,
    }
    known = SYMPTOMS[code]
    words, places = (known["note"], ()) if note else (known, range(len(known["causes"])))
    order = sorted((n for n in places if not ruled_out.get((code, n))), key=lambda n: not likely.get((code, n)))
    causes = [(why, cure.format_map(f)) for why, cure in (known["causes"][n] for n in order)]
    # A part of the evidence whose numbers are not known is left out.
    evidence = [text for part in known["evidence"] if "nan" not in (text := part.format_map(f))]
    test = f"{'The history cannot decide between these. A test:' if causes[1:] else 'To make sure:'} {words['test']}"
    return Symptom(code, words["what"], "; ".join(evidence), tuple(causes), test, note)


def _unseen(f: dict[str, Any]) -> list[str]:
    """What this history could not show, and what would."""
    if f["status"] in (Status.OUT_OF_MEMORY, Status.NOT_FINITE):
        return []
    missing = {
        "training": not f["steps"],
        "start": f["steps"] and not f["started"],
        "evaluation": not f["evaluations"],
        "test_pairs": f["evaluations"] and not f["pairs"],
        "few": f["evaluations"] and 0 < f["pairs"] < ENOUGH_PAIRS,
        "config": math.isnan(f["beta"]),
        "height": f["loss"] == "None",
        "loss_type": f["loss"] not in ("None", "sigmoid"),
        "start_unknown": f["loss"] != "None" and math.isnan(f["start"]),
        "over": f["over"] < LIMITS["over"],
        "report": f["findings"] is None,
    }
    return [UNSEEN[name].format_map(f) for name, is_missing in missing.items() if is_missing]


def of_run(run: Run) -> dict[str, Any]:
    """What `measure` needs of a `run`."""
    names = ("config", "train_pairs", "test_pairs", "status", "steps", "memory_gb")
    data = run.info.data
    rest = {"history": run.history, "findings": data.findings, "longest": data.longest}
    return {name: run.info[name] for name in names} | rest


def _of_text(text: str) -> Any:
    """What was pasted: a history or trainer_state.json as JSON, or the lines that a trainer prints."""
    try:
        read = json.loads(text)
        return [read] if isinstance(read, dict) and "log_history" not in read else read
    except ValueError:
        quoted = (re.sub(r"(?<=: )-?(nan|inf)\b", r"'\g<0>'", line) for line in re.findall(r"{['\"][^{}]*}", text))
        with contextlib.suppress(ValueError, SyntaxError):
            if rows := [ast.literal_eval(line) for line in quoted]:
                return rows
    raise unreadable("not_a_history")


def _existing(source: str | Path) -> Path:
    """UserError too for what cannot be a path, such as a long text."""
    path = Path(source)
    with contextlib.suppress(OSError):
        if path.exists():
            return path
    raise unreadable("no_history", folder=path.name[:60])


def _of_folder(folder: Path) -> dict[str, Any]:
    """What `measure` needs, from a run folder, or from TRL's output or checkpoint folder."""
    if info := read_info(folder):
        stopped = info.status in (Status.OUT_OF_MEMORY, Status.NOT_FINITE)
        return of_run(Run(folder, info, [], {}, None) if stopped else Run.load(folder))
    states = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    if not states:
        raise unreadable("no_history", folder=folder.name)
    try:
        read = [json.loads(path.read_text(encoding="utf-8")) for path in states]
        state = max(read, key=lambda state: state["global_step"])
        return {"history": state["log_history"], "config": {"max_steps": state["max_steps"]}}
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable("state", folder=folder.name, error=error) from error


def _of_source(source: Any) -> dict[str, Any]:
    if isinstance(source, str) and "{" in source:
        source = _of_text(source)
    elif isinstance(source, str | Path) and (path := _existing(source)).is_file():
        source = _of_text(path.read_text(encoding="utf-8", errors="replace"))
    if isinstance(source, dict) and "log_history" in source:
        return _of_source(source["log_history"]) | {"config": {"max_steps": source.get("max_steps") or 0}}
    if isinstance(source, str | Path):
        return _of_folder(Path(source).expanduser())
    if isinstance(source, Run):
        return of_run(source)
    if isinstance(source, Trainer):
        config = describe_config(source.args) | {"max_steps": source.state.max_steps}
        sets = {"train_pairs": source.train_dataset, "test_pairs": source.eval_dataset}
        sizes = {name: len(rows) for name, rows in sets.items() if hasattr(rows, "column_names")}
        return {"history": source.state.log_history, "config": config} | sizes
    rows = source if isinstance(source, list) else [None]
    if not all(isinstance(row, dict) and all(isinstance(key, str) for key in row) for row in rows):
        raise unreadable("not_a_history")
    return {"history": source}


def _readable(known: dict[str, Any]) -> dict[str, Any]:
    """The same, or UserError: rows that DPO does not log, and what is no number or count where one must be."""
    for place, row in enumerate(known["history"], 1):
        for key, value in row.items():
            if other := OTHERS.get(key.removeprefix("eval_")):
                raise unreadable("not_dpo", key=key, other=other)
            if key.endswith(("loss", "step", "epoch", "grad_norm", "learning_rate")) or "/" in key:
                number = _number(value, f"{key} in row {place}")
                if key.endswith("rewards/accuracies") and (number or 0) > 1:
                    raise unreadable("no_share", name=f"{key} in row {place}", value=value)
    for name in ("train_pairs", "test_pairs"):
        if not isinstance(known.get(name, 0), int) or known.get(name, 0) < 0:
            raise unreadable("no_count", name=name, value=known[name])
    config = known.get("config", {})
    numbers = {name: _number(config[name], f"{name} in config") for name in NUMBERS if name in config}
    return known | {"config": config | numbers}


def _number(value: Any, name: str) -> float | None:
    """As text too, as YAML reads 5e-6 and TRL prints values. UserError says where another thing is."""
    try:
        return float(value) if isinstance(value, str) else value if value is None else value + 0
    except (TypeError, ValueError) as error:
        raise unreadable("no_number", name=name, value=value) from error


def diagnose(
    source: Run | str | Path | Trainer | list[dict],
    *,
    config: TrainingArguments | dict[str, Any] | None = None,
    train_pairs: int | None = None,
    test_pairs: int | None = None,
    report: Report | None = None,
) -> Diagnosis:
    """What is wrong with a training run, from its history and data report alone.

    Args:
        source: a Run or its folder, also of one that ran out of memory; a trainer; its `state.log_history`, also as
            text or in a file (JSON, or the lines that it prints); or TRL's output or checkpoint folder.
        config: the DPOConfig, or a dict with its `beta`, `loss_type`, `learning_rate`, ..., where the source has none.
        train_pairs, test_pairs: how many pairs, where the source does not say. A `report` says how many to train on.
            Of several evaluation sets each is judged, with so many pairs.
        report: of `check_pairs` for the training pairs.

    What stays unknown is named as not judged, never assumed.

    Raises:
        UserError: no such folder, an unfinished run, no history, or one of another method than DPO.
    """
    known: dict[str, Any] = {} if report is None else {"train_pairs": len(report.pairs)}
    known |= _of_source(source)
    known |= {} if report is None else {"longest": report.longest}
    if not isinstance(config, TrainingArguments | dict | None):
        raise unreadable("no_config", kind=type(config).__name__)
    settings = describe_config(config) if isinstance(config, TrainingArguments) else config or {}
    findings = {one.code: one.count for one in report.findings} if report is not None else None
    given = {"train_pairs": train_pairs, "test_pairs": test_pairs, "findings": findings}
    known |= {name: value for name, value in given.items() if value is not None}
    return _of_sets(_readable(known | {"config": settings | known.get("config", {})}))


def _of_sets(known: dict[str, Any]) -> Diagnosis:
    """By each evaluation set. What several show is said once, with the numbers of the first that shows it."""
    sets = {prefix: measure(known, prefix) for prefix in _held_out_sets(known["history"])}
    findings = []
    for (code, note), shown in _named(sets).items():
        one = _symptom(code, note, sets[shown[0]])
        names = ", ".join(prefix.removeprefix("eval_").removesuffix("_") for prefix in shown)
        findings.append(replace(one, evidence=f"by {names}: {one.evidence}") if sets.keys() - {"eval_"} else one)
    return Diagnosis(findings, list(dict.fromkeys(text for f in sets.values() for text in _unseen(f))))
