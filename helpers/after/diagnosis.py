"""Diagnosis of a training run: the symptom by name, with its numbers, its likely causes in order, and the cure.

It reads what a run folder holds (history, metrics, info) and loads no model. `measure` turns that into a few numbers,
`RULES` compares them with the limits of symptoms.yaml, which also says what is behind each symptom.
"""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.run.folder import Run, RunInfo, Status, read_info
from helpers.run.metrics import wilson_interval

ENOUGH_PAIRS = 30  # held out; below, the interval of an accuracy is wider than 0.34 and tells little from chance
# At which value a number becomes a symptom, and the catalogue by code: what is seen, evidence, causes with their cures,
# the test that decides between them.
LIMITS, SYMPTOMS = yaml.safe_load_all(Path(__file__).with_name("symptoms.yaml").read_text("utf-8"))


@dataclass(frozen=True)
class Symptom:
    """One thing that is wrong with a run; `causes` are pairs (cause, its cure), the likeliest first."""

    code: str
    what: str
    evidence: str
    causes: tuple[tuple[str, str], ...]
    test: str

    @property
    def decides(self) -> str:
        """What `test` is for."""
        return "The history cannot decide between these. A test:" if len(self.causes) > 1 else "To make sure:"


class Diagnosis:
    """The symptoms of a run. It prints as text, and as escaped HTML in a notebook.

    `findings`: what hides others first, their `codes` in the same order. `unseen`: what this run's history could not
    show, and what would.
    """

    def __init__(self, findings: list[Symptom], unseen: list[str]):
        self.findings, self.unseen = findings, unseen
        self.codes, count = [finding.code for finding in findings], len(findings)
        self._summary = f"{count} symptom{'s' * (count > 1)} found." if count else "No symptom found."

    def __str__(self) -> str:
        lines = [self._summary]
        for finding in self.findings:
            lines += ["", f"{finding.code}: {finding.what}", f"  evidence: {finding.evidence}"]
            lines += [f"  cause {place}: {why}. Cure: {cure}." for place, (why, cure) in enumerate(finding.causes, 1)]
            lines += [f"  {finding.decides} {finding.test}"]
        return "\n".join(lines + [f"Not judged: {text}" for text in self.unseen])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        e = html.escape
        parts = [f"<p>{self._summary}</p>"]
        for finding in self.findings:
            causes = "".join(f"<li>{e(why)}. <b>Cure:</b> {e(cure)}.</li>" for why, cure in finding.causes)
            parts.append(
                f"<p><code>{e(finding.code)}</code> <b>{e(finding.what)}</b><br>{e(finding.evidence)}</p>"
                f"<ol>{causes}</ol><p>{e(finding.decides)} {e(finding.test)}</p>"
            )
        return "".join(parts + [f"<p>Not judged: {e(text)}</p>" for text in self.unseen])


class _Numbers(dict):
    """One that was not measured is NaN: every comparison with it is false, so it is never a sign."""

    def __missing__(self, name: str) -> float:
        return math.nan


def _mean(rows: list[dict], name: str) -> float:
    """Text such as "nan" is read as a number."""
    return sum(float(row[name]) for row in rows) / len(rows)


def measure(history: list[dict], info: RunInfo) -> dict[str, Any]:
    """The numbers that a diagnosis is made from, of a run's `history` and `info`, with what words them.

    Log-ratios are means over pairs in nats: TRL's rewards divided by beta. "start" is step 1, whose loss is taken
    before its update; "end" is the last held-out evaluation, or for training a mean over the last half of its rows.
    """
    config, beta, cut = info.config, float(info.config["beta"]), info.data.findings.get("over_max_length", 0)
    train, held = ([row for row in history if name in row] for name in ("loss", "eval_loss"))
    curves = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
    values = [float(row[name]) for row in train + held for name in row if name.endswith(curves)]
    f = _Numbers(info.memory_gb)
    f |= {
        "status": info.status,
        "ln2": config["loss_type"] in ("sigmoid", ["sigmoid"]),  # whether the loss starts there and LIMITS fit it
        "train_pairs": info.train_pairs,
        "pairs": info.test_pairs,
        "max_length": config["max_length"],
        "micro_batch": config.get("per_device_train_batch_size"),
        "checkpointing": "on" if config.get("gradient_checkpointing") else "off",
        "findings_cut": cut,
        "cut": cut / max(info.train_pairs, 1),
        "not_numbers": sum(not math.isfinite(value) for value in values),
        "held_loss": "no held-out evaluation",
        "held_accuracy": "no held-out evaluation",
    }
    if train and train[0]["step"] <= 1:
        f["start_loss"] = float(train[0]["loss"])
        f["start_off"] = max(abs(float(train[0][f"rewards/{side}"]) / beta) for side in ("chosen", "rejected"))
    half = math.ceil(len(train) / 2)
    if train:
        f["loss_half"], f["loss_end"] = _mean(train[:half][-2:], "loss"), _mean(train[-half:], "loss")
        f["margin_end"] = _mean(train[-half:], "rewards/margins")
        f["gradient"] = max((float(row["grad_norm"]) for row in train if "grad_norm" in row), default=math.nan)
    if train or held:
        # Rounding moves one training batch as much as a run that does not learn; the mean of many it does not.
        rows, prefix = (held[-1:], "eval_") if held else (train[-half:], "")
        chosen, rejected = (_mean(rows, f"{prefix}rewards/{side}") / beta for side in ("chosen", "rejected"))
        f |= {"chosen_end": chosen, "rejected_end": rejected, "gap": chosen - rejected}
        f["moved"] = max(abs(chosen), abs(rejected))
        f["chosen_fall"] = chosen / (_mean(rows, f"{prefix}logps/chosen") - chosen)
    f["log_ratios"] = "log-ratios at the end {chosen_end:+.2f} (chosen) and {rejected_end:+.2f} (rejected) nats"
    if held:
        losses, accuracies = ([float(row[f"eval_{name}"]) for row in held] for name in ("loss", "rewards/accuracies"))
        best, f["held_loss_end"] = min(losses), losses[-1]
        f |= {"held_loss_best": best, "loss_rise": losses[-1] - best, "accuracy_best": max(accuracies)}
        f["accuracy_first"], f["accuracy_end"] = accuracies[0], accuracies[-1]
        if f["pairs"] and not math.isnan(f["accuracy_end"]):
            f["low"], f["high"] = wilson_interval(round(f["accuracy_end"] * f["pairs"]), f["pairs"])
        f["held_loss"] = "held-out loss {held_loss_best:.3f} at its best, {held_loss_end:.3f} at the end"
        f["held_accuracy"] = "held-out accuracy {accuracy_end:.2f} (95% interval {low:.2f} to {high:.2f})"
    f |= {name: f[name].format_map(f) for name in ("log_ratios", "held_loss", "held_accuracy")}
    return f


# code -> whether a run has the symptom, in the order in which symptoms are named.
RULES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "out_of_memory": lambda f: f["status"] == Status.OUT_OF_MEMORY,
    "nan": lambda f: f["not_numbers"] > 0,
    "wrong_reference": lambda f: f["start_off"] > LIMITS["start_off"],
    "diverged": lambda f: f["ln2"] and f["loss_end"] > LIMITS["loss_end"],
    "leak": lambda f: f["accuracy_first"] > LIMITS["accuracy_first"] and f["pairs"] >= ENOUGH_PAIRS,
    "below_half": lambda f: f["moved"] >= LIMITS["moved"] and f["high"] < 0.5 and f["accuracy_best"] < 0.5,
    "overfitting": lambda f: f["loss_rise"] > LIMITS["loss_rise"] and f["loss_end"] < f["held_loss_best"],
    "loss_zero": lambda f: f["ln2"] and f["loss_half"] < LIMITS["loss_half"],
    "chosen_falls": lambda f: f["chosen_fall"] > LIMITS["chosen_fall"] and f["chosen_end"] > f["rejected_end"],
    "not_moving": lambda f: f["moved"] < LIMITS["moved"],
    "never_ends": lambda f: f["cut"] > LIMITS["cut"],
    "no_preference": lambda f: (
        f["moved"] >= LIMITS["moved"]
        and f["low"] < 0.5 <= f["high"]
        and f["accuracy_end"] < LIMITS["accuracy_end"]
        and f["pairs"] >= ENOUGH_PAIRS
    ),
}


def _named(f: dict[str, Any]) -> list[str]:
    """Codes of the symptoms, without those that another one explains."""
    codes = [code for code, holds in RULES.items() if holds(f)]
    if codes and codes[0] in ("out_of_memory", "nan"):  # after these no other number means anything
        return codes[:1]
    for code in SYMPTOMS:
        if code in codes:
            codes = [other for other in codes if other not in SYMPTOMS[code].get("explains", ())]
    return codes


def _causes(code: str, f: dict[str, Any], info: RunInfo) -> tuple[tuple[str, str], ...]:
    """The catalogue's causes without those that the run's own numbers rule out, the likelier first."""
    surface = any(name in info.data.findings for name in ("length_leak", "feature_leak", "length_ratio"))
    ruled_out = {
        ("nan", 1): not info.config.get("fp16"),
        ("loss_zero", 1): f["accuracy_first"] <= LIMITS["accuracy_first"],
        ("not_moving", 0): f["gradient"] == 0,
        ("not_moving", 1): f["gradient"] > 0,
        ("out_of_memory", 0): f["micro_batch"] == 1,
        ("out_of_memory", 1): f["checkpointing"] == "on",
    }
    causes = [(why, cure) for n, (why, cure) in enumerate(SYMPTOMS[code]["causes"]) if not ruled_out.get((code, n))]
    if (code == "leak" and not surface) or (code == "loss_zero" and surface):
        causes.reverse()
    return tuple(causes)


def _unseen(f: dict[str, Any]) -> list[str]:
    """What this history could not show, and what would."""
    if f["status"] == Status.OUT_OF_MEMORY:
        return []
    unseen = []
    if "loss_end" not in f:
        unseen.append("anything about training: no step was logged. Set logging_steps below the number of steps.")
    elif "start_off" not in f:
        unseen.append("whether policy and reference were equal before training: pass logging_first_step=True.")
    if "accuracy_end" not in f:
        unseen.append("overfitting, leaks and low accuracy: no held-out evaluation. Set eval_steps below the steps.")
    elif f["pairs"] < ENOUGH_PAIRS:
        unseen.append(f"low accuracy: {f['pairs']} held-out pairs are too few to tell it from chance.")
    if not f["ln2"]:
        unseen.append("the height of the loss: its limits are for loss_type sigmoid.")
    return unseen


def diagnose(run: Run | str | Path) -> Diagnosis:
    """What is wrong with a training run, from its history and data report alone.

    Args:
        run: a Run, or a run folder; one that ran out of memory has no Run, but its folder can be diagnosed.

    Raises:
        UserError: no run folder, or an unfinished run.
    """
    if not isinstance(run, Run):
        folder, info = Path(run), read_info(Path(run))
        out_of_memory = info is not None and info.status == Status.OUT_OF_MEMORY
        run = Run(folder, info, [], {}, None) if out_of_memory else Run.load(folder)
    f = measure(run.history, run.info)
    findings = [
        Symptom(code, known["what"], known["evidence"].format_map(f), _causes(code, f, run.info), known["test"])
        for code, known in ((code, SYMPTOMS[code]) for code in _named(f))
    ]
    return Diagnosis(findings, _unseen(f))
